"""Tools that multiply by a quantized weight on a GPU: fewbits, bitsandbytes, and torch's bf16 and int4."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.formats import QuantSpec
from fewbits.tensor import QuantTensor, linear

DTYPE = torch.bfloat16
SPECS = {str(spec): spec for spec in (QuantSpec("nf4", double_quant=True), QuantSpec("nf4"), QuantSpec("int8"))}


@dataclass(frozen=True)
class Contender:
    """A tool, and how it multiplies.

    Attributes:
        make: from a weight, bf16 [N, K], to what the tool keeps of it; can be copied by ``copy.deepcopy``.
        call: from that and x, bf16 [M, K], to [M, N].
        bits: of a weight's element.
        format: that of fewbits whose values the tool's weight has; ``None`` where it has others.
        most_rows: above which it is left out, since it takes too long.
        eager: it waits for the GPU, which no graph can hold.
        outliers: it is given an x that has some.
    """

    make: Callable[[Tensor], Any]
    call: Callable[[Any, Tensor], Tensor]
    bits: int
    format: str | None = None
    most_rows: float = math.inf
    eager: bool = False
    outliers: bool = False


def peer_4bit(w: Tensor, *, double_quant: bool) -> nn.Module:
    import bitsandbytes as bnb

    n, k = w.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=DTYPE, device="meta")
    weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=double_quant)
    layer.weight = weight.to(w.device)  # which quantizes
    return layer.eval()


def peer_8bit(w: Tensor, *, threshold: float) -> nn.Module:
    import bitsandbytes as bnb

    n, k = w.shape
    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(w.half())  # as it does for a weight that comes from a CPU
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return layer.eval()


def torch_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Any codes and scales: its speed does not depend on them."""
    n, k = w.shape
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=w.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return packed, torch.full((k // 64, n, 2), 0.01, dtype=DTYPE, device=w.device)


def int4_linear(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    packed, scales_and_zeros = weight
    return torch.ops.aten._weight_int4pack_mm(x, packed, 64, scales_and_zeros)


def quantized(w: Tensor, *, format: str) -> QuantTensor:
    return QuantTensor.quantize(w, SPECS[format], known_finite=True)


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


CONTENDERS: dict[str, Contender] = {
    "bf16": Contender(lambda w: w, lambda w, x: F.linear(x, w), 16),
    **{
        f"fewbits {name}": Contender(
            functools.partial(quantized, format=name),
            lambda weight, x: linear(x, weight),
            8 if name == "int8" else 4,
            name,
        )
        for name in SPECS
    },
    "fewbits int8, outliers": Contender(
        functools.partial(quantized, format="int8"), lambda weight, x: linear(x, weight), 8, "int8", outliers=True
    ),
    "bitsandbytes nf4-dq": Contender(functools.partial(peer_4bit, double_quant=True), _called, 4, "nf4-dq"),
    "bitsandbytes nf4": Contender(functools.partial(peer_4bit, double_quant=False), _called, 4, "nf4"),
    "bitsandbytes int8": Contender(functools.partial(peer_8bit, threshold=6.0), _called, 8, "int8", eager=True),
    "bitsandbytes int8 t=0": Contender(functools.partial(peer_8bit, threshold=0.0), _called, 8, "int8"),
    "torch int4": Contender(torch_int4, int4_linear, 4, None, 128),
}
