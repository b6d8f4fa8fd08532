"""What the tests of PEFT's adapters share: formats, configurations, the truth on the dequantized model."""

from __future__ import annotations

import copy

import torch
from architectures import ARCHITECTURES
from peft import IA3Config, LoraConfig
from torch import nn

import fewbits
from fewbits.inplace import dequantize
from fewbits.tensor import QuantTensor

FORMATS = {"nf4": {"double_quant": True}, "fp4": {}, "int8": {}}
ADAPTERS = {
    "lora": lambda **k: LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **{"target_modules": "all-linear", **k}),
    "dora": lambda **k: LoraConfig(
        r=4, use_dora=True, init_lora_weights=False, **{"target_modules": "all-linear", **k}
    ),
    "ia3": lambda target_modules=("k_proj", "v_proj", "down_proj"): IA3Config(
        target_modules=[*target_modules], feedforward_modules=[target_modules[-1]], init_ia3_weights=False
    ),
}  # fmt: skip


def llama(format: str, device: str = "cpu", seed: int = 0):
    return fewbits.quantize(ARCHITECTURES["llama"].build(seed).to(device), format, **FORMATS[format])


def on_dequantized(model: nn.Module) -> nn.Module:
    """A copy whose base weights are plain, with the same adapters."""
    twin = copy.deepcopy(model)
    dequantize(twin.base_model.model)
    return twin


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def limit(format: str) -> float:
    """fp32 sums in another order; int8's two digits keep 16 bits of the activations (2^-15 at each of 14 layers)."""
    return 14 * 2.0**-15 if format == "int8" else 1e-5


def quantized(model: nn.Module) -> dict[str, QuantTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantTensor)}
