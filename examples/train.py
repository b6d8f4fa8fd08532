"""Train a byte-level Llama from any text file and save it as a transformers folder: how models/bytellama was made.

    python examples/train.py TEXT [TEXT ...] --out FOLDER

A byte b of the text is the id b + 3 (ByT5's numbering: 0 pads, 1 ends, 2 is unknown), so there is no vocabulary to
build. The defaults are bytellama's: 10.4 M parameters, windows of 512 bytes, 1,445 steps of AdamW at batch 160, a short
warm-up to 2e-3 and a cosine down to a tenth of it: minutes on a GPU, days on a laptop, where ``--hidden 64 --layers 2
--batch 8 --steps 200`` shows it at work. The result is written in bf16, in shards, and
``fewbits.from_pretrained(FOLDER, "nf4")`` loads it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

OFFSET = 3  # ByT5's special ids come before the bytes
VOCABULARY = 384  # 3 + 256 bytes + 125 extra ids


def read_ids(paths: list[Path]) -> Tensor:
    """The bytes of all files, one after the other, as ids in uint8 without the offset: [bytes]."""
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def windows(data: Tensor, starts: Tensor, length: int, device: str) -> Tensor:
    """Ids of the windows that begin at ``starts``: [windows, length]."""
    return (data[starts[:, None] + torch.arange(length)].long() + OFFSET).to(device)


def build(hidden: int, layers: int, heads: int, window: int) -> LlamaForCausalLM:
    """A Llama whose MLP is 2.8 times as wide as the model, rounded up to a multiple of 64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=64 * math.ceil(2.8 * hidden / 64),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2 * window,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up over the first twentieth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def bits_per_byte(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Cross-entropy of each next byte in bits, averaged over the windows ``ids`` [windows, length]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model(input_ids=ids, labels=ids).loss / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="+", help="any files; their bytes are the training text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=1445)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--window", type=int, default=512, help="bytes")
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, help="by default hidden / 64")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--shard", default="8MB", help="bytes of a file, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = read_ids(args.text)
    if len(data) < 20 * args.window:
        parser.error(f"{len(data):,} bytes of text are too few: {20 * args.window:,} at least for this window")
    split = len(data) - max(args.window, len(data) // 20)  # the last twentieth is not trained on
    model = build(args.hidden, args.layers, args.heads or max(1, args.hidden // 64), args.window).to(args.device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {split:,} bytes of text, on {args.device}")

    began = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        starts = torch.randint(split - args.window + 1, (args.batch,))
        loss = bits_per_byte(model, windows(data, starts, args.window, args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
            elapsed = time.perf_counter() - began
            print(f"step {step + 1:5}/{args.steps}  {loss.item():.4f} bits per byte  {elapsed:.0f} s", flush=True)

    model.eval()
    with torch.no_grad():
        starts = torch.arange(split, len(data) - args.window + 1, args.window)[:64]
        held_out = torch.stack(
            [bits_per_byte(model, windows(data, s[None], args.window, args.device)) for s in starts]
        ).mean()
    print(f"held-out text: {held_out.item():.4f} bits per byte")
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size=args.shard)
    ByT5Tokenizer().save_pretrained(args.out)
    print(f"saved to {args.out}: load it with fewbits.from_pretrained({str(args.out)!r}, 'nf4')")


if __name__ == "__main__":
    main()
