"""The recipe of Hugging Face Accelerate's "bitsandbytes integration" page, with only its import lines changed.

    python examples/recipe.py

It runs with or without a GPU, on a small GPT of random weights, in 8 bits and in 4, and shows three things that the
recipe promises: the empty model takes no memory and can be used again, the quantized model is smaller, and a quantized
model that is saved and loaded again is the same bit for bit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from gpt import GPT, GPTConfig

import fewbits
from fewbits.accelerate import Accelerator, init_empty_weights
from fewbits.accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

model_config = GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=1024, block_size=128)

CONFIGS = {
    "8-bit": BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=6),
    "4-bit": BnbQuantizationConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    ),
}


def recipe(config: BnbQuantizationConfig, path: Path, new_path: Path) -> tuple[GPT, GPT, GPT]:
    """The page's own lines: an empty model, loaded quantized, saved, and loaded again."""
    with init_empty_weights():
        empty_model = GPT(model_config)
    model = load_and_quantize_model(
        empty_model, weights_location=path, bnb_quantization_config=config, device_map="auto"
    )
    Accelerator().save_model(model, new_path)
    again = load_and_quantize_model(
        empty_model, weights_location=new_path, bnb_quantization_config=config, device_map="auto"
    )
    return empty_model, model, again


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        original = GPT(model_config)
        path = Path(folder, "original", "pytorch_model.bin")
        path.parent.mkdir()
        torch.save(original.state_dict(), path)
        print(f"a GPT of {fewbits.summary(original).total.parameters:,} parameters, on disk in fp32")
        for name, config in CONFIGS.items():
            empty_model, model, again = recipe(config, path, Path(folder, name))
            report(name, original, empty_model, model, again)


def report(name: str, original: GPT, empty_model: GPT, model: GPT, again: GPT) -> None:
    """Print what became of it; stop if anything is not as promised."""
    before, after = fewbits.summary(original).total, fewbits.summary(model).total
    device = next(model.parameters()).device
    ids = torch.arange(32, device=device)[None]
    with torch.no_grad():
        logits, same = model(ids), again(ids)
        error = (logits.float().cpu() - original(ids.cpu())).norm() / original(ids.cpu()).norm()
    state, state_again = model.state_dict(), again.state_dict()
    checks = {
        "empty_model is still on the meta device": all(p.is_meta for p in empty_model.parameters()),
        "again has the weights of model, bit for bit": state.keys() == state_again.keys()
        and all(torch.equal(state[key], state_again[key]) for key in state),
        "again has the outputs of model, bit for bit": torch.equal(logits, same),
    }
    print(f"\n{name} on {device}")
    print(f"  parameters  {before.nbytes:,} bytes -> {after.nbytes:,} ({after.bits:.2f} bits each)")
    print(f"  one block   {model.transformer.h[0].mlp.c_fc}")
    print(f"  logits      {100 * error:.1f} % from those of the fp32 model")
    for text, holds in checks.items():
        print(f"  {'yes' if holds else 'NO '}         {text}")
    if not all(checks.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
