"""The Triton backend: quantizing, dequantizing and products with few rows, each in one pass over the bytes.

Layouts and arithmetic are those of :mod:`fewbits.kernels.reference`, and what a function here does not serve it hands
there: other dtypes and block sizes, empty tensors. Codes, scales and dequantized values agree with the reference on the
same GPU bit for bit; kernels whose last bit would change with a fused multiply-add are compiled without it. Products
sum in another order.

With at most ``_FEW_ROWS`` rows of x (decoding a text, one token at a time) a product reads the codes once and never
writes the weight: each thread decodes 16 or 32 neighbouring codes of an output row, whose sum with x takes its block's
scale once. With more rows the weight is dequantized to x's dtype in pieces that stay in the L2 cache, and multiplied by
torch, whose matrix units then decide the time.

``TRITON_INTERPRET=1``, set before Triton is imported, runs the same kernels on a CPU, for tests.
"""

from __future__ import annotations

import functools
import os
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import fewbits.kernels.reference as reference
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.kernels.pieces import many_rows, many_rows_t
from fewbits.kernels.reference import _TINY

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DEVICE_TYPES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_BLOCK_SIZES = frozenset(32 << i for i in range(8))
_TILE = 4096  # elements that a program quantizes or dequantizes
_FEW_ROWS = 8
_NVIDIA = torch.version.cuda is not None and not INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_TINY_BITS = tl.constexpr(struct.unpack("i", struct.pack("f", _TINY))[0])  # as bits: Triton takes a subnormal for fp64
_OVER_127 = tl.constexpr(1 / 127)  # in fp32, as torch multiplies by it
_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added and taken off again, it rounds an fp32 below 2^22, half to even


# ------------------------------------------------------------------------------------------------- kernels
# Offsets within a tile are int32; the tile's own place is int64. Sizes that decide how wide a load may be come as
# arguments of their own, since Triton knows of an argument whether 16 divides it.


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, to nearest even; Triton's interpreter would truncate to bf16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def _scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, blocks, mask):
    """fp32 scales of ``blocks``; without double quantization ``nested_ptr`` is None."""
    scales = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if nested_ptr is not None:
        nested = tl.load(nested_ptr + (blocks >> 8), mask=mask, other=0.0)
        scales = tl.load(dynamic_ptr + scales.to(tl.int32)) * nested + tl.load(offset_ptr)
    return scales.to(tl.float32)


