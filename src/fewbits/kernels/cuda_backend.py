"""The CUDA backend: products with a quantized weight in CUDA C++, compiled for the GPU at hand when first wanted.

What is not served here (other dtypes, rows that are not whole blocks, more rows of x, an older GPU) is left to the
next backend, by returning ``NotImplemented``. Layouts are those of :mod:`fewbits.kernels.reference`.

4 bits: up to 64 rows of x, values of codes are rounded to x's dtype, products are exact, sums and scales in fp32, and
the output is rounded once; with more rows it is the weight that is rounded, and from some point on torch multiplies.
8 bits: up to 16 rows, or 32 with a weight that the cache holds, the weight alone is quantized; with more, x is as well
(LLM.int8(), where its threshold is above 0), products and sums are exact, and the output is rounded once; unless
more than 16 columns have outliers: then the weight alone is again. The same inputs give the same bits every time.
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
from fewbits.kernels.nvrtc import CudaError, Kernel
from fewbits.kernels.pieces import many_rows, many_rows_t
from fewbits.kernels.reference import NESTED_BLOCK

DEVICE_TYPES = ("cuda",)

_WARPS = 16  # of decode.cu
_CHUNK = 64  # bytes of a row that a warp takes at a time
_TABLE = 65536  # bytes of its table of pairs
_FEW_ROWS = 16
_INT8_ROWS = 48  # up to which the weight is rather read several times than dequantized
_DECODE_ARGUMENTS = "9Pq4i"
_SKINNY_ARGUMENTS = "9Pq4i2P"
_SKINNY_ROWS = 64  # of x, at most: with more, scales in fp32 outside the matrix units take too long
_WIDE_MOST_ROWS = 1024  # of x with 4 bits, above which it pays to dequantize (measured on an H200)
_WIDE_THREADS = 384
_MOST_OUTLIERS = 16  # columns of x that have any, up to which the others are multiplied in 8 bits (measured)
_WIDE_ROWS = 128  # of the weight, in a tile
_DTYPES = (torch.bfloat16, torch.float16)


def check() -> None:
    """Raise what keeps CUDA C++ from running here.

    Raises:
        CudaError: no driver or no NVRTC, or a GPU that it does not compile for.
    """
    if torch.version.cuda is None:
        raise CudaError("torch is built for another kind of GPU")
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise CudaError(f"the kernels need compute capability 9.0, the GPU has {major}.{minor}")
    nvrtc.machine_code("probe.cu", (("BF16", 1),), f"{major}{minor}")


# ------------------------------------------------------------------------------------------------- tables


@functools.lru_cache(maxsize=64)
def _pairs(format: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """int32 [256]: the two values of a packed byte in ``dtype``, the high nibble's in the low half."""
    values = codebook(format, torch.device("cpu")).to(dtype)
    byte = torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int32).view(-1).to(device)


# With it each value of a format is nearly one of fp16: for fp4 exactly, for nf4 off by 3.2e-5 in the mean, the least of
# 1.3 million factors from 1/2 to 1.
_HALF_FACTORS = {"nf4": 0.838844921875, "fp4": 0.75}


@functools.lru_cache(maxsize=64)
def _values(format: str, device: torch.device) -> Tensor:
    """fp32 [18]: the values of the codes, the factor above, and one over it."""
    factor = _HALF_FACTORS[format]
    values = codebook(format, torch.device("cpu"))
    return torch.cat([values, torch.tensor([factor, 1 / factor])]).to(device)


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin - 2048  # less what is static


