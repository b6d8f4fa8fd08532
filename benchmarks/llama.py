"""What the benchmarks of loading and offloading share: a checkpoint of Llama's shape, memory, processes, tables.

Every row of these benchmarks is measured in a process of its own, so that no tool meets what another left behind: the
script starts itself again with ``--row NAME`` and reads what that process reports from a file. The report is written
anew after every step, so that a row that fails or is stopped still says what it had measured.

Host memory is what ``/proc/self/status`` counts: anonymous and shared memory (``RssAnon + RssShmem``), and apart from
it pages of files (``RssFile``), which the system may drop. Pinned memory that the CUDA driver allocates may be in
neither; torch's own count of it is a figure of its own, and :func:`pinned_counted` says where it shows.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import facts
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
GiB = 2**30
SHARD = 5_000_000_000  # bytes of a file, at most
SIZES: dict[str, dict[str, int]] = {
    "8b": {  # Llama 3 8B
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mid": {  # TinyLlama 1.1B
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "small": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def bitsandbytes_config(format: str | None, **more: Any) -> dict[str, Any]:
    """The argument of transformers' ``from_pretrained`` that loads a format through bitsandbytes; none for bf16."""
    from transformers import BitsAndBytesConfig

    if format == "nf4":
        more |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    elif format == "int8":
        more["load_in_8bit"] = True
    else:
        return {}
    return {"quantization_config": BitsAndBytesConfig(**more)}


def load_with_accelerate(folder: Path, format: str, **arguments: Any) -> torch.nn.Module:
    """Accelerate's own recipe: an empty model, loaded through bitsandbytes."""
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    if format == "nf4":
        config = BnbQuantizationConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            torch_dtype=torch.bfloat16,
        )
    else:
        config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.bfloat16)
    return load_and_quantize_model(model, weights_location=str(folder), bnb_quantization_config=config, **arguments)


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def collect(device: str) -> None:
    """Give back what is free: Python's cycles and torch's cached GPU memory."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- the checkpoint


def llama_config(size: str) -> Any:
    """The ``LlamaConfig`` of one of ``SIZES``. It names no token that ends a text, so that generation never stops."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **SIZES[size],
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    config.dtype = torch.bfloat16
    return config


def make_checkpoint(folder: Path, size: str = "8b", seed: int = 0) -> int:
    """Write random bf16 weights (normal, standard deviation 0.02; norms are ones) as sharded safetensors.

    They are made on the GPU if there is one, a shard at a time. A folder that holds them already is left as it is: its
    index is written last, and says whose it is. Afterwards every file has been read once, so that it lies in the
    system's cache.

    Returns:
        The bytes of all tensors.
    """
    from transformers import LlamaForCausalLM

    config = llama_config(size)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    made_for = {"total_size": total, "shape": SIZES[size], "seed": seed}
    index = folder / "model.safetensors.index.json"
    if not index.exists() or json.loads(index.read_text())["metadata"] != made_for:
        began = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        for old in (index, *folder.glob("*.safetensors")):
            old.unlink(missing_ok=True)
        if (free := shutil.disk_usage(folder).free) < total:
            raise SystemExit(
                f"{folder} has room for {free / 1e9:.1f} GB, {total / 1e9:.1f} GB are needed: use --folder"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight_map = _write(folder, shapes, torch.Generator(device).manual_seed(seed))
        config.save_pretrained(folder)
        index.write_text(json.dumps({"metadata": made_for, "weight_map": weight_map}, indent=1))
        collect(device)
        say(f"{total / 1e9:.2f} GB of random weights made in {time.perf_counter() - began:.1f} s")
    read_once(folder)
    return total


def _write(folder: Path, shapes: Mapping[str, torch.Size], generator: torch.Generator) -> dict[str, str]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + 2 * shape.numel() > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * shape.numel()
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16, device=generator.device)
            tensors[name] = tensor.fill_(1) if tensor.ndim == 1 else tensor.normal_(0, 0.02, generator=generator)
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def read_once(folder: Path) -> float:
    """Read all weights, so that they lie in the system's cache; returns GB/s, which tells whether they already did."""
    return weight_bytes(folder) / plain_read(weight_files(folder), "cpu", repeat=1) / 1e9


