"""The CUDA backend: products with a quantized weight in CUDA C++, compiled for the GPU at hand when first wanted.

What is not served here (other dtypes, rows that are not whole blocks, more rows of x, an older GPU) is left to the
next backend, by returning ``NotImplemented``. Layouts are those of :mod:`fewbits.kernels.reference`.

Values of codes are rounded to x's dtype, products are exact, sums and scales in fp32, and the output is rounded once.
The same inputs give the same bits every time.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

import fewbits.kernels.nvrtc as nvrtc
from fewbits.errors import FewbitsWarning
from fewbits.kernels.codebooks import codebook
from fewbits.kernels.nvrtc import CudaError, Kernel

DEVICE_TYPES = ("cuda",)

_WARPS = 16  # of decode.cu
_CHUNK = 64  # bytes of a row that a warp takes at a time
_TABLE = 65536  # bytes of its table of pairs
_FEW_ROWS = 16
_DECODE_ARGUMENTS = "9Pq4i"
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


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin - 2048  # less what is static


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
        # slots of the ring (measured on an H200): four pay where a tile's are a multiple, constants to the compiler
        stages = 4 if tiles == 1 and slots % 4 == 0 and chunks <= 4 else 3
        stages = min(stages, slots + 1)
        shared = (_TABLE if bits == 4 else 0) + _WARPS * stages * 1024 + scales + partials
        if shared > room:
            continue
        rounds = -(-n // (rows * processors))
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
    try:
        made = nvrtc.kernel("decode.cu", defines, device, _DECODE_ARGUMENTS, 32 * _WARPS, shared)
    except CudaError as error:
        warnings.warn(f"a kernel cannot be made, a slower one runs instead: {error}", FewbitsWarning, stacklevel=2)
        return None
    return made, min(-(-n // (16 * row_tiles)), processors)


def _served(x: Tensor, packed: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype in _DTYPES
        and packed.get_device() == x.get_device()
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
        and (bias is None or bias.dtype is x.dtype or bias.dtype is torch.float32)
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
) -> Any:
    n, k = shape
    rows = x.numel() // k if k else 0
    if not (n and 0 < rows <= _FEW_ROWS and _served(x, packed, bias)):
        return NotImplemented
    dtype, device, index = x.dtype, x.device, x.get_device()
    tiles = 1 if rows <= 8 else 2
    plan = _decode(n, k, tiles, dtype is torch.bfloat16, 4, block_size, nested_absmax is not None, index)
    if plan is None:
        return NotImplemented
    nested: tuple[Any, ...] = (0, 0, 0)
    if nested_absmax is not None and nested_offset is not None:
        nested_absmax = nested_absmax.contiguous()
        nested = nested_absmax.data_ptr(), nested_offset.data_ptr(), codebook("dynamic", device).data_ptr()
    return _run_decode(plan, x, packed, absmax, (*nested, _pairs(format, dtype, device).data_ptr()), bias, rows, n, k)


def linear_int8(x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Any:
    """As Triton's: x keeps its own precision, so that no column is an outlier and ``threshold`` has no effect."""
    n, k = q.shape
    rows = x.numel() // k if k else 0
    if not (n and 0 < rows <= _FEW_ROWS and _served(x, q, bias)):
        return NotImplemented
    plan = _decode(n, k, 1 if rows <= 8 else 2, x.dtype is torch.bfloat16, 8, 64, False, x.get_device())
    if plan is None:
        return NotImplemented
    return _run_decode(plan, x, q, absmax, (0, 0, 0, 0), bias, rows, n, k)


def _run_decode(
    plan: tuple[Kernel, int],
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    tables: tuple[int, ...],
    bias: Tensor | None,
    rows: int,
    n: int,
    k: int,
) -> Tensor:
    kernel, blocks = plan
    x_MK = x.reshape(rows, k)
    if x_MK.stride(1) != 1 or x_MK.stride(0) % 8 or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    absmax = _aligned(absmax)
    bias_pointer = bias_bytes = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_pointer, bias_bytes = bias.data_ptr(), bias.element_size()
    arguments = (
        packed.data_ptr(), absmax.data_ptr(), *tables, x_MK.data_ptr(), bias_pointer, out.data_ptr(), x_MK.stride(0),
        rows, n, k, bias_bytes,
    )  # fmt: skip
    _launch(kernel, x.get_device(), blocks, 1, arguments)
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
