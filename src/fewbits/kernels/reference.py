"""The reference backend: every operator in plain torch, on any device, readable before fast.

Sums are in fp32 and rounded once, at the end; on an accelerator the 16-bit products go through its matrix units, whose
accumulation is fp32 too. Work is cut into pieces, so that a temporary never grows with the weight.

4-bit (``format`` is "nf4" or "fp4"; W has n elements, blocks run over the flattened W):
    packed  uint8 [(n+1)//2]           element 2i in the high nibble
    absmax  fp32 [ceil(n/block)]       or, with double quantization, uint8 codes of the dynamic map,
    nested_absmax fp32 [ceil(len(absmax)/256)] and nested_offset fp32 []:
            absmax = dynamic[codes] * nested_absmax[block of 256] + nested_offset
    W = value[code] * absmax

8-bit, LLM.int8() (Dettmers et al., 2022):
    q       int8 [..., N, K],  absmax fp32 [..., N]:   W = q * absmax / 127
    x @ W.T = (int32(x_1 @ q.T) + int32(x_2 @ q.T) / 254) * x_absmax * absmax / 127²  +  x[:, out] @ W[:, out].T
    where x * 127 / x_absmax = x_1 + x_2 / 254 by row, without the outlier columns ``out``, those with any
    |x| >= threshold. The paper stops at x_1. A second 8-bit digit makes the product as accurate as 16-bit activations
    are, for one more integer product: what is left is the rounding of the weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.codebooks import codebook, decision_rule, pair_table

NESTED_BLOCK = 256  # scales per second-level scale; fixed by the format
_TINY = 1e-38  # bitsandbytes' floor under a divisor, so that an all-zero block stays finite


def _piece(device: torch.device) -> int:
    """Elements worked on at a time: 4 MiB of fp32 on a CPU, where caches matter, 256 MiB on an accelerator."""
    return 1 << 20 if device.type == "cpu" else 1 << 26


# ------------------------------------------------------------------------------------------------- quantizing


def _normalize(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x / absmax by blocks, in [-1, 1], and absmax. ``flat``: fp32 [n]."""
    n = flat.numel()
    whole = n - n % block_size
    blocks = flat[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1).view(-1)
    if whole < n:
        tail = flat[whole:]
        if flat.device.type == "cpu":  # bitsandbytes divides here, and only here; CUDA treats the tail as a block
            last = tail.abs().amax().clamp(min=_TINY)
            scaled_tail = tail / last
        else:
            last = tail.abs().amax()
            scaled_tail = tail * (1.0 / last.clamp(min=_TINY))
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, scaled_tail.clamp_(-1, 1)])
    return scaled, absmax


def _nearest(scaled: Tensor, table: str) -> Tensor:
    """uint8 codes of the table's nearest values."""
    bounds, codes = decision_rule(table, scaled.device)
    if scaled.device.type == "cpu" and len(bounds) < 16:
        # a sum of comparisons: a third of the time of torch's binary search
        position = torch.zeros(scaled.shape, dtype=torch.uint8)
        above = torch.empty(scaled.shape, dtype=torch.bool)
        for bound in bounds.tolist():
            position += torch.gt(scaled, bound, out=above)
    else:
        position = torch.bucketize(scaled, bounds, out_int32=True)
    return position.to(torch.uint8) if table != "fp4" else codes[position.int()]


