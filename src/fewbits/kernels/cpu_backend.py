"""The CPU backend: native kernels in C++, compiled with the package for several instruction sets, chosen as it runs.

They run on torch's own threads, as many as :func:`torch.get_num_threads` says, and without the GIL. ``FEWBITS_CPU``
(amx, avx512_bf16, avx512, avx2, neon, portable) forces an instruction set; without it the fastest is taken.
What is not served here (dtypes beside fp32, fp16 and bf16) is left to the reference, by returning ``NotImplemented``.

4 bits: values of codes and scales are fp32, sums are fp32, and the output is rounded once. With instructions for bf16,
and inputs in bf16, the weight is rounded to bf16.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import ConfigError
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.kernels.reference import NESTED_BLOCK, _nearest
from fewbits.memory import FilePart, uninitialized

DEVICE_TYPES = ("cpu",)

_LIBRARY = Path(__file__).with_name("cpu") / "libfewbits_cpu.so"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType of cpu/kernels.h
_CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------- the library


class NativeError(RuntimeError):
    """The native kernels are not there, or do not load."""


@functools.cache
def _library() -> ctypes.CDLL:
    if not _LIBRARY.exists():
        raise NativeError("the native kernels were not built, for want of a C++ compiler when fewbits was installed")
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        raise NativeError(f"the native kernels do not load: {error}") from error
    library.fewbits_level.restype = ctypes.c_char_p
    library.fewbits_level.argtypes = [ctypes.c_int64]
    library.fewbits_use_level.argtypes = [ctypes.c_char_p]
    library.fewbits_set_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.fewbits_set_threads.restype = None
    library.fewbits_set_threads(_torch_openmp("GOMP_parallel"), _torch_openmp("omp_in_parallel"))
    library.fewbits_best_level.restype = ctypes.c_char_p
    library.fewbits_best_level.argtypes = []
    _use_level(library, os.environ.get("FEWBITS_CPU") or library.fewbits_best_level().decode())
    return library


def _torch_openmp(name: str) -> int | None:
    """Address of a function of the OpenMP runtime that torch uses; None if it uses none, or one without it."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            # looked up in the libraries that this one, which is loaded already, was linked with
            return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _levels(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := library.fewbits_level(len(names))) is not None:
        names.append(name.decode())
    return names


def _use_level(library: ctypes.CDLL, name: str) -> None:
    global _level
    if library.fewbits_use_level(name.encode()) != 0:
        raise ConfigError(
            f"the native kernels cannot run as {name!r} here", expected=f"one of {', '.join(_levels(library))}"
        )
    _level = name


_level = ""


def level() -> str:
    """The instruction set in use."""
    _library()
    return _level


def check() -> None:
    """Raise if the native kernels cannot run here."""
    _library()


def levels() -> list[str]:
    """The instruction sets that the library was built for and this CPU has, those with more instructions first."""
    return _levels(_library())


@contextlib.contextmanager
def use_level(name: str) -> Iterator[None]:
    """Force an instruction set within a ``with`` block, for every thread."""
    library, before = _library(), _level
    _use_level(library, name)
    try:
        yield
    finally:
        _use_level(library, before)


@functools.cache
def _kernel(name: str, arguments: str) -> Any:
    """A kernel and how to write its struct, of 8-byte fields: P for pointers, q for integers, d for floats."""
    function = getattr(_library(), f"fewbits_{name}")
    function.argtypes = [ctypes.c_char_p]
    layout = struct.Struct(f"={arguments.replace('P', 'Q')}")
    return function, layout.pack


def _run(name: str, arguments: str, *values: Any) -> bool:
    """Whether the level in use has the kernel; if so it has run."""
    function, pack = _kernel(name, arguments)
    return bool(function(pack(*values, torch.get_num_threads())) == 0)


def _rows(x: Tensor, k: int) -> Tensor:
    """x [..., k] as rows, each of which lies together."""
    x_MK = x if x.dim() == 2 else x.reshape(-1, k)
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def _is_plain(tensor: Tensor, dtype: torch.dtype, count: int) -> bool:
    """Whether a kernel may read so many elements of the tensor: what does not fit is the reference's to refuse."""
    return tensor.is_cpu and tensor.dtype is dtype and tensor.numel() >= count