def plain_read(files: Iterable[Path], device: str, *, repeat: int = 3, threads: int = 8, piece: int = 8 << 20) -> float:
    """Least seconds of ``repeat`` for reading files whole: the floor under loading them.

    A few threads ``preadv`` pieces into two buffers each. For a GPU these are pinned, and copied on into GPU memory
    while the next piece is read.
    """
    files = list(files)
    cuda = torch.device(device).type == "cuda"
    sizes = [file.stat().st_size for file in files]
    target = torch.empty(sum(sizes), dtype=torch.uint8, device=device) if cuda else None
    handles = [os.open(file, os.O_RDONLY) for file in files]
    threads = min(threads, os.cpu_count() or 1)
    buffers = [[torch.empty(piece, dtype=torch.uint8, pin_memory=cuda).fill_(0) for _ in "ab"] for _ in range(threads)]
    jobs: deque[tuple[int, int, int, int]] = deque()  # handle, offset in the file, bytes, offset in the target

    def work(mine: list[torch.Tensor]) -> None:
        views = [memoryview(buffer.numpy()) for buffer in mine]
        stream = torch.cuda.Stream() if cuda else None
        copied = [torch.cuda.Event() for _ in mine] if cuda else []
        turn = 0
        while True:
            try:
                handle, offset, size, to = jobs.popleft()
            except IndexError:
                return
            if cuda:
                copied[turn].synchronize()  # an event that was never recorded is done
            done = 0
            while done < size:
                done += (got := os.preadv(handle, [views[turn][done:size]], offset + done))
                if got == 0:
                    raise OSError("a file ended before its size")
            if target is not None:
                with torch.cuda.stream(stream):
                    target[to : to + size].copy_(mine[turn][:size], non_blocking=True)
                    copied[turn].record()
            turn = 1 - turn

    best = float("inf")
    try:
        for _ in range(repeat):
            start = 0
            for handle, size in zip(handles, sizes, strict=True):
                jobs.extend(
                    (handle, offset, min(piece, size - offset), start + offset) for offset in range(0, size, piece)
                )
                start += size
            synchronize(device)
            began = time.perf_counter()
            crew = [threading.Thread(target=work, args=(mine,)) for mine in buffers]
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
            synchronize(device)
            best = min(best, time.perf_counter() - began)
    finally:
        for handle in handles:
            os.close(handle)
    return best


# ------------------------------------------------------------------------------------------------- memory

_RESIDENT = re.compile(rb"^(RssAnon|RssFile|RssShmem):\s+(\d+) kB", re.MULTILINE)


def resident() -> tuple[int, int]:
    """Bytes of this process: anonymous and shared ones, and those of files."""
    with open("/proc/self/status", "rb", buffering=0) as status:
        found = {name: int(kib) * 1024 for name, kib in _RESIDENT.findall(status.read(1 << 16))}
    return found[b"RssAnon"] + found[b"RssShmem"], found[b"RssFile"]


def _pinned() -> dict[str, int]:
    """torch's count of pinned memory that it holds, free for its next use or not: now and at its peak."""
    stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    held = "reserved_bytes" if "reserved_bytes.peak" in stats else "allocated_bytes"  # by release of torch
    return {what: stats.get(f"{held}.{what}", 0) for what in ("current", "peak")}


def pinned_counted() -> dict[str, float]:
    """Which part of pinned memory (256 MiB, by torch) ``/proc/self/status`` counts, and as what."""
    before = resident()
    held = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True).fill_(1)
    after = resident()
    return {
        name: round((b - a) / held.nbytes, 3) for name, a, b in zip(("anonymous", "file"), before, after, strict=True)
    }


def touch(gib: float) -> None:
    """Use memory once, in another process: a virtual machine may be given its own only then, and slowly."""
    if gib:
        began = time.perf_counter()
        code = f"import torch; torch.ones({int(gib * GiB)}, dtype=torch.uint8)"
        subprocess.run([sys.executable, "-c", code], check=False)
        say(f"{gib:g} GiB of memory touched in {time.perf_counter() - began:.1f} s")


class Memory:
    """Measures memory within a ``with`` block, in bytes above its start; host memory is sampled every 5 ms."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"

    def __enter__(self) -> Memory:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
                torch.cuda.reset_peak_host_memory_stats()
            self._gpu = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            self._pinned = _pinned()["current"]
        self._start = self._peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._sample()

    def _sample(self) -> tuple[int, int]:
        now = resident()
        self._peak = max(self._peak[0], now[0]), max(self._peak[1], now[1])
        return now

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        now = self._sample()
        self.found = {
            "host_peak_bytes": self._peak[0] - self._start[0],
            "host_final_bytes": now[0] - self._start[0],
            "host_file_peak_bytes": self._peak[1] - self._start[1],
        }
        if self._cuda:
            torch.cuda.synchronize()
            allocated, reserved = self._gpu
            self.found |= {
                "pinned_peak_bytes": _pinned()["peak"] - self._pinned,
                "pinned_final_bytes": _pinned()["current"] - self._pinned,
                "gpu_final_bytes": torch.cuda.memory_allocated() - allocated,
                "gpu_peak_bytes": torch.cuda.max_memory_allocated() - allocated,
                "gpu_reserved_peak_bytes": torch.cuda.max_memory_reserved() - reserved,
            }


# ------------------------------------------------------------------------------------------------- rows, apart


class Report(dict[str, Any]):
    """What a row has measured so far: ``add`` also writes it to the file that the starting process reads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def add(self, **values: Any) -> None:
        self.update(values)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self))
        os.replace(partial, self._file)