@functools.cache
def _cache_bytes(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    size: int = properties.L2_cache_size
    return size


# ------------------------------------------------------------------------------------------------- dequantizing


@functools.lru_cache(maxsize=256)
def _dequantizer(dtype: torch.dtype, block_size: int, nested: bool, device: int) -> Kernel | None:
    defines = (
        ("OUT", dtype.itemsize), ("BF16", int(dtype is torch.bfloat16)), ("FORMAT_BLOCK", block_size),
        ("NESTED", int(nested)),
    )  # fmt: skip
    return _made("dequantize_4bit.cu", defines, device, "7P2q", 256, 0)


def _dequantize_into(out: Tensor, packed: Tensor, scales: _Scales, format: str, block_size: int, first: int) -> None:
    """Into ``out`` elements ``first`` (a block's first, a multiple of 8) and following."""
    index, n = out.get_device(), out.numel()
    kernel = _dequantizer(out.dtype, block_size, scales.nested is not None, index)
    assert kernel is not None, "the caller has asked whether there is one"
    block = first // block_size
    values = codebook(format, out.device)
    absmax = scales.absmax.data_ptr() + block * scales.absmax.element_size()
    arguments = (
        packed.data_ptr() + first // 2, absmax, *scales.pointers(), values.data_ptr(), out.data_ptr(), block, n,
    )  # fmt: skip
    blocks = min(-(-n // (256 * 32)), 4 * _limits(index)[0])
    _launch(kernel, index, max(blocks, 1), 1, arguments)


class _Scales(NamedTuple):
    """A weight's scales as the kernels read them."""

    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None

    def pointers(self) -> tuple[int, int, int]:
        """Of the scales' scales, the offset, and the table of the scales' codes."""
        if self.nested is None or self.offset is None:
            return 0, 0, 0
        return self.nested.data_ptr(), self.offset.data_ptr(), codebook("dynamic", self.absmax.device).data_ptr()


def _scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> _Scales:
    return _Scales(_aligned(absmax), None if nested_absmax is None else nested_absmax.contiguous(), nested_offset)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Any:
    if not packed.numel() or dtype not in (*_DTYPES, torch.float32):
        return NotImplemented
    if _dequantizer(dtype, block_size, nested_absmax is not None, packed.get_device()) is None:
        return NotImplemented
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _dequantize_into(out, _aligned(packed), _scales(absmax, nested_absmax, nested_offset), format, block_size, 0)
    return out


# ------------------------------------------------------------------------------------------------- quantizing


@functools.lru_cache(maxsize=8)
def _buckets(device: torch.device) -> Tensor:
    """fp32 [33, 2] for nf4: the bound that rounds to each of -16 … 16 sixteenths, and (as bits) the code below it."""
    bounds = decision_rule("nf4", torch.device("cpu"))[0]
    buckets = torch.full((33, 2), torch.inf)
    buckets[:, 1] = torch.tensor(
        [int((bounds < (i - 16.5) / 16).sum()) for i in range(33)], dtype=torch.int32
    ).view(torch.float32)  # fmt: skip
    at = (bounds * 16).round().long() + 16
    assert len(at.unique()) == len(at), "no two bounds are in one bucket"
    buckets[at, 0] = bounds
    return buckets.to(device)


def quantize_4bit(w: Tensor, format: str, block_size: int) -> Any:
    n = w.numel()
    # fp4's bounds lie too close; long blocks are no warp's
    if not n or n % 8 or format != "nf4" or block_size > 256 or w.dtype not in (*_DTYPES, torch.float32):
        return NotImplemented
    index = w.get_device()
    defines = ("IN", w.element_size()), ("BF16", int(w.dtype is torch.bfloat16)), ("FORMAT_BLOCK", block_size)
    kernel = _made("quantize_4bit.cu", defines, index, "4Pq", 256, 0)
    if kernel is None:
        return NotImplemented
    w = _aligned(w)
    packed = torch.empty(n // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    arguments = w.data_ptr(), _buckets(w.device).data_ptr(), packed.data_ptr(), absmax.data_ptr(), n
    _launch(kernel, index, min(-(-n // (256 * 32)), 8 * _limits(index)[0]), 1, arguments)
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> Any:
    n, index = absmax.numel(), absmax.get_device()
    kernel = _made("quantize_absmax.cu", (("BF16", 1),), index, "5Pq", 256, 0) if n else None
    if kernel is None:
        return NotImplemented
    absmax = absmax.contiguous()
    offset = absmax.mean()
    codes = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(-(-n // NESTED_BLOCK), dtype=torch.float32, device=absmax.device)
    bounds = decision_rule("dynamic", absmax.device)[0]
    arguments = (
        absmax.data_ptr(), offset.data_ptr(), bounds.data_ptr(), codes.data_ptr(), nested.data_ptr(), n,
    )  # fmt: skip
    _launch(kernel, index, nested.numel(), 1, arguments)
    return codes, nested, offset


# ------------------------------------------------------------------------------------------------- few rows


@functools.lru_cache(maxsize=1024)
def _decode(
    n: int, k: int, tiles: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> tuple[Kernel, int] | None:
    """The kernel for up to ``8 * tiles`` rows of x and how many blocks run it; None where it does not serve.

    ``block_size``: of 4 bits; for 8 any from 64 on.
    """
    processors, room = _limits(device)
    if k % (max(block_size, 64) if bits == 4 else 16):
        return None
    row_bytes = k * bits // 8
    chunks = -(-row_bytes // (_CHUNK * _WARPS))
    columns = _CHUNK * 8 // bits
    best: tuple[float, tuple[int, int, int]] | None = None
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
            best = cost, (row_tiles, stages, shared)
    if best is None:
        return None
    row_tiles, stages, shared = best[1]
    whole = n % (16 * row_tiles) == 0 and row_bytes % (_CHUNK * _WARPS) == 0
    defines = (
        ("BF16", int(bf16)), ("BITS", bits), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)),
        ("COLUMN_TILES", tiles), ("ROW_TILES", row_tiles), ("CHUNKS", chunks), ("STAGES", stages),
        ("WHOLE", int(whole)),
    )  # fmt: skip
    made = _made("decode.cu", defines, device, _DECODE_ARGUMENTS, 32 * _WARPS, shared)
    return None if made is None else (made, min(-(-n // (16 * row_tiles)), processors))


def _served(x: Tensor, columns: int, packed: Tensor, bias: Tensor | None, n: int) -> bool:
    return (
        x.dtype in _DTYPES
        and x.shape[-1] == columns
        and packed.get_device() == x.get_device()
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
        and (bias is None or ((bias.dtype is x.dtype or bias.dtype is torch.float32) and bias.shape == (n,)))
    )


# ------------------------------------------------------------------------------------------------- some tens of rows


class _Skinny(NamedTuple):
    """A kernel of skinny_4bit.cu: its grid is ``blocks`` by tiles of ``tile_m`` rows of x."""

    kernel: Kernel
    tile_m: int
    blocks: int
    tiles: int  # of the weight, each of ``rows`` rows
    rows: int


@functools.lru_cache(maxsize=1024)
def _skinny(n: int, k: int, tile_m: int, bf16: bool, block_size: int, nested: bool, device: int) -> _Skinny | None:
    """The kernel for tiles of ``tile_m`` rows of x; None where it does not serve."""
    processors, room = _limits(device)
    if k % max(block_size, 64) or block_size < 64 or torch.cuda.get_device_capability(device) != (9, 0):
        return None  # its matrix instructions are Hopper's alone
    # measured on an H200
    warpgroups = 4 if n > 8192 else 2
    rows = 64 * warpgroups
    slot = tile_m * 256 + rows * 64
    stages = min((room - _TABLE - 64) // slot, 8)
    if stages < 3:
        return None
    shared = _TABLE + stages * slot + 64
    defines = (
        ("BF16", int(bf16)), ("FORMAT_BLOCK", block_size), ("NESTED", int(nested)), ("TILE_M", tile_m),
        ("WARPGROUPS", warpgroups), ("STAGES", stages),
    )  # fmt: skip
    kernel = _made("skinny_4bit.cu", defines, device, _SKINNY_ARGUMENTS, 128 * warpgroups, shared)
    tiles = -(-n // rows)
    return None if kernel is None else _Skinny(kernel, tile_m, _blocks(processors, tiles, k), tiles, rows)


# ------------------------------------------------------------------------------------------------- many rows


class _Wide(NamedTuple):
    """A kernel of wide.cu, run by ``blocks``."""

    kernel: Kernel
    tile_m: int
    blocks: int
    tiles: int

    def memory(self, device: torch.device, zeros: int = 0) -> tuple[Tensor, Tensor]:
        """Where blocks leave the sums of parts of tiles, and count them: at least so many zeros."""
        sums = torch.empty(2 * self.blocks * _WIDE_ROWS * self.tile_m, dtype=torch.int32, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        return sums, _counters_for(device, stream, max(self.tiles, zeros))


@functools.lru_cache(maxsize=1024)
def _wide(
    rows: int, n: int, k: int, bf16: bool, bits: int, block_size: int, nested: bool, device: int
) -> _Wide | None:  # fmt: skip
    """The kernel for ``rows`` of x; None where it does not serve. ``block_size``, ``nested``: of 4 bits."""
    processors, room = _limits(device)
    if torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.has_tensor_maps():
        return None  # its matrix instructions are Hopper's alone
    if block_size < 64 or k % (max(block_size, 64) if bits == 4 else 16):
        return None
    # rows of x that tiles work on, those past the last one as well; the weight is decoded again for each tile
    sizes = {256: 1.0, 128: 1.3} if bits == 4 else {256: 1.0, 128: 1.15, 64: 1.5}
    tile_m = min(sizes, key=lambda size: -(-rows // size) * size * sizes[size])
    slot = tile_m * 128 + _WIDE_ROWS * (32 + 4 if bits == 4 else 128)
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
        defines = *defines, ("MOST_OUTLIERS", _MOST_OUTLIERS)
    arguments = "128s128s9Pq4i2P" if bits == 4 else "128s128s128s9Pq4i2P3Pq"
    kernel = _made("wide.cu", defines, device, arguments, _WIDE_THREADS, fixed + stages * slot + 1024)
    tiles = -(-rows // tile_m) * -(-n // _WIDE_ROWS)
    return None if kernel is None else _Wide(kernel, tile_m, _blocks(processors, tiles, k), tiles)


def _blocks(processors: int, tiles: int, k: int) -> int:
    """How many share the chunks of all tiles, of 128 columns each."""
    # a multiple of the tiles if that leaves few processors idle: no block then has a part of two tiles
    blocks = processors // tiles * tiles
    blocks = blocks if blocks >= 0.9 * processors else processors
    return min(blocks, tiles * -(-k // 128))


_counters: dict[tuple[int, int], Tensor] = {}  # by device and stream
_captured_counters: dict[tuple[int, int], tuple[int, Tensor]] = {}  # the same, of the capture that was last seen


def _counters_for(device: torch.device, stream: int, count: int) -> Tensor:
    """int32 zeros, which the kernels leave as zeros: only launches that follow each other may share them."""
    index = device.index
    capture = nvrtc.capture_id(stream)
    if capture:  # a graph's own: it may run beside others later
        known = _captured_counters.get((index, stream))
        if known is None or known[0] != capture or known[1].numel() < count:
            known = capture, torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
            _captured_counters[index, stream] = known
        return known[1]
    found = _counters.get((index, stream))
    if found is None or found.numel() < count:
        found = _counters[index, stream] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return found


@functools.cache  # of a failure as well: it is tried and told once
def _made(
    file: str, defines: tuple[tuple[str, int], ...], device: int, arguments: str, threads: int, shared: int
) -> Kernel | None:
    try:
        return nvrtc.kernel(file, defines, device, arguments, threads, shared)
    except CudaError as error:
        warnings.warn(f"a kernel cannot be made, a slower one runs instead: {error}", FewbitsWarning, stacklevel=2)
        return None


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    format: str,
    block_size: int,
    shape: list[int],
) -> Any:
    n, k = shape
    rows = x.numel() // k if k else 0
    if not (n and rows and _served(x, k, packed, bias, n)):
        return NotImplemented
    dtype, device, index = x.dtype, x.device, x.get_device()
    scales = _scales(absmax, nested_absmax, nested_offset)
    kind = dtype is torch.bfloat16, nested_absmax is not None
    decode = skinny = None
    if rows <= _FEW_ROWS:
        decode = _decode(n, k, 1 if rows <= 8 else 2, kind[0], 4, block_size, kind[1], index)
    elif rows <= _SKINNY_ROWS:
        skinny = _skinny(n, k, 32 if rows <= 32 else 64, kind[0], block_size, kind[1], index)
    wide = None
    if decode is None and skinny is None and _SKINNY_ROWS < rows <= _WIDE_MOST_ROWS:
        wide = _wide(rows, n, k, kind[0], 4, block_size, kind[1], index)
    if decode is None and skinny is None and wide is None:
        if k % max(block_size, 8) or _dequantizer(dtype, block_size, kind[1], index) is None:
            return NotImplemented
        return many_rows(
            x, bias, n, k,
            lambda part, out: _dequantize_into(out, packed, scales, format, block_size, part.start * k),
        )  # fmt: skip
    x_MK, out = _rows(x, k), torch.empty((*x.shape[:-1], n), dtype=dtype, device=device)
    absmax = scales.absmax
    if wide is not None:
        maps = (
            nvrtc.tensor_map(x_MK.data_ptr(), 2, rows, k, x_MK.stride(0) * 2, wide.tile_m, 64),
            nvrtc.tensor_map(packed.data_ptr(), 1, n, k // 2, k // 2, _WIDE_ROWS, 32),
        )
        tables = *scales.pointers(), _values(format, device).data_ptr()
        sums, counters = wide.memory(device)
        more = sums.data_ptr(), counters.data_ptr()
        return _run(wide.kernel, wide.blocks, 1, x_MK, out, packed, absmax, tables, bias, n, k, more, maps)
    tables = *scales.pointers(), _pairs(format, dtype, device).data_ptr()
    if decode is not None:
        return _run(decode[0], decode[1], 1, x_MK, out, packed, absmax, tables, bias, n, k)
    assert skinny is not None
    x_tiles = -(-rows // skinny.tile_m)
    workspace = torch.empty(
        x_tiles * 2 * skinny.blocks * skinny.rows * skinny.tile_m, dtype=torch.float32, device=device
    )
    counters = _counters_for(device, torch._C._cuda_getCurrentRawStream(index), x_tiles * skinny.tiles)
    more = workspace.data_ptr(), counters.data_ptr()
    return _run(skinny.kernel, skinny.blocks, x_tiles, x_MK, out, packed, absmax, tables, bias, n, k, more)


def linear_4bit_t(
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    block_size: int,
    shape: list[int],
) -> Any:
    n, k = shape
    dtype, index = g.dtype, g.get_device()
    if not (k and g.numel() and _served(g, n, packed, None, n)) or k % max(block_size, 8):
        return NotImplemented
    if _dequantizer(dtype, block_size, nested_absmax is not None, index) is None:
        return NotImplemented
    scales = _scales(absmax, nested_absmax, nested_offset)
    return many_rows_t(
        g, n, k, lambda part, out: _dequantize_into(out, packed, scales, format, block_size, part.start * k)
    )


def linear_int8(x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Any:
    """LLM.int8(), and for a few rows as Triton's: x keeps its own precision, ``threshold`` has no effect.

    So it does with a threshold of 0: without outliers apart x is not well quantized to 8 bits.
    """
    n, k = q.shape
    rows = x.numel() // k if k else 0
    if not (n and rows and _served(x, k, q, bias, n)):
        return NotImplemented
    bf16, index = x.dtype is torch.bfloat16, x.get_device()
    twice = rows <= 2 * _FEW_ROWS and n * k <= _cache_bytes(index)  # the second time from the cache: it is as fast
    if rows > _FEW_ROWS and not twice and threshold > 0:
        wide = _wide(rows, n, k, bf16, 8, 64, False, index)
        if wide is not None:
            return _linear_of_quantized(wide, x, q, _aligned(absmax), bias, threshold)
    if rows > _INT8_ROWS:
        return NotImplemented
    absmax = _aligned(absmax)
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    x_MK, out_MN = _rows(x, k), out.view(rows, n)
    for first in range(0, rows, _FEW_ROWS):
        count = min(_FEW_ROWS, rows - first)
        plan = _decode(n, k, 1 if count <= 8 else 2, bf16, 8, 64, False, index)
        if plan is None:
            return NotImplemented
        part = slice(first, first + count)
        _run(plan[0], plan[1], 1, x_MK[part], out_MN[part], q, absmax, (0, 0, 0, 0), bias, n, k)
    return out


def _linear_of_quantized(
    wide: _Wide, x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Any:
    """Rows of x are quantized and columns with outliers found, and then all multiplied: two launches."""
    (n, k), device, index = q.shape, x.device, x.get_device()
    x_MK = _rows(x, k)
    rows, words = x_MK.shape[0], -(-k // 32)
    quantize = _made("quantize_rows.cu", (("BF16", int(x.dtype is torch.bfloat16)),), index, "5Pq2if", 256, words * 4)
    if quantize is None:
        return NotImplemented
    codes = torch.empty(rows, k, dtype=torch.int8, device=device)
    scales = torch.empty(-(-rows // wide.tile_m) * wide.tile_m, dtype=torch.float32, device=device)
    outliers = torch.empty(1 + k, dtype=torch.int32, device=device)
    sums, counters = wide.memory(device, 1 + words)
    arguments = (
        x_MK.data_ptr(), codes.data_ptr(), scales.data_ptr(), outliers.data_ptr(), counters.data_ptr(),
        x_MK.stride(0), rows, k, threshold,
    )  # fmt: skip
    _launch(quantize, index, min(rows, 8 * _limits(index)[0]), 1, arguments)
    more = (
        sums.data_ptr(), counters.data_ptr(), scales.data_ptr(), x_MK.data_ptr(), outliers.data_ptr(), x_MK.stride(0)
    )  # fmt: skip
    maps = (
        nvrtc.tensor_map(codes.data_ptr(), 1, rows, k, k, wide.tile_m, 128),
        nvrtc.tensor_map(q.data_ptr(), 1, n, k, k, _WIDE_ROWS, 128),
        nvrtc.tensor_map(x_MK.data_ptr(), 2, rows, k, x_MK.stride(0) * 2, wide.tile_m, 64),
    )
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=device)
    return _run(wide.kernel, wide.blocks, 1, codes, out, q, absmax, (0, 0, 0, 0), bias, n, k, more, maps)


def _rows(x: Tensor, k: int) -> Tensor:
    """x [..., k] as rows that begin at multiples of 16 bytes, one after the other, and lie together."""
    x_MK = x.reshape(-1, k)
    if x_MK.stride(1) != 1 or x_MK.stride(0) < k or x_MK.stride(0) * x.element_size() % 16 or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    return x_MK


def _run(
    kernel: Kernel,
    grid_x: int,
    grid_y: int,
    x_MK: Tensor,
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    tables: tuple[int, ...],
    bias: Tensor | None,
    n: int,
    k: int,
    more: tuple[int, ...] = (),
    maps: tuple[bytes, ...] = (),
) -> Tensor:
    bias_pointer = bias_bytes = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_pointer, bias_bytes = bias.data_ptr(), bias.element_size()
    arguments = (
        *maps, packed.data_ptr(), absmax.data_ptr(), *tables, x_MK.data_ptr(), bias_pointer, out.data_ptr(),
        x_MK.stride(0), x_MK.shape[0], n, k, bias_bytes, *more,
    )  # fmt: skip
    _launch(kernel, x_MK.get_device(), grid_x, grid_y, arguments)
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernels read it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch(kernel: Kernel, device: int, grid_x: int, grid_y: int, arguments: tuple[Any, ...]) -> None:
    if device == torch.cuda.current_device():
        kernel(torch._C._cuda_getCurrentRawStream(device), grid_x, grid_y, *arguments)
        return
    with torch.cuda.device(device):
        kernel(torch._C._cuda_getCurrentRawStream(device), grid_x, grid_y, *arguments)