@triton.jit
def _quantize_4bit_kernel(
    w_ptr,
    bounds_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    n_bytes,
    LOW_CODES: tl.constexpr,  # a nibble for each of the lower intervals; None if codes ascend with their values
    HIGH_CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    start = first * BLOCK
    block = tl.arange(0, BLOCKS)
    offset = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(w_ptr + start + offset, mask=offset < n - start, other=0.0).to(tl.float32)

    # non-negative floats are ordered as their bits are, with NaN above infinity: a NaN is not lost
    absmax_bits = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax = absmax_bits.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + first + block, absmax, mask=block * BLOCK < n - start)
    inverse = tl.div_rn(1.0, tl.maximum(absmax_bits, _TINY_BITS).to(tl.float32, bitcast=True))
    scaled = w * inverse[:, None]

    # binary search among the 15 bounds, which lie within ±1: clamping would change nothing. A table of them in memory
    # would take fewer instructions, but Triton spreads gathers over the threads in another way than the weight
    above_7 = ~(scaled <= tl.load(bounds_ptr + 7))
    bound = tl.where(above_7, tl.load(bounds_ptr + 11), tl.load(bounds_ptr + 3))
    above_3 = ~(scaled <= bound)
    low = tl.where(above_3, tl.load(bounds_ptr + 5), tl.load(bounds_ptr + 1))
    high = tl.where(above_3, tl.load(bounds_ptr + 13), tl.load(bounds_ptr + 9))
    above_1 = ~(scaled <= tl.where(above_7, high, low))
    low_low = tl.where(above_1, tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 0))
    low_high = tl.where(above_1, tl.load(bounds_ptr + 6), tl.load(bounds_ptr + 4))
    high_low = tl.where(above_1, tl.load(bounds_ptr + 10), tl.load(bounds_ptr + 8))
    high_high = tl.where(above_1, tl.load(bounds_ptr + 14), tl.load(bounds_ptr + 12))
    low = tl.where(above_3, low_high, low_low)
    high = tl.where(above_3, high_high, high_low)
    above_0 = ~(scaled <= tl.where(above_7, high, low))
    code = tl.where(above_7, 8, 0) | tl.where(above_3, 4, 0) | tl.where(above_1, 2, 0) | tl.where(above_0, 1, 0)
    if LOW_CODES is not None:
        code = (tl.where(above_7, HIGH_CODES, LOW_CODES) >> ((code & 7) * 4)) & 15
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCK // 2, 2)))
    byte_offset = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    first_byte = first * (BLOCK // 2)
    byte = ((high << 4) | low).to(tl.uint8)
    tl.store(packed_ptr + first_byte + byte_offset, byte, mask=byte_offset < n_bytes - first_byte)


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    dynamic_ptr,
    values_ptr,
    out_ptr,
    first_block,
    n,
    n_bytes,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``n`` elements from block ``first_block`` on."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    start = first * BLOCK
    block = tl.arange(0, BLOCKS)
    in_range = block * BLOCK < n - start
    scale = _scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, first_block + first + block, in_range)
    byte_offset = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed_ptr += (first_block + first) * (BLOCK // 2)
    byte = tl.load(packed_ptr + byte_offset, mask=byte_offset < n_bytes - first * (BLOCK // 2), other=0).to(tl.int32)
    values = tl.join(tl.load(values_ptr + (byte >> 4)), tl.load(values_ptr + (byte & 15)))
    w = tl.reshape(values, (BLOCKS, BLOCK)) * scale[:, None]
    offset = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + start + offset, _rounded(w, out_ptr.dtype.element_ty), mask=offset < n - start)


@triton.jit
def _quantize_int8_kernel(
    w_ptr,
    q_ptr,
    absmax_ptr,
    columns,
    APPROXIMATE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * columns
    q_ptr += row * columns
    column = tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        start = step * BLOCK
        half = tl.load(w_ptr + start + column, mask=column < columns - start, other=0.0).to(tl.float32).to(tl.float16)
        bits = tl.maximum(bits, half.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF)
    absmax = tl.max(bits, axis=0).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    tl.store(absmax_ptr + row, absmax)
    divisor = tl.where(absmax == 0.0, 1.0, absmax)  # a row of zeros stays one
    if APPROXIMATE:  # what bitsandbytes' __fdividef compiles to
        scale = tl.inline_asm_elementwise(
            "div.approx.f32 $0, 0f42FE0000, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # as torch divides a number by a tensor
        scale = tl.div_rn(1.0, divisor) * 127.0
    for step in range(STEPS):
        start = step * BLOCK
        mask = column < columns - start
        half = tl.load(w_ptr + start + column, mask=mask, other=0.0).to(tl.float32).to(tl.float16)
        scaled = half.to(tl.float32) * scale
        scaled = tl.where(scaled == scaled, scaled, 0.0)
        rounded = (scaled + _TO_INTEGER) - _TO_INTEGER
        tl.store(q_ptr + start + column, rounded.to(tl.int32).to(tl.int8), mask=mask)


@triton.jit
def _dequantize_int8_kernel(q_ptr, absmax_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = row < rows - first
    scale = tl.load(absmax_ptr + first + row, mask=in_rows, other=0.0) * _OVER_127
    offset = (first + row)[:, None] * columns + column[None, :]
    mask = in_rows[:, None] & (column < columns)[None, :]
    w = tl.load(q_ptr + offset, mask=mask, other=0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + offset, _rounded(w, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_4bit_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    dynamic_ptr,
    values_ptr,
    bias_ptr,
    out_ptr,
    m_rows,
    n_rows,
    x_stride,
    row_groups,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # elements that one thread takes from a block; they share its scale
):
    # dimensions of a tile: row of x, group, row of W, element of the group; in this order Triton gives the groups to
    # the threads, so that each keeps its part of x for all rows of W. Rows past the end repeat the last one
    m = tl.program_id(1) * M + tl.arange(0, M)
    n = tl.program_id(0) * N + tl.arange(0, N)
    m_safe = tl.minimum(m, m_rows - 1).to(tl.int64)[:, None, None, None]
    n_safe = tl.minimum(n, n_rows - 1).to(tl.int64)[None, None, :, None]
    group = tl.arange(0, GROUPS)[None, :, None, None]
    x_ptrs = x_ptr + m_safe * x_stride + group * GROUP + tl.arange(0, GROUP)[None, None, None, :]
    groups = n_safe * row_groups + group
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    word_ptrs = words_ptr + groups * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, None, None, :]
    shift = (tl.arange(0, 8) ^ 1) * 4  # the even element has the high nibble
    sums = tl.zeros((M, GROUPS, N, 1), tl.float32)
    for step in range(STEPS):
        start = step * GROUPS
        mask = group < row_groups - start
        words = tl.load(word_ptrs + start * (GROUP // 8), mask=mask, other=0)
        x = tl.load(x_ptrs + start * GROUP, mask=mask, other=0.0)
        blocks = (groups + start) // (BLOCK // GROUP)
        scale = _scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, blocks, mask)
        codes = (tl.expand_dims(words, 4) >> shift[None, None, None, None, :]) & 15
        w = tl.reshape(tl.load(values_ptr + codes), (1, GROUPS, N, GROUP))
        sums += tl.sum(x.to(tl.float32) * w, axis=3, keep_dims=True) * scale
    out = tl.reshape(tl.sum(sums, axis=1), (M, N))
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < n_rows, other=0.0).to(tl.float32)[None, :]
    mask_MN = (m < m_rows)[:, None] & (n < n_rows)[None, :]
    tl.store(out_ptr + m[:, None] * n_rows + n[None, :], _rounded(out, out_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def _linear_int8_kernel(
    x_ptr,
    q_ptr,
    absmax_ptr,
    bias_ptr,
    out_ptr,
    m_rows,
    n_rows,
    columns,
    x_stride,
    STEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    m = tl.program_id(1) * M + tl.arange(0, M)
    n = tl.program_id(0) * N + tl.arange(0, N)
    m_safe = tl.minimum(m, m_rows - 1).to(tl.int64)[:, None, None, None]
    n_safe = tl.minimum(n, n_rows - 1).to(tl.int64)[None, None, :, None]
    k = tl.arange(0, GROUPS)[None, :, None, None] * GROUP + tl.arange(0, GROUP)[None, None, None, :]
    x_ptrs = x_ptr + m_safe * x_stride + k
    q_ptrs = q_ptr + n_safe * columns + k
    sums = tl.zeros((M, GROUPS, N), tl.float32)
    for step in range(STEPS):
        start = step * (GROUPS * GROUP)
        mask = k < columns - start
        q = tl.load(q_ptrs + start, mask=mask, other=0).to(tl.float32)
        x = tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(x * q, axis=3)
    in_rows = n < n_rows
    out = tl.sum(sums, axis=1) * (tl.load(absmax_ptr + n, mask=in_rows, other=0.0) * _OVER_127)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    mask_MN = (m < m_rows)[:, None] & in_rows[None, :]
    tl.store(out_ptr + m[:, None] * n_rows + n[None, :], _rounded(out, out_ptr.dtype.element_ty), mask=mask_MN)


# ------------------------------------------------------------------------------------------------- launching


def check() -> None:
    """Raise what keeps Triton from running on this machine's GPU: a driver that it cannot build its own module for."""
    if not INTERPRETED and (torch.cuda.is_available() or torch.xpu.is_available()):
        triton.runtime.driver.active.get_current_target()


def _launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **options: Any) -> None:
    """Launch on the device of ``on``; Triton launches on the current one."""
    index = on.get_device()
    if index >= 0:
        module = torch.cuda if on.is_cuda else torch.xpu
        if index != module.current_device():
            with module.device(index):
                kernel[grid](*args, **options)
            return
    kernel[grid](*args, **options)


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


def _nested_args(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> tuple[Any, ...]:
    if nested_absmax is None or nested_offset is None:
        return absmax.contiguous(), None, None, None
    return absmax.contiguous(), nested_absmax.contiguous(), nested_offset, codebook("dynamic", absmax.device)


# ------------------------------------------------------------------------------------------------- quantizing


@functools.lru_cache(maxsize=8)
def _code_words(format: str) -> tuple[int | None, int | None]:
    """The codes of the 16 intervals in ascending order, eight to a word; None if they are 0 … 15."""
    codes = decision_rule(format, torch.device("cpu"))[1].tolist()
    if codes == list(range(16)):
        return None, None
    low, high = (sum(code << 4 * i for i, code in enumerate(half)) for half in (codes[:8], codes[8:]))
    return low, high


def quantize_4bit(w: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    if not n or w.dtype not in _DTYPES or block_size not in _BLOCK_SIZES:
        return reference.quantize_4bit(w, format, block_size)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    low_codes, high_codes = _code_words(format)
    _launch(
        _quantize_4bit_kernel,
        (-(-n // _TILE),),
        w,
        w.contiguous(),
        decision_rule(format, w.device)[0],
        packed,
        absmax,
        n,
        packed.numel(),
        LOW_CODES=low_codes,
        HIGH_CODES=high_codes,
        BLOCK=block_size,
        BLOCKS=_TILE // block_size,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return packed, absmax


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    if not w.numel() or w.dtype not in _DTYPES:
        return reference.quantize_int8(w)
    columns = w.shape[-1]
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    absmax = torch.empty(w.shape[:-1], dtype=torch.float32, device=w.device)
    block = min(_power_of_2(columns), _TILE)
    _launch(
        _quantize_int8_kernel,
        (absmax.numel(),),
        w,
        w.contiguous(),
        q,
        absmax,
        columns,
        APPROXIMATE=_NVIDIA,
        STEPS=-(-columns // block),
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
        enable_fp_fusion=False,
    )
    return q, absmax


# ------------------------------------------------------------------------------------------------- dequantizing


def _decode_4bit(
    packed: Tensor, nested: tuple[Any, ...], format: str, block_size: int, first: int, out: Tensor
) -> None:
    """Into ``out`` [n] elements ``first`` (a block's first) to ``first + n`` of a weight, flat.

    ``nested``: see :func:`_nested_args`.
    """
    n = out.numel()
    _launch(
        _dequantize_4bit_kernel,
        (-(-n // _TILE),),
        packed,
        packed.contiguous(),
        *nested,
        codebook(format, packed.device),
        out,
        first // block_size,
        n,
        (n + 1) // 2,
        BLOCK=block_size,
        BLOCKS=_TILE // block_size,
        num_warps=4,
        enable_fp_fusion=False,
    )


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    if not packed.numel() or dtype not in _DTYPES or block_size not in _BLOCK_SIZES:
        return reference.dequantize_4bit(packed, absmax, nested_absmax, nested_offset, format, block_size, shape, dtype)
    nested = _nested_args(absmax, nested_absmax, nested_offset)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _decode_4bit(packed, nested, format, block_size, 0, out.view(-1))
    return out


def dequantize_int8(q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    if not q.numel() or dtype not in _DTYPES:
        return reference.dequantize_int8(q, absmax, dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _decode_int8(q, absmax, out)
    return out


def _decode_int8(q: Tensor, absmax: Tensor, out: Tensor) -> None:
    columns = q.shape[-1]
    rows = q.numel() // columns
    tile_columns = min(_power_of_2(columns), 1024)
    tile_rows = _TILE // tile_columns
    _launch(
        _dequantize_int8_kernel,
        (-(-rows // tile_rows), -(-columns // tile_columns)),
        q,
        q.contiguous(),
        absmax.contiguous(),
        out,
        rows,
        columns,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=4,
        enable_fp_fusion=False,
    )


# ------------------------------------------------------------------------------------------------- products


@functools.lru_cache(maxsize=256)
def _tile(rows: int, groups: int, rows_of_w: int) -> dict[str, int]:
    """Tile of a product with few rows of x: up to 4 of them at once, and 128 threads of one or more groups each."""
    across = min(_power_of_2(groups), 128)
    n = max(rows_of_w, 128 // across)
    return {"STEPS": -(-groups // across), "M": min(_power_of_2(rows), 4), "N": n, "GROUPS": across, "num_warps": 4}


def _rows_of(x: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] with neighbouring elements of a row next to each other."""
    x_MK = x.reshape(rows, columns)
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def _served(x: Tensor, columns: int, packed: Tensor, n: int, bias: Tensor | None = None) -> bool:
    """Whether x [..., columns] can be multiplied here; what does not fit is left to the reference to say."""
    fits = x.dim() > 0 and x.shape[-1] == columns and x.numel() * n > 0 and (bias is None or bias.shape == (n,))
    return fits and x.dtype in _DTYPES and x.get_device() == packed.get_device()


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
) -> Tensor:
    n, k = shape
    rows = x.numel() // k if k else 0
    if not _served(x, k, packed, n, bias) or block_size not in _BLOCK_SIZES:
        return reference.linear_4bit(x, packed, absmax, nested_absmax, nested_offset, bias, format, block_size, shape)
    nested = _nested_args(absmax, nested_absmax, nested_offset)
    if rows > _FEW_ROWS or k % block_size:
        return many_rows(
            x, bias, n, k,
            lambda rows, out: _decode_4bit(packed, nested, format, block_size, rows.start * k, out.view(-1)),
            aligned=k % block_size == 0,
        )  # fmt: skip
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    x_MK = _rows_of(x, rows, k)
    packed = packed.contiguous()
    if packed.data_ptr() % 4:  # the kernel reads words of eight codes
        packed = packed.clone()
    group = 32 if rows == 1 else 16
    tile = _tile(rows, k // group, 2)
    _launch(
        _linear_4bit_kernel,
        (-(-n // tile["N"]), -(-rows // tile["M"])),
        x,
        x_MK,
        packed,
        *nested,
        codebook(format, x.device),
        None if bias is None else bias.contiguous(),
        out,
        rows,
        n,
        x_MK.stride(0),
        k // group,
        BLOCK=block_size,
        GROUP=group,
        **tile,
    )
    return out


def linear_4bit_t(
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    block_size: int,
    shape: list[int],
) -> Tensor:
    n, k = shape
    if not _served(g, n, packed, k) or block_size not in _BLOCK_SIZES:
        return reference.linear_4bit_t(g, packed, absmax, nested_absmax, nested_offset, format, block_size, shape)
    nested = _nested_args(absmax, nested_absmax, nested_offset)
    return many_rows_t(
        g, n, k,
        lambda rows, out: _decode_4bit(packed, nested, format, block_size, rows.start * k, out.view(-1)),
        aligned=k % block_size == 0,
    )  # fmt: skip


def linear_int8(x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """As the reference's, but x keeps its own precision instead of two 8-bit digits; so no column is an outlier, and
    ``threshold`` has no effect. What is left is the rounding of the weights, and sums in fp32 rounded once."""
    n, k = q.shape
    rows = x.numel() // k if k else 0
    if not _served(x, k, q, n, bias):
        return reference.linear_int8(x, q, absmax, bias, threshold)
    q, absmax = q.contiguous(), absmax.contiguous()
    if rows > _FEW_ROWS:
        return many_rows(x, bias, n, k, lambda rows, out: _decode_int8(q[rows], absmax[rows], out))
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    x_MK = _rows_of(x, rows, k)
    tile = _tile(rows, -(-k // 16), 4 if rows == 1 else 2)
    _launch(
        _linear_int8_kernel,
        (-(-n // tile["N"]), -(-rows // tile["M"])),
        x,
        x_MK,
        q,
        absmax,
        bias,
        out,
        rows,
        n,
        k,
        x_MK.stride(0),
        GROUP=16,
        **tile,
    )
    return out


def linear_int8_t(g: Tensor, q: Tensor, absmax: Tensor) -> Tensor:
    n, k = q.shape
    if not _served(g, n, q, k):
        return reference.linear_int8_t(g, q, absmax)
    q, absmax = q.contiguous(), absmax.contiguous()
    return many_rows_t(g, n, k, lambda rows, out: _decode_int8(q[rows], absmax[rows], out))
