"""QLoRA: a step's time, its peak of memory and the loss, fewbits beside PEFT on bitsandbytes, of Llama 3 8B's shape.

    PYTHONPATH=src:.peers python benchmarks/finetune.py
    PYTHONPATH=src:.peers python benchmarks/finetune.py --only bitsandbytes-nf4,fewbits-nf4 --profile
    python benchmarks/finetune.py --small --device cpu

Every row is a process of its own, and does the same: it loads the checkpoint (random weights), has PEFT prepare the
model (``prepare_model_for_kbit_training``: gradient checkpointing, what is not quantized in fp32), puts a LoRA of rank
16 on every linear layer but the head, and takes steps of AdamW on 4 texts of 1024 tokens under autocast to bf16. The
rows named ``-peft`` are fewbits' weights under PEFT's own functions and layers; in the others fewbits prepares the
model (the same numbers, tables and head in 16 bits) and fuses LoRA (``fewbits.integrations.peft``).

The loss is that of two batches in turn, from adapters with the same first values, so that rows of one format can be
compared step by step: ``above`` is by how much it is above bitsandbytes' at most, relative. A step's time is the
median, the GPU done; the peak is torch's count of allocated memory from loading on. ``floor`` is the time of the
products alone: 2 x tokens x parameters of the linear layers for forward, forward again, and the gradient of x, at the
speed of a large bf16 product measured in the same run.

Without a GPU it is a model of 1.1 B with 2 texts of 128 tokens, which shows the losses. Writes
``benchmarks/results/finetune-cuda.json`` or ``-cpu.json``; ``--profile`` prints where the GPU's time goes instead.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama
import torch
from llama import GiB, number, say
from torch import nn

BATCH, LENGTH, RANK, RATE = 4, 1024, 16, 2e-4
STEPS, WARM = 12, 4
TARGETS = {"seconds": 0.75, "peak_bytes": 0.95}  # of bitsandbytes' in the same format, at most
SAME_LOSS = 0.01  # above bitsandbytes', relative, at most


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        title: in tables.
        tool: "fewbits", "bitsandbytes" or "none".
        format: of the weights; ``None`` is bf16.
        fused: whether LoRA is fused.
    """

    title: str
    tool: str
    format: str | None
    fused: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("peft", "bitsandbytes") if self.tool == "bitsandbytes" else ("peft",)


ROWS = {
    "floor": Row("the products alone, in bf16", "none", None),
    "bf16": Row("LoRA on bf16", "none", None),
    "bitsandbytes-nf4": Row("PEFT + bitsandbytes, nf4", "bitsandbytes", "nf4"),
    "fewbits-nf4-peft": Row("PEFT + fewbits, nf4, PEFT's own functions", "fewbits", "nf4"),
    "fewbits-nf4": Row("PEFT + fewbits, nf4", "fewbits", "nf4", fused=True),
    "bitsandbytes-int8": Row("PEFT + bitsandbytes, int8", "bitsandbytes", "int8"),
    "fewbits-int8-peft": Row("PEFT + fewbits, int8, PEFT's own functions", "fewbits", "int8"),
    "fewbits-int8": Row("PEFT + fewbits, int8", "fewbits", "int8", fused=True),
}


def load(row: Row, folder: Path, device: str) -> Any:
    """The model, prepared by PEFT, with its adapter."""
    import peft
    import transformers

    import fewbits
    from fewbits.integrations.peft import fuse_lora, prepare_model_for_kbit_training

    if row.tool == "fewbits":
        settings = {"double_quant": True, "compute_dtype": torch.bfloat16} if row.format == "nf4" else {}
        model = fewbits.from_pretrained(folder, row.format, device_map=device, **settings)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": device}, dtype=torch.bfloat16, **llama.bitsandbytes_config(row.format)
        )
    model.config.use_cache = False
    if row.format is None:  # PEFT prepares what is quantized only
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    elif row.fused:
        model = prepare_model_for_kbit_training(model)
    else:
        model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    return fuse_lora(model) if row.fused else model


def batches(vocabulary: int, device: str, batch: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (batch, length), generator=generator).to(device) for _ in range(2)]


def linear_parameters(model: nn.Module) -> int:
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def product_speed(device: str) -> float:
    """Operations a second of an 8192 x 8192 x 8192 product in bf16 (1024 on a CPU), the best of five."""
    n = 8192 if device != "cpu" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    best = float("inf")
    for _ in range(5):
        llama.synchronize(device)
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        llama.synchronize(device)
        best = min(best, (time.perf_counter() - began) / 4)
    return 2 * n**3 / best


