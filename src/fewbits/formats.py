"""The formats: what each stores, how a tensor becomes it, and how it comes back.

| name | bits | inner tensors | written as |
| --- | --- | --- | --- |
| nf4, fp4 | 4 + 32/block, or 4 + 8.125/block with double quantization | packed, absmax [, nested_absmax, nested_offset] | bitsandbytes 4-bit |
| int8 | 8 + 32/columns | packed, absmax | bitsandbytes LLM.int8() |

Inner tensors lead with the logical row dimension wherever rows hold whole blocks, so that taking rows of a weight is
taking rows of each inner tensor. For a weight of shape [R, …] with n elements and B-sized blocks:

    4-bit   packed uint8 [R, n/R/2], absmax fp32 [R, n/R/B]     if n/R is a multiple of B
            packed uint8 [1, ceil(n/2)], absmax fp32 [1, ceil(n/B)]   otherwise (a block spans rows)
            with double quantization absmax is uint8, nested_absmax fp32 [ceil(len/256)], nested_offset fp32 []
    int8    packed int8 [R, …], absmax fp32 [R, … without the last dimension]

The layout of the bytes within ``packed`` is the one bitsandbytes uses; see :mod:`fewbits.kernels.reference`.
"""  # noqa: E501 - the table's rows

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fewbits.errors import ConfigError
from fewbits.kernels import conversion, from_files
from fewbits.kernels.reference import NESTED_BLOCK, decode_absmax
from fewbits.memory import Arena, FilePart

INNER_NAMES = ("packed", "absmax", "nested_absmax", "nested_offset")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Attributes:
        name: as users write it.
        bits: of one code.
        blocked: whether it has a block size and may be double-quantized.
    """

    name: str
    bits: int
    blocked: bool


FORMATS: Mapping[str, Format] = MappingProxyType(
    {row.name: row for row in (Format("nf4", 4, True), Format("fp4", 4, True), Format("int8", 8, False))}
)


def get_format(name: object) -> Format:
    """The format of this name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    hint = None
    if isinstance(name, str):
        hint = {"4bit": "nf4", "int4": "nf4", "8bit": "int8", "fp8": "int8"}.get(name.lower().replace("-", ""))
    raise ConfigError(
        f"unknown format {name!r}",
        expected=f"one of {', '.join(FORMATS)}",
        hint=hint and f'perhaps you mean "{hint}"',
    )


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        block_size: elements that share a scale (4-bit): 32, 64, … 4096.
        double_quant: whether the scales are themselves quantized to 8 bits (4-bit).
        threshold: |x| from which an input column is an outlier, multiplied in 16 bits or more; 0 for none (int8).
        compute_dtype: what inputs are cast to before the product (4-bit); ``None`` for their own dtype.
    """

    format: str
    block_size: int = 64
    double_quant: bool = False
    threshold: float = 6.0
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        row = get_format(self.format)
        if row.blocked and (type(self.block_size) is not int or self.block_size not in BLOCK_SIZES):
            raise ConfigError(
                f"block size {self.block_size!r} is not one the format {self.format} has",
                expected=f"one of {', '.join(map(str, BLOCK_SIZES))}",
            )
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or not self.threshold >= 0:
            raise ConfigError(f"llm_int8_threshold is {self.threshold}", expected="a number that is not negative")

    def __str__(self) -> str:
        if not FORMATS[self.format].blocked:
            return self.format
        block = "" if self.block_size == 64 else f"-b{self.block_size}"
        return f"{self.format}{block}{'-dq' if self.double_quant else ''}"


def rows_align(spec: QuantSpec, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether every row of a tensor of this shape holds whole blocks, so that rows can be taken apart."""
    if not FORMATS[spec.format].blocked:
        return True
    return len(shape) > 1 and math.prod(shape[1:]) % spec.block_size == 0 and math.prod(shape) > 0


