"""llama.cpp beside the other tools: a checkpoint of ``llama.py`` written as GGUF, and a model that is called as theirs.

Needs llama-cpp-python and gguf, of which the first is compiled when it is installed. Every linear layer is in Q4_0, 4
bits with an fp16 scale for 32 weights; the embeddings and the head stay in bf16, as with the other tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    if path in OTHERS:
        return f"{OTHERS[path]}.weight"
    _, _, layer, part = path.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def rotated(w: Tensor, heads: int) -> Tensor:
    """Rows of a head's halves in turn: llama.cpp rotates neighbours, transformers the halves."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def write_gguf(folder: Path, target: Path) -> None:
    """The checkpoint in ``folder`` (``config.json`` and safetensors) as one file."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    types = gguf.GGMLQuantizationType
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in list(weights.keys()):
                w, to = weights.get_tensor(name), gguf_name(name)
                if w.dim() == 1:
                    writer.add_tensor(to, w.float().numpy())
                elif to in ("token_embd.weight", "output.weight"):
                    bits = w.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
                    writer.add_tensor(to, bits, raw_dtype=types.BF16)
                else:
                    if "attn_q" in to or "attn_k" in to:
                        w = rotated(w, heads if "attn_q" in to else kv_heads)
                    codes = gguf.quants.quantize(w.float().numpy(), types.Q4_0)
                    writer.add_tensor(to, codes, raw_dtype=types.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """Called as a model of transformers is: token ids [1, tokens], and ``past_key_values`` to go on."""

    def __init__(self, file: Path, context: int = 512) -> None:
        import llama_cpp

        threads = torch.get_num_threads()
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def __call__(self, ids: Tensor, past_key_values: Any = None, **_: Any) -> SimpleNamespace:
        if past_key_values is None:
            self._llama.reset()
        self._llama.eval(ids[0].tolist())
        logits = np.ctypeslib.as_array(self._llama._ctx.get_logits(), shape=(self._llama.n_vocab(),))
        return SimpleNamespace(logits=torch.from_numpy(logits.copy())[None, None], past_key_values=self)


def load(folder: Path, devices: dict[str, int | str], files: str, *, format: str) -> Model:
    """A checkpoint written to ``files`` first; all of it is on the CPU."""
    assert format == "q4_0"
    assert set(devices.values()) == {"cpu"}
    target = Path(files) / "model.gguf"
    write_gguf(folder, target)
    return Model(target)
