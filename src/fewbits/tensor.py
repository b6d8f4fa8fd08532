"""``QuantTensor``: a quantized tensor that any torch code can use as if it were the floating-point one.

It is a wrapper subclass: logical shape and dtype outside, the plain inner tensors of its format inside (see
:mod:`fewbits.formats` for each one's shape and dtype). What happens to an operation on it:

1. a product, an embedding look-up, taking or joining rows, moving, casting, copying: the quantized operator;
2. writing in place (``weight += delta``, ``weight.copy_(w)``): dequantized, changed, quantized again, in place;
3. anything else: dequantized, with one warning for each operation and tensor. Slow is said, wrong is impossible.

Modules on the fast path (:mod:`fewbits.modules`) never come here: they read the inner tensors as attributes and call
:func:`linear`. ``benchmarks/dispatch.py`` measures the difference.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.formats import INNER_NAMES, QuantSpec, dequantize_inner, plain_scales, quantize_inner, rows_align
from fewbits.kernels import ops

aten = torch.ops.aten


class QuantTensor(torch.Tensor):
    """A quantized tensor; see :mod:`fewbits.tensor`.

    Made by :meth:`quantize` or :meth:`from_inner`. Called as ``QuantTensor(other, requires_grad=…)`` it gives another
    tensor on the same inner tensors, which is how code that rebuilds parameters as ``type(param)(value)`` calls it.

    Attributes:
        packed, absmax, nested_absmax, nested_offset: the inner tensors; the last two are ``None`` without double
            quantization.
        spec: the format and its settings.
        transposed: whether the logical tensor is the stored one with its last two dimensions exchanged.
        label: the parameter's dotted name if it has one, for messages.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    spec: QuantSpec
    transposed: bool
    label: str | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    @staticmethod
    def __new__(cls, value: Tensor, requires_grad: bool = False, **attributes: Any) -> QuantTensor:
        if isinstance(value, QuantTensor):
            return value.detach().requires_grad_(requires_grad)  # type: ignore[return-value]  # detach keeps the class
        raise ConfigError(
            f"QuantTensor was called with a {type(value).__name__}",
            expected="a QuantTensor",
            hint="use QuantTensor.quantize(tensor, QuantSpec(...)) to quantize",
        )

    @classmethod
    def from_inner(
        cls,
        inner: dict[str, Tensor | None],
        spec: QuantSpec,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        label: str | None = None,
    ) -> QuantTensor:
        """Wrap inner tensors (not copied). ``shape`` is the stored shape, before any transposition."""
        size, strides = list(shape), _contiguous_strides(shape)
        if transposed:
            size[-2:], strides[-2:] = size[:-3:-1], strides[:-3:-1]
        packed = inner["packed"]
        assert packed is not None
        # the wrapper itself is never an inference tensor: a view of a parameter may not be one
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            self: QuantTensor = torch.Tensor._make_wrapper_subclass(
                cls, size, strides=strides, dtype=dtype, device=packed.device, requires_grad=False
            )
        for name in INNER_NAMES:
            setattr(self, name, inner.get(name))
        self.spec, self.transposed, self.label = spec, transposed, label
        return self

    @classmethod
    def quantize(cls, w: Tensor, spec: QuantSpec | str, *, label: str | None = None) -> QuantTensor:
        """Quantize a floating-point tensor, of any shape with at least one element, on its device.

        Raises:
            ConfigError: ``w`` is not floating point, is empty, or holds a NaN or an infinity (for ``int8`` also a
                magnitude above 65504, since the format passes through fp16).
        """
        spec = QuantSpec(spec) if isinstance(spec, str) else spec
        if not w.is_floating_point() or w.numel() == 0 or w.dim() == 0:
            raise ConfigError(
                f"cannot quantize a tensor of {w.dtype} and shape {list(w.shape)}",
                parameter=label,
                expected="a floating-point tensor with at least one element",
            )
        with torch.no_grad():
            result = cls.from_inner({**quantize_inner(w.detach(), spec)}, spec, w.shape, w.dtype, label=label)
        if not w.is_meta:
            check_finite(result)
        return result

    @property
    def inner_tensors(self) -> dict[str, Tensor]:
        """The inner tensors that are there, by name."""
        return {name: tensor for name in INNER_NAMES if (tensor := getattr(self, name)) is not None}

    @property
    def stored_shape(self) -> torch.Size:
        """The shape as stored, before any transposition."""
        return self.shape if not self.transposed else torch.Size([*self.shape[:-2], self.shape[-1], self.shape[-2]])

    @property
    def data(self) -> Tensor:
        """The same tensor outside autograd. Assigning a floating-point tensor quantizes it into this one."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.device != self.device:
            raise ConfigError(
                f"cannot assign a tensor of shape {list(value.shape)} on {value.device} to a quantized parameter",
                parameter=self.label,
                expected=f"shape {list(self.shape)} on {self.device}",
            )
        with torch.no_grad():
            self.copy_(value)

    def dequantize(self) -> Tensor:
        """A plain tensor of the logical shape and dtype."""
        out = dequantize_inner(self.inner_tensors, self.spec, self.stored_shape, self.dtype)
        return out.transpose(-1, -2) if self.transposed else out

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return (
            f"QuantTensor({self.spec}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"bytes={sum(t.nbytes for t in self.inner_tensors.values())})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantTensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        copy = self._map(torch.clone).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        memo[id(self)] = copy
        return copy  # type: ignore[return-value]

    def _map(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantTensor:
        """The same tensor with ``fn`` applied to every inner one."""
        inner: dict[str, Tensor | None] = {name: fn(tensor) for name, tensor in self.inner_tensors.items()}
        return QuantTensor.from_inner(
            inner, self.spec, self.stored_shape, dtype or self.dtype, transposed=self.transposed, label=self.label
        )

    def _adopt(self, other: QuantTensor) -> None:
        """Become ``other``'s bytes: in place where the layouts agree, so that aliases of this tensor follow."""
        if {n: (t.dtype, t.shape) for n, t in self.inner_tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in other.inner_tensors.items()
        } and self.spec.format == other.spec.format:
            for name, tensor in self.inner_tensors.items():
                tensor.copy_(other.inner_tensors[name])
        else:
            for name in INNER_NAMES:
                tensor_ = getattr(other, name)
                setattr(self, name, None if tensor_ is None else tensor_.to(self.device))
            self.spec = other.spec

    def __tensor_flatten__(self) -> tuple[list[str], tuple[QuantSpec, bool, str | None]]:
        return list(self.inner_tensors), (self.spec, self.transposed, self.label)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[QuantSpec, bool, str | None], size: Any, stride: Any
    ) -> QuantTensor:
        spec, transposed, label = context
        # the logical dtype is not in the context: torch restores it from the outer tensor's metadata
        shape = [*size[:-2], size[-1], size[-2]] if transposed else list(size)
        return cls.from_inner({**inner}, spec, shape, torch.float32, transposed=transposed, label=label)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its disabled form
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable and isinstance(args[0], QuantTensor):
            return _in_place(func, args, kwargs)
        result = func.decompose(*args, **kwargs)  # composite operators reach here whole in inference mode
        if result is not NotImplemented:
            return result
        return _floor(func, args, kwargs)


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(reversed([*shape[1:], 1]), lambda a, b: a * max(b, 1)))[::-1]


