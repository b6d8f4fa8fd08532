"""A GPT-2-XL-shaped model, 1.6 B parameters and 6.6 GB in fp32, in 8 bits and in 4: what it takes, measured.

    python examples/gpt2_xl.py                      random weights, written to a temporary folder first
    python examples/gpt2_xl.py --cache FOLDER       the same, kept for the next time
    python examples/gpt2_xl.py --weights PATH       a checkpoint in minGPT's names: a file, a folder or a hub id
    python examples/gpt2_xl.py --layers 2           a small one, to try it

Each format is loaded in a process of its own, so that one's peak of memory says nothing of another's. Memory of the
host is anonymous memory above what the process had before loading: pages of the checkpoint's files that the system
keeps in its cache are not counted, since it drops them when it needs room.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from gpt import GPT, GPTConfig, initialize
from safetensors.torch import save_file
from tqdm import tqdm

import fewbits

GiB = 2**30
HOST_LIMIT = 1_500_000_000  # bytes of host memory, above the quantized model's own, that loading may take

# what to load, and the most GiB that its parameters may take at the full size
SMALL_ENDS = {"transformer.wte": "int8", "transformer.wpe": "int8", "lm_head": "int8"}
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "int8": ({"format": "int8"}, 1.70),
    "nf4-dq": ({"format": "nf4", "double_quant": True}, 1.03),
    "nf4-dq+int8-ends": ({"format": "nf4", "double_quant": True, "overrides": SMALL_ENDS}, 0.88),
}


# ------------------------------------------------------------------------------------------------- the checkpoint


def shards_of(config: GPTConfig, shard_bytes: int) -> list[dict[str, torch.Size]]:
    """The parameters of a GPT, name to shape, split into files of at most ``shard_bytes`` in fp32."""
    with fewbits.init_empty_weights():
        model = GPT(config)
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, p in model.named_parameters():
        if shards[-1] and size + 4 * p.numel() > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = p.shape
        size += 4 * p.numel()
    return shards


def write_random_checkpoint(folder: Path, config: GPTConfig, shard_bytes: int = 400_000_000, seed: int = 0) -> int:
    """Write random fp32 weights as sharded safetensors, one shard in memory at a time; returns the bytes of all.

    A folder that holds this model already is left as it is: its index is written last, and says whose it is.
    """
    shards = shards_of(config, shard_bytes)
    total = sum(4 * shape.numel() for shard in shards for shape in shard.values())
    made_for = {"total_size": total, "config": asdict(config), "seed": seed}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        if json.loads(index.read_text())["metadata"] != made_for:
            raise SystemExit(f"{folder} holds a checkpoint of another model: give another folder to --cache")
        return total
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < total:
        raise SystemExit(f"{folder} has room for {free / 1e9:.1f} GB, {total / 1e9:.1f} GB are needed: use --cache")
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing random weights") as bar:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: initialize(name, torch.empty(shape), generator) for name, shape in shard.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            bar.update(sum(t.nbytes for t in tensors.values()))
            del tensors
    index.write_text(json.dumps({"metadata": made_for, "weight_map": weight_map}, indent=1))
    return total


# ------------------------------------------------------------------------------------------------- measuring


def anonymous_bytes() -> int:
    """Memory of this process that is not a view of some file."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_full_info().uss


class HostMemory:
    """Samples this process's anonymous memory within a ``with`` block; ``peak`` is bytes above its start."""

    def __enter__(self) -> HostMemory:
        self.start, self.peak, self._done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.004):
            self.sample()

    def sample(self) -> int:
        self.peak = max(self.peak, anonymous_bytes() - self.start)
        return self.peak

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def measure(settings: dict[str, Any], weights: str, config: GPTConfig, device: str, new_tokens: int) -> dict[str, Any]:
    """Load a GPT quantized, generate with it, and say what both took (in bytes and seconds)."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.zeros(1, device=device)  # the driver's own memory comes before the start
        torch.cuda.reset_peak_memory_stats(device)
    quantization = fewbits.QuantizationConfig(**settings, dtype=torch.float16)
    with HostMemory() as host:
        began = time.perf_counter()
        model = fewbits.load(lambda: GPT(config), weights, quantization, device_map=device)
        if cuda:
            torch.cuda.synchronize(device)
        seconds_loading = time.perf_counter() - began
        host_loading = host.sample()
        gpu_loading = torch.cuda.max_memory_allocated(device) if cuda else None
        began = time.perf_counter()
        prompt = torch.arange(10, 14, device=device)[None]
        tokens = model.eval().generate(prompt, new_tokens)[0, prompt.shape[1] :].tolist()
        seconds_generating = time.perf_counter() - began
    table = fewbits.summary(model)
    return {
        "parameters": table.total.parameters,
        "parameter_bytes": table.total.nbytes,
        "buffer_bytes": table.buffer_bytes,
        "load_seconds": seconds_loading,
        "host_peak_bytes_loading": host_loading,
        "host_peak_bytes": host.peak,
        "gpu_peak_bytes_loading": gpu_loading,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "tokens": tokens,
        "seconds_per_token": seconds_generating / max(new_tokens, 1),
    }


def measure_apart(*arguments: Any) -> dict[str, Any]:
    """:func:`measure` in a fresh process, which has no memory of other runs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