# ------------------------------------------------------------------------------------------------- 4 bits

_WEIGHT_4BIT = "6P3q"  # Weight4Bit of cpu/kernels.h


@functools.lru_cache(maxsize=16)
def _values(format: str) -> Tensor:
    return codebook(format, _CPU)


def _weight_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    block_size: int,
    shape: list[int],
) -> tuple[tuple[int, ...], tuple[Tensor, ...]] | None:
    """The fields of a Weight4Bit, and the tensors that must live as long as they are used; None if not served."""
    n, k = shape if len(shape) == 2 else (1, math.prod(shape))
    elements = n * k
    if not (
        block_size % 8 == 0
        and _is_plain(packed, torch.uint8, (elements + 1) // 2)
        and _is_plain(absmax, torch.float32 if nested_absmax is None else torch.uint8, -(-elements // block_size))
    ):
        return None
    values = _values(format)
    packed, absmax = packed.contiguous(), absmax.contiguous()
    if nested_absmax is None or nested_offset is None:
        fields = packed.data_ptr(), absmax.data_ptr(), 0, 0, 0, values.data_ptr(), block_size, n, k
        return fields, (packed, absmax)
    if not (
        _is_plain(nested_absmax, torch.float32, -(-absmax.numel() // NESTED_BLOCK))
        and _is_plain(nested_offset, torch.float32, 1)
    ):
        return None
    nested_absmax, dynamic = nested_absmax.contiguous(), _values("dynamic")
    fields = (
        packed.data_ptr(), absmax.data_ptr(), nested_absmax.data_ptr(), nested_offset.data_ptr(), dynamic.data_ptr(),
        values.data_ptr(), block_size, n, k,
    )  # fmt: skip
    return fields, (packed, absmax, nested_absmax, nested_offset)


def _product_4bit(
    op: str, x: Tensor, weight: tuple[tuple[int, ...], tuple[Tensor, ...]] | None, bias: Tensor | None, width: int
) -> Any:
    """x [..., K] to [..., width] by either product."""
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or weight is None or not x.is_cpu or not x.numel() or not width:
        return NotImplemented
    bias_pointer = bias_dtype = 0
    if bias is not None:
        if bias.dtype not in _DTYPES or not _is_plain(bias, bias.dtype, width):
            return NotImplemented
        bias = bias.contiguous()
        bias_pointer, bias_dtype = bias.data_ptr(), _DTYPES[bias.dtype]
    x_MK, out = _rows(x, x.shape[-1]), x.new_empty((*x.shape[:-1], width))
    product = x_MK.data_ptr(), x_MK.stride(0), x_MK.shape[0], dtype, bias_pointer, bias_dtype, out.data_ptr()
    return out if _run(op, f"{_WEIGHT_4BIT}P3qPqPq", *weight[0], *product) else NotImplemented


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
    if x.shape[-1] != k:
        return NotImplemented
    weight = _weight_4bit(packed, absmax, nested_absmax, nested_offset, format, block_size, shape)
    return _product_4bit("linear_4bit", x, weight, bias, n)


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
    if g.shape[-1] != n:
        return NotImplemented
    weight = _weight_4bit(packed, absmax, nested_absmax, nested_offset, format, block_size, shape)
    return _product_4bit("linear_4bit_t", g, weight, None, k)


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
    weight = _weight_4bit(packed, absmax, nested_absmax, nested_offset, format, block_size, shape)
    if dtype not in _DTYPES or weight is None:
        return NotImplemented
    out = uninitialized(shape, dtype)
    fields = *weight[0], out.data_ptr(), _DTYPES[dtype]
    return out if _run("dequantize_4bit", f"{_WEIGHT_4BIT}P2q", *fields) else NotImplemented


# ------------------------------------------------------------------------------------------------- quantizing


_SOURCE = "P3q"  # Source of cpu/kernels.h
_FOUND = struct.Struct("=f4xq")  # Found; of its first field, bits of fp32, the low half


def _source(w: Tensor | FilePart) -> tuple[int, ...]:
    if isinstance(w, Tensor):
        return w.data_ptr(), -1, 0, _DTYPES[w.dtype]
    return 0, w.file, w.offset, _DTYPES[w.dtype]


def _quantize(name: str, arguments: str, w: Tensor | FilePart, *values: Any) -> float:
    """Run a kernel that quantizes ``w``, and give its largest absolute value, NaN if it has one."""
    found = ctypes.create_string_buffer(_FOUND.size)
    done = _run(name, f"{_SOURCE}{arguments}Pq", *_source(w), *values, ctypes.addressof(found))
    assert done, "every level has it"
    largest, error = _FOUND.unpack(found.raw)
    if error:
        raise OSError(error, os.strerror(error)) if error > 0 else EOFError("the file ended")
    return float(largest)


def quantize_4bit_to(w: Tensor | FilePart, format: str, block_size: int, packed: Tensor, absmax: Tensor) -> float:
    """:func:`quantize_4bit` of a contiguous tensor or of what lies in a file, to tensors that are there.

    Gives the largest absolute value, NaN if there is one.

    Raises:
        OSError: the file cannot be read.
        EOFError: it ends before.
    """
    bounds, codes = decision_rule(format, _CPU)
    pointers = bounds.data_ptr(), codes.data_ptr(), packed.data_ptr(), absmax.data_ptr()
    return _quantize("quantize_4bit", "2q4P", w, w.numel(), block_size, *pointers)


def quantize_4bit(w: Tensor, format: str, block_size: int) -> Any:
    n = w.numel()
    if not n or w.dtype not in _DTYPES or block_size % 2:
        return NotImplemented
    packed = uninitialized(((n + 1) // 2,), torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=_CPU)
    quantize_4bit_to(w.contiguous(), format, block_size, packed, absmax)
    return packed, absmax


@functools.cache
def _steps() -> Tensor:
    """uint8 [65536]: the code of each of so many steps from -1 to 1, through which bitsandbytes' CPU code goes."""
    return _nearest(torch.arange(65536, dtype=torch.float32, device=_CPU) * 2 / 65535 - 1, "dynamic")


@functools.cache
def _first_steps() -> Tensor:
    """int16 [256], as bits: of each code the first of these steps that has it, or a higher one."""
    return torch.searchsorted(_steps(), torch.arange(256, dtype=torch.uint8, device=_CPU)).to(torch.int16)


def quantize_absmax(absmax: Tensor) -> Any:
    n = absmax.numel()
    if not n or absmax.dtype is not torch.float32:
        return NotImplemented
    offset = absmax.mean()
    absmax = absmax.contiguous()
    codes = torch.empty(n, dtype=torch.uint8, device=_CPU)
    nested = torch.empty(-(-n // NESTED_BLOCK), dtype=torch.float32, device=_CPU)
    tables = _steps().data_ptr(), _first_steps().data_ptr()
    pointers = offset.data_ptr(), *tables, codes.data_ptr(), nested.data_ptr()
    done = _run("quantize_absmax", "Pq5Pq", absmax.data_ptr(), n, *pointers)
    return (codes, nested, offset) if done else NotImplemented


def quantize_int8_to(w: Tensor | FilePart, q: Tensor, absmax: Tensor) -> float:
    """:func:`quantize_int8`, as :func:`quantize_4bit_to`."""
    return _quantize("quantize_int8", "2q2P", w, absmax.numel(), q.shape[-1], q.data_ptr(), absmax.data_ptr())


def quantize_int8(w: Tensor) -> Any:
    if not w.numel() or w.dtype not in _DTYPES or not w.dim():
        return NotImplemented
    q = uninitialized(w.shape, torch.int8)
    absmax = torch.empty(w.shape[:-1], dtype=torch.float32, device=_CPU)
    quantize_int8_to(w.contiguous(), q, absmax)
    return q, absmax


# ------------------------------------------------------------------------------------------------- 8 bits


_WEIGHT_INT8 = "2P2q"  # WeightInt8 of cpu/kernels.h
_TWO_DIGITS_ROWS = 8


def _weight_int8(q: Tensor, absmax: Tensor) -> tuple[tuple[int, ...], tuple[Tensor, ...]] | None:
    """The fields of a WeightInt8, and the tensors that must live as long as they are used; None if not served."""
    if not q.numel() or q.dtype is not torch.int8 or absmax.dtype is not torch.float32 or absmax.shape != q.shape[:-1]:
        return None
    if q.device != _CPU or absmax.device != _CPU:  # an error that the reference reports
        return None
    q, absmax = q.contiguous(), absmax.contiguous()
    return (q.data_ptr(), absmax.data_ptr(), absmax.numel(), q.shape[-1]), (q, absmax)


def linear_int8(x: Tensor, q: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Any:
    dtype, weight = _DTYPES.get(x.dtype), _weight_int8(q, absmax)
    if dtype is None or weight is None or q.dim() != 2 or not x.numel() or x.shape[-1] != q.shape[1]:
        return NotImplemented
    bias_pointer = bias_dtype = 0
    if bias is not None:
        if bias.dtype not in _DTYPES or bias.shape != q.shape[:1] or bias.device != _CPU:
            return NotImplemented
        bias = bias.contiguous()
        bias_pointer, bias_dtype = bias.data_ptr(), _DTYPES[bias.dtype]
    x_MK = _rows(x, q.shape[1])
    out = x.new_empty((*x.shape[:-1], q.shape[0]))
    # one has fewer bits than fp32 inputs are there for; with few rows the second is free, while the weight is read
    digits = 2 if x.dtype is torch.float32 or x_MK.shape[0] <= _TWO_DIGITS_ROWS else 1
    done = _run(
        "linear_int8", f"{_WEIGHT_INT8}P3qPqPd2q", *weight[0], x_MK.data_ptr(), x_MK.stride(0), x_MK.shape[0], dtype,
        bias_pointer, bias_dtype, out.data_ptr(), threshold, digits,
    )  # fmt: skip
    return out if done else NotImplemented


def linear_int8_t(g: Tensor, q: Tensor, absmax: Tensor) -> Any:
    dtype, weight = _DTYPES.get(g.dtype), _weight_int8(q, absmax)
    if dtype is None or weight is None or q.dim() != 2 or not g.numel() or g.shape[-1] != q.shape[0]:
        return NotImplemented
    g_MN = _rows(g, q.shape[0])
    out = g.new_empty((*g.shape[:-1], q.shape[1]))
    done = _run(
        "linear_int8_t", f"{_WEIGHT_INT8}P3qPqPd2q", *weight[0], g_MN.data_ptr(), g_MN.stride(0), g_MN.shape[0], dtype,
        0, 0, out.data_ptr(), 0.0, 0,
    )  # fmt: skip
    return out if done else NotImplemented


def dequantize_int8(q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Any:
    weight = _weight_int8(q, absmax)
    if dtype not in _DTYPES or weight is None:
        return NotImplemented
    out = uninitialized(q.shape, dtype)
    done = _run("dequantize_int8", f"{_WEIGHT_INT8}P2q", *weight[0], out.data_ptr(), _DTYPES[dtype])
    return out if done else NotImplemented


def _checked_ids(ids: Tensor, rows: int) -> Tensor | None:
    """ids as the kernels read them; None if one is not a row's, which the reference says."""
    if ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        return None
    low, high = torch.aminmax(ids)
    return ids.reshape(-1).to(torch.int64).contiguous() if int(low) >= 0 and int(high) < rows else None


def embedding_int8(ids: Tensor, q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Any:
    weight, flat = _weight_int8(q, absmax), _checked_ids(ids, q.shape[0])
    if dtype not in _DTYPES or weight is None or q.dim() != 2 or flat is None:
        return NotImplemented
    out = torch.empty((*ids.shape, q.shape[1]), dtype=dtype, device=_CPU)
    arguments = flat.data_ptr(), flat.numel(), out.data_ptr(), _DTYPES[dtype]
    return out if _run("embedding_int8", f"{_WEIGHT_INT8}PqP2q", *weight[0], *arguments) else NotImplemented


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
    flat = _checked_ids(ids, shape[0])
    weight = _weight_4bit(packed, absmax, nested_absmax, nested_offset, format, block_size, shape)
    if dtype not in _DTYPES or weight is None or flat is None:
        return NotImplemented
    out = torch.empty((*ids.shape, shape[1]), dtype=dtype, device=_CPU)
    fields = *weight[0], flat.data_ptr(), flat.numel(), out.data_ptr(), _DTYPES[dtype]
    return out if _run("embedding_4bit", f"{_WEIGHT_4BIT}PqP2q", *fields) else NotImplemented
