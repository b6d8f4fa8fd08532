"""LoRA on a quantized weight as one function of autograd; see :func:`fuse_lora`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbits.errors import ConfigError
from fewbits.modules import QuantLinear, is_conv1d
from fewbits.tensor import QuantTensor, linear, linear_t


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
