"""Writes the README's tables from ``benchmarks/results/*.json``; ``--check`` only says whether they are up to date.

A table stands between ``<!-- table: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GiB = 2**30


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def quality() -> str:
    rows = _load("quality-cpu.json")["rows"]
    return _table(
        ("bits per byte of text", "fewbits", "transformers + bitsandbytes"),
        (
            (row["model"], f"{row['fewbits']:.4f}", "" if row["bitsandbytes"] is None else f"{row['bitsandbytes']:.4f}")
            for row in rows
        ),
    )


def gpt2_xl() -> str:
    names = {
        "int8": "8 bits (`int8`)",
        "nf4-dq": "4 bits (`nf4`, double quantization)",
        "nf4-dq+int8-ends": "the same, embeddings and head in 8 bits",
    }
    result = _load("gpt2_xl-cpu.json")
    return _table(
        ("GPT-2 XL's shape, 1.64 B parameters", "parameters, GiB", "host memory at its peak, GiB", "seconds to load"),
        (
            (
                names[name],
                f"{run['parameter_bytes'] / GiB:.3f}",
                f"{run['host_peak_bytes'] / GiB:.2f}",
                f"{run['load_seconds']:.0f}",
            )
            for name, run in result["runs"].items()
        ),
    )


def linear() -> str:
    result = _load("linear-cpu.json")
    titles = {"nf4": "nf4", **_FORMATS}
    return _table(
        (f"4096 × 4096, 2 CPU cores ({result['level']}), bf16 input, µs", "rows", "torch bf16", "torch fp32",
         "bitsandbytes", "fewbits", "bf16's time / fewbits'", "bitsandbytes' / fewbits'"),
        (
            (titles[row["format"]], str(row["rows"]), *(f"{us[who]:.0f}" for who in ("bf16", "fp32", "peer", "ours")),
             *(f"{us[who] / us['ours']:.1f}" for who in ("bf16", "peer")))
            for row in result["rows"] if row["shape"] == [4096, 4096] for us in [row["us"]]
        ),
    )  # fmt: skip


_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # those with targets
_FORMATS = {"nf4-dq": "nf4, double quantization", "int8": "int8"}


def linear_gpu() -> str:
    """Microseconds of fewbits for each shape, and beside them the times of bf16 and of bitsandbytes as multiples."""
    result = _load("linear-cuda.json")
    rows = [row for row in result["rows"] if row["format"] in _FORMATS and tuple(row["shape"]) in _SHAPES]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    found = {(row["format"], row["rows"], tuple(row["shape"])): row for row in rows}

    def cell(row: dict | None) -> str:
        if row is None or row["ours"] is None:
            return ""
        peer = "" if row["speedup"] is None else f"{row['speedup']:.1f}"
        return f"{row['ours']:.1f} ({1 / row['of_torch']:.2f}, {peer})"

    return _table(
        ("µs (bf16's time and bitsandbytes' as multiples)", "rows of x", *(f"{n} × {k}" for n, k in shapes)),
        (
            (title, str(m), *(cell(found.get((format, m, shape))) for shape in shapes))
            for format, title in _FORMATS.items()
            for m in dict.fromkeys(row["rows"] for row in rows)
        ),
    )


def linear_gpu_more() -> str:
    """Of other shapes bf16's time as a multiple of fewbits'."""
    rows = [row for row in _load("linear-cuda.json")["rows"] if row["format"] in _FORMATS]
    shapes = [shape for shape in dict.fromkeys(tuple(row["shape"]) for row in rows) if shape not in _SHAPES]
    found = {(row["format"], row["rows"], tuple(row["shape"])): row for row in rows}
    return _table(
        ("bf16's time / fewbits'", "rows of x", *(f"{n} × {k}" for n, k in shapes)),
        (
            (title, str(m), *(f"{1 / found[format, m, shape]['of_torch']:.2f}" for shape in shapes))
            for format, title in _FORMATS.items()
            for m in (1, 16, 64, 512, 2048)
        ),
    )


def conversions() -> str:
    result = _load("linear-cuda.json")
    n, k = result["conversions_shape"]
    return _table(
        (f"{n} × {k} in bf16, one H200, µs", "fewbits", "bitsandbytes", "GB/s"),
        (
            (row["what"], f"{row['ours']:.0f}", "" if row["peer"] is None else f"{row['peer']:.0f}",
             f"{row['bytes'] / row['ours'] / 1e3:.0f}")
            for row in result["conversions"]
        ),
    )  # fmt: skip


_MODELS = {
    "bf16": "bf16",
    "bnb-nf4": "bitsandbytes, nf4 with double quantization",
    "bnb-int8": "bitsandbytes, int8",
    "fewbits-nf4": "fewbits, nf4 with double quantization",
    "fewbits-int8": "fewbits, int8",
}


def decode() -> str:
    rows = {row["name"]: row for row in _load("decode-cuda.json")["rows"]}
    parts = ("step_1", "step_8", "step_32", "compiled_1", "compiled_8", "compiled_32", "eager_1", "prefill")
    return _table(
        ("8 layers of Llama-3-8B's shape, one H200, ms", "step, 1 text", "8", "32", "compiled, 1 text", "8", "32",
         "1, without a graph", "4096 tokens at once", "weights, GiB"),
        (
            (
                title,
                *("" if (ms := rows[name]["ms"].get(part)) is None else f"{ms:.2f}" for part in parts),
                f"{rows[name]['weight_bytes'] / GiB:.2f}",
            )
            for name, title in _MODELS.items()
            if name in rows  # a run that its time limit ended has not all
        ),
    )  # fmt: skip


_TOOLS = {
    "floor": "a plain read of the files",
    "fewbits-nf4": "fewbits, nf4 with double quantization",
    "fewbits-int8": "fewbits, int8",
    "fewbits-reload": "fewbits, its own nf4 checkpoint",
    "transformers-bf16": "transformers, bf16",
    "transformers-nf4": "transformers + bitsandbytes, nf4 with double quantization",
    "transformers-int8": "transformers + bitsandbytes, int8",
    "accelerate-nf4": "Accelerate + bitsandbytes, nf4 with double quantization",
    "accelerate-int8": "Accelerate + bitsandbytes, int8",
    "floor-nf4": "quantizing alone what lies in memory, nf4",
    "floor-int8": "the same, int8",
    "floor-memory": "new memory for the result, int8",
    "floor-cold": "a plain read from the disk",
    "fewbits-nf4-cold": "fewbits, nf4 with double quantization, from the disk",
    "fewbits-int8-cold": "fewbits, int8, from the disk",
    "fewbits-nf4-resident": "fewbits, nf4, all of it there",
    "fewbits-int8-resident": "fewbits, int8, all of it there",
    "fewbits-nf4-disk": "fewbits, nf4, half on disk",
    "fewbits-int8-disk": "fewbits, int8, half on disk",
    "transformers-bf16-resident": "transformers, bf16, all of it there",
    "transformers-nf4-resident": "transformers + bitsandbytes, nf4, all of it there",
    "transformers-int8-resident": "transformers + bitsandbytes, int8, all of it there",
    "llamacpp-q4_0-resident": "llama.cpp, Q4_0, all of it there",
    "transformers-bf16-disk": "transformers + Accelerate, bf16, half on disk",
}


def load() -> str:
    lines = []
    for where, name in (("8.0 B, one H200", "load-cuda.json"), ("1.1 B, 2 CPU cores", "load-cpu.json")):
        rows = _load(name)["rows"]
        for tool, row in rows.items():
            if tool not in _TOOLS or "seconds" not in row:
                continue
            size, seconds = row["checkpoint_bytes"], row["seconds"]
            gpu = [row.get(f"gpu_{part}_bytes") for part in ("final", "peak")]
            host = row.get("host_peak_bytes")
            lines.append((
                f"{_TOOLS[tool]} ({where})", f"{seconds:.2f}", f"{size / seconds / 1e9:.1f}",
                f"{gpu[0] / GiB:.2f}" if gpu[0] is not None else "",
                f"{(gpu[1] - gpu[0]) / GiB:.2f}" if gpu[0] is not None else "",
                f"{host / GiB:.2f}" if host is not None else "",
            ))  # fmt: skip
    header = ("loading (cached files)", "s", "GB/s of the files", "GPU, GiB", "its peak above", "host peak, GiB")
    return _table(header, lines)


def offload() -> str:
    lines = []
    for where, name in (("8.0 B, one H200", "offload-cuda.json"), ("1.1 B, 2 CPU cores", "offload-cpu.json")):
        rows = _load(name)["rows"]
        link = rows["link"]
        for tool, row in rows.items():
            rates = [row[way]["tokens_per_second"] for way in ("loop", "generate") if way in row]
            if not rates:
                continue
            fast, moved = max(rates), row.get("moved_bytes")
            limit = link.get("link_bytes_per_second") if name == "offload-cuda.json" else link["file_bytes_per_second"]
            title = _TOOLS.get(tool, tool)
            if name == "offload-cuda.json" and moved is not None:
                title = _TOOLS.get(tool, tool.replace("-", ", ")).removesuffix(" with double quantization")
                title += ", half on the CPU"
            lines.append((
                f"{title} ({where})", f"{fast:.1f}", f"{min(row['prefill_milliseconds']):.0f}",
                "" if moved is None else f"{moved * fast / 1e9:.1f}",
                "" if moved is None else f"{100 * moved * fast / limit:.0f} %",
            ))  # fmt: skip
    header = ("every second layer off the device", "tokens/s", "prefill, ms", "GB/s moved", "of the link or file")
    return _table(header, lines)


def finetune() -> str:
    titles = {
        "floor": "the products alone, in bf16",
        "bf16": "PEFT, bf16",
        "bitsandbytes-nf4": "PEFT + bitsandbytes, nf4",
        "fewbits-nf4-peft": "PEFT + fewbits, nf4, PEFT's own functions",
        "fewbits-nf4": "PEFT + fewbits, nf4",
        "bitsandbytes-int8": "PEFT + bitsandbytes, int8",
        "fewbits-int8-peft": "PEFT + fewbits, int8, PEFT's own functions",
        "fewbits-int8": "PEFT + fewbits, int8",
    }

    def of(row: dict, key: str) -> str:
        value = row.get("of_peer", {}).get(key)
        return "" if value is None else f"{value:.2f}"

    lines = []
    for size, file in (("8.0 B", "finetune-cuda.json"), ("1.1 B", "finetune-cpu.json")):
        found = _load(file)
        cuda = file == "finetune-cuda.json"
        where = f"{size}, one {found['device'].split()[1]}" if cuda else f"{size}, {found['threads']} CPU cores"
        for name, title in titles.items():
            row = found["rows"].get(name, {})
            if "seconds" not in row:
                continue
            losses = " → ".join(f"{row['losses'][i]:.3f}" for i in (0, 2, 6, -1)) if "losses" in row else ""
            peak = f"{row['peak_bytes'] / GiB:.2f}" if "peak_bytes" in row else ""
            step = f"{row['seconds'] * 1e3:.0f}"
            lines.append((f"{title} ({where})", step, of(row, "seconds"), peak, of(row, "peak_bytes"), losses))
    header = ("LoRA", "ms a step", "of bnb's", "peak, GiB", "of bnb's", "loss: 1st, 3rd, 7th, 12th step")
    return _table(header, lines)


TABLES = {
    "quality": quality,
    "gpt2_xl": gpt2_xl,
    "linear": linear,
    "linear_gpu": linear_gpu,
    "linear_gpu_more": linear_gpu_more,
    "conversions": conversions,
    "decode": decode,
    "finetune": finetune,
    "load": load,
    "offload": offload,
}


def render(text: str) -> str:
    """The text with every table made anew."""

    def one(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", one, text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = render(text)
    if "--check" in sys.argv:
        raise SystemExit(0 if made == text else "README.md: the tables are not those of benchmarks/results")
    readme.write_text(made)


if __name__ == "__main__":
    main()
