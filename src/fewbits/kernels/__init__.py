"""The operators: their schemas, fakes and gradients, and the one place that picks an implementation.

An operator takes plain tensors only. What runs it is a backend, a namespace with a function of the operator's name;
a backend need not have them all: behind ``cuda`` (CUDA C++ for NVIDIA's GPUs) stands ``triton`` (any GPU), and behind
each, and ``cpu`` (C++), ``reference`` (plain torch, any device). They are imported when the first tensor on such a
device comes. The environment variable ``FEWBITS_BACKEND`` or :func:`use_backend` forces one.

Shapes, dtypes and the arithmetic of every operator are in :mod:`fewbits.kernels.reference`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.kernels import reference

BACKENDS: dict[str, ModuleType] = {"reference": reference}  # those loaded; another joins them when it is first used
_LOADED_LATER = {
    "cpu": "fewbits.kernels.cpu_backend",
    "cuda": "fewbits.kernels.cuda_backend",
    "triton": "fewbits.kernels.triton_backend",
}
_NEEDS = {"triton": "triton"}  # the package that a backend needs
_BEHIND = {"cuda": ("triton",)}  # who serves what a backend has not, before the reference
# by device type; one not listed runs the reference
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}
_forced: str | None = None

_Function = TypeVar("_Function", bound=Callable[..., Any])

_STATE = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_SCHEMAS = {
    "quantize_4bit": "(Tensor w, str format, int block_size) -> (Tensor, Tensor)",
    "quantize_absmax": "(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    "quantize_int8": "(Tensor w) -> (Tensor, Tensor)",
    "dequantize_4bit": f"({_STATE}, str format, int block_size, int[] shape, ScalarType dtype) -> Tensor",
    "dequantize_int8": "(Tensor q, Tensor absmax, ScalarType dtype) -> Tensor",
    "linear_4bit": f"(Tensor x, {_STATE}, Tensor? bias, str format, int block_size, int[] shape) -> Tensor",
    "linear_4bit_t": f"(Tensor g, {_STATE}, str format, int block_size, int[] shape) -> Tensor",
    "linear_int8": "(Tensor x, Tensor q, Tensor absmax, Tensor? bias, float threshold) -> Tensor",
    "linear_int8_t": "(Tensor g, Tensor q, Tensor absmax) -> Tensor",
    "embedding_4bit": (f"(Tensor ids, {_STATE}, str format, int block_size, int[] shape, ScalarType dtype) -> Tensor"),
    "embedding_int8": "(Tensor ids, Tensor q, Tensor absmax, ScalarType dtype) -> Tensor",
}


def force_backend(name: str | None) -> None:
    """Run every operator on the named backend; ``None`` goes back to choosing by device.

    Raises:
        ConfigError: there is no such backend, or the package that it needs is not installed.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        if name not in _LOADED_LATER:
            names = sorted(BACKENDS.keys() | _LOADED_LATER.keys())
            raise ConfigError(f"unknown backend {name!r}", expected=f"one of {', '.join(names)}")
        package = _NEEDS.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the backend {name!r} was asked for, and the package {package} is not installed",
                hint=f"pip install {package}",
            )
    _forced = name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend within a ``with`` block."""
    before = _forced
    force_backend(name)
    try:
        yield
    finally:
        force_backend(before)


def backend_for(device_type: str) -> str:
    """Name of the backend that runs operators on this type of device now."""
    return _chain(device_type, _forced)[0]


def from_files() -> ModuleType | None:
    """The backend that quantizes what lies in files (``quantize_4bit_to``, ``quantize_int8_to``), if it is in use."""
    return _load("cpu") if backend_for("cpu") == "cpu" and os.name == "posix" else None


@functools.cache
def _chain(device_type: str, forced: str | None) -> tuple[str, ...]:
    """Backends to ask, in this order: each may leave what it does not serve to the next."""
    if forced is not None:
        return (forced, *(name for name in _BEHIND.get(forced, ()) if _failure(name) is None), "reference")
    names = _PREFERRED.get(device_type, ())
    if device_type == "cuda" and torch.version.cuda is None:  # AMD's GPUs go by that name as well
        names = ("triton",)
    failures = {name: _failure(name) for name in names}
    working = tuple(name for name, failure in failures.items() if failure is None)
    told = [f"{name}: {failure}" for name, failure in failures.items() if failure]
    if not working and told:
        warnings.warn(
            f"no fast backend works here, the slower reference runs instead ({'; '.join(told)})",
            FewbitsWarning,
            stacklevel=2,
        )
    return (*working, "reference")


@functools.cache
def _failure(name: str) -> str | None:
    """Why a backend does not work on this machine: "" if it is not installed, None if it works."""
    if importlib.util.find_spec(_NEEDS.get(name, "torch")) is None:
        return ""
    try:
        _load(name).check()
    except ConfigError:  # what the user asked for cannot be had
        raise
    except Exception as error:  # a package that is there and does not work: Triton without a C compiler, for one
        return str(error) or type(error).__name__
    return None


def _load(name: str) -> ModuleType:
    if name not in BACKENDS:
        BACKENDS[name] = importlib.import_module(_LOADED_LATER[name])
    return BACKENDS[name]


@functools.cache
def _implementations(op: str, device_type: str, forced: str | None) -> tuple[Any, ...]:
    modules = [_load(name) for name in _chain(device_type, forced)]
    device_types = getattr(modules[0], "DEVICE_TYPES", None)
    if device_types is not None and device_type not in device_types:
        raise ConfigError(
            f"the backend {forced!r} is forced and cannot run on a tensor of the device type {device_type!r}",
            expected=f"tensors on {' or '.join(device_types)}",
            hint="unset FEWBITS_BACKEND, and each device gets its own (for tests, TRITON_INTERPRET=1 takes CPUs too)",
        )
    return tuple(getattr(module, op) for module in modules if hasattr(module, op))


def _run(implementations: tuple[Any, ...], *args: Any) -> Any:
    for implementation in implementations:
        out = implementation(*args)
        if out is not NotImplemented:
            return out
    raise AssertionError("the reference serves everything")


def _dispatcher(op: str) -> Any:
    def call(first: Tensor, *args: Any) -> Any:
        device_type = first.device.type
        implementations = _implementations(op, device_type, _forced)
        if torch.is_autocast_enabled(device_type):  # an operator's own precision is not autocast's to choose
            with torch.autocast(device_type, enabled=False):
                return _run(implementations, first, *args)
        return _run(implementations, first, *args)

    return call


_library: Any = torch.library.Library("fewbits", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _dispatcher(_name), "CompositeExplicitAutograd")

ops = torch.ops.fewbits


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for a tensor's device; torch raises when asked for meta, which has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def undisturbed(x: Tensor) -> bool:
    """Whether nothing transforms or traces a call on this tensor, which has data; autograd may record it."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(x) is Tensor
        and not x.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def unrecorded(x: Tensor, *others: Tensor | None) -> bool:
    """Whether autograd does not record a call on these tensors."""
    return not torch.is_grad_enabled() or not (
        x.requires_grad or any(t is not None and t.requires_grad for t in others)
    )


