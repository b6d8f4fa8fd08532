"""What happens to each operation on a :class:`~fewbits.tensor.QuantTensor`: the rules of the universal path.

A rule gets the operation's arguments and gives its result, or ``NotImplemented`` where it has no quantized form for
them; then the tensor is dequantized (:func:`floor`), or for an operation in place changed and quantized again.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.formats import QuantSpec, plain_scales, rows_align
from fewbits.kernels import undisturbed
from fewbits.tensor import QuantTensor, embedding, linear, linear_t

aten = torch.ops.aten
RULES: dict[Any, Callable[..., Any]] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one aten operation that has a ``QuantTensor`` among its arguments."""
    rule = RULES.get(func)
    if rule is not None:
        with torch.no_grad():  # autograd has recorded the operation already
            result = rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func._schema.is_mutable and isinstance(args[0], QuantTensor):
        return in_place(func, args, kwargs)
    result = func.decompose(*args, **kwargs)  # composite operators reach here whole in inference mode
    if result is not NotImplemented:
        return result
    return floor(func, args, kwargs)


def _rule(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(overloads, fn))
        return fn

    return register


def _plain(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QuantTensor) else x


_said: set[tuple[str, str | None]] = set()

# Of tensors, number by number, as adapters do it (DoRA adds its delta, IA³ scales, a merge looks for what is not
# finite): values are what is asked for.
_ARITHMETIC = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.equal.default, aten.abs.default,
    aten.eq.Tensor,
}  # fmt: skip


def floor(func: Any, args: Any, kwargs: Any) -> Any:
    """Dequantize and run; say so once for each operation and tensor, unless nothing else could be meant."""
    tensors: list[QuantTensor] = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, QuantTensor) else None, (args, kwargs))
    key = (str(func), tensors[0].label)
    meant = func in _ARITHMETIC and all(isinstance(x, Tensor) for x in args)
    if not meant and key not in _said and not torch.compiler.is_compiling():
        _said.add(key)
        warnings.warn(
            f"{func} has no quantized form: {tensors[0].label or 'a QuantTensor'} {list(tensors[0].shape)} is "
            "dequantized for it (said once)",
            FewbitsWarning,
            stacklevel=3,
        )
    return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


def in_place(func: Any, args: Any, kwargs: Any) -> Any:
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


def _factory(func: Any) -> Callable[..., Any]:
    def make(self: QuantTensor, *args: Any, **kwargs: Any) -> Any:
        stand_in = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        return func(stand_in, *args, **kwargs)

    return make


for _func in (
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
):
    RULES[_func] = _factory(_func)


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


@_rule(aten._grouped_mm.default)
def _grouped_mm(
    x: Tensor, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> Any:
    """Rows of x, sorted by expert, times a stack of experts: only the experts that have rows are read.

    How many each has is read from ``offs``, for which the host waits; where it may not (while a graph is captured or
    code traced) there is no quantized form.
    """
    if not (_is_weight(weight, 3) and offs is not None and bias is None and out_dtype in (None, x.dtype)):
        return NotImplemented
    if not (undisturbed(x) and x.dim() == 2 and rows_align(weight.spec, weight.stored_shape)):
        return NotImplemented
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return NotImplemented
    experts = _rows(weight, lambda t: t)  # their scales decoded once
    out = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            out[start:end] = _mm(x[start:end], _select(experts, 0, expert))
        start = end
    return out


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
        and source.transposed == self.transposed
        and source.shape == self.shape
    ):
        self._adopt(source)
        return self
    value = _plain(source).expand(self.shape).to(self.device)
    if self.transposed:
        value = value.transpose(-1, -2)
    self._adopt(QuantTensor.quantize(value.contiguous(), self.spec, label=self.label))
    return self
