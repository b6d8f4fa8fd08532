"""LoRA on a quantized weight as one function of autograd; see :func:`fuse_lora`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbits.errors import ConfigError
from fewbits.formats import dequantize_inner
from fewbits.kernels import autocasts
from fewbits.modules import QuantLinear, is_conv1d
from fewbits.tensor import QuantTensor, linear


def fuse_lora(model: nn.Module) -> nn.Module:
    """Make the LoRA layers of a PEFT model on quantized weights compute in one go, in place.

    ``x W.T + s (x A.T) B.T``: in training the weight is dequantized into a scratch, and its product added to the
    adapter's by the product itself, so that their sum is rounded once. All is in one dtype: autocast's,
    ``compute_dtype``, or x's own. (PEFT rounds the weight's product first. In 16 bits the adapter's contribution is
    then lost wherever it is below half a unit in the last place, which at the beginning of a training it mostly is; and
    it computes in the adapter's dtype, fp32 by default, with intermediates of full size.) Backward keeps x in that
    dtype and the r numbers a row of ``x A.T``, nothing else. The adapter and its gradients stay in their own dtype.

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
        base, active = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or self.merged or len(active) != 1)
        if not plain or active[0] in self.lora_variant or self.lora_bias[active[0]] or not _untouched(base):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        name, weight = active[0], base.weight
        autocast = autocasts(x)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.spec.compute_dtype or x.dtype
        dropout = self.lora_dropout[name]
        low = x if isinstance(dropout, nn.Identity) or not self.training else dropout(x)
        down, up, scaling = self.lora_A[name].weight, self.lora_B[name].weight, float(self.scaling[name])
        x_MK = x.to(dtype).reshape(-1, x.shape[-1])
        low_MK = x_MK if low is x else low.to(dtype).reshape(-1, x.shape[-1])
        out: Tensor
        if self.training or torch.is_grad_enabled():  # a checkpointed block is first run without gradients
            out = _Fused.apply(x_MK, low_MK, down, up, base.bias, scaling, weight)  # type: ignore[no-untyped-call]
        else:  # a few rows perhaps, for which the weight is not dequantized
            out = linear(x_MK, weight, base.bias)
            out.addmm_(low_MK @ down.to(dtype).t(), up.to(dtype).t(), alpha=scaling)
        out = out.view(*x.shape[:-1], out.shape[-1])
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
        inner = weight.inner_tensors
        ctx.scaling, ctx.same, ctx.names = scaling, low is x, list(inner)
        spec, shape = ctx.about = weight.spec, weight.stored_shape
        small = low @ down.to(x.dtype).t()  # [M, r]
        out = small @ up.to(x.dtype).t()
        out.addmm_(x, dequantize_inner(inner, spec, shape, x.dtype).t(), beta=scaling)
        if bias is not None:
            out += bias
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
        needs_x, needs_low = ctx.needs_input_grad[:2]
        if needs_low or (needs_x and ctx.same):
            grad_low = g_small @ down.to(g.dtype)
        if needs_x:
            (spec, shape), parts = ctx.about, dict(zip(ctx.names, inner, strict=True))
            w_NK = dequantize_inner(parts, spec, shape, g.dtype)
            if ctx.same:  # rounded once, as in forward
                assert grad_low is not None
                grad_x, grad_low = grad_low.addmm_(g, w_NK), None
            else:
                grad_x = g @ w_NK
        grad_down = (g_small.t() @ low).to(down.dtype) if ctx.needs_input_grad[2] else None
        grad_up = (g.t() @ small).to(up.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[3] else None
        return grad_x, grad_low, grad_down, grad_up, None, None, None