def quantize_4bit(w: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    flat = w.reshape(-1)
    step = max(_piece(w.device) // (2 * block_size), 1) * 2 * block_size  # whole bytes and whole blocks
    packed, absmax = [], []
    for start in range(0, flat.numel(), step):
        scaled, piece_absmax = _normalize(flat[start : start + step].float(), block_size)
        if scaled.numel() % 2:
            scaled = F.pad(scaled, (0, 1))  # the unused last nibble holds the code of zero
        code = _nearest(scaled, format)
        packed.append((code[::2] << 4) | code[1::2])
        absmax.append(piece_absmax)
    if not packed:
        return w.new_empty(0, dtype=torch.uint8), w.new_empty(0, dtype=torch.float32)
    return torch.cat(packed), torch.cat(absmax)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    flat = (absmax - offset).view(-1)
    n = flat.numel()
    blocks = F.pad(flat, (0, -n % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / nested)[:, None]).view(-1)[:n]
    scaled = scaled.nan_to_num_(-1.0)  # 0 / 0, every scale equal to the mean: bitsandbytes writes code 0
    if absmax.device.type == "cpu":
        # bitsandbytes' CPU code looks the value up in a table of 65536 steps over [-1, 1] instead of comparing it
        scaled = ((scaled + 1) * 32767.5 + 0.5).floor().clamp_(0, 65535) * 2 / 65535 - 1
    return _nearest(scaled, "dynamic"), nested, offset


def _int8_scale(absmax: Tensor) -> Tensor:
    """127 / absmax, rounded as bitsandbytes rounds it: on a GPU by the approximate division of the hardware."""
    if absmax.device.type != "cuda":
        return 127.0 / absmax
    result: Tensor = _fast_division()(absmax)
    return result


@functools.lru_cache(maxsize=1)
def _fast_division() -> Any:
    source = "template <typename T> T int8_scale(T absmax) { return __fdividef(127.0f, absmax); }"
    return torch.cuda.jiterator._create_jit_fn(source)


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    rows = w.reshape(-1, w.shape[-1])
    q = torch.empty(rows.shape, dtype=torch.int8, device=w.device)
    absmax = torch.empty(rows.shape[0], dtype=torch.float32, device=w.device)
    step = max(_piece(w.device) // max(w.shape[-1], 1), 1)
    for start in range(0, rows.shape[0], step):
        half = rows[start : start + step].half()  # the format quantizes what fp16 holds
        piece_absmax = half.abs().amax(dim=1).float()
        scaled = torch.round(half * _int8_scale(piece_absmax)[:, None])
        q[start : start + step] = scaled.nan_to_num_(0.0).to(torch.int8)  # 0 / 0: an all-zero row
        absmax[start : start + step] = piece_absmax
    return q.view(w.shape), absmax.view(w.shape[:-1])


# ------------------------------------------------------------------------------------------------- dequantizing


def decode_absmax(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """fp32 scales in the shape of ``absmax``, whatever they are stored as."""
    if nested_absmax is None or nested_offset is None:
        return absmax
    values = codebook("dynamic", absmax.device)[absmax.reshape(-1).int()]
    values = F.pad(values, (0, -values.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK) * nested_absmax[:, None]
    return (values.view(-1)[: absmax.numel()] + nested_offset).view(absmax.shape)


def _decode_4bit(packed: Tensor, absmax: Tensor, format: str, block_size: int, n: int) -> Tensor:
    """fp32 [n] from flat ``packed`` and flat fp32 ``absmax``."""
    values = pair_table(format, packed.device).index_select(0, packed.int()).view(torch.float32)
    whole = n - n % block_size
    if whole == n:
        return values.view(-1, block_size).mul_(absmax[:, None]).view(-1)
    values[:whole].view(-1, block_size).mul_(absmax[:-1, None])
    values[whole:].mul_(absmax[-1])
    return values[:n]


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
    n = math.prod(shape)
    scales = decode_absmax(absmax, nested_absmax, nested_offset).reshape(-1)
    packed = packed.reshape(-1)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    step = max(_piece(packed.device) // (2 * block_size), 1) * 2 * block_size
    for start in range(0, n, step):
        count = min(step, n - start)
        blocks = slice(start // block_size, -(-(start + count) // block_size))
        piece = packed[start // 2 : (start + count + 1) // 2]
        out[start : start + count] = _decode_4bit(piece, scales[blocks], format, block_size, count)
    return out.view(shape)


def dequantize_int8(q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    rows, flat, scale = q.reshape(-1, q.shape[-1]), out.view(-1, q.shape[-1]), absmax.reshape(-1, 1) * (1 / 127)
    step = max(_piece(q.device) // max(q.shape[-1], 1), 1)
    for start in range(0, rows.shape[0], step):
        piece = slice(start, start + step)
        flat[piece] = rows[piece] * scale[piece]
    return out


# ------------------------------------------------------------------------------------------------- products


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32 on a CPU; on an accelerator the dtype of x, whose matrix units sum 16-bit products in fp32."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def _row_pieces(shape: list[int], block_size: int, device: torch.device) -> list[slice]:
    """Row ranges of an [N, K] weight that begin and end on a block and a byte; one range if rows do not align."""
    rows, columns = shape
    if rows * columns == 0 or columns % block_size:
        return [slice(0, rows)]
    step = max(_piece(device) // columns, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _weight_rows(
    rows: slice, packed: Tensor, scales: Tensor, format: str, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    columns = shape[1]
    first, last = rows.start * columns, rows.stop * columns
    piece = packed[first // 2 : (last + 1) // 2]
    piece_scales = scales[first // block_size : -(-last // block_size)]
    return dequantize_4bit(
        piece, piece_scales, None, None, format, block_size, [rows.stop - rows.start, columns], dtype
    )


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
    x_MK = x.reshape(math.prod(x.shape[:-1]), shape[1]).to(_accumulation_dtype(x))
    scales, flat = decode_absmax(absmax, nested_absmax, nested_offset).reshape(-1), packed.reshape(-1)
    out_MN = x_MK.new_empty(x_MK.shape[0], shape[0])
    for rows in _row_pieces(shape, block_size, x.device):
        w_NK = _weight_rows(rows, flat, scales, format, block_size, shape, x_MK.dtype)
        out_MN[:, rows] = F.linear(x_MK, w_NK, None if bias is None else bias[rows].to(x_MK.dtype))
    return out_MN.to(x.dtype).view(*x.shape[:-1], shape[0])


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
    g_MN = g.reshape(math.prod(g.shape[:-1]), shape[0]).to(_accumulation_dtype(g))
    scales, flat = decode_absmax(absmax, nested_absmax, nested_offset).reshape(-1), packed.reshape(-1)
    out_MK = g_MN.new_zeros(g_MN.shape[0], shape[1])
    for rows in _row_pieces(shape, block_size, g.device):
        out_MK.addmm_(g_MN[:, rows], _weight_rows(rows, flat, scales, format, block_size, shape, g_MN.dtype))
    return out_MK.to(g.dtype).view(*g.shape[:-1], shape[1])


def _int8_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """int8 [M, K] @ int8 [N, K].T, exact, int32 or fp32 [M, N]."""
    if a_MK.device.type == "cpu" and a_MK.shape[1] > 1:  # with K = 1 torch's CPU product is wrong (torch 2.13)
        return torch._int_mm(a_MK, b_NK.t())
    if a_MK.device.type == "cuda":  # cuBLASLt wants more than 16 rows, and K and N that 8 divides
        m, n, k = a_MK.shape[0], b_NK.shape[0], a_MK.shape[1]
        a_MK = F.pad(a_MK, (0, -k % 8, 0, max(0, 32 - m)))
        b_NK = F.pad(b_NK, (0, -k % 8, 0, -n % 8))
        return torch._int_mm(a_MK, b_NK.t())[:m, :n]
    return a_MK.float() @ b_NK.float().t()  # within 2^-24 of exact


def linear_int8(x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    n, k = q.shape
    x_MK = x.reshape(math.prod(x.shape[:-1]), k).float()
    if not x_MK.numel() or not n:
        out_MN = x_MK.new_zeros(x_MK.shape[0], n)
        return (out_MN if bias is None else out_MN + bias).to(x.dtype).view(*x.shape[:-1], n)
    outlier_K = (x_MK.abs() >= threshold).any(dim=0) if threshold > 0 else None
    inner_MK = x_MK if outlier_K is None else x_MK.masked_fill(outlier_K, 0.0)
    x_absmax_M = inner_MK.abs().amax(dim=1, keepdim=True)
    scaled_MK = inner_MK * (127.0 / x_absmax_M.clamp(min=_TINY))
    first_MK = torch.round(scaled_MK)
    second_MK = torch.round((scaled_MK - first_MK) * 254.0)
    out_MN = _int8_product(second_MK.to(torch.int8), q) / 254.0
    out_MN += _int8_product(first_MK.to(torch.int8), q)
    out_MN *= x_absmax_M * (absmax * (1 / (127 * 127)))
    if outlier_K is not None:
        scale_N = absmax * (1 / 127)
        if x.device.type == "cpu":
            columns = outlier_K.nonzero().view(-1)
            if columns.numel():
                out_MN += (x_MK[:, columns] @ q[:, columns].t().float()) * scale_N
        else:  # no host synchronisation: the whole product, of a masked x
            masked_MK = (x_MK * outlier_K).to(x.dtype)
            out_MN += (masked_MK @ q.t().to(x.dtype)).float() * scale_N
    if bias is not None:
        out_MN += bias
    return out_MN.to(x.dtype).view(*x.shape[:-1], n)


def linear_int8_t(g: Tensor, q: Tensor, absmax: Tensor) -> Tensor:
    n, k = q.shape
    g_MN = g.reshape(math.prod(g.shape[:-1]), n).float() * (absmax * (1 / 127))
    dtype = _accumulation_dtype(g)
    out_MK = g_MN.new_zeros(g_MN.shape[0], k, dtype=dtype)
    step = max(_piece(g.device) // max(k, 1), 1)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        out_MK.addmm_(g_MN[:, rows].to(dtype), q[rows].to(dtype))
    return out_MK.to(g.dtype).view(*g.shape[:-1], k)


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
) -> Tensor:
    columns = shape[1]
    if columns % block_size:  # rows share blocks: decode the whole table
        table = dequantize_4bit(packed, absmax, nested_absmax, nested_offset, format, block_size, shape, dtype)
        return F.embedding(ids, table)
    rows = ids.reshape(-1)
    codes = packed.view(shape[0], -1)[rows]
    scales = absmax.view(shape[0], -1)[rows]
    if nested_absmax is not None and nested_offset is not None:
        per_row = columns // block_size
        block = rows[:, None] * per_row + torch.arange(per_row, device=rows.device)
        nested = nested_absmax[block // NESTED_BLOCK]
        scales = codebook("dynamic", absmax.device)[scales.int()] * nested + nested_offset
    out = _decode_4bit(codes.reshape(-1), scales.reshape(-1), format, block_size, rows.numel() * columns)
    return out.to(dtype).view(*ids.shape, columns)


def embedding_int8(ids: Tensor, q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return (q[ids] * (absmax[ids] * (1 / 127))[..., None]).to(dtype)
