"""fewbits under PEFT: adapters on quantized weights, of any model.

PEFT needs nothing from here to put LoRA, DoRA or IA³ on a fewbits model, transformers' or not: quantized layers are
``nn.Linear`` to it, ``prepare_model_for_kbit_training`` and ``target_modules="all-linear"`` do what they do, and a
merge (``weight += delta``) dequantizes, adds and quantizes again. What is here goes beyond:

- :func:`merge_and_unload` keeps merged weights in 16 bits if asked to (a 4-bit format loses most of a small delta), and
  merges IA³ too;
- :func:`fuse_lora` makes training faster and smaller: LoRA's two small products join the quantized one;
- :func:`as_plain` is for what PEFT refuses to do with weights in 4 or 8 bits, since it thinks of bitsandbytes' layers:
  mixed adapters (``get_peft_model(…, mixed=True)``), and IA³'s own ``merge_and_unload``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbits.errors import ConfigError, UnsupportedError
from fewbits.hf import record_config
from fewbits.modules import QuantLinear, is_conv1d, uninstall
from fewbits.offload import is_offloaded
from fewbits.place import put
from fewbits.storage import owners_of
from fewbits.tensor import QuantTensor, linear, linear_t

_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


@contextlib.contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Within it the model and what it is wrapped in do not say that they are loaded in 4 or 8 bits.

    Args:
        model: a fewbits model, or a PEFT model of one.
    """
    marked = [(module, mark) for module in model.modules() for mark in _MARKS if module.__dict__.get(mark) is True]
    for module, mark in marked:
        setattr(module, mark, False)
    try:
        yield
    finally:
        for module, mark in marked:
            setattr(module, mark, True)


# ------------------------------------------------------------------------------------------------- merging


