"""Fine-tune the sample model on text it has never seen, with a LoRA on weights in 4 or 8 bits (QLoRA).

    python examples/finetune.py                       # on this package's source code, nf4, a plain loop
    python examples/finetune.py --format int8 --trainer
    python examples/finetune.py --format none         # the same LoRA on the unquantized model, to compare with
    python examples/finetune.py my_notes.txt --steps 200 --out my-adapter

A tenth of the text, its last, is kept apart; printed is its cross entropy in bits per byte before and after. With
``--trainer`` transformers' ``Trainer`` does what the loop does. The adapter is saved in PEFT's format, and merged into
a model of its own (in 16 bits, and in the format once more) if ``--merge`` names a folder.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bytellama import MODEL, OFFSET, ROOT
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

import fewbits
from fewbits.integrations.peft import fuse_lora, merge_and_unload

WINDOW = 256  # bytes


def read_windows(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Ids of the text in windows, those to train on and those kept apart: [windows, WINDOW] both."""
    text = b"\n".join(path.read_bytes() for path in paths)
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + OFFSET
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    kept = max(len(windows) // 10, 1)
    return windows[:-kept], windows[-kept:]


@torch.no_grad()
def bits_per_byte(model: Any, windows: Tensor) -> float:
    """Cross entropy of every byte but a window's first."""
    model.eval()
    nats = 0.0
    for batch in windows.to(model.device).split(8):
        logits = model(input_ids=batch).logits.float()
        nats += F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / (len(windows) * (WINDOW - 1))


def with_adapter(format: str | None, device: str, seed: int = 0) -> Any:
    """The sample model in a format (``None``: as it is), prepared by PEFT, with a LoRA on every linear layer."""
    model = fewbits.from_pretrained(MODEL, format, device_map=device, dtype=torch.float32)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(seed)  # of the adapter's first values
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return fuse_lora(model) if format else model


def train(model: Any, windows: Tensor, steps: int, batch: int, rate: float, seed: int = 0) -> list[float]:
    """A plain loop of AdamW, whose rate falls linearly to nothing; the losses, in nats a byte."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in range(steps):
        ids = windows[torch.randint(len(windows), (batch,), generator=generator)].to(model.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def train_with_trainer(model: Any, windows: Tensor, steps: int, batch: int, rate: float, folder: Path) -> list[float]:
    """The same by transformers' ``Trainer``."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
        weight_decay=0.0, lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.log = lambda *_, **__: None  # what is to be seen is printed at the end
    result = trainer.train()
    return [result.training_loss]


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", type=Path, help="files to learn (default: this package's source code)")
    parser.add_argument("--format", default="nf4", choices=["nf4", "fp4", "int8", "none"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} bytes")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--trainer", action="store_true", help="by transformers' Trainer")
    parser.add_argument("--out", type=Path, help="a folder for the adapter")
    parser.add_argument("--merge", type=Path, help="a folder for the model with the adapter merged into it")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = options.text or sorted((ROOT / "src" / "fewbits").rglob("*.py"))
    training, kept = read_windows(paths)
    format = None if options.format == "none" else options.format
    model = with_adapter(format, device)
    before = bits_per_byte(model, kept)
    start = time.perf_counter()
    if options.trainer:
        folder = options.out or Path("finetuned")
        train_with_trainer(model, training, options.steps, options.batch, options.rate, folder)
    else:
        train(model, training, options.steps, options.batch, options.rate)
    took = time.perf_counter() - start
    after = bits_per_byte(model, kept)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{options.format}: {trained:,} trained numbers, {took / options.steps * 1e3:.0f} ms a step")
    print(f"bits per byte of text kept apart: {before:.4f} before, {after:.4f} after")
    if options.out:
        model.save_pretrained(options.out)
        print(f"the adapter is in {options.out}")
    if options.merge:
        merged = merge_and_unload(model, dtype=torch.bfloat16)
        fewbits.save(merged, options.merge)
        print(f"merged in 16 bits: {bits_per_byte(merged, kept):.4f}, in {options.merge}")
        if format:
            again = fewbits.quantize(merged, format)
            print(f"merged and quantized again: {bits_per_byte(again, kept):.4f}")


if __name__ == "__main__":
    main()
