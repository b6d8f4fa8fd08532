"""Putting finished tensors into modules: what loading a model and quantizing one in memory share."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import ConfigError, FewbitsError
from fewbits.modules import install
from fewbits.storage import Owner, Storage
from fewbits.tensor import QuantTensor

_HELD = 32 << 20  # bytes of tensors worked through before freed memory goes back to the system


def limit_of(storage: Storage, dtype: torch.dtype) -> float:
    """The largest magnitude that a parameter of this dtype may have, stored so."""
    if storage.spec is not None:
        return torch.finfo(torch.float16 if storage.spec.format == "int8" else torch.float32).max
    return torch.finfo(storage.dtype or dtype).max


def check_values(value: Tensor, storage: Storage, path: str, error: type[FewbitsError] = ConfigError) -> None:
    """Raise ``error``, which names the parameter, for a value that is not finite or beyond what it is to become."""
    if not value.is_floating_point() or value.numel() == 0:
        return
    limit = limit_of(storage, value.dtype)
    low, high = torch.stack(torch.aminmax(value)).tolist()  # NaN if any value is; and no copy of the tensor is made
    if not (-limit <= low and high <= limit):
        into = str(storage.spec) if storage.spec is not None else str(storage.dtype or value.dtype)
        finite = math.isfinite(low) and math.isfinite(high)
        raise error(
            f"the parameter holds values from {low:g} to {high:g}, which {into} cannot hold"
            if finite
            else "the parameter holds values that are NaN or infinite",
            parameter=path,
            expected=f"finite values up to ±{limit:g}",
            hint="repair the checkpoint, or choose a format or dtype that holds them (skip_modules, dtype)",
        )


def put(owners: Sequence[Owner], value: Tensor, requires_grad: bool) -> nn.Parameter:
    """Make one parameter of ``value`` and give it to all its owners; a quantized one becomes it itself, frozen."""
    quantized = isinstance(value, QuantTensor)
    if quantized:
        value._is_param = True  # nn.Parameter's own mark; it would first make a copy that shares the inner tensors
        parameter: nn.Parameter = value  # type: ignore[assignment]  # an instance, by the mark
    else:
        parameter = nn.Parameter(value, requires_grad=requires_grad and value.is_floating_point())
    for owner in owners:
        if quantized:
            install(owner.module, owner.name, parameter)
        else:
            owner.module._parameters[owner.name] = parameter
    return parameter


class _Silent:
    """A progress bar that is not shown. tqdm's own would still start a thread and take a lock that a fork may hold."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, n: float) -> None:
        """Nothing."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Nothing."""


def bar(total: int, progress: bool | None, what: str) -> Any:
    """A context manager: a progress bar of bytes on stderr, by default only where that is a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        return _Silent()
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=what)


class Heap:
    """Gives memory that was freed back to the system now and then, where the C library (glibc) would keep it.

    Tensors of many sizes come and go between those that stay, and glibc returns only what lies at the heap's end:
    loading a model can otherwise peak at nearly twice its size.
    """

    def __init__(self) -> None:
        self._passed = 0
        try:
            self._trim: Any = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError, TypeError):  # another C library
            self._trim = None

    def passed(self, nbytes: int) -> None:
        """Say that ``nbytes`` of tensors have been worked through."""
        self._passed += nbytes
        if self._passed >= _HELD:
            self.trim()

    def trim(self) -> None:
        """Give back what is free."""
        self._passed = 0
        if self._trim is not None:
            self._trim(0)
