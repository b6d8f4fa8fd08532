"""Which way multiplies how many rows of x by a quantized weight on an NVIDIA GPU: a table, found by measuring.

The ways are kernels of ``kernels/cuda`` (``decode``, ``skinny``, ``wide``), and ``dequantize``: the weight is
dequantized and torch multiplies. The table is by architecture; one that is not in it takes the ways that need none of
Hopper's matrix instructions. Nothing is timed here. ``fewbits bench --tune`` times the ways for shapes of a weight on
the GPU at hand and keeps what it found in a file in the folder of compiled kernels: there a shape has steps of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.kernels.nvrtc import cache_folder

WAYS = ("decode", "skinny", "wide", "dequantize")
QUICKEST = "quickest"  # in a table: the one of these that takes the least time, about
MOST = 1 << 62
Steps = tuple[tuple[int, str], ...]  # up to so many rows of x: this way; ascending, to MOST

_HOPPER: dict[str, Steps] = {  # measured on an H200
    "4-bit": ((8, "decode"), (256, QUICKEST), (4096, "wide"), (MOST, "dequantize")),
    "int8": ((32, "decode"), (MOST, "wide")),
}
_OTHERS: dict[str, Steps] = {
    "4-bit": ((16, "decode"), (MOST, "dequantize")),
    "int8": ((48, "decode"), (MOST, "dequantize")),  # the weight is rather read several times than dequantized
}
TABLE: dict[tuple[int, int], dict[str, Steps]] = {(9, 0): _HOPPER}
# In 4 bits with more rows than these, "wide" pays only where its tiles of 128 by 256 fill that share of the processors'
# rounds (measured on an H200, eleven shapes, up to 4096 rows)
_ANY_TILES, _FILLED = 1024, 0.86
_forced: str | None = None
generation = 0  # changes whenever the answers of ways may


def ways(
    kind: str, n: int, k: int, rows: int, device: int, quickest: Callable[[int, int, int, int], str]
) -> tuple[str, ...]:
    """The ways to try, in this order, for so many rows of x and a weight [n, k].

    Args:
        kind: "4-bit" or "int8".
        device: the GPU's index.
        quickest: tells the way for ``rows``, ``n``, ``k`` and ``device`` where the table leaves it to that.
    """
    if _forced is not None:
        return (_forced,)
    for up_to, way in _steps(kind, n, k, device):
        if rows <= up_to:
            if way == QUICKEST:
                way = quickest(rows, n, k, device)
            elif way == "wide" and kind == "4-bit" and rows > _ANY_TILES and not _fills(kind, n, k, rows, device):
                way = "dequantize"
            if way == "dequantize":
                return (way,)
            # short blocks of quantization are served by few of the kernels
            return (way, "decode", "dequantize") if kind == "4-bit" and way != "decode" else (way, "dequantize")
    raise AssertionError("steps end with MOST")


def _fills(kind: str, n: int, k: int, rows: int, device: int) -> bool:
    """Whether tiles of so many rows fill the GPU; what was tuned for a shape has been measured with it."""
    if _key(kind, n, k) in _tuned(device):
        return True
    tiles, processors = -(-n // 128) * -(-rows // 256), _processors(device)
    return tiles >= _FILLED * processors * -(-tiles // processors)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@contextlib.contextmanager
def use_way(name: str) -> Iterator[None]:
    """Every product goes this way within a ``with`` block, or is left to the next backend."""
    global _forced, generation
    before, _forced, generation = _forced, name, generation + 1
    try:
        yield
    finally:
        _forced, generation = before, generation + 1


@functools.lru_cache(maxsize=4096)
def _steps(kind: str, n: int, k: int, device: int) -> Steps:
    found = _tuned(device).get(_key(kind, n, k))
    if found is not None:
        return found
    return TABLE.get(torch.cuda.get_device_capability(device), _OTHERS)[kind]


# ------------------------------------------------------------------------------------------------- what was tuned here


def _key(kind: str, n: int, k: int) -> str:
    return f"{kind} {n}x{k}"


def tuned_file(device: int) -> Path:
    """Where what was tuned for this model of GPU is kept."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache_folder() / f"ways-{name}.json"


@functools.cache
def _tuned(device: int) -> dict[str, Steps]:
    path = tuned_file(device)
    try:
        text = path.read_text()
    except OSError:
        return {}
    try:
        return {key: _checked(steps) for key, steps in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a table that fewbits bench --tune writes, and is left out ({error}): "
            "delete it, or tune again",
            FewbitsWarning,
            stacklevel=2,
        )
        return {}


def _checked(steps: Any) -> Steps:
    checked = tuple((MOST if up_to is None else int(up_to), str(way)) for up_to, way in steps)
    bounds = [up_to for up_to, _ in checked]
    if not checked or bounds != sorted(set(bounds)) or bounds[-1] != MOST or any(way not in WAYS for _, way in checked):
        raise ValueError(f"{steps} are not steps of rows, ascending, that end with null")
    return checked


def keep(device: int, found: dict[tuple[str, int, int], Steps]) -> Path:
    """Add steps by kind and shape to what is tuned, for this process and later ones; the file that was written.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = tuned_file(device)
    table = {**_tuned(device), **{_key(*key): _checked(steps) for key, steps in found.items()}}
    plain = {key: [[None if up_to == MOST else up_to, way] for up_to, way in steps] for key, steps in table.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".new")
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(steps)}" for key, steps in plain.items())
        whole.write_text(f"{{\n{lines}\n}}\n")
        whole.replace(path)
    except OSError as error:
        raise ConfigError(
            f"what was tuned cannot be written to {path}: {error}",
            hint="FEWBITS_CACHE names another folder",
        ) from error
    forget()
    return path


def forget() -> None:
    """Read what is tuned again when it is next asked for."""
    global generation
    generation += 1
    _tuned.cache_clear()
    _steps.cache_clear()