def call(op: str, x: Tensor, *args: Any) -> Any:
    """An operator past PyTorch's dispatcher, three passes through which take longer than a small product on a GPU.

    Only where nothing would miss it; see :func:`undisturbed` and :func:`unrecorded`.
    """
    device_type = x.device.type
    implementations = _implementations(op, device_type, _forced)
    if not torch.is_autocast_enabled(device_type):
        return _run(implementations, x, *args)
    torch.set_autocast_enabled(device_type, False)  # as in _dispatcher; a context manager takes ten times as long
    try:
        return _run(implementations, x, *args)
    finally:
        torch.set_autocast_enabled(device_type, True)


def conversion(op: str, first: Tensor, *args: Any) -> Any:
    """An operator without gradient (``quantize_…``, ``dequantize_…``, ``embedding_…``) as :func:`product`."""
    return call(op, first, *args) if undisturbed(first) else getattr(ops, op)(first, *args)


def product(op: str, x: Tensor, *args: Any) -> Any:
    """``linear_4bit``, ``linear_int8`` or a ``…_t`` by the shortest way on which nothing that listens misses it."""
    if not undisturbed(x):
        return getattr(ops, op)(x, *args)
    bias = args[_BIAS[op]] if op in _BIAS else None
    if unrecorded(x, bias):
        return call(op, x, *args)
    return _RECORDED[op].apply(x, *args)


# ------------------------------------------------------------------------------------------------- fakes


