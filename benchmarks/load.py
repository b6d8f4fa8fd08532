"""Loading a checkpoint of Llama-3-8B's shape quantized: seconds and memory, fewbits beside the peers, in one run.

    PYTHONPATH=src:.peers python benchmarks/load.py --folder FOLDER
    PYTHONPATH=src:.peers python benchmarks/load.py --folder FOLDER --only floor,fewbits-nf4,transformers-nf4

The checkpoint (16.1 GB of bf16 safetensors with random weights; 2.2 GB and TinyLlama's shape without a GPU) lies in
the system's cache. Each row is a process of its own. Before the clock starts it has imported everything, has a CUDA
context, and has loaded and run a tiny model with the same tool, so that kernels compiled at their first use are not
counted. The time is the best of a row's loads, the memory that of its first one.

The floor is reading the files: 8 threads with two buffers of 8 MiB each, copied on into GPU memory. The row
``fewbits-reload`` loads what ``fewbits-save`` has written before it, in bitsandbytes' format.

On a CPU a plain read from the system's cache is no more than a copy in memory, and the same cores quantize. Rows
``floor-…`` tell what else must be done at the least: quantizing as many weights that lie in memory, to where results
were before, and taking new memory for the result. In rows ``…-cold`` the files were first put out of the cache.

Writes ``benchmarks/results/load-<cpu|cuda>.json``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama
import torch
from llama import GiB, number, say

Load = Callable[[Path, str], torch.nn.Module]  # from a folder, to a device


@dataclass(frozen=True)
class Row:
    """A tool and what it loads.

    Attributes:
        title: its name in the table.
        load: None for what loads nothing: the floor, and saving.
        format: what it is compared with fewbits in.
        needs: modules that it imports.
        repeat: how often it loads.
        cpu: whether it is among the rows for a machine without a GPU, unless rows are named.
        saved: whether it loads what fewbits saved in nf4, not the checkpoint in bf16.
        cold: whether the files are put out of the system's cache before each load.
    """

    title: str
    load: Load | None
    format: str = ""
    needs: tuple[str, ...] = ("transformers",)
    repeat: int = 1
    cpu: bool = True
    saved: bool = False
    cold: bool = False


# ------------------------------------------------------------------------------------------------- the tools


def fewbits_in(format: str | None, **settings: Any) -> Load:
    def load(folder: Path, device: str) -> torch.nn.Module:
        import fewbits

        return fewbits.from_pretrained(folder, format, device_map=device, progress=False, **settings)

    return load


def transformers_in(format: str | None) -> Load:
    def load(folder: Path, device: str) -> torch.nn.Module:
        import importlib.util

        from transformers import LlamaForCausalLM

        settings: dict[str, Any] = {"dtype": torch.bfloat16, **llama.bitsandbytes_config(format)}
        if importlib.util.find_spec("accelerate") is None:  # then it loads to the CPU only
            return LlamaForCausalLM.from_pretrained(folder, **settings).to(device)
        return LlamaForCausalLM.from_pretrained(folder, device_map={"": device}, **settings)

    return load


def accelerate_in(format: str) -> Load:
    def load(folder: Path, device: str) -> torch.nn.Module:
        index = torch.device(device).index if device != "cpu" else "cpu"
        return llama.load_with_accelerate(folder, format, device_map={"": index})

    return load


SAVE, RELOAD = "fewbits-save", "fewbits-reload"
BITSANDBYTES = ("transformers", "accelerate", "bitsandbytes")
ROWS: dict[str, Row] = {
    "floor": Row("plain read", None, needs=()),
    "floor-nf4": Row("quantizing in memory, nf4", None, needs=()),
    "floor-int8": Row("quantizing in memory, int8", None, needs=()),
    "floor-memory": Row("new memory for the result in int8", None, needs=()),
    "fewbits-nf4": Row("fewbits nf4, double quant.", fewbits_in("nf4", double_quant=True), "nf4", repeat=2),
    "fewbits-int8": Row("fewbits int8", fewbits_in("int8"), "int8", repeat=2),
    SAVE: Row("fewbits, saving nf4", None),
    RELOAD: Row("fewbits, nf4 saved by it", fewbits_in(None), repeat=2, saved=True),
    "floor-cold": Row("plain read from the disk", None, needs=(), repeat=3, cold=True),
    "fewbits-nf4-cold": Row(
        "fewbits nf4, d. q., from the disk", fewbits_in("nf4", double_quant=True), repeat=3, cold=True
    ),
    "fewbits-int8-cold": Row("fewbits int8, from the disk", fewbits_in("int8"), repeat=3, cold=True),
    "transformers-bf16": Row("transformers bf16", transformers_in(None)),
    "transformers-nf4": Row("transformers + bitsandbytes nf4, d. q.", transformers_in("nf4"), "nf4", BITSANDBYTES),
    "transformers-int8": Row(
        "transformers + bitsandbytes int8", transformers_in("int8"), "int8", BITSANDBYTES, cpu=False
    ),
    "accelerate-nf4": Row("accelerate + bitsandbytes nf4, d. q.", accelerate_in("nf4"), "nf4", BITSANDBYTES, cpu=False),
    "accelerate-int8": Row("accelerate + bitsandbytes int8", accelerate_in("int8"), "int8", BITSANDBYTES, cpu=False),
}


# ------------------------------------------------------------------------------------------------- measuring


def saved_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + "-nf4")


def measure_save(folder: Path, small: Path, device: str, report: llama.Report) -> None:
    """Save the checkpoint in nf4 beside itself, and the tiny one, for the row that loads them."""
    import fewbits

    for source in (small, folder):
        model = fewbits.from_pretrained(source, "nf4", double_quant=True, device_map=device, progress=False)
        llama.collect(device)
        with llama.Memory(device) as memory:
            began = time.perf_counter()
            fewbits.save(model, saved_folder(source))
            seconds = time.perf_counter() - began
        model = None
    host = memory.found["host_peak_bytes"]
    report.add(seconds=seconds, checkpoint_bytes=llama.weight_bytes(saved_folder(folder)), host_peak_bytes=host)


def quantizing_alone(folder: Path, format: str) -> float:
    """Seconds for as many bytes as the checkpoint has, again and again one matrix that lies in memory."""
    from fewbits.formats import QuantSpec, quantize_inner

    weight, spec = torch.randn(4096, 4096).bfloat16(), QuantSpec(format, double_quant=format == "nf4")
    quantize_inner(weight, spec)
    began = time.perf_counter()
    times = max(llama.weight_bytes(folder) // weight.nbytes, 1)
    for _ in range(times):
        quantize_inner(weight, spec)
    return (time.perf_counter() - began) / times * llama.weight_bytes(folder) / weight.nbytes


def new_memory(folder: Path) -> float:
    """Seconds to write once to each page of half as many bytes as the checkpoint has, by all threads."""
    from fewbits.memory import Arena

    arena, size = Arena(), 64 << 20
    began = time.perf_counter()
    kept = [arena.empty([size], torch.uint8).fill_(1) for _ in range(llama.weight_bytes(folder) // 2 // size)]
    return (time.perf_counter() - began) / len(kept) * llama.weight_bytes(folder) / 2 / size


def put_out_of_cache(folder: Path) -> None:
    for file in llama.weight_files(folder):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # what is not on the disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def forward(model: torch.nn.Module, device: str) -> float:
    """Seconds for 16 tokens, where work that loading put off would show."""
    tokens = torch.arange(16, device=device)[None]
    llama.synchronize(device)
    began = time.perf_counter()
    finite = bool(model(tokens).logits.isfinite().all())
    seconds = time.perf_counter() - began
    if not finite:
        raise RuntimeError("the loaded model's logits are not all finite")
    return seconds


def measure(name: str, folder: Path, small: Path, device: str, repeat: int | None, report: llama.Report) -> None:
    row = ROWS[name]
    if device != "cpu":
        torch.zeros(1, device=device)
    if name == SAVE:
        measure_save(folder, small, device, report)
        return
    if row.load is None:
        if device != "cpu":
            report.add(pinned_counted=llama.pinned_counted())
        if name in ("floor-nf4", "floor-int8"):
            seconds = min(quantizing_alone(folder, name.removeprefix("floor-")) for _ in range(3))
        elif name == "floor-memory":
            seconds = min(new_memory(folder) for _ in range(3))
        elif row.cold:
            cold = []
            for _ in range(repeat or row.repeat):
                put_out_of_cache(folder)
                cold.append(llama.plain_read(llama.weight_files(folder), device, repeat=1))
            seconds = min(cold)
        else:
            seconds = llama.plain_read(llama.weight_files(folder), device)
        report.add(seconds=seconds, checkpoint_bytes=llama.weight_bytes(folder))
        return
    if row.saved:
        small, folder = saved_folder(small), saved_folder(folder)
    report.add(checkpoint_bytes=llama.weight_bytes(folder), cached_gb_s=llama.read_once(folder))
    before = llama.resident()[0]
    forward(row.load(small, device), device)
    llama.collect(device)
    report.add(host_warm_bytes=llama.resident()[0] - before)  # kept by the tool, its libraries and its kernels
    loads: list[float] = []
    model = None
    for _ in range(repeat or row.repeat):
        model = None
        llama.collect(device)
        if row.cold:
            put_out_of_cache(folder)
        with llama.Memory(device) as memory:
            began = time.perf_counter()
            model = row.load(folder, device)
            llama.synchronize(device)
            loads.append(time.perf_counter() - began)
        if len(loads) == 1:
            report.add(**memory.found)
        report.add(seconds=min(loads), loads=loads)
    assert model is not None
    report.add(first_forward_seconds=forward(model, device))


# ------------------------------------------------------------------------------------------------- the table


def show(rows: dict[str, dict[str, Any]], device: str) -> None:
    floor = rows.get("floor", {})
    speed, cold = (
        found["checkpoint_bytes"] / found["seconds"] if "seconds" in found else None
        for found in (floor, rows.get("floor-cold", {}))
    )
    ours = {
        ROWS[name].format: found["seconds"]
        for name, found in rows.items()
        if name.startswith("fewbits") and "seconds" in found and not ROWS[name].cold
    }
    gpu = ("GPU GiB", "peak +", "reserved +", "pinned") if device != "cpu" else ()
    header = ("tool", "s", "GB/s", "× floor", "× fewbits", "first run", *gpu, "host peak GiB")

    def line(name: str, found: dict[str, Any]) -> tuple[str, ...]:
        row = ROWS[name]
        if "seconds" not in found:
            return row.title, found.get("error", "nothing was measured")[:100]
        size, seconds = found["checkpoint_bytes"], found["seconds"]
        reading = cold if row.cold else speed
        base = ours.get(row.format) if row.format else None
        cells = [
            row.title + (" (!)" if "error" in found else ""),
            number(seconds),
            number(size / seconds, 2, 1e9),
            number(None if reading is None or name == SAVE else seconds * reading / size),
            number(None if base is None or name.startswith("fewbits") else seconds / base),
            number(found.get("first_forward_seconds")),
        ]
        if device != "cpu":
            final = found.get("gpu_final_bytes")
            peaks = [found.get(f"gpu_{what}_bytes") for what in ("peak", "reserved_peak")]
            above = [None if peak is None or final is None else peak - final for peak in peaks]
            cells += [number(value, 2, GiB) for value in (final, *above, found.get("pinned_peak_bytes"))]
        return *cells, number(found.get("host_peak_bytes"), 2, GiB)

    llama.print_table(header, (line(name, rows[name]) for name in ROWS if name in rows))
    print("GB/s of the checkpoint's bytes. Host: anonymous and shared memory, with no pages of files.")
    print("first run: seconds for 16 tokens just after, in which a tool that only mapped the files reads them.")
    if device != "cpu":
        print("peak +, reserved +: GPU memory at its peak, above the model's own. pinned: as torch counts it.")
    for name, found in rows.items():
        if "error" in found and "seconds" in found:
            print(f"(!) {ROWS[name].title}: {found['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, help="loads of each row; by default 2 for fewbits and 1 for the others")
    args = llama.parse(parser, ROWS, {"cuda": (440, 150), "cpu": (3600, 900)})
    device = "cuda:0" if args.device == "cuda" else "cpu"
    if args.row is not None:

        def one(report: llama.Report) -> None:
            measure(args.row, args.folder / args.size, args.folder / "small", device, args.repeat, report)

        llama.measure_row(one, args.report, args.folder)
        return
    on_cpu_only = {name for name, row in ROWS.items() if row.cold or name.startswith("floor-")}
    names = args.only or [n for n, row in ROWS.items() if (row.cpu if device == "cpu" else n not in on_cpu_only)]
    if RELOAD in names and SAVE not in names[: names.index(RELOAD)]:
        names = [name for name in names if name != SAVE]
        names.insert(names.index(RELOAD), SAVE)
    target = args.json
    if target is None and args.size != "small":
        target = llama.ROOT / "benchmarks" / "results" / f"load-{args.device}.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        began = time.perf_counter()
        llama.make_checkpoint(folder / "small", "small")
        total = llama.make_checkpoint(folder / args.size, args.size)
        llama.touch(args.touch)
        say(f"a checkpoint of {total / 1e9:.2f} GB")
        arguments = ["--device", args.device, "--size", args.size, "--folder", str(folder)]
        if args.repeat is not None:
            arguments += ["--repeat", str(args.repeat)]
        result = llama.Result(target, {**llama.head(args.device, args.size), "checkpoint_bytes": total})
        limits = args.seconds - (time.perf_counter() - began), args.row_seconds
        llama.run_rows(__file__, names, lambda name: ROWS[name].needs, arguments, limits, result.add)
    show(result.rows, device)


if __name__ == "__main__":
    main()
