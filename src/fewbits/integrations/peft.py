"""fewbits under PEFT: adapters on quantized weights, of any model.

PEFT needs nothing from here to put LoRA, DoRA or IA³ on a fewbits model, transformers' or not: quantized layers are
``nn.Linear`` to it, ``prepare_model_for_kbit_training`` and ``target_modules="all-linear"`` do what they do, and a
merge (``weight += delta``) dequantizes, adds and quantizes again. What is here goes beyond:

- :func:`merge_and_unload` keeps merged weights in 16 bits if asked to (a 4-bit format loses most of a small delta), and
  merges IA³ too;
- :func:`fuse_lora` makes training faster: LoRA's two small products join the quantized one;
- :func:`prepare_model_for_kbit_training` does what PEFT's does in less memory, and for any module;
- :func:`as_plain` is for what PEFT refuses to do with weights in 4 or 8 bits, since it thinks of bitsandbytes' layers:
  mixed adapters (``get_peft_model(…, mixed=True)``), and IA³'s own ``merge_and_unload``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewbits.errors import ConfigError, UnsupportedError
from fewbits.hf import is_transformers_model, record_config
from fewbits.integrations.fused_lora import FusedLoraLinear, fuse_lora
from fewbits.kernels import autocasts
from fewbits.modules import install, uninstall
from fewbits.offload import is_offloaded
from fewbits.place import put
from fewbits.storage import owners_of
from fewbits.structure import blocks_of, output_heads
from fewbits.tensor import QuantTensor

__all__ = ["FusedLoraLinear", "as_plain", "fuse_lora", "merge_and_unload", "prepare_model_for_kbit_training"]

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


# ------------------------------------------------------------------------------------------------- preparing


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze a quantized model and make it fit to train adapters on, in place: PEFT's function, in less memory.

    As there, what is not quantized goes to fp32, so that activations between layers are in fp32, and blocks are
    checkpointed: their inner activations are computed again in backward. Unlike there,

    - tables and output heads stay in 16 bits, half the size. What comes out of a table is cast instead, which gives the
      same numbers; a head multiplies in its own dtype, as under autocast it does in any case;
    - checkpointing works for modules that are not transformers' too: their blocks are the modules alike that repeat in
      a list.

    Args:
        model: a fewbits model.
        use_gradient_checkpointing: whether to checkpoint.
        gradient_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``. By default it is reentrant for
            transformers' models, which takes the host a quarter less time, and is not for others.

    Returns:
        The same model.
    """
    heads = set(output_heads(model))
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False):
            p.requires_grad_(False)
            half = p.dtype in (torch.float16, torch.bfloat16)
            if half and not (table or name in heads or isinstance(p, QuantTensor)):
                p.data = p.data.float()
        if table:
            module.register_forward_hook(_in_fp32)
        elif name in heads:
            module.register_forward_pre_hook(_in_the_weights_dtype)
    if use_gradient_checkpointing:
        default = {"use_reentrant": is_transformers_model(model)}
        _checkpoint_blocks(model, {**default, **(gradient_checkpointing_kwargs or {})})
    return model


def _in_fp32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def _in_the_weights_dtype(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = args[0]
    return args if autocasts(x) else (x.to(module.weight.dtype), *args[1:])


def _take_off_casts(model: nn.Module) -> None:
    """What keeps activations in fp32, where all parameters have become one dtype."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in [*hooks.items()]:
                if hook in (_in_fp32, _in_the_weights_dtype):
                    del hooks[key]


def _checkpoint_blocks(model: Any, settings: dict[str, Any]) -> None:
    if settings["use_reentrant"] and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers
        model.activation_checkpointing_enable(settings)
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    else:
        modules = dict(model.named_modules())
        for name in blocks_of(model):
            modules[name].forward = _Checkpointed(modules[name], settings)


class _Checkpointed:
    """A block's ``forward`` that is computed again in backward."""

    def __init__(self, module: nn.Module, settings: dict[str, Any]) -> None:
        self.module, self.settings, self.own = module, settings, module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.own or type(self.module).forward.__get__(self.module)
        if not (self.module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **self.settings, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Checkpointed:
        again = _Checkpointed(copy.deepcopy(self.module, memo), self.settings)
        again.own = copy.deepcopy(self.own, memo)
        return again


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
        weight: Any = getattr(own, "weight", None)
        if dtype is None or not isinstance(weight, QuantTensor):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            continue
        with torch.no_grad():
            plain = weight.relabelled(torch.float32).dequantize().contiguous()  # not rounded to 16 bits before the sum
            uninstall(own, "weight", nn.Parameter(plain, requires_grad=False))
            try:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            except Exception:
                install(own, "weight", weight)  # type: ignore[arg-type]  # an instance, by its mark
                raise
            own.weight.data = own.weight.data.to(dtype)  # at once: there is one in fp32 at a time
    with as_plain(model):
        unloaded: nn.Module = base.unload()
    if dtype is not None:
        _cast_parameters(unloaded, dtype)
        _take_off_casts(unloaded)
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
