"""Products with many rows: the weight is dequantized in pieces that stay in the cache, and multiplied by torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.reference import _accumulation_dtype

Decode = Callable[[slice, Tensor], object]  # rows of a weight, and where they go in floating point

_SUMMED = 256 << 20  # bytes of a piece whose product is a part of a sum: in 16 bits each part is rounded once more


@functools.cache
def _scratch_bytes(device: torch.device, rows: int) -> int:
    """Of a dequantized piece of a weight.

    With many rows of x it shall about stay in the L2 cache from being written to being read. With fewer, products of
    small pieces leave matrix units idle, which costs more (measured on an H200, at 512 and 2048 rows).
    """
    if rows < 1024 or device.type != "cuda":
        return 128 << 20
    properties: Any = torch.cuda.get_device_properties(device)
    return max(int(properties.L2_cache_size * 1.2), 32 << 20)


def pieces(
    n: int, k: int, rows: int, dtype: torch.dtype, device: torch.device, aligned: bool = True, limit: int | None = None
) -> list[slice]:  # fmt: skip
    """Rows of a weight [n, k], about as many in each piece; all in one if they are not whole blocks.

    ``rows``: of x. ``limit``: bytes of a piece, by default what suits so many rows.
    """
    limit = _scratch_bytes(device, min(rows, 1024)) if limit is None else limit
    count = -(-n * k * dtype.itemsize // limit) if aligned else 1
    step = -(-n // max(count, 1))
    step = min(-(-step // 128) * 128, n)  # matrix units work on tiles
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def many_rows(
    x: Tensor, bias: Tensor | None, n: int, k: int, decode: Decode, *, aligned: bool = True
) -> Tensor:  # fmt: skip
    """x [..., k] times a weight [n, k] of which ``decode`` writes rows; ``aligned``: rows are whole blocks."""
    x_MK = x.reshape(-1, k).to(_accumulation_dtype(x))
    dtype, device = x_MK.dtype, x.device
    bias_N = None if bias is None else bias.to(dtype)
    parts = pieces(n, k, x_MK.shape[0], dtype, device, aligned)
    scratch = torch.empty(parts[0].stop, k, dtype=dtype, device=device)
    if len(parts) == 1:
        decode(parts[0], scratch)
        return F.linear(x_MK, scratch, bias_N).to(x.dtype).view(*x.shape[:-1], n)
    out_MN = torch.empty(x_MK.shape[0], n, dtype=dtype, device=device)
    for rows in parts:
        w_NK = scratch[: rows.stop - rows.start]
        decode(rows, w_NK)
        if bias_N is None:
            torch.mm(x_MK, w_NK.t(), out=out_MN[:, rows])
        else:
            torch.addmm(bias_N[rows], x_MK, w_NK.t(), out=out_MN[:, rows])
    return out_MN.to(x.dtype).view(*x.shape[:-1], n)


def many_rows_t(g: Tensor, n: int, k: int, decode: Decode, *, aligned: bool = True) -> Tensor:
    """g [..., n] times a weight [n, k] of which ``decode`` writes rows; ``aligned``: rows are whole blocks."""
    g_MN = g.reshape(-1, n).to(_accumulation_dtype(g))
    parts = pieces(n, k, g_MN.shape[0], g_MN.dtype, g.device, aligned, _SUMMED)
    scratch = torch.empty(parts[0].stop, k, dtype=g_MN.dtype, device=g.device)
    out_MK = None
    for rows in parts:
        w_NK = scratch[: rows.stop - rows.start]
        decode(rows, w_NK)
        out_MK = g_MN[:, rows] @ w_NK if out_MK is None else out_MK.addmm_(g_MN[:, rows], w_NK)
    assert out_MK is not None
    return out_MK.to(g.dtype).view(*g.shape[:-1], k)
