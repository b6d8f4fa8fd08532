"""How blocks of the CUDA kernels share a product, what that needs of a GPU, and how long it takes.

A shape says how; which one is taken follows from costs that were fitted to times on an H200. The kernels themselves are
in :mod:`fewbits.kernels.cuda_plans`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

import fewbits.kernels.nvrtc as nvrtc
from fewbits.kernels.nvrtc import CudaError

FEW_ROWS = 32  # of x, that decode.cu takes at most
WARPS = 16  # of decode.cu
TABLE = 65536  # bytes of its table of pairs


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


def blocks(processors: int, tiles: int, k: int) -> int:
    """How many share the chunks of all tiles, of 128 columns each."""
    # A multiple of the tiles if that leaves few processors idle: no block then has a part of two tiles. Or, where there
    # are more tiles than processors, a number that they are a multiple of: no tile then is shared.
    rounds = -(-tiles // processors)
    count = processors // tiles * tiles or (tiles // rounds if tiles % rounds == 0 else 0)
    count = count if count >= 0.9 * processors else processors
    return min(count, tiles * -(-k // 128))


# ------------------------------------------------------------------------------------------------- shapes


class DecodeShape(NamedTuple):
    """How blocks of decode.cu share a weight: tiles of 16 ``row_tiles`` rows, each by ``split`` of them."""

    row_tiles: int
    split: int


class DecodePlan(NamedTuple):
    """What follows from a shape of blocks."""

    blocks: int
    rounds: int  # tiles of the block that has most
    line: int  # bytes of a row that a warp takes at a time: its chunks
    chunks: int  # of a warp, for each row
    stages: int
    shared: int
    whole: bool  # rows are whole chunks of all warps, and the tiles have all their rows
    kept: int  # tiles whose sums have a place of their own: all of a block's, or 0

    @property
    def single(self) -> bool:
        return self.rounds == 1


def decode_plan(
    shape: DecodeShape, n: int, k: int, rows: int, bits: int, block_size: int, nested: bool, device: int
) -> DecodePlan | None:
    """None where it does not fit a block's memory, or not all blocks run at once that have to."""
    processors, room = limits(device)
    row_tiles, split = shape
    tile_rows, tiles = 16 * row_tiles, -(-rows // 8)
    row_bytes = k * bits // 8
    weight_tiles = -(-n // tile_rows)
    rounds = -(-weight_tiles * split // processors)
    if split > 1 and (rounds > 1 or weight_tiles > most_clusters(split, device)):
        return None
    # Bytes of a row that a warp takes at a time: whole lines of the cache are faster where what x has for them stays in
    # registers, and all warps have as much to do as before. Measured on an H200, as the slots of a warp's ring are.
    line, chunks = 64, -(-row_bytes // (64 * WARPS * split))
    if (
        bits == 4 and block_size >= 64 and (tiles == 1 or rounds == 1)
        and chunks % 2 == 0 and chunks * tiles <= 4 and chunks * row_tiles <= 8
    ):  # fmt: skip
        line, chunks, stages = 128, chunks // 2, 2
    elif bits == 8:
        stages = 3 if tiles == 4 and rounds == 1 and chunks > 4 else 4
    else:
        stages = 4 if nested and tiles == 2 and rounds > 1 else 3
    columns = line * 8 // bits
    stages = min(stages, chunks * row_tiles + 1)
    buffers = 4 if line == 64 else 3  # SCALE_BUFFERS in decode.cu
    scales = buffers * WARPS * (tile_rows + 1) * max(columns // block_size, 1) * 4 if bits == 4 else 0
    shared = (TABLE if bits == 4 else 0) + WARPS * stages * 16 * line + scales

    def sums(rows_of_x: int, tiles: int) -> int:
        return WARPS * rows_of_x * (tile_rows * tiles + 4) * 4

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
    count = weight_tiles * split if rounds == 1 else min(weight_tiles, processors)
    whole = n % tile_rows == 0 and row_bytes % (line * WARPS * split) == 0
    return DecodePlan(count, rounds, line, chunks, stages, shared, whole, kept)


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


def skinny_tile(rows: int) -> int:
    """Rows of x in a tile."""
    return 32 if rows <= 32 else 64


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
        return tiles * self.split if self.split > 1 else blocks(processors, tiles, k)


# ------------------------------------------------------------------------------------------------- costs


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
        1: _DecodeCost(1.35, 0.536, 0.231, 0.0, 0.22), 2: _DecodeCost(1.42, 0.790, 0.304, 0.0, 0.09, 0.02),
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
# of wide.cu by bits of the weight, rows of x and warpgroups; of 8 bits with outliers in six columns
_WIDE_COSTS = {
    4: {
        (256, 2): _Cost(1.48, 12.4, {2: 4.9, 4: 3.9}), (128, 2): _Cost(1.03, 6.2, {2: 1.6, 4: 0.1}),
        (128, 3): _Cost(1.38, 9.8, {2: 3.6, 4: 5.0}),
    },
    8: {
        (256, 2): _Cost(0.78, 18.9, {2: 5.3, 4: 6.7}), (128, 2): _Cost(0.43, 16.1, {2: 3.9, 4: 11.4}),
        (64, 2): _Cost(0.28, 17.8, {2: 5.7}),
    },
}  # fmt: skip


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
    count = blocks(limits(device)[0], tiles, k)
    return (tiles * chunks / count * of.chunk + (of.shared if tiles % count else 0.0)) * turns


# ------------------------------------------------------------------------------------------------- the quickest


# that were faster than others on some shape
_DECODE_SHAPES = (
    DecodeShape(2, 1), DecodeShape(1, 1), DecodeShape(3, 1), DecodeShape(7, 1), DecodeShape(2, 2), DecodeShape(3, 2)
)  # fmt: skip


def decode_shape(
    n: int, k: int, rows: int, bits: int, block_size: int, nested: bool, device: int
) -> DecodeShape | None:
    found = _least_decode(n, k, rows, bits, block_size, nested, device)
    return found and found[1]


def _least_decode(
    n: int, k: int, rows: int, bits: int, block_size: int, nested: bool, device: int
) -> tuple[float, DecodeShape] | None:
    """The quickest shape of those that fit, and microseconds, about."""
    best: tuple[float, DecodeShape] | None = None
    costs = _DECODE_COSTS[bits][-(-rows // 8)]
    for shape in _DECODE_SHAPES:
        row_tiles, split = shape
        if row_tiles > 3 and (bits == 8 or rows > 8):
            continue  # registers
        plan = decode_plan(shape, n, k, rows, bits, block_size, nested, device)
        if plan is None or (row_tiles > 2 and not plan.single):
            continue
        slot = costs.slot if plan.whole else costs.slot + costs.ragged
        us = costs.alone + plan.rounds * plan.chunks * (plan.line // 64) * (row_tiles * slot + costs.chunk)
        us += plan.rounds * costs.tile * (plan.kept == 0) + costs.cluster * (split > 1) + _MANY_ROWS * (row_tiles > 3)
        if best is None or us < best[0]:
            best = us, shape
    return best


def _skinny_us(shape: SkinnyShape, rows: int, n: int, k: int, device: int) -> float:
    tile_m = skinny_tile(rows)
    tiles, x_tiles = -(-n // shape.rows), -(-rows // tile_m)
    of = _SKINNY_COSTS[tile_m][shape.warpgroups, shape.groups]
    return _SKINNY_ALONE[tile_m] + _cost(of, tiles, k, shape.split, device, x_tiles, shape.groups)


def skinny_shape(rows: int, n: int, k: int, device: int) -> SkinnyShape:
    shapes = [
        SkinnyShape(warpgroups, split, groups)
        for (warpgroups, groups), of in _SKINNY_COSTS[skinny_tile(rows)].items()
        for split in ((1, *of.clusters) if groups == 1 else of.clusters)
    ]
    return min(shapes, key=lambda shape: _skinny_us(shape, rows, n, k, device))


def _wide_us(shape: WideShape, rows: int, n: int, k: int, bits: int, device: int) -> float:
    of = _WIDE_COSTS[bits][shape.tile_m, shape.warpgroups]
    alone = 1.1 if bits == 4 else 6.0  # fitted; of 8 bits with quantizing x
    return _cost(of, shape.tiles(rows, n), k, shape.split, device) + alone


def wide_shape(rows: int, n: int, k: int, bits: int, device: int) -> WideShape:
    costs = _WIDE_COSTS[bits]
    if rows > 1024:
        kinds = [(256, 2)]  # with many rows the least of the weight is read again
    elif rows > 128:
        kinds = list(costs)
    else:  # in one tile, the least that has them all, so that the weight is read once
        least = min(tile_m for tile_m, _ in costs if tile_m >= rows)
        kinds = [kind for kind in costs if kind[0] == least]
    shapes = [WideShape(*kind, split) for kind in kinds for split in (1, *costs[kind].clusters)]
    return min(shapes, key=lambda shape: _wide_us(shape, rows, n, k, bits, device))


@functools.lru_cache(maxsize=4096)
def quickest(rows: int, n: int, k: int, device: int) -> str:
    """The way that takes the least time, about, of those for up to 256 rows of x and a weight in 4 bits."""
    us = {"skinny": _skinny_us(skinny_shape(rows, n, k, device), rows, n, k, device)}
    if rows <= FEW_ROWS:
        found = _least_decode(n, k, rows, 4, 64, True, device)
        if found is not None:
            us["decode"] = found[0]
    if rows > 64:
        us["wide"] = _wide_us(wide_shape(rows, n, k, 4, device), rows, n, k, 4, device)
    return min(us, key=us.__getitem__)