def measure(name: str, folder: Path, device: str, sizes: tuple[int, int], profile: bool, report: llama.Report) -> None:
    row, (batch, length) = ROWS[name], sizes
    if name == "floor":
        import transformers

        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
        operations = 3 * 2 * batch * length * linear_parameters(empty)
        speed = product_speed(device)
        report.add(seconds=operations / speed, operations=operations, operations_per_second=speed)
        return
    kind = torch.device(device).type
    if kind == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    with torch.enable_grad():
        model = load(row, folder, device).train()
        data = batches(model.config.vocab_size, device, batch, length)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        losses: list[torch.Tensor] = []

        def step(i: int) -> None:
            ids = data[i % len(data)]
            with torch.autocast(kind, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())

        times = []
        for i in range(STEPS):
            if profile and i == STEPS - 1:
                print_profile(lambda: step(STEPS - 1), kind)
                break
            llama.synchronize(device)
            began = time.perf_counter()
            step(i)
            llama.synchronize(device)
            times.append(time.perf_counter() - began)
    report.add(
        seconds=statistics.median(times[WARM:]),
        times=times,
        losses=[loss.item() for loss in losses],
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    if kind == "cuda":
        report.add(peak_bytes=torch.cuda.max_memory_allocated(), reserved_peak_bytes=torch.cuda.max_memory_reserved())


def print_profile(step: Any, kind: str) -> None:
    """Where the time of one step goes, on stdout."""
    from torch.profiler import ProfilerActivity, profile

    device = ProfilerActivity.CUDA if kind == "cuda" else ProfilerActivity.CPU
    with profile(activities=[device]) as found:
        step()
    key = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    print(f"{total / 1e3:.0f} ms")
    for row in rows[:40]:
        print(f"{getattr(row, key) / 1e3:8.2f} ms {row.count:6} x  {row.key[:110]}")


# ------------------------------------------------------------------------------------------------- the table


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Put beside each row of fewbits how it stands to bitsandbytes' in the same format."""
    for name, found in rows.items():
        row = ROWS[name]
        peer = rows.get(f"bitsandbytes-{row.format}", {})
        if row.tool != "fewbits" or "losses" not in found or "losses" not in peer:
            continue
        found["of_peer"] = {
            key: found[key] / peer[key] for key in TARGETS if found.get(key) is not None and key in peer
        }
        pairs = zip(found["losses"], peer["losses"], strict=True)
        found["loss_above"] = max(ours / theirs - 1 for ours, theirs in pairs)


def show(rows: dict[str, dict[str, Any]]) -> None:
    def line(name: str, found: dict[str, Any]) -> tuple[str, ...]:
        if "seconds" not in found:
            return ROWS[name].title, found.get("error", "nothing was measured")[:100]
        of = found.get("of_peer", {})
        losses = found.get("losses", [])
        return (
            ROWS[name].title,
            number(found["seconds"], 0, 1e-3),
            number(of.get("seconds")),
            number(found.get("peak_bytes"), 2, GiB),
            number(of.get("peak_bytes")),
            f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "",
            "" if "loss_above" not in found else f"{found['loss_above']:+.1e}",
        )

    header = ("tool", "ms a step", "of bnb's", "peak GiB", "of bnb's", "loss", "above")
    llama.print_table(header, (line(name, rows[name]) for name in ROWS if name in rows))
    for name, found in rows.items():
        for key, bound in TARGETS.items():
            ratio = found.get("of_peer", {}).get(key)
            if ratio is not None and ROWS[name].fused:
                print(f"{'met   ' if ratio <= bound else 'MISSED'} {name}: {key} {ratio:.2f} of {bound}")
        if "loss_above" in found and ROWS[name].fused:
            verdict = "met   " if found["loss_above"] <= SAME_LOSS else "MISSED"
            print(f"{verdict} {name}: loss {found['loss_above']:+.1e} of {SAME_LOSS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes; writes nothing")
    args = llama.parse(parser, ROWS, {"cuda": (540, 120), "cpu": (3600, 900)})
    device = "cuda:0" if args.device == "cuda" else "cpu"
    sizes = (BATCH, LENGTH) if args.size == "8b" else (2, 128)
    if args.row is not None:

        def one(report: llama.Report) -> None:
            measure(args.row, args.folder / args.size, device, sizes, args.profile, report)

        llama.measure_row(one, args.report, args.folder)
        return
    target = args.json
    if target is None and args.size == ("8b" if args.device == "cuda" else "mid") and not args.profile:
        target = llama.ROOT / "benchmarks" / "results" / f"finetune-{args.device}.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        began = time.perf_counter()
        llama.make_checkpoint(folder / args.size, args.size)
        llama.touch(args.touch)
        if args.profile:
            for name in args.only or [name for name in ROWS if name != "floor"]:
                say(name)
                report = llama.Report(folder / "report.json")
                llama.quiet()
                measure(name, folder / args.size, device, sizes, True, report)
                llama.collect(device)
            return
        arguments = ["--device", args.device, "--size", args.size, "--folder", str(folder)]
        head = llama.head(args.device, args.size)
        about = {"batch": sizes[0], "length": sizes[1], "rank": RANK, "targets": TARGETS}
        result = llama.Result(target, {**head, "peft": version("peft"), **about})
        limits = args.seconds - (time.perf_counter() - began), args.row_seconds

        def add(name: str, found: dict[str, Any]) -> None:
            result.rows[name] = found
            compare(result.rows)
            result.add(name, found)

        llama.run_rows(__file__, args.only or [*ROWS], lambda name: ROWS[name].needs, arguments, limits, add)
    show(result.rows)


def version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


if __name__ == "__main__":
    main()