def merge_and_unload(
    model: Any, *, dtype: torch.dtype | None = None, adapter_names: list[str] | None = None, safe_merge: bool = False
) -> nn.Module:
    """Merge the adapters of a PEFT model into its weights and give back the model that they were put on.

    Args:
        model: a ``PeftModel`` (or ``PeftMixedModel``) whose base is a fewbits model; it is used up.
        dtype: what the merged weights are kept in, ``torch.bfloat16`` for one: dequantized + delta, summed in fp32 and
            rounded once; the other parameters are cast to it as well. ``None`` quantizes merged weights again, each to
            the format that it had: most of a delta below half a step of the format is lost there.
        adapter_names: which adapters; by default the active ones.
        safe_merge: raise instead of merging an adapter with values that are not finite.

    Returns:
        The base model. Weights without an adapter stay quantized.

    Raises:
        ConfigError: the model is none of PEFT's, or ``dtype`` is no floating-point one.
        UnsupportedError: ``dtype`` is given, and parts of the model are offloaded.
        ValueError: PEFT's own, of an adapter that is broken (``safe_merge``) or cannot be merged.
    """
    base = getattr(model, "base_model", None)
    if base is None or not hasattr(base, "unload"):
        raise ConfigError(f"a {type(model).__name__} has no adapters to merge", expected="a model of peft")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype}", expected="torch.bfloat16, torch.float16 or torch.float32")
    if dtype is not None and is_offloaded(base.model):
        raise UnsupportedError("the model is offloaded", hint="merge it with dtype=None, or load it on one device")
    for layer in _tuned(base):
        if not check_adapters_to_merge(layer, adapter_names):
            continue
        own = layer.get_base_layer()
        weight = getattr(own, "weight", None)
        if dtype is None or not isinstance(weight, QuantTensor):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            continue
        with torch.no_grad():
            plain = weight.relabelled(torch.float32).dequantize().contiguous()  # not rounded to 16 bits before the sum
            uninstall(own, "weight", nn.Parameter(plain, requires_grad=False))
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            own.weight.data = own.weight.data.to(dtype)  # at once: there is one in fp32 at a time
    with as_plain(model):
        unloaded: nn.Module = base.unload()
    if dtype is not None:
        _cast_parameters(unloaded, dtype)
    record_config(unloaded)
    return unloaded


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Without buffers, some of which are to stay in fp32 (a rotary embedding's frequencies)."""
    for owners in owners_of(model):
        p: Any = owners[0].module._parameters[owners[0].name]
        if isinstance(p, QuantTensor):
            put(owners, p.relabelled(dtype), False)
        elif p.is_floating_point():
            p.data = p.data.to(dtype)


def _tuned(model: nn.Module) -> Iterator[Any]:
    return (module for module in [*model.modules()] if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"))


# ------------------------------------------------------------------------------------------------- fused LoRA


def fuse_lora(model: nn.Module) -> nn.Module:
    """Make the LoRA layers of a PEFT model on quantized weights compute in one go, in place.

    ``x W.T + s (x A.T) B.T``: the second sum is added into the first by the product that makes it, all in the dtype of
    the quantized product (autocast's, ``compute_dtype``, or x's own), and backward keeps x in that dtype and the r
    numbers a row of ``x A.T``, nothing else. PEFT's own layer casts x to the adapter's dtype (fp32 by default), and
    keeps and adds full-size intermediates. The adapter's parameters and their gradients stay in their own dtype.

    Names, state dicts, merging and everything else stay PEFT's; a call that is more than this (DoRA and other variants,
    several adapters at once, adapters by sample, adapters with a bias) is left to PEFT's own forward, as it comes.

    Args:
        model: a ``PeftModel``, or any module with PEFT's LoRA layers in it.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no LoRA layer on a quantized weight in it.
    """
    found: list[Any] = [m for m in model.modules() if type(m) in (LoraLinear, FusedLoraLinear)]
    layers = [layer for layer in found if _fusible(layer.get_base_layer())]
    if not layers:
        raise ConfigError(
            "the model has no LoRA layer on a quantized linear layer",
            expected="a fewbits model after peft.get_peft_model(model, LoraConfig(…))",
        )
    for layer in layers:
        layer.__class__ = FusedLoraLinear  # as a quantized layer is made: names, hooks and attributes stay
    return model


def _fusible(module: Any) -> bool:
    exact = isinstance(module, QuantLinear) or is_conv1d(module)
    return exact and isinstance(getattr(module, "weight", None), QuantTensor)


class FusedLoraLinear(LoraLinear):  # type: ignore[misc]  # mypy does not follow peft
    """PEFT's LoRA layer on a quantized weight, made by :func:`fuse_lora`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        plain = not (args or kwargs or self.disable_adapters or self.merged or len(active) != 1)
        if not plain or active[0] in self.lora_variant or self.lora_bias[active[0]] or not _untouched(base):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        name, weight = active[0], base.weight
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.spec.compute_dtype or x.dtype
        dropout = self.lora_dropout[name]
        low = x if isinstance(dropout, nn.Identity) or not self.training else dropout(x)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        lead = x.shape[:-1]
        x_MK = x.to(dtype).reshape(-1, x.shape[-1])
        low_MK = x_MK if low is x else low.to(dtype).reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = _Fused.apply(x_MK, low_MK, down, up, base.bias, float(self.scaling[name]), weight)  # type: ignore[no-untyped-call]
        out = out.view(*lead, out.shape[-1])
        return out if autocast else out.to(x.dtype)


def _untouched(base: Any) -> bool:
    """Whether the quantized layer below is what it was, with nothing around its forward, and its bias is frozen."""
    return (
        _fusible(base)
        and "forward" not in base.__dict__
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not (base.bias is not None and base.bias.requires_grad)
        and not torch.compiler.is_compiling()
    )


class _Fused(torch.autograd.Function):
    """``x W.T + bias + s (l A.T) B.T`` for x and l [M, K] in one dtype, A [r, K], B [N, r] and a quantized W [N, K]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, scaling: float, weight: Any
    ) -> Tensor:
        out = linear(x, weight, bias)
        small = low @ down.to(x.dtype).t()  # [M, r]
        out.addmm_(small, up.to(x.dtype).t(), alpha=scaling)
        inner = weight.inner_tensors
        ctx.scaling, ctx.same, ctx.names = scaling, low is x, list(inner)
        ctx.about = weight.spec, weight.stored_shape, weight.dtype
        # the inner tensors too: a weight that was brought from elsewhere is not there any more in backward, and what
        # autograd saves is brought again
        ctx.save_for_backward(low, small, down, up, *inner.values())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        low, small, down, up, *inner = ctx.saved_tensors
        g_small = torch.mm(g, up.to(g.dtype)).mul_(ctx.scaling)  # [M, r]
        grad_x = grad_low = None
        if ctx.needs_input_grad[0]:
            grad_x = linear_t(g, QuantTensor.from_inner(dict(zip(ctx.names, inner, strict=True)), *ctx.about))
            if ctx.same:
                grad_x.addmm_(g_small, down.to(g.dtype))
        if ctx.needs_input_grad[1] and not ctx.same:
            grad_low = g_small @ down.to(g.dtype)
        grad_down = (g_small.t() @ low).to(down.dtype) if ctx.needs_input_grad[2] else None
        grad_up = (g.t() @ small).to(up.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[3] else None
        return grad_x, grad_low, grad_down, grad_up, None, None, None
