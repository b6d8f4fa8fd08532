"""The CUDA backend: products with a quantized weight in CUDA C++, compiled for the GPU at hand when first wanted.

What is not served here (other dtypes, rows that are not whole blocks, more rows of x, an older GPU) is left to the
next backend, by returning ``NotImplemented``. Layouts are those of :mod:`fewbits.kernels.reference`.

4 bits: up to 64 rows of x (256 with small weights), values of codes are rounded to x's dtype, products are exact, sums
and scales in fp32, and the output is rounded once; with more rows it is the weight that is rounded, and from some point
on torch multiplies.
8 bits: up to 32 rows the weight alone is quantized; with more, x is as well (LLM.int8(), where its threshold
is above 0), products and sums are exact, and the output is rounded once; unless more than 16 columns have outliers:
then the weight alone is again. The same inputs give the same bits every time.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fewbits.kernels.cuda_plans as plans
import fewbits.kernels.cuda_shapes as shapes
import fewbits.kernels.nvrtc as nvrtc
import fewbits.kernels.ways as ways
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.kernels.nvrtc import CudaError, Kernel
from fewbits.kernels.pieces import many_rows, many_rows_t
from fewbits.kernels.reference import NESTED_BLOCK

DEVICE_TYPES = ("cuda",)

_INT8_ROWS = 48  # of x, up to which a weight in 8 bits is rather read several times than dequantized
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


# ------------------------------------------------------------------------------------------------- dequantizing


def _dequantize_into(out: Tensor, packed: Tensor, scales: _Scales, format: str, block_size: int, first: int) -> None:
    """Into ``out`` elements ``first`` (a block's first, a multiple of 8) and following."""
    index, n = out.get_device(), out.numel()
    kernel = plans.dequantizer(out.dtype, block_size, scales.nested is not None, index)
    assert kernel is not None, "the caller has asked whether there is one"
    block = first // block_size
    values = codebook(format, out.device)
    absmax = scales.absmax.data_ptr() + block * scales.absmax.element_size()
    arguments = (
        packed.data_ptr() + first // 2, absmax, *scales.pointers(), values.data_ptr(), out.data_ptr(), block, n,
    )  # fmt: skip
    blocks = min(-(-n // (256 * 32)), 4 * shapes.limits(index)[0])
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
    if plans.dequantizer(dtype, block_size, nested_absmax is not None, packed.get_device()) is None:
        return NotImplemented
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _dequantize_into(out, _aligned(packed), _scales(absmax, nested_absmax, nested_offset), format, block_size, 0)
    return out


# ------------------------------------------------------------------------------------------------- rows


def embedding_4bit(
    ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Any:
    scales = _scales(absmax, nested_absmax, nested_offset)
    tables = *scales.pointers(), codebook(format, packed.device).data_ptr()
    kind = ("FORMAT_BLOCK", block_size), ("NESTED", int(nested_absmax is not None))
    return _embedding(ids, packed, scales.absmax, tables, (("BITS", 4), *kind), shape, dtype)


def embedding_int8(ids: Tensor, q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Any:
    return _embedding(ids, q, absmax.contiguous(), (0, 0, 0, 0), (("BITS", 8),), list(q.shape), dtype)


def _embedding(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    tables: tuple[int, ...],
    kind: tuple[tuple[str, int], ...],
    shape: list[int],
    dtype: torch.dtype,
) -> Any:
    (n, k), count, index = shape, ids.numel(), packed.get_device()
    if not (count and n and k) or k % 8 or dtype not in (*_DTYPES, torch.float32) or ids.get_device() != index:
        return NotImplemented
    defines = *kind, ("OUT", dtype.itemsize), ("BF16", int(dtype is torch.bfloat16))
    kernel = plans.made("embedding.cu", defines, index, "8Pq2i", 256, 0)
    if kernel is None:
        return NotImplemented
    ids, packed = ids.to(torch.int64).contiguous(), _aligned(packed)
    out = torch.empty((*ids.shape, k), dtype=dtype, device=packed.device)
    arguments = ids.data_ptr(), packed.data_ptr(), scales.data_ptr(), *tables, out.data_ptr(), count, n, k
    _launch(kernel, index, min(-(-count * k // (256 * 8)), 16 * shapes.limits(index)[0]), 1, arguments)
    return out


# ------------------------------------------------------------------------------------------------- quantizing


def quantize_4bit(w: Tensor, format: str, block_size: int) -> Any:
    n = w.numel()
    # fp4's bounds lie too close; long blocks are no warp's
    if not n or n % 8 or format != "nf4" or block_size > 256 or w.dtype not in (*_DTYPES, torch.float32):
        return NotImplemented
    index = w.get_device()
    defines = ("IN", w.element_size()), ("BF16", int(w.dtype is torch.bfloat16)), ("FORMAT_BLOCK", block_size)
    kernel = plans.made("quantize_4bit.cu", defines, index, "4Pq", 256, 0)
    if kernel is None:
        return NotImplemented
    w = _aligned(w)
    packed = torch.empty(n // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    arguments = w.data_ptr(), plans.buckets(w.device).data_ptr(), packed.data_ptr(), absmax.data_ptr(), n
    _launch(kernel, index, min(-(-n // (256 * 32)), 8 * shapes.limits(index)[0]), 1, arguments)
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> Any:
    n, index = absmax.numel(), absmax.get_device()
    kernel = plans.made("quantize_absmax.cu", (("BF16", 1),), index, "5Pq", 256, 0) if n else None
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


def _served(x: Tensor, columns: int, packed: Tensor, bias: Tensor | None, n: int) -> bool:
    return (
        x.dtype in _DTYPES
        and x.shape[-1] == columns
        and packed.get_device() == x.get_device()
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
        and (bias is None or _is_bias(bias, x, n))
    )


def _is_bias(bias: Tensor, x: Tensor, n: int) -> bool:
    """Whether the kernels add it; torch says what is wrong with one that lies elsewhere."""
    alike = bias.dtype is x.dtype or bias.dtype is torch.float32
    return alike and bias.shape == (n,) and bias.get_device() == x.get_device()


class _Few(NamedTuple):
    """A product with few rows of x as far as shapes, dtypes and the GPU decide it: one launch of decode.cu."""

    kernel: Kernel
    blocks: int
    codes_of_scales: int  # pointers to tables, which stay where they are
    pairs: int
    rows: int
    out_shape: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _few(
    x_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    format: str,
    block_size: int,
    nested: bool,
    n: int,
    k: int,
    generation: int,  # of the table of ways
) -> _Few | None:
    """How x is multiplied, where the table of ways says decode.cu for its rows and one launch does it.

    With few rows a call takes the host longer than the GPU, so what is the same for every call, and for every layer of
    a shape, is found once.
    """
    rows, index = math.prod(x_shape) // k if k else 0, -1 if device.index is None else device.index
    kind, bits = ("int8", 8) if format == "int8" else ("4-bit", 4)
    if dtype not in _DTYPES or x_shape[-1] != k or not (n and 0 < rows <= shapes.FEW_ROWS):
        return None
    if k * dtype.itemsize % 16 or ways.ways(kind, n, k, rows, index, shapes.quickest)[0] != "decode":
        return None
    found = plans.decode(n, k, rows, dtype is torch.bfloat16, bits, block_size, nested, index)
    if found is None:
        return None
    codes_of_scales = codebook("dynamic", device).data_ptr() if nested else 0
    pairs = 0 if bits == 8 else plans.pairs(format, dtype, device).data_ptr()
    return _Few(*found, codes_of_scales, pairs, rows, (*x_shape[:-1], n))


def _run_few(
    few: _Few,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    k: int,
) -> Any:
    """The product; ``NotImplemented`` where a tensor does not lie as the kernel reads it."""
    index, n = x.get_device(), few.out_shape[-1]
    x_at, packed_at, absmax_at = x.data_ptr(), packed.data_ptr(), absmax.data_ptr()
    if (
        (x_at | packed_at | absmax_at) & 15
        or packed.get_device() != index
        or not (x.is_contiguous() and packed.is_contiguous() and absmax.is_contiguous())
    ):
        return NotImplemented
    nested_at = offset_at = bias_at = bias_bytes = 0
    if nested_absmax is not None and nested_offset is not None:
        if not nested_absmax.is_contiguous():
            return NotImplemented
        nested_at, offset_at = nested_absmax.data_ptr(), nested_offset.data_ptr()
    if bias is not None:
        if not (_is_bias(bias, x, n) and bias.is_contiguous()):
            return NotImplemented
        bias_at, bias_bytes = bias.data_ptr(), bias.element_size()
    out = x.new_empty(few.out_shape)
    arguments = (
        packed_at, absmax_at, nested_at, offset_at, few.codes_of_scales, few.pairs, x_at, bias_at, out.data_ptr(),
        k, few.rows, n, k, bias_bytes,
    )  # fmt: skip
    _launch(few.kernel, index, few.blocks, 1, arguments)
    return out


class _Product(NamedTuple):
    """x [..., k] by a weight [n, k] in 4 bits."""

    x: Tensor
    packed: Tensor
    scales: _Scales
    bias: Tensor | None
    format: str
    block_size: int
    n: int
    k: int
    rows: int

    def kind(self) -> tuple[bool, int, bool, int]:
        """What variants of kernels differ by, and the GPU."""
        x = self.x
        return x.dtype is torch.bfloat16, self.block_size, self.scales.nested is not None, x.get_device()

    def run(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        x: _Rows,
        table: Tensor,
        more: tuple[float, ...] = (),
        maps: tuple[bytes, ...] = (),
    ) -> Tensor:
        out = self.x.new_empty((*self.x.shape[:-1], self.n))
        tables = *self.scales.pointers(), table.data_ptr()
        absmax = self.scales.absmax
        return _run(kernel, *grid, x, out, self.packed, absmax, tables, self.bias, self.n, self.k, more, maps)


def _decode_4bit(product: _Product) -> Any:
    bf16, block_size, nested, index = product.kind()
    found = plans.decode(product.n, product.k, product.rows, bf16, 4, block_size, nested, index)
    if found is None:
        return NotImplemented
    table = plans.pairs(product.format, product.x.dtype, product.x.device)
    return product.run(found[0], (found[1], 1), _rows(product.x, product.k), table)


def _skinny_4bit(product: _Product) -> Any:
    bf16, block_size, nested, index = product.kind()
    skinny = plans.skinny(product.rows, product.n, product.k, bf16, block_size, nested, index)
    if skinny is None:
        return NotImplemented
    device, x_tiles = product.x.device, -(-product.rows // skinny.tile_m)
    sums = torch.empty(x_tiles * skinny.parts * skinny.rows * skinny.tile_m, dtype=torch.float32, device=device)
    counters = plans.counters_for(device, torch._C._cuda_getCurrentRawStream(index), x_tiles * skinny.tiles)
    table = plans.pairs(product.format, product.x.dtype, device)
    more = sums.data_ptr(), counters.data_ptr()
    n, k, x = product.n, product.k, _rows(product.x, product.k)
    maps = (
        nvrtc.tensor_map(x.pointer, 2, product.rows, k, x.stride * 2, skinny.tile_m, 64),
        nvrtc.tensor_map(product.packed.data_ptr(), 1, n, k // 2, k // 2, skinny.rows, 64),
    )
    return product.run(skinny.kernel, (skinny.blocks, x_tiles), x, table, more, maps)


def _wide_4bit(product: _Product) -> Any:
    bf16, block_size, nested, index = product.kind()
    n, k, rows, device = product.n, product.k, product.rows, product.x.device
    wide = plans.wide(rows, n, k, bf16, 4, block_size, nested, index)
    if wide is None:
        return NotImplemented
    x = _rows(product.x, k)
    maps = (
        nvrtc.tensor_map(x.pointer, 2, rows, k, x.stride * 2, wide.shape.tile_m, 64),
        nvrtc.tensor_map(product.packed.data_ptr(), 1, n, k // 2, k // 2, wide.rows, 32),
    )
    sums, counters = wide.memory(device)
    table = plans.value_table(product.format, bf16, wide.shape.warpgroups == 2, device)
    more = sums.data_ptr(), counters.data_ptr(), table.scale, table.shift
    return product.run(wide.kernel, (wide.blocks, 1), x, table.entries, more, maps)


def _dequantize_and_multiply(product: _Product) -> Any:
    x, packed, scales, bias, format, block_size, n, k, _ = product
    if k % max(block_size, 8) or plans.dequantizer(x.dtype, block_size, product.kind()[2], x.get_device()) is None:
        return NotImplemented
    return many_rows(
        x, bias, n, k, lambda part, out: _dequantize_into(out, packed, scales, format, block_size, part.start * k)
    )


_WAYS_4BIT = {
    "decode": _decode_4bit, "skinny": _skinny_4bit, "wide": _wide_4bit, "dequantize": _dequantize_and_multiply,
}  # fmt: skip


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
    nested = nested_absmax is not None
    few = _few(x.shape, x.dtype, x.device, format, block_size, nested, n, k, ways.generation)
    if few is not None:
        out = _run_few(few, x, packed, absmax, nested_absmax, nested_offset, bias, k)
        if out is not NotImplemented:
            return out
    rows = x.numel() // k if k else 0
    if not (n and rows and _served(x, k, packed, bias, n)):
        return NotImplemented
    scales = _scales(absmax, nested_absmax, nested_offset)
    product = _Product(x, packed, scales, bias, format, block_size, n, k, rows)
    for way in ways.ways("4-bit", n, k, rows, x.get_device(), shapes.quickest):
        out = _WAYS_4BIT[way](product)
        if out is not NotImplemented:
            return out
    return NotImplemented


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
    if plans.dequantizer(dtype, block_size, nested_absmax is not None, index) is None:
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
    few = _few(x.shape, x.dtype, x.device, "int8", 64, False, n, k, ways.generation)
    if few is not None:
        out = _run_few(few, x, q, absmax, None, None, bias, k)
        if out is not NotImplemented:
            return out
    rows = x.numel() // k if k else 0
    if not (n and rows and _served(x, k, q, bias, n)):
        return NotImplemented
    bf16, index = x.dtype is torch.bfloat16, x.get_device()
    absmax = _aligned(absmax)
    for way in ways.ways("int8", n, k, rows, index, shapes.quickest):
        wide = plans.wide(rows, n, k, bf16, 8, 64, False, index) if way == "wide" and threshold > 0 else None
        if wide is not None:
            return _linear_of_quantized(wide, x, q, absmax, bias, threshold)
        if way == "decode" or (way == "dequantize" and rows <= _INT8_ROWS):
            return _decode_int8(x, q, absmax, bias, n, k, rows)
    return NotImplemented


def _decode_int8(x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, n: int, k: int, rows: int) -> Any:
    """The weight is read once for each 32 rows."""
    bf16, index, most = x.dtype is torch.bfloat16, x.get_device(), shapes.FEW_ROWS
    out, all_rows = x.new_empty((*x.shape[:-1], n)), _rows(x, k)
    for first in range(0, rows, most):
        count = min(most, rows - first)
        plan = plans.decode(n, k, count, bf16, 8, 64, False, index)
        if plan is None:
            return NotImplemented
        part, part_out = all_rows, out
        if rows > most:
            pointer = all_rows.pointer + first * all_rows.stride * x.element_size()
            part, part_out = all_rows._replace(pointer=pointer, rows=count), out.view(rows, n)[first : first + count]
        _run(plan[0], plan[1], 1, part, part_out, q, absmax, (0, 0, 0, 0), bias, n, k)
    return out


def _linear_of_quantized(
    wide: plans.Wide, x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Any:
    """Rows of x are quantized and columns with outliers found, and then all multiplied: two launches."""
    (n, k), device, index = q.shape, x.device, x.get_device()
    from_x = _rows(x, k)
    rows, words = from_x.rows, -(-k // 32)
    quantize = plans.made(
        "quantize_rows.cu", (("BF16", int(x.dtype is torch.bfloat16)),), index, "5Pq2if", 256, words * 4
    )
    if quantize is None:
        return NotImplemented
    codes = torch.empty(rows, k, dtype=torch.int8, device=device)
    scales = torch.empty(-(-rows // wide.shape.tile_m) * wide.shape.tile_m, dtype=torch.float32, device=device)
    outliers = torch.empty(1 + k, dtype=torch.int32, device=device)
    sums, counters = wide.memory(device, 1 + words)
    arguments = (
        from_x.pointer, codes.data_ptr(), scales.data_ptr(), outliers.data_ptr(), counters.data_ptr(),
        from_x.stride, rows, k, threshold,
    )  # fmt: skip
    _launch(quantize, index, min(rows, 8 * shapes.limits(index)[0]), 1, arguments)
    more = (
        sums.data_ptr(), counters.data_ptr(), scales.data_ptr(), from_x.pointer, outliers.data_ptr(), from_x.stride
    )  # fmt: skip
    maps = (
        nvrtc.tensor_map(codes.data_ptr(), 1, rows, k, k, wide.shape.tile_m, 128),
        nvrtc.tensor_map(q.data_ptr(), 1, n, k, k, wide.rows, 128),
        nvrtc.tensor_map(from_x.pointer, 2, rows, k, from_x.stride * 2, wide.shape.tile_m, 64),
    )
    out = x.new_empty((*x.shape[:-1], n))
    quantized = _Rows(codes, codes.data_ptr(), k, rows)
    return _run(wide.kernel, wide.blocks, 1, quantized, out, q, absmax, (0, 0, 0, 0), bias, n, k, more, maps)


class _Rows(NamedTuple):
    """Rows of x as the kernels read them: each lies together, and begins at a multiple of 16 bytes."""

    tensor: Tensor  # whose memory it is
    pointer: int
    stride: int  # elements from a row to the next
    rows: int


def _rows(x: Tensor, k: int) -> _Rows:
    """Of x [..., k], which is copied where that is not how they lie."""
    item = x.element_size()
    if x.is_contiguous() and k * item % 16 == 0 and (pointer := x.data_ptr()) % 16 == 0:
        return _Rows(x, pointer, k, x.numel() // k)
    x_MK = x.reshape(-1, k)
    if x_MK.stride(1) != 1 or x_MK.stride(0) < k or x_MK.stride(0) * item % 16 or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    return _Rows(x_MK, x_MK.data_ptr(), x_MK.stride(0), x_MK.shape[0])


def _run(
    kernel: Kernel,
    grid_x: int,
    grid_y: int,
    x: _Rows,
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    tables: tuple[int, ...],
    bias: Tensor | None,
    n: int,
    k: int,
    more: tuple[float, ...] = (),
    maps: tuple[bytes, ...] = (),
) -> Tensor:
    bias_pointer = bias_bytes = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_pointer, bias_bytes = bias.data_ptr(), bias.element_size()
    arguments = (
        *maps, packed.data_ptr(), absmax.data_ptr(), *tables, x.pointer, bias_pointer, out.data_ptr(),
        x.stride, x.rows, n, k, bias_bytes, *more,
    )  # fmt: skip
    _launch(kernel, out.get_device(), grid_x, grid_y, arguments)
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernels read it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch(kernel: Kernel, device: int, grid_x: int, grid_y: int, arguments: tuple[Any, ...]) -> None:
    if device == torch._C._cuda_getDevice():
        kernel(torch._C._cuda_getCurrentRawStream(device), grid_x, grid_y, *arguments)
        return
    with torch.cuda.device(device):
        kernel(torch._C._cuda_getCurrentRawStream(device), grid_x, grid_y, *arguments)
