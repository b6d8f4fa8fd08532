"""The CUDA kernels as they are run: the variant for a product's shape, its blocks, and what it needs beside tensors.

A variant is compiled when it is first asked for, and asked for only where it serves; what does not serve is ``None``.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fewbits.kernels.nvrtc as nvrtc
from fewbits.errors import FewbitsWarning
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.kernels.constants import constant
from fewbits.kernels.nvrtc import CudaError, Kernel

FEW_ROWS = 32  # of x, that decode.cu takes at most
MOST_OUTLIERS = 16  # columns of x that have any, up to which the others are multiplied in 8 bits (measured)
_WARPS = 16  # of decode.cu
_CHUNK = 64  # bytes of a row that a warp takes at a time
_TABLE = 65536  # bytes of its table of pairs
_DECODE_ARGUMENTS = "9Pq4i"
_SKINNY_ARGUMENTS = "128s128s9Pq4i2P"


class _Cost(NamedTuple):
    """Microseconds, fitted to some hundred times on an H200, which they give within 2 to 8 % in the median.

    What a kernel takes whatever its blocks are is in none.
    """

    chunk: float  # of 128 columns of a tile
    shared: float  # more, where blocks that share a tile add up sums in global memory
    clusters: dict[int, float]  # more, where so many blocks of a cluster do, or groups of a block


class _DecodeCost(NamedTuple):
    """The same of a product by decode.cu."""

    alone: float
    slot: float  # of 16 rows by a chunk of each warp
    chunk: float  # of each warp, whatever the rows of a tile
    tile: float  # where the sums of all of a block's have no place of their own
    cluster: float  # where a tile is shared
    ragged: float = 0.0  # of a slot, where rows are not whole chunks of all warps


# of decode.cu by bits of the weight and tiles of 8 rows of x
_DECODE_COSTS = {
    4: {
        1: _DecodeCost(1.35, 0.536, 0.231, 0.0, 0.22), 2: _DecodeCost(1.42, 0.790, 0.304, 0.0, 0.09, 0.107),
        3: _DecodeCost(1.18, 1.039, 0.656, 0.24, 0.43), 4: _DecodeCost(0.0, 1.690, 0.960, 0.38, 0.58, 0.086),
    },
    8: {
        1: _DecodeCost(1.02, 0.456, 0.050, 0.0, 0.11), 2: _DecodeCost(1.36, 0.510, 0.090, 0.07, 0.31),
        3: _DecodeCost(1.62, 0.509, 0.229, 0.12, 0.51), 4: _DecodeCost(2.22, 0.550, 0.286, 0.47, 0.33),
    },
}  # fmt: skip
_MANY_ROWS = 2.5  # microseconds more of decode.cu with tiles of more than 48 rows
# of skinny_4bit.cu by rows of x in a tile, warpgroups and groups of these
_SKINNY_COSTS = {
    32: {
        (2, 1): _Cost(0.51, 2.2, {2: -1.0, 4: -0.3}), (3, 1): _Cost(0.63, 4.3, {2: 1.3, 4: 0.7}),
        (4, 1): _Cost(0.76, 5.6, {2: 2.5, 4: 1.6}), (2, 2): _Cost(0.53, 0.0, {1: -2.0, 2: -0.5}),
        (4, 2): _Cost(1.12, 0.0, {1: -4.8, 2: -1.7}), (4, 4): _Cost(1.28, 0.0, {1: -3.7}),
    },
    64: {
        (2, 1): _Cost(0.59, 4.5, {2: 1.1, 4: 2.5}), (3, 1): _Cost(0.81, 6.7, {2: 1.8, 4: 2.0, 8: 2.4}),
        (2, 2): _Cost(0.64, 0.0, {1: -0.6, 2: 0.5}),
    },
}  # fmt: skip
_SKINNY_ALONE = {32: 4.0, 64: 3.3}
# of wide.cu by bits of the weight, rows of x and warpgroups
_WIDE_COSTS = {
    4: {
        (256, 2): _Cost(1.52, 15.1, {2: 2.0, 4: 5.5}), (128, 2): _Cost(0.96, 7.4, {2: 2.0, 4: 3.4}),
        (128, 3): _Cost(1.34, 13.3, {2: 3.3, 4: 5.7}),
    },
    8: {
        (256, 2): _Cost(0.79, 18.0, {2: 3.1, 4: 4.5}), (128, 2): _Cost(0.42, 14.0, {2: 3.1, 4: 4.5}),
        (64, 2): _Cost(0.29, 12.0, {2: 3.1}),
    },
}  # fmt: skip


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
def most_clusters(blocks: int, device: int) -> int:
    """How many clusters of so many blocks run at once, where each block takes a multiprocessor: 0 on older GPUs."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return 0
    try:
        return nvrtc.most_clusters(blocks, device)
    except CudaError:  # slower without
        return 0