# ------------------------------------------------------------------------------------------------- the report


def targets_missed(run: dict[str, Any], limit_gib: float | None) -> Iterator[str]:
    """What a run took beyond what it may."""
    if limit_gib is not None and run["parameter_bytes"] > limit_gib * GiB:
        yield f"{run['parameter_bytes'] / GiB:.3f} GiB of parameters, more than {limit_gib}"
    if run["host_peak_bytes"] > run["parameter_bytes"] + HOST_LIMIT:
        yield f"{run['host_peak_bytes'] / GiB:.3f} GiB of host memory, more than the parameters and 1.5 GB"


def show(name: str, run: dict[str, Any], limit_gib: float | None) -> None:
    def gib(key: str) -> str:
        return f"{run[key] / GiB:.3f} GiB"

    target = "" if limit_gib is None else f" (at most {limit_gib:.2f})"
    host_limit = (run["parameter_bytes"] + HOST_LIMIT) / GiB
    print(f"\n{name}")
    bits = 8 * run["parameter_bytes"] / run["parameters"]
    print(f"  parameters       {gib('parameter_bytes')}{target}, {bits:.2f} bits each")
    print(f"  mask buffers     {gib('buffer_bytes')}")
    print(f"  load             {run['load_seconds']:.1f} s")
    print(
        f"  host memory      {gib('host_peak_bytes_loading')} at its peak loading, {gib('host_peak_bytes')} in all"
        f" (at most {host_limit:.2f})"
    )
    if run["gpu_peak_bytes"] is not None:
        print(f"  GPU memory       {gib('gpu_peak_bytes_loading')} at its peak loading, {gib('gpu_peak_bytes')} in all")
    print(f"  generated        {run['tokens']}, {run['seconds_per_token']:.2f} s a token")
    for miss in run["missed"]:
        print(f"  MISSED           {miss}")


def main(arguments: list[str] | None = None) -> None:
    size = GPTConfig.named("gpt2-xl")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a checkpoint in minGPT's names; by default random weights are made")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the random weights here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--tokens", type=int, default=3, help="how many to generate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here")
    parser.add_argument("--layers", type=int, default=size.n_layer)
    parser.add_argument("--heads", type=int, default=size.n_head)
    parser.add_argument("--embd", type=int, default=size.n_embd)
    parser.add_argument("--vocab", type=int, default=size.vocab_size)
    parser.add_argument("--block", type=int, default=size.block_size)
    args = parser.parse_args(arguments)
    config = GPTConfig(args.layers, args.heads, args.embd, args.vocab, args.block)

    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights
        if weights is None:
            weights = str(args.cache or folder)
            print(f"a checkpoint of {write_random_checkpoint(Path(weights), config) / 1e9:.2f} GB in fp32")
        runs = {}
        for name in args.formats:
            settings, limit = RUNS[name]
            limit_gib = limit if config == size else None
            runs[name] = run = measure_apart(settings, weights, config, args.device, args.tokens)
            run["target_parameter_gib"] = limit_gib
            run["missed"] = list(targets_missed(run, limit_gib))
            show(name, run, limit_gib)
    if args.json is not None:
        cuda = torch.device(args.device).type == "cuda"
        result = {
            "torch": torch.__version__,
            "fewbits": fewbits.__version__,
            "device": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
            "threads": torch.get_num_threads(),
            "weights": "random" if args.weights is None else "given",
            "config": asdict(config),
            "runs": runs,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if any(run["missed"] for run in runs.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
