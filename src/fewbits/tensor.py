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
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._tensor import _rebuild_from_type_v2

from fewbits.errors import ConfigError, ShapeError, UnsupportedError
from fewbits.formats import INNER_NAMES, QuantSpec, dequantize_inner, quantize_inner
from fewbits.kernels import autocasts, conversion, product
from fewbits.memory import note_write


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
            rebuilt: Any = value.detach().requires_grad_(requires_grad)  # detach keeps the class
            rebuilt._is_param = True  # nn.Parameter's own mark
            return rebuilt  # type: ignore[no-any-return]
        raise ConfigError(
            f"QuantTensor was called with a {type(value).__name__}",
            expected="a QuantTensor",
            hint="QuantTensor.quantize(tensor, QuantSpec(…)) quantizes; load_state_dict and fewbits.load load",
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
    def quantize(
        cls, w: Tensor, spec: QuantSpec | str, *, label: str | None = None, known_finite: bool = False
    ) -> QuantTensor:
        """Quantize a floating-point tensor, of any shape with at least one element, on its device.

        With ``known_finite`` the caller has looked at the values; looking waits for a GPU.

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
        if not w.is_meta and not known_finite:
            mean = result.nested_offset  # of all scales: not finite if one of them is not, as the largest
            if not math.isfinite((result.absmax.max() if mean is None else mean).item()):
                raise not_finite(label, spec)
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

    def data_ptr(self) -> int:
        """Where the packed codes lie, by which code tells tensors that are the same memory; 0 on the meta device."""
        return self.packed.data_ptr()

    @property
    def _parameters(self) -> NoReturn:
        """What code that walks down a state dict's keys asks a module for, when it comes to a part of a weight."""
        raise UnsupportedError(
            "a state dict's entry belongs to a quantized parameter, and cannot be set by itself",
            parameter=self.label,
            hint="load it with load_state_dict, fewbits.load, or fewbits.from_pretrained",
        )

    def dequantize(self) -> Tensor:
        """A plain tensor of the logical shape and dtype."""
        out = dequantize_inner(self.inner_tensors, self.spec, self.stored_shape, self.dtype)
        return out.transpose(-1, -2) if self.transposed else out

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return (
            f"QuantTensor({self.spec}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"bytes={sum(t.nbytes for t in self.inner_tensors.values())})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # as torch pickles wrapper subclasses, which it would tell by a data_ptr() of 0
        about = self.dtype, tuple(self.size()), self.stride(), self.storage_offset(), self.layout, self.device
        arguments = type(self), *about, self.requires_grad
        state = torch._utils._get_obj_state(self)
        return _rebuild_from_type_v2, (torch._utils._rebuild_wrapper_subclass, type(self), arguments, state)

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

    def relabelled(self, dtype: torch.dtype) -> QuantTensor:
        """The same inner tensors under another logical dtype."""
        return self if dtype == self.dtype else self._map(lambda tensor: tensor, dtype)

    def _adopt(self, other: QuantTensor) -> None:
        """Become ``other``'s bytes: in place where the layouts agree, so that aliases of this tensor follow."""
        if {n: (t.dtype, t.shape) for n, t in self.inner_tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in other.inner_tensors.items()
        } and self.spec.format == other.spec.format:
            for name, tensor in self.inner_tensors.items():
                tensor.copy_(other.inner_tensors[name])
                note_write(tensor)
        else:
            for name in INNER_NAMES:
                tensor_ = getattr(other, name)
                setattr(self, name, None if tensor_ is None else tensor_.to(self.device))
            self.spec = other.spec

    def __tensor_flatten__(self) -> tuple[list[str], tuple[QuantSpec, bool, torch.dtype]]:
        # without the label: compiled code is specialized to what is here, and layers alike should share it
        return list(self.inner_tensors), (self.spec, self.transposed, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[QuantSpec, bool, torch.dtype], size: Any, stride: Any
    ) -> QuantTensor:
        spec, transposed, dtype = context
        shape = [*size[:-2], size[-1], size[-2]] if transposed else list(size)
        return cls.from_inner({**inner}, spec, shape, dtype, transposed=transposed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its disabled form
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from fewbits.dispatch import dispatch  # the rules know the class; the class knows only that there are rules

        return dispatch(func, args, kwargs or {})


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(reversed([*shape[1:], 1]), lambda a, b: a * max(b, 1)))[::-1]


def scales_finite(tensor: QuantTensor) -> Tensor:
    """bool []: whether all scales are finite, which they are not if the values were NaN or infinite."""
    flags = [t.isfinite().all() for t in tensor.inner_tensors.values() if t.is_floating_point()]
    return flags[0] if len(flags) == 1 else torch.stack(flags).all()


def not_finite(label: str | None, spec: QuantSpec) -> ConfigError:
    """The error for a weight whose scales are not finite."""
    limit = " or beyond fp16's ±65504, through which int8 passes" if spec.format == "int8" else ""
    return ConfigError(
        f"the weight holds values that are NaN or infinite{limit}",
        parameter=label,
        expected="finite values",
        hint="repair the checkpoint, or leave this module out with skip_modules",
    )


# ------------------------------------------------------------------------------------------------- products


def linear(x: Tensor, weight: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` on the quantized operator; differentiable in ``x`` and ``bias``.

    Args:
        x: [..., K], fp32, fp16 or bf16; under autocast it is cast as ``F.linear`` would, unless the weight has a
            ``compute_dtype``: then to that, and the result back, as bitsandbytes does.
        weight: stored as [N, K] (a ``transposed`` view is one to the same bytes, and makes no difference).
        bias: [N] or ``None``.

    Returns:
        [..., N] in the dtype of ``x``, or that of autocast.

    Raises:
        ShapeError: ``x``'s last dimension is not K.
    """
    spec, shape = weight.spec, weight.stored_shape
    if not x.dim() or x.shape[-1] != shape[1]:
        raise _wrong_width(x, shape[1], weight)
    if spec.compute_dtype is None and autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor
    if spec.format == "int8":
        out = product("linear_int8", x, weight.packed, weight.absmax, bias, spec.threshold)
        return out
    dtype = x.dtype
    if spec.compute_dtype is not None:
        x = x.to(spec.compute_dtype)
    out = product(
        "linear_4bit",
        x,
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_offset,
        bias,
        spec.format,
        spec.block_size,
        shape,
    )
    return out if out.dtype is dtype else out.to(dtype)


def _wrong_width(x: Tensor, columns: int, weight: QuantTensor) -> ShapeError:
    return ShapeError(
        f"an input of shape {list(x.shape)} meets a weight of shape {list(weight.shape)}",
        parameter=weight.label,
        expected=f"an input whose last dimension is {columns}",
    )


def linear_t(g: Tensor, weight: QuantTensor) -> Tensor:
    """``g @ weight`` for a weight stored as [N, K]: [..., N] to [..., K]."""
    spec, rows = weight.spec, weight.stored_shape[0]
    if not g.dim() or g.shape[-1] != rows:
        raise _wrong_width(g, rows, weight)
    if spec.format == "int8":
        out: Tensor = product("linear_int8_t", g, weight.packed, weight.absmax)
        return out
    state = weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset
    out = product("linear_4bit_t", g, *state, spec.format, spec.block_size, list(weight.stored_shape))
    return out


def embedding(ids: Tensor, weight: QuantTensor) -> Tensor:
    """Rows of ``weight`` [V, D] at ``ids`` [...]: [..., D] in the weight's logical dtype."""
    spec = weight.spec
    if spec.format == "int8":
        out: Tensor = conversion("embedding_int8", ids, weight.packed, weight.absmax, weight.dtype)
        return out
    state = weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset
    out = conversion("embedding_4bit", ids, *state, spec.format, spec.block_size, list(weight.shape), weight.dtype)
    return out
