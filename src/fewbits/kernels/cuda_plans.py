"""The CUDA kernels as they are run: the variant for a product's shape, its blocks, and what it needs beside tensors.

A variant is compiled when it is first asked for, and asked for only where it serves; what does not serve is ``None``.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import fewbits.kernels.cuda_shapes as shapes
import fewbits.kernels.nvrtc as nvrtc
from fewbits.errors import FewbitsWarning
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.kernels.constants import constant
from fewbits.kernels.nvrtc import CudaError, Kernel

MOST_OUTLIERS = 16  # columns of x that have any, up to which the others are multiplied in 8 bits (measured)
_DECODE_ARGUMENTS = "9Pq4i"
_SKINNY_ARGUMENTS = "128s128s9Pq4i2P"


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


class ValueTable(NamedTuple):
    """How wide.cu has the values of 4-bit codes: each is (entry + shift) * scale."""

    entries: Tensor  # fp32 [16]
    scale: float
    shift: float


# A factor and an offset with which each value of a format is nearly one of fp16, weighed by how often normal numbers in
# blocks of 64 have its code: fp4's exactly, nf4's off by 4.2e-5 of a weight (rms; 4.5e-5 with rounded scales), where
# rounding to bf16 takes 1.65e-3. The least of 1e11 pairs whose offset is one of fp16's numbers, so that zero is exact.
_SHIFTED = {"nf4": (1.8607641802, -785 / 2048), "fp4": (0.75, 0.0)}
# A factor alone: nf4's are off by 8.1e-5, the least of 40 million factors.
_SCALED = {"nf4": (1.36619072, 0.0), "fp4": (0.75, 0.0)}


@functools.lru_cache(maxsize=64)
def value_table(format: str, bf16: bool, shifted: bool, device: torch.device) -> ValueTable:
    """For x in bf16 of halves, which take half the bandwidth of look-ups; for x in fp16 the values themselves."""
    values = codebook(format, torch.device("cpu"))
    if not bf16:
        return ValueTable(constant(values, device), 1.0, 0.0)
    factor, offset = (_SHIFTED if shifted else _SCALED)[format]
    entries = (values.double() * factor + offset).half().float()
    return ValueTable(constant(entries, device), 1 / factor, -offset)


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


@functools.lru_cache(maxsize=4096)
def decode_variant(
    shape: shapes.DecodeShape,
    n: int,
    k: int,
    rows: int,
    bf16: bool,
    bits: int,
    block_size: int,
    nested: bool,
    device: int,
) -> tuple[Kernel, int] | None:
    """The kernel for blocks of this shape, and how many run it."""
    plan = shapes.decode_plan(shape, n, k, rows, bits, block_size, nested, device)
    if plan is None:
        return None
    tiles, row_bytes = -(-rows // 8), k * bits // 8
    early = plan.single and tiles == 1 and (bits == 8 or plan.chunks * plan.line <= 256)  # measured on an H200
    defines = (
        ("BF16", int(bf16)), ("BITS", bits), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)),
        ("COLUMN_TILES", tiles), ("ROW_TILES", shape.row_tiles), ("LINE", plan.line), ("CHUNKS", plan.chunks),
        ("STAGES", plan.stages), ("WHOLE", int(plan.whole)), ("WHOLE_CHUNKS", int(row_bytes % plan.line == 0)),
        ("TILES", plan.kept), ("SPLIT", shape.split), ("X_EARLY", int(early)),
    )  # fmt: skip
    kernel = made("decode.cu", defines, device, _DECODE_ARGUMENTS, 32 * shapes.WARPS, plan.shared)
    return None if kernel is None else (kernel, plan.blocks)


@functools.lru_cache(maxsize=4096)
def decode(
    n: int, k: int, rows: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> tuple[Kernel, int] | None:
    """The kernel for so many rows of x and how many blocks run it; None where it does not serve.

    ``block_size``: of 4 bits; for 8 any from 64 on.
    """
    if rows > shapes.FEW_ROWS or k % (max(block_size, 64) if bits == 4 else 16):
        return None
    shape = shapes.decode_shape(n, k, rows, bits, block_size, nested, device)
    return shape and decode_variant(shape, n, k, rows, bf16, bits, block_size, nested, device)


# ------------------------------------------------------------------------------------------------- some tens of rows


class Skinny(NamedTuple):
    """A kernel of skinny_4bit.cu: its grid is ``blocks`` by tiles of ``tile_m`` rows of x."""

    kernel: Kernel
    tile_m: int
    blocks: int
    tiles: int  # of the weight, each of ``rows`` rows
    rows: int
    parts: int  # of tiles, whose sums blocks leave in memory, for each tile of x: none where clusters add them up


@functools.lru_cache(maxsize=1024)
def skinny(
    rows: int, n: int, k: int, bf16: bool, block_size: int, nested: bool, device: int
) -> Skinny | None:  # fmt: skip
    """The kernel for ``rows`` of x; None where it does not serve."""
    if k % max(block_size, 64) or block_size < 64:
        return None
    if torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.has_tensor_maps():
        return None  # its matrix instructions are Hopper's alone
    shape = shapes.skinny_shape(rows, n, k, device)
    return skinny_variant(shape, n, k, shapes.skinny_tile(rows), bf16, block_size, nested, device)


@functools.lru_cache(maxsize=1024)
def skinny_variant(
    shape: shapes.SkinnyShape, n: int, k: int, tile_m: int, bf16: bool, block_size: int, nested: bool, device: int
) -> Skinny | None:
    """The kernel for blocks of this shape; None where it does not fit."""
    processors, room = shapes.limits(device)
    rows = shape.rows
    slot = shape.groups * (tile_m * 256 + rows * 64)
    stages = min((room - shapes.TABLE - 256) // slot, 8)
    if stages < 2:
        return None
    shared = shapes.TABLE + stages * slot + 256
    defines = (
        ("BF16", int(bf16)), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)), ("TILE_M", tile_m),
        ("WARPGROUPS", shape.warpgroups), ("GROUPS", shape.groups), ("STAGES", stages), ("SPLIT", shape.split),
    )  # fmt: skip
    threads = 128 * (shape.warpgroups + 1)
    kernel = made("skinny_4bit.cu", defines, device, _SKINNY_ARGUMENTS, threads, shared)
    tiles = -(-n // rows)
    blocks = tiles * shape.split if shape.parts > 1 else shapes.blocks(processors, tiles, k)
    return None if kernel is None else Skinny(kernel, tile_m, blocks, tiles, rows, 2 * blocks * (shape.parts == 1))


# ------------------------------------------------------------------------------------------------- many rows


class Wide(NamedTuple):
    """A kernel of wide.cu, run by ``blocks``."""

    kernel: Kernel
    shape: shapes.WideShape
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
    shape = shapes.wide_shape(rows, n, k, bits, device)
    return wide_variant(shape, rows, n, k, bf16, bits, block_size, nested, device)


@functools.lru_cache(maxsize=1024)
def wide_variant(
    shape: shapes.WideShape,
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
    processors, room = shapes.limits(device)
    weight_rows = 64 * shape.warpgroups
    slot = shape.tile_m * 128 + weight_rows * (32 + 4 if bits == 4 else 128)
    fixed = shapes.TABLE + 1024 if bits == 4 else shape.tile_m * 128
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
    arguments = "128s128s9Pq4i2P2f" if bits == 4 else "128s128s128s9Pq4i2P3Pq"
    threads = 128 * (shape.warpgroups + 1)
    kernel = made("wide.cu", defines, device, arguments, threads, fixed + stages * slot + 1024)
    if kernel is None:
        return None
    return Wide(kernel, shape, shape.blocks(rows, n, k, processors), shape.tiles(rows, n))


# ------------------------------------------------------------------------------------------------- counters

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