def _fake(op: str) -> Callable[[_Function], _Function]:
    """Register what an operator's result looks like, for tracing without data."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"fewbits::{op}", function)
        return function

    return register


@_fake("quantize_4bit")
def _(w: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    return w.new_empty((n + 1) // 2, dtype=torch.uint8), w.new_empty(-(-n // block_size), dtype=torch.float32)


@_fake("quantize_absmax")
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    codes = absmax.new_empty(n, dtype=torch.uint8)
    return codes, absmax.new_empty(-(-n // reference.NESTED_BLOCK)), absmax.new_empty(())


@_fake("quantize_int8")
def _(w: Tensor) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[:-1], dtype=torch.float32)


@_fake("dequantize_4bit")
def _(packed: Tensor, absmax: Tensor, na: Any, no: Any, format: str, block_size: int, shape: Any, dtype: Any) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@_fake("dequantize_int8")
def _(q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


@_fake("linear_4bit")
def _(x: Tensor, p: Any, a: Any, na: Any, no: Any, bias: Any, format: str, block_size: int, shape: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@_fake("linear_4bit_t")
def _(g: Tensor, p: Any, a: Any, na: Any, no: Any, format: str, block_size: int, shape: Any) -> Tensor:
    return g.new_empty((*g.shape[:-1], shape[1]))


@_fake("linear_int8")
def _(x: Tensor, q: Tensor, absmax: Tensor, bias: Any, threshold: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


@_fake("linear_int8_t")
def _(g: Tensor, q: Tensor, absmax: Tensor) -> Tensor:
    return g.new_empty((*g.shape[:-1], q.shape[1]))


@_fake("embedding_4bit")
def _(ids: Tensor, p: Any, a: Any, na: Any, no: Any, format: str, block_size: int, shape: Any, dtype: Any) -> Tensor:
    return ids.new_empty((*ids.shape, shape[1]), dtype=dtype)


@_fake("embedding_int8")
def _(ids: Tensor, q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, q.shape[1]), dtype=dtype)


# ------------------------------------------------------------------------------------------------- gradients
# The weight is frozen; gradients go to the input and the bias. Each product's gradient is the other product, so that
# they can be differentiated again. LLM.int8()'s rounding of x is passed straight through, as the paper does.


def _bias_gradient(g: Tensor, needed: bool, dtype: torch.dtype | None) -> Tensor | None:
    return g.reshape(-1, g.shape[-1]).sum(0, dtype=dtype) if needed else None


def _setup_4bit(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_offset, bias, ctx.format, ctx.block_size, ctx.shape = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)


def _backward_4bit(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = product("linear_4bit_t", g, *ctx.saved_tensors, ctx.format, ctx.block_size, ctx.shape)
    grad_bias = _bias_gradient(g, ctx.needs_input_grad[5], ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None


def _setup_4bit_t(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_offset, ctx.format, ctx.block_size, ctx.shape = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)


def _backward_4bit_t(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    grad = product("linear_4bit", gg, *ctx.saved_tensors, None, ctx.format, ctx.block_size, ctx.shape)
    return grad, None, None, None, None, None, None, None


def _setup_int8(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, q, absmax, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(q, absmax)


def _backward_int8(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = product("linear_int8_t", g, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, _bias_gradient(g, ctx.needs_input_grad[3], ctx.bias_dtype), None


def _setup_int8_t(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_int8_t(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    return product("linear_int8", gg, *ctx.saved_tensors, None, 0.0), None, None


_GRADIENTS = {
    "linear_4bit": (_backward_4bit, _setup_4bit),
    "linear_4bit_t": (_backward_4bit_t, _setup_4bit_t),
    "linear_int8": (_backward_int8, _setup_int8),
    "linear_int8_t": (_backward_int8_t, _setup_int8_t),
}
_BIAS = {"linear_4bit": 4, "linear_int8": 2}  # where it stands among what follows x


def _recorded(op: str) -> Any:
    """The operator as a function that autograd records by itself: half the time of its way through the dispatcher."""
    backward, setup = _GRADIENTS[op]

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out: Tensor = call(op, *inputs)
        setup(ctx, inputs, out)
        return out

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": __name__}
    return type(op, (torch.autograd.Function,), members)


for _name, (_backward, _setup) in _GRADIENTS.items():
    torch.library.register_autograd(f"fewbits::{_name}", _backward, setup_context=_setup)
_RECORDED = {name: _recorded(name) for name in _GRADIENTS}

force_backend(os.environ.get("FEWBITS_BACKEND") or None)
