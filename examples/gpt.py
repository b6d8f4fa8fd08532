"""A GPT of the shape and with the parameter names of minGPT: what the other examples load in 8 and 4 bits.

Nothing here knows of quantization. The names are minGPT's, so that checkpoints made for it load:

    transformer.wte, transformer.wpe                       embeddings of tokens and positions
    transformer.h.<n>.ln_1, .attn.c_attn, .attn.c_proj     attention of block n, pre-norm, with its mask .attn.bias
    transformer.h.<n>.ln_2, .mlp.c_fc, .mlp.c_proj         its MLP
    transformer.ln_f, lm_head                              last norm; head, neither tied to wte nor with a bias
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The size of a GPT: GPT-2's smallest by default.

    Attributes:
        n_layer: blocks.
        n_head: attention heads; they divide ``n_embd``.
        n_embd: width.
        vocab_size: tokens.
        block_size: longest sequence.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    block_size: int = 1024

    @classmethod
    def named(cls, name: str, **changes: Any) -> GPTConfig:
        """One of ``SIZES``, with some fields changed: ``GPTConfig.named("gpt2-xl", n_layer=2)``."""
        return replace(SIZES[name], **changes)


SIZES = {
    "gpt2": GPTConfig(12, 12, 768),  # 163 M parameters
    "gpt2-medium": GPTConfig(24, 16, 1024),  # 406 M
    "gpt2-large": GPTConfig(36, 20, 1280),  # 838 M
    "gpt2-xl": GPTConfig(48, 25, 1600),  # 1,638 M
}


class Attention(nn.Module):
    """Causal self-attention: x [B, T, C] to [B, T, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        mask = torch.ones(config.block_size, config.block_size).tril()
        self.register_buffer("bias", mask[None, None])  # [1, 1, T, T] of ones and zeros in float, as minGPT saves it

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = (p.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, :, :T, :T] != 0)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """ids [B, T] to logits [B, T, vocab_size]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            initialize(name, p.data)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """Append the likeliest token ``max_new_tokens`` times: ids [B, T] to [B, T + max_new_tokens]."""
        for _ in range(max_new_tokens):
            logits = self(ids[:, -self.config.block_size :])
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids


def initialize(name: str, value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill one parameter as GPT-2 does: norms 1, biases 0, the rest normal with deviation 0.02."""
    if name.endswith(".bias"):
        return value.zero_()
    if value.dim() == 1:
        return value.fill_(1)
    return value.normal_(std=0.02, generator=generator)
