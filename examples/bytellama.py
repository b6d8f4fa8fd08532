"""The sample model: text to ids and back, its quality in bits per byte, outlier features put into it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "bytellama"
TEXT = ROOT / "text" / "wikitext2-test-400k.txt"
OFFSET = 3  # ByT5's ids: 0, 1 and 2 are padding, end and unknown; a byte b is b + 3


def encode(text: bytes) -> Tensor:
    """ids [1, len(text)]."""
    return torch.tensor([[byte + OFFSET for byte in text]])


def decode(ids: Tensor) -> str:
    """The text of ids [...], special ones left out."""
    return bytes(i - OFFSET for i in ids.flatten().tolist() if OFFSET <= i < OFFSET + 256).decode(errors="replace")


@torch.inference_mode()
def bits_per_byte(model: nn.Module, windows: int = 64, length: int = 512, bar: Any = None) -> float:
    """Cross entropy of the sample text, in bits per byte.

    The first ``windows`` windows of ``length`` bytes, one after the other, each on its own: every byte but a window's
    first is predicted from those before it. Logits are taken in fp32.
    """
    ids = encode(TEXT.read_bytes()[: windows * length]).view(windows, length)
    device = next(model.parameters()).device
    nats = 0.0
    for batch in ids.split(8):
        batch = batch.to(device)
        logits = model(batch).logits.float()
        nats += F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        if bar is not None:
            bar.update(len(batch))
    return nats / math.log(2) / (windows * (length - 1))


@torch.no_grad()
def add_outlier_features(model: Any, seed: int = 0, channels: int = 6, factor: float = 60.0) -> None:
    """Give a Llama the outlier features of a large model without changing its function, in place.

    In every block the same ``channels`` channels, drawn with ``seed``, of both norms' gains are multiplied by
    ``factor``, and the columns of the matrices that read them divided by it (Dettmers et al., "LLM.int8()", 2022, found
    such features in models from 6.7 B parameters up).
    """
    picked = torch.tensor(random.Random(seed).sample(range(model.config.hidden_size), channels))
    for layer in model.model.layers:
        readers = {
            layer.input_layernorm: (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            layer.post_attention_layernorm: (layer.mlp.gate_proj, layer.mlp.up_proj),
        }
        for norm, linears in readers.items():
            norm.weight[picked] *= factor
            for linear in linears:
                linear.weight[:, picked] /= factor
