"""Tiny models of many architectures of transformers, with random weights, and something to run each on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

WORDS = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**WORDS, "num_key_value_heads": 2}
PIXELS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """How to build one.

    Attributes:
        config: a function that gives its configuration.
        kind: the class of the model.
        generates: whether it writes text from ``input_ids`` alone.
        inputs: from a batch's size and a generator to what its ``forward`` takes.
        output: the name of what it gives, of which tests look at the values.
    """

    config: Callable[[], Any]
    kind: Any
    generates: bool = True
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]] = lambda n, g: {"input_ids": words(n, 10, g)}
    output: str = "logits"

    def build(self, seed: int = 0) -> Any:
        """A model in evaluation mode; the weights are large enough for its values to differ."""
        torch.manual_seed(seed)
        model = self.kind(self.config()).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(2)
        return model

    def batch(self, n: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Inputs for ``n`` samples, the same for the same seed."""
        return self.inputs(n, torch.Generator().manual_seed(seed))

    def run(self, model: Any, n: int = 2, seed: int = 0) -> Tensor:
        """What the model gives for :meth:`batch`, on the model's device."""
        device = next(model.parameters()).device
        with torch.no_grad():
            out = model(**{name: value.to(device) for name, value in self.batch(n, seed).items()})
        return out[self.output].float()


def words(n: int, length: int, generator: torch.Generator) -> Tensor:
    """Ids [n, length] of no special token."""
    return torch.randint(3, 96, (n, length), generator=generator)


def _pixels(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=generator)


def _translated(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": words(n, 10, generator), "decoder_input_ids": words(n, 6, generator)}


def _heard(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(n, 16, 40, generator=generator),
        "decoder_input_ids": words(n, 6, generator),
    }


def _seen_and_read(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": _pixels(n, generator), "input_ids": words(n, 10, generator)}


ARCHITECTURES = {
    "llama": Architecture(lambda: transformers.LlamaConfig(**GROUPED), transformers.LlamaForCausalLM),
    "mistral": Architecture(
        lambda: transformers.MistralConfig(**GROUPED, sliding_window=8), transformers.MistralForCausalLM
    ),
    "mixtral": Architecture(
        lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
        transformers.MixtralForCausalLM,
    ),
    "qwen2": Architecture(
        lambda: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True), transformers.Qwen2ForCausalLM
    ),
    "gemma2": Architecture(
        lambda: transformers.Gemma2Config(**GROUPED, head_dim=16, sliding_window=8), transformers.Gemma2ForCausalLM
    ),
    "phi": Architecture(lambda: transformers.PhiConfig(**WORDS), transformers.PhiForCausalLM),
    "gpt2": Architecture(
        lambda: transformers.GPT2Config(
            vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        transformers.GPT2LMHeadModel,
    ),
    "opt": Architecture(
        lambda: transformers.OPTConfig(**WORDS, ffn_dim=128, word_embed_proj_dim=64),
        transformers.OPTForCausalLM,
    ),
    "bloom": Architecture(
        lambda: transformers.BloomConfig(
            vocab_size=96, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        transformers.BloomForCausalLM,
    ),
    "t5": Architecture(
        lambda: transformers.T5Config(
            vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        transformers.T5ForConditionalGeneration,
        inputs=_translated,
    ),
    "bert": Architecture(
        lambda: transformers.BertConfig(**WORDS, num_labels=32),
        transformers.BertForSequenceClassification,
        generates=False,
    ),
    "bert-embedding": Architecture(
        lambda: transformers.BertConfig(**WORDS),
        transformers.BertModel,
        generates=False,
        output="last_hidden_state",
    ),
    "vit": Architecture(
        lambda: transformers.ViTConfig(**PIXELS, num_labels=32),
        transformers.ViTForImageClassification,
        generates=False,
        inputs=lambda n, g: {"pixel_values": _pixels(n, g)},
    ),
    "whisper": Architecture(
        lambda: transformers.WhisperConfig(
            vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16,
            max_source_positions=20, max_target_positions=32, decoder_start_token_id=3, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, suppress_tokens=None, begin_suppress_tokens=None,
        ),
        transformers.WhisperForConditionalGeneration,
        generates=False,
        inputs=_heard,
    ),
    "clip": Architecture(
        lambda: transformers.CLIPConfig(
            text_config={**WORDS, "eos_token_id": 2}, vision_config=PIXELS, projection_dim=32
        ),
        transformers.CLIPModel,
        generates=False,
        inputs=_seen_and_read,
        output="image_embeds",
    ),
}  # fmt: skip
