"""A model of Llama-3-8B's shape with half of its layers off the GPU: tokens a second, prefill and memory.

    PYTHONPATH=src:.peers python benchmarks/offload.py --folder FOLDER
    PYTHONPATH=src:.peers python benchmarks/offload.py --folder FOLDER --only link,fewbits-nf4,fewbits-nf4-disk

The embeddings, the head and every second layer are on the GPU, as fewbits' own plans spread them; the other layers are
on the CPU or, in rows that say so, on disk. ``--last`` takes the last half instead. Without a GPU it is a smaller
model, and half of it is on disk instead of in memory.

Each row is a process of its own, which has loaded and run a tiny model with the same tool before anything is timed.
Decoding is greedy, one sequence, after a prompt of 128 tokens, through ``generate`` and through a plain loop that keeps
``past_key_values``; the rate is of the tokens after the first, and what is slow is stopped after 20 seconds.

The bytes moved are those of the layers that are off, as their format stores them, once for every token; a second of
them is set against the speed of the link, measured in the row ``link``: 256 MiB of pinned memory copied to the GPU,
or, for what is on disk, a plain read of cached files to the device.

llama.cpp's row needs its Python package, which is compiled when it is installed (``benchmarks/ggml.py``); its loading
converts the checkpoint first.

Writes ``benchmarks/results/offload-<cpu|cuda>.json``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llama
import torch
from llama import GiB, number, say
from torch import Tensor

from fewbits.formats import QuantSpec, quantized_bytes

Map = dict[str, int | str]
Load = Callable[[Path, Map, str], torch.nn.Module]  # from a folder, by a map of devices, with a folder for files


@dataclass(frozen=True)
class Row:
    """A tool and how it runs the model.

    Attributes:
        title: its name in the table.
        load: None for the link.
        format: of the layers on the device.
        off: where half of the layers is: "cpu", "disk", or None for where all others are.
        moved: the format in which offloaded layers are kept.
        needs: modules that it imports.
        on: the devices for which it is among the rows, unless rows are named.
    """

    title: str
    load: Load | None
    format: str = ""
    off: str | None = None
    moved: str = ""
    needs: tuple[str, ...] = ("transformers",)
    on: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------- the tools


def fewbits_in(folder: Path, devices: Map, files: str, *, format: str, offload: str = "stream") -> torch.nn.Module:
    import fewbits

    settings: dict[str, Any] = {"double_quant": True} if format == "nf4" else {}
    places = set(devices.values())
    if len(places) == 1:
        settings["device_map"] = places.pop()
    else:
        settings |= {"device_map": devices, "offload": offload}
    if "disk" in places:
        settings["offload_folder"] = files
    return fewbits.from_pretrained(folder, format, progress=False, **settings)


def transformers_in(folder: Path, devices: Map, files: str, *, format: str) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": devices}
    # allows parts on the CPU beside a GPU, and leaves them unquantized: where all is on a CPU, that is everything
    offloaded = {"llm_int8_enable_fp32_cpu_offload": True} if len(set(devices.values())) > 1 else {}
    settings |= llama.bitsandbytes_config(format, **offloaded)
    if "disk" in devices.values():
        settings["offload_folder"] = files
    return LlamaForCausalLM.from_pretrained(folder, **settings)


def accelerate_in(folder: Path, devices: Map, files: str, *, format: str) -> torch.nn.Module:
    offload_folder = files if "disk" in devices.values() else None
    return llama.load_with_accelerate(folder, format, device_map=devices, offload_folder=offload_folder)


def ggml_in(folder: Path, devices: Map, files: str, *, format: str) -> Any:
    import ggml

    return ggml.load(folder, devices, files, format=format)


def _fewbits(format: str, off: str | None, on: tuple[str, ...], offload: str = "stream") -> Row:
    title = {None: "all on the device", "cpu": "half on the CPU", "disk": "half on disk"}[off]
    if offload != "stream":
        title += f", {offload}"
    return Row(
        f"fewbits {format}, {title}", partial(fewbits_in, format=format, offload=offload), format, off, format, on=on
    )


def _peer(
    load: Callable[..., torch.nn.Module], format: str, off: str | None, moved: str, on: tuple[str, ...] = ()
) -> Row:
    tool = "transformers" if load is transformers_in else "accelerate"
    needs = ("transformers", "accelerate", *(("bitsandbytes",) if format != "bf16" else ()))
    kept = "" if format == moved else f" ({moved})"
    title = {None: "all on the device", "cpu": f"half on the CPU{kept}", "disk": f"half on disk{kept}"}[off]
    return Row(f"{tool} {format}, {title}", partial(load, format=format), format, off, moved, needs, on)


ROWS: dict[str, Row] = {
    "link": Row("link", None, needs=(), on=("cpu", "cuda")),
    "fewbits-nf4": _fewbits("nf4", "cpu", ("cuda",)),
    "fewbits-int8": _fewbits("int8", "cpu", ("cuda",)),
    "fewbits-nf4-resident": _fewbits("nf4", None, ("cuda", "cpu")),
    "fewbits-int8-resident": _fewbits("int8", None, ("cpu",)),
    "fewbits-nf4-disk": _fewbits("nf4", "disk", ("cpu",)),
    "fewbits-int8-disk": _fewbits("int8", "disk", ("cpu",)),
    "fewbits-nf4-compute": _fewbits("nf4", "cpu", (), "compute"),
    "fewbits-int8-compute": _fewbits("int8", "cpu", (), "compute"),
    "accelerate-int8": _peer(accelerate_in, "int8", "cpu", "int8", ("cuda",)),
    "accelerate-nf4": _peer(accelerate_in, "nf4", "cpu", "bf16"),
    "transformers-int8": _peer(transformers_in, "int8", "cpu", "bf16", ("cuda",)),
    "transformers-nf4": _peer(transformers_in, "nf4", "cpu", "bf16"),
    "transformers-bf16": _peer(transformers_in, "bf16", "cpu", "bf16", ("cuda",)),
    "transformers-bf16-resident": _peer(transformers_in, "bf16", None, "bf16", ("cpu",)),
    "transformers-nf4-resident": _peer(transformers_in, "nf4", None, "nf4", ("cpu",)),
    "transformers-int8-resident": _peer(transformers_in, "int8", None, "int8", ("cpu",)),
    "llamacpp-q4_0-resident": Row(
        "llama.cpp q4_0, all on the device",
        partial(ggml_in, format="q4_0"),
        "q4_0",
        needs=("llama_cpp", "gguf"),
        on=("cpu",),
    ),
    "transformers-bf16-disk": _peer(transformers_in, "bf16", "disk", "bf16", ("cpu",)),
}


def devices_for(size: str, device: str, off: str | None, *, last: bool) -> Map:
    """Where every part of the model is: half of the layers at ``off``, everything else on the device.

    Every second layer, as fewbits' own plans spread them, or the ``last`` half.
    """
    here: int | str = 0 if device != "cpu" else "cpu"
    layers = llama.SIZES[size]["num_hidden_layers"]
    away = range(layers // 2, layers) if last else range(1, layers, 2)
    inner = {f"model.layers.{i}": off if off is not None and i in away else here for i in range(layers)}
    return {"model.embed_tokens": here, "model.rotary_emb": here, **inner, "model.norm": here, "lm_head": here}


def moved_bytes(size: str, format: str) -> int:
    """Bytes of half of the layers, with their norms in bf16."""
    shape = llama.SIZES[size]
    hidden, middle, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv = hidden // heads * shape["num_key_value_heads"]
    weights = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    weights += [(middle, hidden), (middle, hidden), (hidden, middle)]
    spec = None if format == "bf16" else QuantSpec(format, double_quant=format == "nf4")
    one = sum(
        2 * rows * columns if spec is None else quantized_bytes(spec, (rows, columns)) for rows, columns in weights
    )
    layers = shape["num_hidden_layers"]
    return (layers - layers // 2) * (one + 2 * 2 * hidden)


# ------------------------------------------------------------------------------------------------- measuring


def link_speed(device: str) -> float:
    """Bytes a second from pinned memory to the GPU: 256 MiB, the best of five."""
    source = torch.ones(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return source.nbytes / best


def generate(model: Any, prompt: Tensor, tokens: int, stop: float, device: str) -> dict[str, Any]:
    """Tokens a second of ``model.generate`` after the first token, and the first tokens."""
    from transformers import StoppingCriteria

    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            llama.synchronize(device)
            times.append(time.perf_counter())
            return torch.full(input_ids.shape[:1], times[-1] - times[0] > stop, device=input_ids.device)

    began = time.perf_counter()
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[Clock()],
    )
    return {
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "first_token_seconds": times[0] - began,
        "decoded": len(times),
        "first_tokens": " ".join(map(str, made[0, prompt.shape[1] :][:8].tolist())),
    }


def loop(model: Any, prompt: Tensor, tokens: int, stop: float, device: str) -> dict[str, Any]:
    """The same through a plain loop over the model's forward, which reads every token."""
    llama.synchronize(device)
    began = time.perf_counter()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    if not bool(out.logits.isfinite().all()):
        raise RuntimeError("the model's logits are not all finite")
    made = [int(out.logits[0, -1].argmax())]
    first = time.perf_counter()
    while len(made) < tokens and (len(made) < 2 or time.perf_counter() - first < stop):
        token = torch.tensor([made[-1:]], device=prompt.device)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        made.append(int(out.logits[0, -1].argmax()))
    seconds = time.perf_counter() - first
    return {
        "tokens_per_second": (len(made) - 1) / seconds,
        "first_token_seconds": first - began,
        "decoded": len(made),
        "first_tokens": " ".join(map(str, made[:8])),
    }


