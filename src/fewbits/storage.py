"""How each parameter is to be stored: the format it gets, or the dtype if it gets none, and the bytes that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbits.config import QuantizationConfig
from fewbits.errors import ConfigError
from fewbits.formats import QuantSpec, inner_shapes
from fewbits.modules import is_linear, stores_transposed
from fewbits.structure import check_patterns, matches, names_parameter, output_heads
from fewbits.tensor import QuantTensor


@dataclass(frozen=True)
class Storage:
    """How one parameter is stored.

    Attributes:
        spec: how it is quantized, or ``None``.
        dtype: what it is cast to if it is not quantized (``None``: left as it is); the logical dtype if it is.
    """

    spec: QuantSpec | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Owner:
    """A module and the name in it under which it holds a parameter."""

    module: nn.Module
    name: str
    path: str  # dotted, from the model


def owners_of(model: nn.Module) -> list[list[Owner]]:
    """The places of every parameter, those of a shared one together, in the order of registration."""
    groups: dict[int, list[Owner]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, p in module._parameters.items():
            if p is not None:
                path = f"{prefix}.{name}" if prefix else name
                groups.setdefault(id(p), []).append(Owner(module, name, path))
    return list(groups.values())


def choose_storage(model: nn.Module, config: QuantizationConfig, *, strict_patterns: bool = True) -> dict[str, Storage]:
    """Decide format and dtype for every parameter, shared ones once for all their names.

    Explicit overrides go first, then ``keep_in_fp32_modules``, then ``skip_modules`` (by default the output heads),
    then ``config.format`` for the weight of every linear layer.

    Args:
        model: on any device, meta included.
        config: what is wanted.
        strict_patterns: whether a pattern that names nothing is an error (not so for one from a checkpoint).

    Raises:
        ConfigError: a pattern that names nothing, or a parameter that the wanted format cannot hold.
    """
    groups = owners_of(model)
    paths = [owner.path for owners in groups for owner in owners]
    if strict_patterns:
        names = [n for n, _ in model.named_modules(remove_duplicate=False) if n] + paths
        check_patterns((name for name, _ in config.overrides), names, "overrides")
        check_patterns(config.keep_in_fp32_modules, names, "keep_in_fp32_modules")
        check_patterns(config.skip_modules or (), names, "skip_modules")
    skipped = config.skip_modules
    if skipped is None:
        skipped = tuple(output_heads(model)) if config.format is not None else ()

    def decide(owners: list[Owner]) -> Storage:
        p: Any = owners[0].module._parameters[owners[0].name]
        shape, floating = p.shape, p.is_floating_point()
        if isinstance(p, QuantTensor):  # nothing is quantized twice
            return Storage(p.spec, config.dtype or p.dtype)
        for pattern, format in config.overrides:
            named = [
                o for o in owners if names_parameter(o.path, pattern) or (matches(o.path, pattern) and _may_hold(o))
            ]
            if format is not None and named:
                if len(shape) < 2 or not floating:
                    raise ConfigError(
                        f"a parameter of shape {list(shape)} cannot be {format}",
                        parameter=owners[0].path,
                        expected="a floating-point parameter of two dimensions or more",
                    )
                return Storage(config.spec(format), config.dtype)
            if format is None and any(matches(o.path, pattern) for o in owners):
                return Storage(None, config.dtype)
        if any(matches(o.path, p) for p in config.keep_in_fp32_modules for o in owners):
            return Storage(None, torch.float32)
        if any(matches(o.path, p) for p in skipped for o in owners) or config.format is None:
            return Storage(None, config.dtype)
        linear = any(o.name == "weight" and is_linear(o.module) for o in owners)
        wanted = linear and floating and len(shape) == 2 and shape.numel() > 0
        return Storage(config.spec(config.format) if wanted else None, config.dtype)

    return {owner.path: placement for owners in groups for placement in [decide(owners)] for owner in owners}


def _may_hold(owner: Owner) -> bool:
    """Whether naming a module in ``overrides`` means this parameter of it: layers' weights, not norms or biases."""
    return owner.name == "weight" and (is_linear(owner.module) or isinstance(owner.module, nn.Embedding))


def inner_layout(owner: Owner, storage: Storage) -> dict[str, tuple[torch.dtype, list[int]]]:
    """dtype and shape of each tensor that a parameter is stored as; of one that is not quantized the name is ""."""
    p = owner.module._parameters[owner.name]
    assert p is not None
    if storage.spec is not None:
        shape = p.shape[::-1] if stores_transposed(owner.module, owner.name) else p.shape
        return inner_shapes(storage.spec, shape)
    dtype = storage.dtype if storage.dtype is not None and p.is_floating_point() else p.dtype
    return {"": (dtype, list(p.shape))}


def stored_bytes(owner: Owner, storage: Storage) -> int:
    """Bytes that a parameter takes once it is stored so, scales included."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in inner_layout(owner, storage).values())
