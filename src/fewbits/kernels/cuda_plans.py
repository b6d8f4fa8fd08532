"""The CUDA kernels as they are run: the variant for a product's shape, its blocks, and what it needs beside tensors.

A variant is compiled when it is first asked for, and asked for only where it serves; what does not serve is ``None``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fewbits.kernels.nvrtc as nvrtc
from fewbits.errors import FewbitsWarning
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.kernels.constants import constant
from fewbits.kernels.nvrtc import CudaError, Kernel

FEW_ROWS = 16  # of x, that decode.cu takes at most
MOST_OUTLIERS = 16  # columns of x that have any, up to which the others are multiplied in 8 bits (measured)
WIDE_ROWS = 128  # of the weight, in a tile of wide.cu
_WARPS = 16  # of decode.cu
_CHUNK = 64  # bytes of a row that a warp takes at a time
_TABLE = 65536  # bytes of its table of pairs
_DECODE_ARGUMENTS = "9Pq4i"
_SKINNY_ARGUMENTS = "128s128s9Pq4i2P"
_WIDE_THREADS = 384
# by bits of the weight and rows of x in a tile: microseconds of one of its chunks, and of tiles that blocks share
# (fitted to 80 times of each on an H200; a block's beginning and end are in none)
_TILE_COSTS = {
    4: {256: (1.52, 15.0), 128: (1.02, 8.0)},
    8: {256: (0.88, 15.0), 128: (0.46, 10.7), 64: (0.32, 8.0)},
}


@functools.cache  # of a failure as well: it is tried and told once
def made(
    file: str, defines: tuple[tuple[str, int], ...], device: int, arguments: str, threads: int, shared: int
) -> Kernel | None:
    try:
        return nvrtc.kernel(file, defines, device, arguments, threads, shared)
    except CudaError as error:
        warnings.warn(f"a kernel cannot be made, a slower one runs instead: {error}", FewbitsWarning, stacklevel=2)
        return None


# ------------------------------------------------------------------------------------------------- tables


@functools.lru_cache(maxsize=64)
def pairs(format: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """int32 [256]: the two values of a packed byte in ``dtype``, the high nibble's in the low half."""
    values = codebook(format, torch.device("cpu")).to(dtype)
    byte = torch.arange(256)
    return constant(torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int32).view(-1), device)


# With it each value of a format is nearly one of fp16: for fp4 exactly, for nf4 off by 3.2e-5 in the mean, the least of
# 1.3 million factors from 1/2 to 1.
_HALF_FACTORS = {"nf4": 0.838844921875, "fp4": 0.75}


@functools.lru_cache(maxsize=64)
def values(format: str, device: torch.device) -> Tensor:
    """fp32 [18]: the values of the codes, the factor above, and one over it."""
    factor = _HALF_FACTORS[format]
    values = codebook(format, torch.device("cpu"))
    return constant(torch.cat([values, torch.tensor([factor, 1 / factor])]), device)