def prefill(model: Any, prompt: Tensor, stop: float, device: str) -> list[float]:
    """Milliseconds of a forward over the prompt, three times, or fewer where that takes long."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 1000 * stop:
        llama.synchronize(device)
        began = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        llama.synchronize(device)
        times.append((time.perf_counter() - began) * 1000)
    return times


@torch.no_grad()
def measure(args: argparse.Namespace, device: str, report: llama.Report) -> None:
    row = ROWS[args.row]
    files = args.files / args.row
    folder, small = args.folder / args.size, args.folder / "small"
    if device != "cpu":
        torch.zeros(1, device=device)
    if row.load is None:
        if device != "cpu":
            report.add(pinned_counted=llama.pinned_counted(), link_bytes_per_second=link_speed(device))
        some = llama.weight_files(folder)[:1]
        report.add(file_bytes_per_second=sum(f.stat().st_size for f in some) / llama.plain_read(some, device))
        return
    vocabulary = llama.SIZES["small"]["vocab_size"]  # the least: the same prompt for every size
    tokens = torch.randint(vocabulary, (1, args.prefill), generator=torch.Generator().manual_seed(1)).to(device)
    prompt = tokens[:, : args.prompt]

    for part in ("small", "model"):
        (files / part).mkdir(parents=True)
    warm = row.load(small, devices_for("small", device, row.off, last=args.last), str(files / "small"))
    loop(warm, prompt, 3, args.stop, device)
    del warm
    llama.collect(device)

    report.add(cached_gb_s=llama.read_once(folder))
    if row.off is not None:
        report.add(moved_bytes=moved_bytes(args.size, row.moved))
    devices = devices_for(args.size, device, row.off, last=args.last)
    with llama.Memory(device) as memory:
        began = time.perf_counter()
        model = row.load(folder, devices, str(files / "model"))
        llama.synchronize(device)
        seconds = time.perf_counter() - began
    report.add(load_seconds=seconds, load=memory.found)
    with llama.Memory(device) as running:
        loop(model, prompt, 3, args.stop, device)  # kernels for this model's shapes are compiled here, if at all
        report.add(loop=loop(model, prompt, args.tokens, args.stop, device))
        if hasattr(model, "generate"):
            report.add(generate=generate(model, prompt, args.tokens, args.stop, device))
    report.add(decoding=running.found)
    with llama.Memory(device) as running:
        report.add(prefill_milliseconds=prefill(model, tokens, args.stop, device))
    report.add(prefilling=running.found)


# ------------------------------------------------------------------------------------------------- the tables


def link_for(row: Row, rows: dict[str, dict[str, Any]], device: str) -> float | None:
    """Bytes a second that could reach the device from where the row's last layers are."""
    key = "link_bytes_per_second" if device != "cpu" and row.off == "cpu" else "file_bytes_per_second"
    return rows.get("link", {}).get(key)