def check_finite(tensor: QuantTensor) -> None:
    """Raise if the tensor was quantized from NaN or infinite values: its scales then are not finite.

    Raises:
        ConfigError: with the parameter's name.
    """
    if not all(bool(t.isfinite().all()) for t in tensor.inner_tensors.values() if t.is_floating_point()):
        limit = " or beyond fp16's ±65504, through which int8 passes" if tensor.spec.format == "int8" else ""
        raise ConfigError(
            f"the weight holds values that are NaN or infinite{limit}",
            parameter=tensor.label,
            expected="finite values",
            hint="repair the checkpoint, or leave this module out with skip_modules",
        )


# ------------------------------------------------------------------------------------------------- products


def linear(x: Tensor, weight: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` on the quantized operator; differentiable in ``x`` and ``bias``.

    Args:
        x: [..., K], fp32, fp16 or bf16; under autocast it is cast as ``F.linear`` would.
        weight: stored as [N, K] (a ``transposed`` view is one to the same bytes, and makes no difference).
        bias: [N] or ``None``.

    Returns:
        [..., N] in the dtype of (the autocast) ``x``.
    """
    spec = weight.spec
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor
    if spec.format == "int8":
        out = ops.linear_int8(x, weight.packed, weight.absmax, bias, spec.threshold)
        return out
    dtype = x.dtype
    if spec.compute_dtype is not None:
        x = x.to(spec.compute_dtype)
    out = ops.linear_4bit(
        x,
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_offset,
        bias,
        spec.format,
        spec.block_size,
        list(weight.stored_shape),
    )
    return out.to(dtype)


def linear_t(g: Tensor, weight: QuantTensor) -> Tensor:
    """``g @ weight`` for a weight stored as [N, K]: [..., N] to [..., K]."""
    spec = weight.spec
    if spec.format == "int8":
        out: Tensor = ops.linear_int8_t(g, weight.packed, weight.absmax)
        return out
    state = weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset
    out = ops.linear_4bit_t(g, *state, spec.format, spec.block_size, list(weight.stored_shape))
    return out


def embedding(ids: Tensor, weight: QuantTensor) -> Tensor:
    """Rows of ``weight`` [V, D] at ``ids`` [...]: [..., D] in the weight's logical dtype."""
    spec = weight.spec
    if spec.format == "int8":
        out: Tensor = ops.embedding_int8(ids, weight.packed, weight.absmax, weight.dtype)
        return out
    state = weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset
    out = ops.embedding_4bit(ids, *state, spec.format, spec.block_size, list(weight.shape), weight.dtype)
    return out


# ------------------------------------------------------------------------------------------------- dispatch rules

_RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(overloads, fn))
        return fn

    return register


def _plain(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QuantTensor) else x


_said: set[tuple[str, str | None]] = set()


def _floor(func: Any, args: Any, kwargs: Any) -> Any:
    """Dequantize and run; say so once for each operation and tensor."""
    tensors: list[QuantTensor] = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, QuantTensor) else None, (args, kwargs))
    key = (str(func), tensors[0].label)
    if key not in _said and not torch.compiler.is_compiling():
        _said.add(key)
        warnings.warn(
            f"{func} has no quantized form: {tensors[0].label or 'a QuantTensor'} {list(tensors[0].shape)} is "
            "dequantized for it (said once)",
            FewbitsWarning,
            stacklevel=3,
        )
    return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """Dequantize, change, quantize again into the same inner tensors."""
    self: QuantTensor = args[0]
    value = self.dequantize().contiguous()
    func(value, *tree_map(_plain, args[1:]), **tree_map(_plain, kwargs))
    if value.shape != self.shape or not value.is_floating_point():
        raise ConfigError(f"{func} would change the shape or type of a quantized tensor", parameter=self.label)
    if self.transposed:
        value = value.transpose(-1, -2).contiguous()
    self._adopt(QuantTensor.quantize(value, self.spec, label=self.label))
    return self


@_rule(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.contiguous.default)
def _alias(self: QuantTensor, **_: Any) -> QuantTensor:
    return self._map(lambda t: t.detach())


@_rule(aten.clone.default)
def _clone(self: QuantTensor, **_: Any) -> QuantTensor:
    return self._map(torch.clone)


@_rule(aten._pin_memory.default)
def _pin(self: QuantTensor, *args: Any) -> QuantTensor:
    return self._map(lambda t: t.pin_memory())


@_rule(aten.is_pinned.default)
def _is_pinned(self: QuantTensor, *args: Any) -> bool:
    return self.packed.is_pinned()


@_rule(aten.record_stream.default)
def _record_stream(self: QuantTensor, stream: Any) -> None:
    for tensor in self.inner_tensors.values():
        tensor.record_stream(stream)


@_rule(aten._to_copy.default)
def _to_copy(self: QuantTensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    kwargs.pop("memory_format", None)
    return self._map(lambda t: aten._to_copy.default(t, **kwargs), dtype)


@_rule(aten.t.default)
def _t(self: QuantTensor) -> Any:
    return _transpose(self, 0, 1) if self.dim() == 2 else NotImplemented


@_rule(aten.transpose.int)
def _transpose(self: QuantTensor, first: int, second: int) -> Any:
    if {first % self.dim(), second % self.dim()} != {self.dim() - 1, self.dim() - 2}:
        return NotImplemented
    inner: dict[str, Tensor | None] = {**self.inner_tensors}
    return QuantTensor.from_inner(
        inner, self.spec, self.stored_shape, self.dtype, transposed=not self.transposed, label=self.label
    )


@_rule(aten.permute.default)
def _permute(self: QuantTensor, dims: Sequence[int]) -> Any:
    swapped = [*range(self.dim() - 2), self.dim() - 1, self.dim() - 2]
    if [d % self.dim() for d in dims] != swapped:
        return NotImplemented
    return _transpose(self, -1, -2)


@_rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)
def _view(self: QuantTensor, size: Sequence[int], **_: Any) -> Any:
    return _alias(self) if list(size) == list(self.shape) else NotImplemented


@_rule(
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
)
def _like(self: QuantTensor, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented  # replaced below: needs the overload that was called


def _factory(func: Any) -> Callable[..., Any]:
    def make(self: QuantTensor, *args: Any, **kwargs: Any) -> Any:
        stand_in = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        return func(stand_in, *args, **kwargs)

    return make


for _func in [f for f, r in _RULES.items() if r is _like] + [
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
]:
    _RULES[_func] = _factory(_func)


def _is_weight(x: Any, dims: int = 2) -> bool:
    return isinstance(x, QuantTensor) and x.dim() == dims


@_rule(aten.linear.default)
def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_weight(weight) or weight.transposed or isinstance(x, QuantTensor) or isinstance(bias, QuantTensor):
        return NotImplemented
    return linear(x, weight, bias)


@_rule(aten.mm.default)
def _mm(x: Tensor, weight: Any) -> Any:
    if not _is_weight(weight) or isinstance(x, QuantTensor):
        return NotImplemented
    return linear(x, weight) if weight.transposed else linear_t(x, weight)


@_rule(aten.matmul.default)
def _matmul(x: Tensor, weight: Any) -> Any:
    return _mm(x, weight) if isinstance(x, Tensor) and x.dim() >= 2 and _is_weight(weight) else NotImplemented


@_rule(aten.addmm.default)
def _addmm(bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not _is_weight(weight) or isinstance(x, QuantTensor) or isinstance(bias, QuantTensor) or beta != 1 or alpha != 1:
        return NotImplemented
    if weight.transposed and bias.dim() == 1:
        return linear(x, weight, bias)
    return _mm(x, weight) + bias


@_rule(aten.bmm.default)
def _bmm(x: Tensor, weight: Any) -> Any:
    if not _is_weight(weight, 3) or isinstance(x, QuantTensor) or not rows_align(weight.spec, weight.stored_shape):
        return NotImplemented
    return torch.stack([_mm(x[i], weight[i]) for i in range(weight.shape[0])])


@_rule(aten.embedding.default)
def _embedding(weight: Any, ids: Tensor, *args: Any, **_: Any) -> Any:
    return embedding(ids, weight) if _is_weight(weight) and not weight.transposed else NotImplemented


def _rows(self: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """Apply a selection along dimension 0 to every inner tensor; scales are decoded first if they are nested."""
    if not isinstance(self, QuantTensor) or not rows_align(self.spec, self.stored_shape):
        return NotImplemented
    if self.transposed and self.dim() == 2:
        return NotImplemented
    absmax = take(plain_scales(self.inner_tensors))
    packed = take(self.packed)
    shape = torch.empty(self.stored_shape, device="meta")
    spec = QuantSpec(self.spec.format, self.spec.block_size, False, self.spec.threshold, self.spec.compute_dtype)
    new_shape = take(shape).shape
    if len(new_shape) < 2 and spec.format != "int8":
        packed, absmax = packed.reshape(1, -1), absmax.reshape(1, -1)
    elif spec.format != "int8":
        packed, absmax = _relayout(packed, spec, new_shape), _relayout(absmax, spec, new_shape)
    return QuantTensor.from_inner(
        {"packed": packed, "absmax": absmax}, spec, new_shape, self.dtype, transposed=self.transposed, label=self.label
    )


def _relayout(inner: Tensor, spec: QuantSpec, shape: torch.Size) -> Tensor:
    return inner.reshape(shape[0] if rows_align(spec, shape) else 1, -1)


@_rule(aten.select.int)
def _select(self: QuantTensor, dim: int, index: int) -> Any:
    if dim != 0 or self.dim() < 2:
        return NotImplemented
    return _rows(self, lambda t: t.select(0, index))


@_rule(aten.slice.Tensor)
def _slice(self: QuantTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if (start or 0) <= 0 and (end is None or end >= self.shape[dim]) and step == 1:
        return _alias(self)
    return _rows(self, lambda t: aten.slice.Tensor(t, 0, start, end, step)) if dim == 0 else NotImplemented


@_rule(aten.index_select.default)
def _index_select(self: QuantTensor, dim: int, index: Tensor) -> Any:
    if dim != 0 or not isinstance(self, QuantTensor):
        return NotImplemented
    return _rows(self, lambda t: t.index_select(0, index.to(t.device)))


@_rule(aten.index.Tensor)
def _index(self: QuantTensor, indices: Sequence[Tensor | None]) -> Any:
    index = indices[0] if len(indices) == 1 else None
    if index is None or index.dtype == torch.bool or index.dim() != 1 or not isinstance(self, QuantTensor):
        return NotImplemented
    return _index_select(self, 0, index)


@_rule(aten.split.Tensor)
def _split(self: QuantTensor, size: int, dim: int = 0) -> Any:
    parts = [_slice(self, dim, i, min(i + size, self.shape[dim])) for i in range(0, self.shape[dim], size)]
    return NotImplemented if any(p is NotImplemented for p in parts) else tuple(parts)


@_rule(aten.split_with_sizes.default)
def _split_with_sizes(self: QuantTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    ends = list(itertools.accumulate(sizes))
    parts = [_slice(self, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return NotImplemented if any(p is NotImplemented for p in parts) else tuple(parts)


@_rule(aten.unbind.int)
def _unbind(self: QuantTensor, dim: int = 0) -> Any:
    parts = [_select(self, dim, i) for i in range(self.shape[dim])]
    return NotImplemented if any(p is NotImplemented for p in parts) else tuple(parts)


@_rule(aten.cat.default)
def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    first = next(t for t in tensors if isinstance(t, QuantTensor))
    alike = dim == 0 and all(
        isinstance(t, QuantTensor)
        and not t.transposed
        and t.dtype == first.dtype
        and t.spec.format == first.spec.format
        and t.spec.block_size == first.spec.block_size
        and rows_align(t.spec, t.shape)
        for t in tensors
    )
    if not alike:
        return NotImplemented
    shape = [sum(t.shape[0] for t in tensors), *first.shape[1:]]
    spec = QuantSpec(first.spec.format, first.spec.block_size, False, first.spec.threshold, first.spec.compute_dtype)
    inner: dict[str, Tensor | None] = {
        "packed": torch.cat([t.packed for t in tensors]),
        "absmax": torch.cat([plain_scales(t.inner_tensors) for t in tensors]),
    }
    return QuantTensor.from_inner(inner, spec, shape, first.dtype, label=first.label)


@_rule(aten.copy_.default)
def _copy_(self: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(self, QuantTensor):
        return self.copy_(source.dequantize(), non_blocking)
    if (
        isinstance(source, QuantTensor)
        and source.spec.format == self.spec.format
        and not (self.transposed or source.transposed)
    ):
        self._adopt(source)
        return self
    value = _plain(source).expand(self.shape).to(self.device)
    if self.transposed:
        value = value.transpose(-1, -2)
    self._adopt(QuantTensor.quantize(value.contiguous(), self.spec, label=self.label))
    return self
