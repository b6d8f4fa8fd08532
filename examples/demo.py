"""The whole recipe on a small real model: load it in six ways, compare, let it write, save it, load it again.

Run ``make demo``. It needs no GPU and no network: the model and the text are in the repository.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from bytellama import MODEL, bits_per_byte, decode, encode
from tqdm import tqdm

import fewbits

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"config": "int8"},
    "nf4": {"config": "nf4"},
    "nf4 + double quant": {"config": "nf4", "double_quant": True},
    "fp4": {"config": "fp4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder with a byte-level transformers model")
    parser.add_argument("--windows", type=int, default=64, help="windows of 512 bytes to measure quality on")
    parser.add_argument("--prompt", default="The film was ", help="what the model goes on from")
    parser.add_argument("--tokens", type=int, default=60, help="bytes to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"fewbits {fewbits.__version__}, torch {torch.__version__}, on {device}; the model: {args.model.name}\n")

    rows, texts, saved_logits = [], {}, {}
    prompt = encode(args.prompt.encode()).to(device)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(WAYS) * args.windows, unit="window") as bar:
        for name, settings in WAYS.items():
            bar.set_description(name)
            start = time.perf_counter()
            model = fewbits.from_pretrained(args.model, device_map=device, progress=False, **settings)
            seconds = time.perf_counter() - start
            weights = fewbits.summary(model).total
            quality = bits_per_byte(model, args.windows, bar=bar)
            written = model.generate(prompt, max_new_tokens=args.tokens, do_sample=False)
            texts[name] = decode(written[0, prompt.shape[1] :])
            rows.append((name, weights.nbytes, weights.bits, quality, seconds))
            if "config" in settings:
                fewbits.save(model, Path(folder, name), progress=False)
                with torch.inference_mode():
                    saved_logits[name] = model(prompt).logits
        bar.set_description("done")
        bar.close()

        titles = ("bytes of weights", "bits/parameter", "bits/byte of text", "seconds to load")
        print(f"\n{'':20}" + "".join(f"{title:>19}" for title in titles))
        for name, nbytes, bits, quality, seconds in rows:
            print(f"{name:20}{nbytes:>19,}{bits:>19.2f}{quality:>19.4f}{seconds:>19.2f}")
        print(f"\nWhat each writes after {args.prompt!r}:")
        for name, text in texts.items():
            print(f"  {name:20}{text!r}")

        print("\nSaved, loaded again, and compared:")
        for name, logits in saved_logits.items():
            again = fewbits.from_pretrained(Path(folder, name), device_map=device, progress=False)
            size = sum(f.stat().st_size for f in Path(folder, name).glob("*.safetensors"))
            with torch.inference_mode():
                same = torch.equal(again(prompt).logits, logits)
            print(f"  {name:20}{size:>12,} bytes on disk, the same outputs to the bit: {'yes' if same else 'NO'}")
            if not same:
                raise SystemExit(f"{name}: a saved model gave other outputs than the one that was saved")
    print(f"\n{time.perf_counter() - began:.0f} s in all.")


if __name__ == "__main__":
    main()
