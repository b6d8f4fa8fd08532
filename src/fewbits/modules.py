"""The fast path: modules that hand their quantized weight's inner tensors straight to the operator.

An exact ``nn.Linear``, ``nn.Embedding`` or transformers' ``Conv1D`` becomes its twin by changing its class in place, so
that its identity, hooks, attributes and ``isinstance`` all survive. Any other module keeps its class, and its quantized
parameters act through :class:`~fewbits.tensor.QuantTensor`. Either way the parameter keeps its name, its logical shape
and its logical dtype, and ``state_dict`` gives plain tensors in bitsandbytes' keys (:mod:`fewbits.statedict`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.accelerate_hooks import HookSlot
from fewbits.statedict import attach_state_dict_hooks
from fewbits.tensor import QuantTensor, embedding, linear


def _fast(weight: Tensor) -> bool:
    """Whether the operator can serve: it gives the weight no gradient, so one that wants it goes the universal way."""
    return isinstance(weight, QuantTensor) and not (weight.requires_grad and torch.is_grad_enabled())


def _describe(module: nn.Module, base: str) -> str:
    weight = module.weight
    return f"{base}, {weight.spec}" if isinstance(weight, QuantTensor) else base


class QuantLinear(nn.Linear):
    """``nn.Linear`` with a quantized weight: x [..., in_features] to [..., out_features] in x's dtype."""

    _hf_hook = HookSlot()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # looked up once: a module's attributes are slow
        if _fast(weight):
            return linear(x, weight, self.bias)  # type: ignore[arg-type]  # _fast has looked
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return _describe(self, super().extra_repr())


class QuantEmbedding(nn.Embedding):
    """``nn.Embedding`` with a quantized table: ids [...] to [..., embedding_dim] in the table's logical dtype."""

    _hf_hook = HookSlot()

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weight
        if _fast(weight):
            return embedding(ids, weight)  # type: ignore[arg-type]
        return super().forward(ids)

    def extra_repr(self) -> str:
        return _describe(self, super().extra_repr())


class _QuantConv1DMixin:
    """transformers' ``Conv1D``, a linear layer whose weight is [in, out]; its bytes are stored as [out, in]."""

    _hf_hook = HookSlot()

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if _fast(weight):
            return linear(x, weight, self.bias)  # type: ignore[arg-type]
        return super().forward(x)  # type: ignore[misc,no-any-return]

    def __repr__(self) -> str:
        rows, columns = self.weight.shape
        return f"QuantConv1D(nf={columns}, nx={rows}, {getattr(self.weight, 'spec', '')})"


@functools.cache
def _quant_conv1d(base: type) -> type:
    return type(
        "QuantConv1D", (_QuantConv1DMixin, base), {"__module__": __name__, "__doc__": _QuantConv1DMixin.__doc__}
    )


def __getattr__(name: str) -> Any:
    if name == "QuantConv1D":  # made on demand, so that nothing imports transformers; found here by pickle
        from transformers.pytorch_utils import Conv1D

        return _quant_conv1d(Conv1D)
    raise AttributeError(name)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D`` (or a subclass), told without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether the module's ``weight`` is the matrix of a linear layer."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def stores_transposed(module: nn.Module, name: str) -> bool:
    """Whether this parameter's bytes are those of its transpose, as transformers + bitsandbytes write ``Conv1D``."""
    return name == "weight" and is_conv1d(module)


_TWINS: dict[type, type[nn.Module]] = {
    nn.Linear: QuantLinear,
    QuantLinear: QuantLinear,
    nn.Embedding: QuantEmbedding,
    QuantEmbedding: QuantEmbedding,
}


def twin_of(module: nn.Module) -> type[nn.Module] | None:
    """The fast class for a module, or ``None`` where only the universal path is safe (subclasses, renormalization)."""
    kind: Any = type(module)
    if kind in _TWINS:
        return None if getattr(module, "max_norm", None) is not None else _TWINS[kind]
    if is_conv1d(module) and (kind.__name__ in ("Conv1D", "QuantConv1D")):
        return kind if kind.__name__ == "QuantConv1D" else _quant_conv1d(kind)
    return None


def quantize_parameter(
    module: nn.Module, name: str, w: Tensor, spec: Any, label: str | None = None, *, known_finite: bool = False
) -> QuantTensor:
    """``w``, the value of ``module.<name>``, quantized in the orientation in which this module stores it."""
    if not stores_transposed(module, name):
        return QuantTensor.quantize(w, spec, label=label, known_finite=known_finite)
    stored = QuantTensor.quantize(w.t().contiguous(), spec, label=label, known_finite=known_finite)
    return stored.t()  # type: ignore[return-value]  # transposing keeps the class


def install(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make ``parameter``, a quantized one, the module's parameter of this name, and the module fit to hold it."""
    module._parameters[name] = parameter
    if name == "weight" and (twin := twin_of(module)) is not None:
        module.__class__ = twin
    attach_state_dict_hooks(module)


def uninstall(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make ``parameter``, a plain one, the module's parameter of this name, and the module a plain one again."""
    module._parameters[name] = parameter
    bases = type(module).__mro__
    if name == "weight" and twin_of(module) is bases[0]:
        module.__class__ = next(base for base in bases if not base.__module__.startswith("fewbits."))