def quiet() -> None:
    """No warnings, bars or network from the tools that a row measures."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def measure_row(measure: Callable[[Report], None], file: Path, folder: Path) -> None:
    """In the process of one row: measure, and report what went wrong instead of raising it."""
    report = Report(file)
    try:
        quiet()
        with torch.no_grad():
            measure(report)
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split())
        for path, name in ((str(folder), "FOLDER"), (str(ROOT), "."), (sys.prefix, "PYTHON")):
            message = message.replace(path, name)
        report.add(error=f"{type(error).__name__}: {message}"[:400])


def run_row(script: str, name: str, arguments: list[str], seconds: float) -> dict[str, Any]:
    """``script`` with ``--row name`` in a process of its own; what it reports, with an ``error`` if it has one."""
    with tempfile.TemporaryDirectory() as temporary:
        file, log = Path(temporary, "report.json"), Path(temporary, "log")
        command = [sys.executable, script, *arguments, "--row", name, "--report", str(file)]
        began = time.perf_counter()
        with open(log, "wb") as output:
            try:
                code = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, check=False
                ).returncode
                error = f"the process ended with status {code}" if code else None
            except subprocess.TimeoutExpired:
                error = f"stopped after {seconds:.0f} s"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if error is not None:
            found.setdefault("error", error)
        if "error" in found:
            tail = log.read_text(errors="replace").splitlines()[-12:]
            say("\n".join(f"    | {line}" for line in tail))
        found["process_seconds"] = round(time.perf_counter() - began, 1)
        return found


def run_rows(
    script: str,
    names: Iterable[str],
    needs: Callable[[str], Iterable[str]],
    arguments: list[str],
    limits: tuple[float, float],
    done: Callable[[str, dict[str, Any]], None],
) -> None:
    """Run rows one after the other and hand each to ``done``; nothing that goes wrong in one stops the rest.

    Args:
        script: the benchmark's own file.
        names: of the rows.
        needs: the modules that a row imports; a row that lacks one is told as not installed.
        arguments: of the processes.
        limits: seconds for all rows together and for one.
        done: called with a row's name and what was found.
    """
    end = time.perf_counter() + limits[0]
    for name in names:
        absent = [module for module in needs(name) if importlib.util.find_spec(module) is None]
        left = end - time.perf_counter()
        if absent:
            found = {"error": f"not installed: {', '.join(absent)}"}
        elif left < 5:
            found = {"error": "not run: the time for all rows was up"}
        else:
            say(f"{name} …")
            found = run_row(script, name, arguments, min(left, limits[1]))
        say(f"{name}: {found.get('error') or 'done'} ({found.get('process_seconds', 0)} s)")
        done(name, found)


# ------------------------------------------------------------------------------------------------- results


def head(device: str, size: str) -> dict[str, Any]:
    """What a result was measured with and on."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        **facts(device),
        **{name: version(name) for name in ("transformers", "accelerate", "bitsandbytes")},
        "shape": SIZES[size],
    }


class Result:
    """A JSON file of rows, written after each; rows of an earlier run with the same head stay."""

    def __init__(self, file: Path | None, head: dict[str, Any]) -> None:
        self._file, self._head = file, head
        self.rows: dict[str, dict[str, Any]] = {}
        if file is not None and file.exists():
            old = json.loads(file.read_text())
            earlier = old.pop("rows", {})
            if old == json.loads(json.dumps(head)):
                self.rows = earlier

    def add(self, name: str, found: dict[str, Any]) -> None:
        self.rows[name] = found
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps({**self._head, "rows": self.rows}, indent=1) + "\n")


def number(value: float | None, digits: int = 2, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines if len(line) > 2 or i == 0) for i in range(len(lines[0]))]
    for line in lines:
        cells = [f"{cell:{'<' if i == 0 or len(line) == 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)]
        print("  ".join(cells).rstrip())


def parse(
    parser: argparse.ArgumentParser, rows: Iterable[str], seconds: Mapping[str, tuple[float, float]]
) -> argparse.Namespace:
    """The options that both benchmarks have, parsed; ``seconds`` are the default limits by device."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=list(SIZES), help="of the model; by default 8b on a GPU, mid without")
    parser.add_argument("--small", action="store_true", help="the same as --size small")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here for the next run; by default nowhere")
    parser.add_argument("--only", metavar="ROW,ROW", help=f"of {', '.join(rows)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="by default in benchmarks/results, unless small")
    parser.add_argument("--seconds", type=float, help="for all rows together")
    parser.add_argument("--row-seconds", type=float, help="for one row")
    parser.add_argument("--touch", type=float, help="GiB of memory to use once first; by default 16 with a GPU")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = "small" if args.small else args.size or ("8b" if args.device == "cuda" else "mid")
    args.seconds = args.seconds or seconds[args.device][0]
    args.row_seconds = args.row_seconds or seconds[args.device][1]
    if args.touch is None:
        args.touch = 16.0 if args.device == "cuda" and args.size != "small" else 0.0
    if args.only is not None:
        args.only = args.only.split(",")
        if unknown := set(args.only) - set(rows):
            parser.error(f"--only: no row is named {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    return args
