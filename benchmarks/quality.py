"""Quality on the sample model: bits per byte of text, fewbits beside transformers with bitsandbytes, in one run.

Every row loads the same checkpoint and reads the same 64 windows of 512 bytes (``examples/bytellama.py``). Then the
model gets outlier features that leave its function as it was (three draws of channels), which is what LLM.int8()'s
threshold is for. Writes ``benchmarks/results/quality-<device>.json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from machine import facts

import fewbits

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bytellama import MODEL, add_outlier_features, bits_per_byte

FORMATS: dict[str, tuple[str, dict]] = {
    "int8, threshold 6": ("int8", {"llm_int8_threshold": 6.0}),
    "int8, threshold 0": ("int8", {"llm_int8_threshold": 0.0}),
    "nf4": ("nf4", {}),
    "nf4, double quantization": ("nf4", {"double_quant": True}),
    "fp4": ("fp4", {}),
}


def ours(folder: Path, format: str, settings: dict) -> float:
    return bits_per_byte(fewbits.from_pretrained(folder, format, **settings))


def peer(folder: Path, format: str, settings: dict) -> float:
    """transformers with bitsandbytes, in the dtype of the checkpoint as ours."""
    if format == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, **settings)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=format,
            bnb_4bit_use_double_quant=settings.get("double_quant", False),
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype="auto", device_map={"": device}
    )
    return bits_per_byte(model.eval())


def plain(folder: Path, dtype: torch.dtype) -> float:
    return bits_per_byte(fewbits.from_pretrained(folder, dtype=dtype))


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []

    def report(name: str, ours_: float, peer_: float | None) -> None:
        rows.append({"model": name, "fewbits": round(ours_, 5), "bitsandbytes": peer_ and round(peer_, 5)})
        print(f"{name:44} {ours_:10.4f} {peer_ if peer_ is None else format(peer_, '14.4f')}", flush=True)

    print(f"{'bits per byte (lower is better)':44} {'fewbits':>10} {'bitsandbytes':>14}")
    report("fp32", plain(MODEL, torch.float32), None)
    report("bf16", plain(MODEL, torch.bfloat16), None)
    for name, (format_, settings) in FORMATS.items():
        report(name, ours(MODEL, format_, settings), peer(MODEL, format_, settings))
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(3):
            model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
            add_outlier_features(model, seed)
            folder = Path(temporary, str(seed))
            model.to(torch.bfloat16).save_pretrained(folder)
            for name in ("int8, threshold 6", "int8, threshold 0", "nf4"):
                format_, settings = FORMATS[name]
                row = f"outlier features (draw {seed}), {name}"
                report(row, ours(folder, format_, settings), peer(folder, format_, settings))
    result = {
        **facts(device),
        "transformers": transformers.__version__,
        "rows": rows,
    }
    target = Path(__file__).parent / "results" / f"quality-{device}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
