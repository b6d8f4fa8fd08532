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
    rows = [
        (f"{row['format']}, {where}", row["rows"], row)
        for where, name in (("2 CPU cores", "linear-cpu.json"), ("one H200, eager", "linear-cuda.json"))
        for row in _load(name)["rows"]
    ]
    return _table(
        ("4096 × 4096, bf16 input, µs a call", "rows", "bf16 torch", "bitsandbytes", "fewbits", "fewbits / peer"),
        (
            (name, str(m), f"{r['torch']:.0f}", f"{r['peer']:.0f}", f"{r['ours']:.0f}", f"{r['ours'] / r['peer']:.1f}")
            for name, m, r in rows
        ),
    )


TABLES = {"quality": quality, "gpt2_xl": gpt2_xl, "linear": linear}


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