def rate(found: dict[str, Any]) -> float | None:
    """Tokens a second, of the better of both ways."""
    rates = [found[way]["tokens_per_second"] for way in ("loop", "generate") if way in found]
    return max(rates, default=None)


PHASES = ("decoding", "prefilling")


def show(rows: dict[str, dict[str, Any]], device: str) -> None:
    gpu = ("GPU GiB", "decoding", "prefill", "pinned") if device != "cpu" else ()
    header = ("tool", "loop tok/s", "generate tok/s", "prefill ms", "GB/s", "of link", *gpu, "host GiB", "load s")

    def line(name: str, found: dict[str, Any]) -> tuple[str, ...]:
        row = ROWS[name]
        if "load" not in found:
            return row.title, found.get("error", "nothing was measured")[:100]
        fastest, link = rate(found), link_for(row, rows, device)
        moved = None if fastest is None or row.off is None else found["moved_bytes"] * fastest
        cells = [
            row.title + (" (!)" if "error" in found else ""),
            *(number(found.get(way, {}).get("tokens_per_second")) for way in ("loop", "generate")),
            number(min(found.get("prefill_milliseconds", ()), default=None), 1),
            number(moved, 2, 1e9),
            "" if moved is None or link is None else f"{moved / link:.0%}",
        ]
        load = found["load"]
        if device != "cpu":
            final = load["gpu_final_bytes"]
            peaks = [found[what]["gpu_peak_bytes"] + final if what in found else None for what in PHASES]
            cells += [number(value, 2, GiB) for value in (final, *peaks, load["pinned_final_bytes"])]
        return *cells, number(load["host_final_bytes"], 2, GiB), number(found["load_seconds"], 1)

    measured = {name: rows[name] for name in ROWS if name in rows and name != "link"}
    llama.print_table(header, (line(name, found) for name, found in measured.items()))
    for name in ("link", "file"):
        if (speed := rows.get("link", {}).get(f"{name}_bytes_per_second")) is not None:
            print(f"{'pinned memory to the GPU' if name == 'link' else 'cached file'}: {speed / 1e9:.1f} GB/s")
    if device != "cpu":
        print("GPU: after loading, and at the peak of decoding and of prefill. pinned: as torch counts it.")
    for name, found in measured.items():
        if "error" in found and "load" in found:
            print(f"(!) {ROWS[name].title}: {found['error']}")
        resident = measured.get(f"fewbits-{ROWS[name].format}-resident", {}).get("loop", {}).get("first_tokens")
        tokens = {found[way]["first_tokens"] for way in ("loop", "generate") if way in found}
        if name.startswith("fewbits") and resident is not None and tokens - {resident}:
            print(f"(!) {ROWS[name].title}: other tokens than with all on the device")
    print()
    compare(measured, rows, device)