def inner_shapes(spec: QuantSpec, shape: torch.Size | tuple[int, ...]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """dtype and shape of each inner tensor of a tensor of this shape."""
    if not FORMATS[spec.format].blocked:
        return {"packed": (torch.int8, list(shape)), "absmax": (torch.float32, list(shape[:-1]))}
    n, rows = math.prod(shape), shape[0] if rows_align(spec, shape) else 1
    blocks = -(-n // spec.block_size)
    inner = {
        "packed": (torch.uint8, [rows, -(-n // 2) // rows]),
        "absmax": (torch.uint8 if spec.double_quant else torch.float32, [rows, blocks // rows]),
    }
    if spec.double_quant:
        inner["nested_absmax"] = (torch.float32, [-(-blocks // NESTED_BLOCK)])
        inner["nested_offset"] = (torch.float32, [])
    return inner


def quantized_bytes(spec: QuantSpec, shape: torch.Size | tuple[int, ...]) -> int:
    """Bytes of all inner tensors together: exactly what the tensor will take."""
    return sum(dtype.itemsize * math.prod(size) for dtype, size in inner_shapes(spec, shape).values())


def quantize_inner(w: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Quantize a floating-point tensor of any shape to the inner tensors of ``spec``, on its own device."""
    if not FORMATS[spec.format].blocked:
        return _inner(spec, w.shape, *conversion("quantize_int8", w))
    return _inner(spec, w.shape, *conversion("quantize_4bit", w, spec.format, spec.block_size))


def quantize_inner_from(w: FilePart, spec: QuantSpec, arena: Arena) -> tuple[dict[str, Tensor], float]:
    """:func:`quantize_inner` of what lies in a file, to the CPU, and its largest absolute value, NaN if it has one.

    It is read a little at a time: it never exists in memory. Only where :func:`fewbits.kernels.from_files` says so.

    Raises:
        OSError: it cannot be read.
        EOFError: the file ends before.
    """
    backend = from_files()
    assert backend is not None
    (dtype, shape), (_, scales) = (inner_shapes(spec, w.shape)[name] for name in ("packed", "absmax"))
    packed = arena.empty(shape, dtype)
    if not FORMATS[spec.format].blocked:
        absmax = arena.empty(scales, torch.float32)
        largest = backend.quantize_int8_to(w, packed, absmax)
    else:  # with double quantization the scales in fp32 do not stay
        absmax = (arena.scratch if spec.double_quant else arena.empty)(scales, torch.float32)
        largest = backend.quantize_4bit_to(w, spec.format, spec.block_size, packed, absmax)
    return _inner(spec, w.shape, packed, absmax), largest


def _inner(spec: QuantSpec, shape: tuple[int, ...], packed: Tensor, absmax: Tensor) -> dict[str, Tensor]:
    inner = {"packed": packed, "absmax": absmax}
    if spec.double_quant and FORMATS[spec.format].blocked:
        inner["absmax"], inner["nested_absmax"], inner["nested_offset"] = conversion("quantize_absmax", absmax)
    for name, (_, inner_shape) in inner_shapes(spec, shape).items():
        if list(inner[name].shape) != inner_shape:
            inner[name] = inner[name].view(inner_shape)
    return inner


def dequantize_inner(
    inner: Mapping[str, Tensor | None], spec: QuantSpec, shape: torch.Size | tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The tensor of this shape and dtype that the inner tensors stand for."""
    packed, absmax = inner["packed"], inner["absmax"]
    assert packed is not None
    if not FORMATS[spec.format].blocked:
        out: Tensor = conversion("dequantize_int8", packed, absmax, dtype)
        return out
    nested = inner.get("nested_absmax"), inner.get("nested_offset")
    about = spec.format, spec.block_size, list(shape), dtype
    out = conversion("dequantize_4bit", packed, absmax, *nested, *about)
    return out


def plain_scales(inner: Mapping[str, Tensor | None]) -> Tensor:
    """The fp32 scales, decoded if they are themselves quantized."""
    absmax = inner["absmax"]
    assert absmax is not None
    return decode_absmax(absmax, inner.get("nested_absmax"), inner.get("nested_offset"))