@functools.cache
def limits(device: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin - 2048  # less what is static


@functools.cache
def cache_bytes(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    size: int = properties.L2_cache_size
    return size


@functools.lru_cache(maxsize=8)
def buckets(device: torch.device) -> Tensor:
    """fp32 [33, 2] for nf4: the bound that rounds to each of -16 … 16 sixteenths, and (as bits) the code below it."""
    bounds = decision_rule("nf4", torch.device("cpu"))[0]
    buckets = torch.full((33, 2), torch.inf)
    buckets[:, 1] = torch.tensor(
        [int((bounds < (i - 16.5) / 16).sum()) for i in range(33)], dtype=torch.int32
    ).view(torch.float32)  # fmt: skip
    at = (bounds * 16).round().long() + 16
    assert len(at.unique()) == len(at), "no two bounds are in one bucket"
    buckets[at, 0] = bounds
    return constant(buckets, device)


# ------------------------------------------------------------------------------------------------- dequantizing


@functools.lru_cache(maxsize=256)
def dequantizer(dtype: torch.dtype, block_size: int, nested: bool, device: int) -> Kernel | None:
    defines = (
        ("OUT", dtype.itemsize), ("BF16", int(dtype is torch.bfloat16)), ("FORMAT_BLOCK", block_size),
        ("NESTED", int(nested)),
    )  # fmt: skip
    return made("dequantize_4bit.cu", defines, device, "7P2q", 256, 0)


# ------------------------------------------------------------------------------------------------- few rows


@functools.lru_cache(maxsize=1024)
def decode(
    n: int, k: int, tiles: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> tuple[Kernel, int] | None:
    """The kernel for up to ``8 * tiles`` rows of x and how many blocks run it; None where it does not serve.

    ``block_size``: of 4 bits; for 8 any from 64 on.
    """
    processors, room = limits(device)
    if k % (max(block_size, 64) if bits == 4 else 16):
        return None
    row_bytes = k * bits // 8
    chunks = -(-row_bytes // (_CHUNK * _WARPS))
    columns = _CHUNK * 8 // bits
    best: tuple[float, tuple[int, int, int, int]] | None = None
    for row_tiles in (2, 1):
        rows, slots = 16 * row_tiles, chunks * row_tiles
        scales = 2 * _WARPS * rows * max(columns // block_size, 1) * 4 if bits == 4 else 0
        partials = 2 * _WARPS * 8 * tiles * (rows + 4) * 4
        rounds = -(-n // (rows * processors))
        # slots of the ring (measured on an H200): four pay where a tile's are a multiple, constants to the compiler
        stages = 4 if tiles == 1 and slots % 4 == 0 and chunks <= 4 and rounds > 1 else 3
        stages = min(stages, slots + 1)
        shared = (_TABLE if bits == 4 else 0) + _WARPS * stages * 1024 + scales + partials
        if shared > room:
            continue
        cost = rounds * (row_tiles + 1)  # measured
        if best is None or cost < best[0]:
            best = cost, (row_tiles, stages, shared, rounds)
    if best is None:
        return None
    row_tiles, stages, shared, rounds = best[1]
    early = rounds == 1 and tiles == 1 and (bits == 8 or chunks <= 4)  # measured on an H200
    whole = n % (16 * row_tiles) == 0 and row_bytes % (_CHUNK * _WARPS) == 0
    defines = (
        ("BF16", int(bf16)), ("BITS", bits), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)),
        ("COLUMN_TILES", tiles), ("ROW_TILES", row_tiles), ("CHUNKS", chunks), ("STAGES", stages),
        ("WHOLE", int(whole)), ("X_EARLY", int(early)),
    )  # fmt: skip
    kernel = made("decode.cu", defines, device, _DECODE_ARGUMENTS, 32 * _WARPS, shared)
    return None if kernel is None else (kernel, min(-(-n // (16 * row_tiles)), processors))


# ------------------------------------------------------------------------------------------------- some tens of rows


class Skinny(NamedTuple):
    """A kernel of skinny_4bit.cu: its grid is ``blocks`` by tiles of ``tile_m`` rows of x."""

    kernel: Kernel
    tile_m: int
    blocks: int
    tiles: int  # of the weight, each of ``rows`` rows
    rows: int


@functools.lru_cache(maxsize=1024)
def skinny(n: int, k: int, tile_m: int, bf16: bool, block_size: int, nested: bool, device: int) -> Skinny | None:
    """The kernel for tiles of ``tile_m`` rows of x; None where it does not serve."""
    processors, room = limits(device)
    if k % max(block_size, 64) or block_size < 64:
        return None
    if torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.has_tensor_maps():
        return None  # its matrix instructions are Hopper's alone
    # measured on an H100
    warpgroups = (4 if tile_m == 32 else 3) if n > 8192 else 2
    rows = 64 * warpgroups
    slot = tile_m * 256 + rows * 64
    stages = min((room - _TABLE - 256) // slot, 8)
    if stages < 2:
        return None
    shared = _TABLE + stages * slot + 256
    defines = (
        ("BF16", int(bf16)), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)), ("TILE_M", tile_m),
        ("WARPGROUPS", warpgroups), ("STAGES", stages),
    )  # fmt: skip
    kernel = made("skinny_4bit.cu", defines, device, _SKINNY_ARGUMENTS, 128 * (warpgroups + 1), shared)
    tiles = -(-n // rows)
    return None if kernel is None else Skinny(kernel, tile_m, _blocks(processors, tiles, k), tiles, rows)


# ------------------------------------------------------------------------------------------------- many rows


class Wide(NamedTuple):
    """A kernel of wide.cu, run by ``blocks``."""

    kernel: Kernel
    tile_m: int
    blocks: int
    tiles: int

    def memory(self, device: torch.device, zeros: int = 0) -> tuple[Tensor, Tensor]:
        """Where blocks leave the sums of parts of tiles, and count them: at least so many zeros."""
        sums = torch.empty(2 * self.blocks * WIDE_ROWS * self.tile_m, dtype=torch.int32, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        return sums, counters_for(device, stream, max(self.tiles, zeros))


def _wide_cost(rows: int, n: int, k: int, bits: int, tile_m: int, processors: int) -> float:
    """Microseconds, about, with tiles of so many rows of x."""
    tiles, chunk_us, shared_us = -(-rows // tile_m) * -(-n // WIDE_ROWS), *_TILE_COSTS[bits][tile_m]
    blocks = _blocks(processors, tiles, k)
    return tiles * -(-k // 128) / blocks * chunk_us + (shared_us if tiles % blocks else 0.0)


@functools.lru_cache(maxsize=1024)
def wide(
    rows: int, n: int, k: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> Wide | None:  # fmt: skip
    """The kernel for ``rows`` of x; None where it does not serve. ``block_size``, ``nested``: of 4 bits."""
    processors, room = limits(device)
    if torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.has_tensor_maps():
        return None  # its matrix instructions are Hopper's alone
    if block_size < 64 or k % (max(block_size, 64) if bits == 4 else 16):
        return None
    costs = _TILE_COSTS[bits]
    sizes = sorted(costs) if rows <= 1024 else [max(costs)]  # with many rows the least of the weight is read again
    tile_m = min(sizes, key=lambda size: _wide_cost(rows, n, k, bits, size, processors))
    slot = tile_m * 128 + WIDE_ROWS * (32 + 4 if bits == 4 else 128)
    fixed = _TABLE + 1024 if bits == 4 else tile_m * 128
    stages = min((room - fixed - 1024) // slot, 8)
    if stages < 3:
        return None
    defines: tuple[tuple[str, int], ...] = (
        ("BF16", int(bf16)), ("BITS", bits), ("TILE_M", tile_m), ("STAGES", stages)
    )  # fmt: skip
    if bits == 4:
        defines = *defines, ("FORMAT_BLOCK", block_size), ("NESTED", int(nested))
    else:
        defines = *defines, ("MOST_OUTLIERS", MOST_OUTLIERS)
    arguments = "128s128s9Pq4i2P" if bits == 4 else "128s128s128s9Pq4i2P3Pq"
    kernel = made("wide.cu", defines, device, arguments, _WIDE_THREADS, fixed + stages * slot + 1024)
    tiles = -(-rows // tile_m) * -(-n // WIDE_ROWS)
    return None if kernel is None else Wide(kernel, tile_m, _blocks(processors, tiles, k), tiles)


def _blocks(processors: int, tiles: int, k: int) -> int:
    """How many share the chunks of all tiles, of 128 columns each."""
    # A multiple of the tiles if that leaves few processors idle: no block then has a part of two tiles. Or, where there
    # are more tiles than processors, a number that they are a multiple of: no tile then is shared.
    rounds = -(-tiles // processors)
    blocks = processors // tiles * tiles or (tiles // rounds if tiles % rounds == 0 else 0)
    blocks = blocks if blocks >= 0.9 * processors else processors
    return min(blocks, tiles * -(-k // 128))


_counters: dict[tuple[int, int, int], Tensor] = {}  # by device, stream and capture


def counters_for(device: torch.device, stream: int, count: int) -> Tensor:
    """int32 zeros, which the kernels leave as zeros: only launches that follow each other may share them.

    A graph that is captured has its own: it may run beside others later.
    """
    key = device.index, stream, nvrtc.capture_id(stream)
    found = _counters.get(key)
    if found is None or found.numel() < count:
        zeros = torch.zeros(max(1 << (count - 1).bit_length(), 1024), dtype=torch.int32)
        found = _counters[key] = constant(zeros, device)
    return found