def compare(measured: dict[str, dict[str, Any]], rows: dict[str, dict[str, Any]], device: str) -> None:
    """The peer, ours, the ratio and the limit, for each way in which ours has layers off the device.

    The peer is the fastest with the same format, or else with any. The limit is the longer of moving the layers over
    the link and of running with all of them on the device, where those are measured.
    """

    def milliseconds(found: dict[str, Any]) -> float | None:
        return min(found.get("prefill_milliseconds", ()), default=None)

    lines = []
    for name, found in measured.items():
        row = ROWS[name]
        if not name.startswith("fewbits") or row.off is None:
            continue
        rivals = {n: f for n, f in measured.items() if not n.startswith("fewbits") and ROWS[n].off == row.off}
        link = link_for(row, rows, device)
        transfer = None if link is None or "moved_bytes" not in found else found["moved_bytes"] / link
        resident = measured.get(f"fewbits-{row.format}-resident", {})
        for what, value, better in (("tok/s", rate, max), ("prefill ms", milliseconds, min)):
            ours = value(found)
            if ours is None:
                continue
            values = {n: v for n, f in rivals.items() if (v := value(f)) is not None}
            same = {n: v for n, v in values.items() if ROWS[n].moved == row.moved}
            best = better(pool, key=pool.__getitem__) if (pool := same or values) else None
            whole = value(resident)
            if value is rate:
                limit = min((v for v in (transfer and 1 / transfer, whole) if v is not None), default=None)
            else:
                limit = max((v for v in (transfer and transfer * 1000, whole) if v is not None), default=None)
            peer = None if best is None else pool[best]
            ratio = None if peer is None else (ours / peer if value is rate else peer / ours)
            lines.append(
                (f"{row.title}, {what}", number(peer), number(ours), number(ratio, 1), number(limit), best or "")
            )
    if lines:
        llama.print_table(("", "peer", "fewbits", "× faster", "limit", "the peer"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=128, help="tokens before decoding")
    parser.add_argument("--tokens", type=int, default=32, help="to decode")
    parser.add_argument("--prefill", type=int, help="tokens of the prefill; by default 4096 on a GPU, 256 without")
    parser.add_argument("--stop", type=float, default=20, help="seconds after which decoding or prefill is stopped")
    parser.add_argument("--last", action="store_true", help="the last half of the layers instead of every second one")
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    args = llama.parse(parser, ROWS, {"cuda": (440, 150), "cpu": (3600, 900)})
    args.prefill = args.prefill or (4096 if args.device == "cuda" else 256)
    device = "cuda:0" if args.device == "cuda" else "cpu"
    if args.row is not None:
        llama.measure_row(partial(measure, args, device), args.report, args.folder)
        return
    names = args.only or [name for name, row in ROWS.items() if args.device in row.on]
    target = args.json
    if target is None and args.size != "small":
        target = llama.ROOT / "benchmarks" / "results" / f"offload-{args.device}.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        began = time.perf_counter()
        llama.make_checkpoint(folder / "small", "small")
        total = llama.make_checkpoint(folder / args.size, args.size)
        llama.touch(args.touch)
        say(f"a checkpoint of {total / 1e9:.2f} GB")
        files = tempfile.mkdtemp(dir=folder)  # what rows keep on disk, also that of a row that is stopped
        options = {name: getattr(args, name) for name in ("device", "size", "prompt", "tokens", "prefill", "stop")}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        arguments += ["--folder", str(folder), "--files", files, *(["--last"] if args.last else [])]
        asked = {name: getattr(args, name) for name in ("prompt", "tokens", "prefill", "last")}
        result = llama.Result(target, {**llama.head(args.device, args.size), **asked})
        limits = args.seconds - (time.perf_counter() - began), args.row_seconds
        try:
            llama.run_rows(__file__, names, lambda name: ROWS[name].needs, arguments, limits, result.add)
        finally:
            shutil.rmtree(files, ignore_errors=True)
    show(result.rows, device)


if __name__ == "__main__":
    main()