@functools.cache
def limits(device: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin - 2048  # less what is static


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


class DecodeShape(NamedTuple):
    """How blocks of decode.cu share a weight: tiles of 16 ``row_tiles`` rows, each by ``split`` of them."""

    row_tiles: int
    split: int


class _Decode(NamedTuple):
    """What follows from a shape of blocks."""

    blocks: int
    rounds: int  # tiles of the block that has most
    chunks: int  # of a warp, for each row
    stages: int
    shared: int
    whole: bool  # rows are whole chunks of all warps, and the tiles have all their rows
    kept: int  # tiles whose sums have a place of their own: all of a block's, or 0

    @property
    def single(self) -> bool:
        return self.rounds == 1


def decode_plan(
    shape: DecodeShape, n: int, k: int, rows: int, bits: int, block_size: int, device: int
) -> _Decode | None:
    """None where it does not fit a block's memory, or not all blocks run at once that have to."""
    processors, room = limits(device)
    row_tiles, split = shape
    tile_rows, tiles = 16 * row_tiles, -(-rows // 8)
    row_bytes = k * bits // 8
    chunks = -(-row_bytes // (_CHUNK * _WARPS * split))
    columns = _CHUNK * 8 // bits
    weight_tiles = -(-n // tile_rows)
    rounds = -(-weight_tiles * split // processors)
    if split > 1 and (rounds > 1 or weight_tiles > most_clusters(split, device)):
        return None
    # slots of a warp's ring: measured on an H200
    stages = 4 if bits == 8 and not (tiles == 4 and rounds == 1 and chunks > 4) else 3
    stages = min(stages, chunks * row_tiles + 1)
    scales = 4 * _WARPS * (tile_rows + 1) * max(columns // block_size, 1) * 4 if bits == 4 else 0
    shared = (_TABLE if bits == 4 else 0) + _WARPS * stages * 1024 + scales

    def sums(rows_of_x: int, tiles: int) -> int:
        return _WARPS * rows_of_x * (tile_rows * tiles + 4) * 4

    kept = rounds
    if rounds == 1:
        shared = max(shared, sums(8 * tiles, 1)) + (8 * tiles * tile_rows + 32 * split) * 4
    elif shared + sums(8 * tiles, rounds) <= room:
        shared += sums(8 * tiles, rounds)
    elif rows <= 4 and shared + sums(4, rounds) <= room:
        shared += sums(4, rounds)
    else:
        kept = 0
        shared += 2 * sums(8 * tiles, 1)
    # of two kernels in a row no blocks are to share a processor: others would have none
    shared = max(shared, room // 2 + 1024)
    if shared > room:
        return None
    blocks = weight_tiles * split if rounds == 1 else min(weight_tiles, processors)
    whole = n % tile_rows == 0 and row_bytes % (_CHUNK * _WARPS * split) == 0
    return _Decode(blocks, rounds, chunks, stages, shared, whole, kept)


@functools.lru_cache(maxsize=4096)
def decode_variant(
    shape: DecodeShape, n: int, k: int, rows: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> tuple[Kernel, int] | None:
    """The kernel for blocks of this shape, and how many run it."""
    plan = decode_plan(shape, n, k, rows, bits, block_size, device)
    if plan is None:
        return None
    tiles, row_bytes = -(-rows // 8), k * bits // 8
    early = plan.single and tiles == 1 and (bits == 8 or plan.chunks <= 4)  # measured on an H200
    defines = (
        ("BF16", int(bf16)), ("BITS", bits), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)),
        ("COLUMN_TILES", tiles), ("ROW_TILES", shape.row_tiles), ("CHUNKS", plan.chunks), ("STAGES", plan.stages),
        ("WHOLE", int(plan.whole)), ("WHOLE_CHUNKS", int(row_bytes % _CHUNK == 0)), ("TILES", plan.kept),
        ("SPLIT", shape.split), ("X_EARLY", int(early)),
    )  # fmt: skip
    kernel = made("decode.cu", defines, device, _DECODE_ARGUMENTS, 32 * _WARPS, plan.shared)
    return None if kernel is None else (kernel, plan.blocks)


@functools.lru_cache(maxsize=4096)
def decode(
    n: int, k: int, rows: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> tuple[Kernel, int] | None:
    """The kernel for so many rows of x and how many blocks run it; None where it does not serve.

    ``block_size``: of 4 bits; for 8 any from 64 on.
    """
    if rows > FEW_ROWS or k % (max(block_size, 64) if bits == 4 else 16):
        return None
    shape = _decode_shape(n, k, rows, bits, block_size, device)
    return shape and decode_variant(shape, n, k, rows, bf16, bits, block_size, nested, device)


# that were faster than others on some shape
_DECODE_SHAPES = (
    DecodeShape(2, 1), DecodeShape(1, 1), DecodeShape(3, 1), DecodeShape(7, 1), DecodeShape(2, 2), DecodeShape(3, 2)
)  # fmt: skip


def _decode_shape(n: int, k: int, rows: int, bits: int, block_size: int, device: int) -> DecodeShape | None:
    found = _least_decode(n, k, rows, bits, block_size, device)
    return found and found[1]


def _least_decode(
    n: int, k: int, rows: int, bits: int, block_size: int, device: int
) -> tuple[float, DecodeShape] | None:
    """The quickest shape of those that fit, and microseconds, about."""
    best: tuple[float, DecodeShape] | None = None
    costs = _DECODE_COSTS[bits][-(-rows // 8)]
    for shape in _DECODE_SHAPES:
        row_tiles, split = shape
        if row_tiles > 3 and (bits == 8 or rows > 8):
            continue  # registers
        plan = decode_plan(shape, n, k, rows, bits, block_size, device)
        if plan is None or (row_tiles > 2 and not plan.single):
            continue
        slot = costs.slot if plan.whole else costs.slot + costs.ragged
        us = costs.alone + plan.rounds * plan.chunks * (row_tiles * slot + costs.chunk)
        us += plan.rounds * costs.tile * (plan.kept == 0) + costs.cluster * (split > 1) + _MANY_ROWS * (row_tiles > 3)
        if best is None or us < best[0]:
            best = us, shape
    return best


# ------------------------------------------------------------------------------------------------- some tens of rows


class Skinny(NamedTuple):
    """A kernel of skinny_4bit.cu: its grid is ``blocks`` by tiles of ``tile_m`` rows of x."""

    kernel: Kernel
    tile_m: int
    blocks: int
    tiles: int  # of the weight, each of ``rows`` rows
    rows: int
    parts: int  # of tiles, whose sums blocks leave in memory, for each tile of x: none where clusters add them up


class SkinnyShape(NamedTuple):
    """How blocks of skinny_4bit.cu share a weight: tiles of 64 rows for each warpgroup of a group, each tile by
    ``split`` of them and the ``groups`` of their warpgroups, or, where both are 1, all chunks of all tiles."""

    warpgroups: int
    split: int
    groups: int = 1

    @property
    def rows(self) -> int:
        """Of the weight, in a tile."""
        return 64 * self.warpgroups // self.groups

    @property
    def parts(self) -> int:
        return self.split * self.groups


@functools.lru_cache(maxsize=1024)
def skinny(
    rows: int, n: int, k: int, bf16: bool, block_size: int, nested: bool, device: int
) -> Skinny | None:  # fmt: skip
    """The kernel for ``rows`` of x; None where it does not serve."""
    if k % max(block_size, 64) or block_size < 64:
        return None
    if torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.has_tensor_maps():
        return None  # its matrix instructions are Hopper's alone
    shape = _skinny_shape(rows, n, k, device)
    return skinny_variant(shape, n, k, _skinny_tile(rows), bf16, block_size, nested, device)


def _skinny_tile(rows: int) -> int:
    """Rows of x in a tile."""
    return 32 if rows <= 32 else 64


def _skinny_us(shape: SkinnyShape, rows: int, n: int, k: int, device: int) -> float:
    tile_m = _skinny_tile(rows)
    tiles, x_tiles = -(-n // shape.rows), -(-rows // tile_m)
    of = _SKINNY_COSTS[tile_m][shape.warpgroups, shape.groups]
    return _SKINNY_ALONE[tile_m] + _cost(of, tiles, k, shape.split, device, x_tiles, shape.groups)


def _skinny_shape(rows: int, n: int, k: int, device: int) -> SkinnyShape:
    shapes = [
        SkinnyShape(warpgroups, split, groups)
        for (warpgroups, groups), of in _SKINNY_COSTS[_skinny_tile(rows)].items()
        for split in ((1, *of.clusters) if groups == 1 else of.clusters)
    ]
    return min(shapes, key=lambda shape: _skinny_us(shape, rows, n, k, device))


@functools.lru_cache(maxsize=1024)
def skinny_variant(
    shape: SkinnyShape, n: int, k: int, tile_m: int, bf16: bool, block_size: int, nested: bool, device: int
) -> Skinny | None:
    """The kernel for blocks of this shape; None where it does not fit."""
    processors, room = limits(device)
    rows = shape.rows
    slot = shape.groups * (tile_m * 256 + rows * 64)
    stages = min((room - _TABLE - 256) // slot, 8)
    if stages < 2:
        return None
    shared = _TABLE + stages * slot + 256
    defines = (
        ("BF16", int(bf16)), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)), ("TILE_M", tile_m),
        ("WARPGROUPS", shape.warpgroups), ("GROUPS", shape.groups), ("STAGES", stages), ("SPLIT", shape.split),
    )  # fmt: skip
    threads = 128 * (shape.warpgroups + 1)
    kernel = made("skinny_4bit.cu", defines, device, _SKINNY_ARGUMENTS, threads, shared)
    tiles = -(-n // rows)
    blocks = tiles * shape.split if shape.parts > 1 else _blocks(processors, tiles, k)
    return None if kernel is None else Skinny(kernel, tile_m, blocks, tiles, rows, 2 * blocks * (shape.parts == 1))


# ------------------------------------------------------------------------------------------------- many rows


class WideShape(NamedTuple):
    """How blocks of wide.cu share a product: tiles of ``tile_m`` rows of x by 64 ``warpgroups`` of the weight, each by
    ``split`` of them, or, where that is 1, all chunks of what tiles are left over."""

    tile_m: int
    warpgroups: int
    split: int

    def tiles(self, rows: int, n: int) -> int:
        return -(-rows // self.tile_m) * -(-n // (64 * self.warpgroups))

    def blocks(self, rows: int, n: int, k: int, processors: int) -> int:
        tiles = self.tiles(rows, n)
        return tiles * self.split if self.split > 1 else _blocks(processors, tiles, k)


class Wide(NamedTuple):
    """A kernel of wide.cu, run by ``blocks``."""

    kernel: Kernel
    shape: WideShape
    blocks: int
    tiles: int

    @property
    def rows(self) -> int:
        """Of the weight, in a tile."""
        return 64 * self.shape.warpgroups

    def memory(self, device: torch.device, zeros: int = 0) -> tuple[Tensor, Tensor]:
        """Where blocks leave the sums of parts of tiles, and count them: at least so many zeros."""
        parts = 2 * self.blocks if self.shape.split == 1 else 0
        sums = torch.empty(parts * self.rows * self.shape.tile_m, dtype=torch.int32, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        return sums, counters_for(device, stream, max(self.tiles, zeros))


@functools.lru_cache(maxsize=1024)
def wide(
    rows: int, n: int, k: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> Wide | None:  # fmt: skip
    """The kernel for ``rows`` of x; None where it does not serve. ``block_size``, ``nested``: of 4 bits."""
    if torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.has_tensor_maps():
        return None  # its matrix instructions are Hopper's alone
    if block_size < 64 or k % (max(block_size, 64) if bits == 4 else 16):
        return None
    shape = _wide_shape(rows, n, k, bits, device)
    return wide_variant(shape, rows, n, k, bf16, bits, block_size, nested, device)


def _wide_us(shape: WideShape, rows: int, n: int, k: int, bits: int, device: int) -> float:
    of = _WIDE_COSTS[bits][shape.tile_m, shape.warpgroups]
    alone = 1.1 if bits == 4 else 6.0  # fitted; of 8 bits with quantizing x
    return _cost(of, shape.tiles(rows, n), k, shape.split, device) + alone


def _wide_shape(rows: int, n: int, k: int, bits: int, device: int) -> WideShape:
    costs = _WIDE_COSTS[bits]
    kinds = list(costs) if rows <= 1024 else [(256, 2)]  # with many rows the least of the weight is read again
    shapes = [WideShape(*kind, split) for kind in kinds for split in (1, *costs[kind].clusters)]
    return min(shapes, key=lambda shape: _wide_us(shape, rows, n, k, bits, device))


@functools.lru_cache(maxsize=1024)
def wide_variant(
    shape: WideShape,
    rows: int,
    n: int,
    k: int,
    bf16: bool,
    bits: int,
    block_size: int,
    nested: bool,
    device: int,
) -> Wide | None:
    """The kernel for blocks of this shape; None where it does not fit."""
    processors, room = limits(device)
    weight_rows = 64 * shape.warpgroups
    slot = shape.tile_m * 128 + weight_rows * (32 + 4 if bits == 4 else 128)
    fixed = _TABLE + 1024 if bits == 4 else shape.tile_m * 128
    stages = min((room - fixed - 1024) // slot, 8)
    if stages < 3:
        return None
    defines: tuple[tuple[str, int], ...] = (
        ("BF16", int(bf16)), ("BITS", bits), ("TILE_M", shape.tile_m), ("WARPGROUPS", shape.warpgroups),
        ("STAGES", stages), ("SPLIT", shape.split),
    )  # fmt: skip
    if bits == 4:
        defines = *defines, ("FORMAT_BLOCK", block_size), ("NESTED", int(nested))
    else:
        defines = *defines, ("MOST_OUTLIERS", MOST_OUTLIERS)
    arguments = "128s128s9Pq4i2P" if bits == 4 else "128s128s128s9Pq4i2P3Pq"
    threads = 128 * (shape.warpgroups + 1)
    kernel = made("wide.cu", defines, device, arguments, threads, fixed + stages * slot + 1024)
    if kernel is None:
        return None
    return Wide(kernel, shape, shape.blocks(rows, n, k, processors), shape.tiles(rows, n))


def _cost(of: _Cost, tiles: int, k: int, split: int, device: int, turns: int = 1, groups: int = 1) -> float:
    """Microseconds, about; infinite where not all clusters run at once, or a part of a tile has no chunk.

    ``turns``: so many times all tiles, one after the other, or at once by as many clusters.
    """
    chunks, parts = -(-k // 128), split * groups
    if parts > 1:
        most = most_clusters(split, device) if split > 1 else limits(device)[0]
        if chunks < parts or tiles * turns > most:
            return math.inf
        return -(-chunks // parts) * of.chunk + of.clusters[split]
    blocks = _blocks(limits(device)[0], tiles, k)
    return (tiles * chunks / blocks * of.chunk + (of.shared if tiles % blocks else 0.0)) * turns


# ------------------------------------------------------------------------------------------------- which of them


@functools.lru_cache(maxsize=4096)
def quickest(rows: int, n: int, k: int, device: int) -> str:
    """The way that takes the least time, about, of those for up to 256 rows of x and a weight in 4 bits."""
    us = {"skinny": _skinny_us(_skinny_shape(rows, n, k, device), rows, n, k, device)}
    if rows <= FEW_ROWS:
        found = _least_decode(n, k, rows, 4, 64, device)
        if found is not None:
            us["decode"] = found[0]
    if rows > 64:
        us["wide"] = _wide_us(_wide_shape(rows, n, k, 4, device), rows, n, k, 4, device)
    return min(us, key=us.__getitem__)


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
