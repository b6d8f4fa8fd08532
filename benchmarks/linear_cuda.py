"""One quantized linear layer on a GPU: fewbits beside torch's bf16 and int4 and bitsandbytes, in one run.

    PYTHONPATH=src:.peers python benchmarks/linear.py --device cuda
    PYTHONPATH=src:.peers python benchmarks/linear.py --device cuda --shapes 6144x4096 --rows 1,16 --formats nf4

What is timed is the GPU's time: each contender is one CUDA graph of calls that take copies of the weight in turn, more
than 500 MB of them, so that no weight comes from the cache. For each shape and number of rows the graphs of all
contenders are replayed in turn, each time in a new order. A time is the median of a graph's replays, divided by the
number of calls; a ratio is the median of those of single turns. bitsandbytes' int8 waits for the GPU in the middle of a
call when its threshold is not 0; no graph can hold that, so it is timed as it is called, with the host's time (``*`` in
the table; the same with threshold 0, in a graph, stands beside it).

``copy`` is the time in which a plain copy moves as many bytes as the packed weight has, divided by fewbits' time. int8
is measured with an x that has no number beyond the threshold, and (``outliers``) with one that has them in six columns.
The targets are those of ``TARGETS``. Errors are those of the graph's last output, relative to fp64 with the weight that
fewbits' format stands for. Beside that: what a call costs the host, and quantizing and dequantizing.

Writes ``benchmarks/results/linear-cuda.json``, also when it is stopped by ``--budget`` or by an error.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders_cuda import CONTENDERS, DTYPE, SPECS, Contender
from machine import facts
from times import Times
from timing_cuda import (
    CALLS,
    Call,
    Graph,
    after_failure,
    as_called,
    attempt,
    copy_speed,
    gpu_time,
    host_time,
    message,
    race,
    waits,
    warm_up,
)
from torch import Tensor, nn

from fewbits.errors import FewbitsWarning
from fewbits.formats import QuantSpec, dequantize_inner, quantize_inner, quantized_bytes
from fewbits.modules import install
from fewbits.tensor import QuantTensor

Shape = tuple[int, int]

DEVICE = "cuda"
ROTATE = 500_000_000  # bytes of packed weights, at least: ten times the largest cache
LONG_CALLS = 8  # of a graph with many rows of x
OUTLIERS = 6  # columns of x
HOST_TURNS = 7  # of each contender, when the host's time is measured
CHECKED = 512  # rows of an output whose error is looked at
SMALL: tuple[Shape, ...] = ((6144, 4096), (4096, 4096))
LARGE: tuple[Shape, ...] = ((28672, 4096), (4096, 14336))
MORE: tuple[Shape, ...] = ((5120, 5120), (11008, 4096), (13824, 5120), (2560, 9728), (3584, 18944))
ROWS = (1, 4, 16, 32, 64, 128, 512, 2048, 4096, 8192)
CONVERTED: Shape = (14336, 8192)


@dataclass(frozen=True)
class Target:
    """What is asked of a format for some shapes, from ``first`` to ``last`` rows of x.

    Attributes:
        figure: "speedup" (the peer's time / ours, at least), "share" (the time of copying as many bytes / ours, at
            least), "of_torch" (ours / bf16's, at most), "of_torch_outliers" (the same with outliers in x), "of_plain"
            (ours / that without double quantization, at most) or "error" (ours / the peer's, at most, to three digits:
            it is that of a sample).
    """

    format: str
    shapes: tuple[Shape, ...]
    first: int
    last: float
    figure: str
    bound: float


TARGETS = (
    Target("nf4-dq", SMALL, 1, 1, "speedup", 2.2),
    Target("nf4-dq", LARGE[:1], 1, 1, "speedup", 3.2),
    Target("nf4-dq", LARGE[1:], 1, 1, "speedup", 2.8),
    Target("nf4-dq", LARGE[:1], 1, 1, "share", 0.75),
    Target("nf4-dq", LARGE[1:], 1, 1, "share", 0.60),
    Target("nf4-dq", SMALL, 4, 16, "speedup", 4.5),
    Target("nf4-dq", LARGE, 4, 16, "speedup", 6.0),
    Target("nf4-dq", SMALL, 4, 16, "of_torch", 0.55),
    Target("nf4-dq", LARGE, 4, 16, "of_torch", 0.5),
    Target("nf4-dq", SMALL, 32, 32, "of_torch", 0.75),
    Target("nf4-dq", LARGE, 32, 32, "of_torch", 0.6),
    Target("nf4-dq", SMALL, 64, 64, "of_torch", 1.0),
    Target("nf4-dq", LARGE, 64, 64, "of_torch", 0.7),
    Target("nf4-dq", SMALL, 128, 128, "of_torch", 1.2),
    Target("nf4-dq", LARGE, 128, 128, "of_torch", 1.0),
    Target("nf4-dq", SMALL + LARGE, 512, 512, "of_torch", 1.3),
    Target("nf4-dq", SMALL + LARGE, 2048, math.inf, "of_torch", 1.08),
    Target("int8", LARGE, 1, 16, "of_torch", 0.75),
    Target("int8", SMALL + LARGE, 1, 16, "speedup", 5.0),
    Target("nf4-dq", SMALL + LARGE + MORE, 1, math.inf, "of_plain", 1.05),
    Target("int8", SMALL + LARGE, 2048, math.inf, "of_torch", 0.85),
    Target("int8", SMALL + LARGE, 2048, math.inf, "of_torch_outliers", 1.0),
    *(Target(format, SMALL + LARGE + MORE, 1, math.inf, "error", 1.0) for format in ("nf4-dq", "nf4", "int8")),
)
AT_LEAST = ("speedup", "share")  # figures that should be large
HOST_MORE = 12.0  # µs of the host for a call, at most, beside F.linear's
CONVERSION_TARGETS = {"quantize nf4-dq": 8.0, "dequantize nf4-dq": 1.5}  # the peer's time / ours, at least


class OutOfTime(Exception):
    """The budget is spent."""


# ------------------------------------------------------------------------------------------------- the contenders

# what stands beside bf16, the peer and ours, by the key in a row: the contender; and its title in the table
MORE_ROLES = {
    "nf4": {"int4": "torch int4"},
    "nf4-dq": {"int4": "torch int4", "plain": "fewbits nf4"},
    "int8": {"peer_threshold_0": "bitsandbytes int8 t=0", "ours_outliers": "fewbits int8, outliers"},
}
TITLES = {"int4": "int4", "plain": "no dq", "peer_threshold_0": "bnb t=0", "ours_outliers": "outliers"}


def roles(format: str) -> dict[str, str]:
    """The contenders for a format, by the key of their time in a row."""
    return {"torch": "bf16", "peer": f"bitsandbytes {format}", "ours": f"fewbits {format}", **MORE_ROLES[format]}


# ------------------------------------------------------------------------------------------------- measuring


def exact_weight(w: Tensor, format: str) -> Tensor:
    """What a weight of this format stands for, fp64."""
    inner = quantize_inner(w, SPECS[format])
    return dequantize_inner(inner, SPECS[format], tuple(w.shape), torch.float32).double()


def with_outliers(x: Tensor) -> Tensor:
    """The same with numbers beyond the threshold in ``OUTLIERS`` columns, as LLM.int8() is made for."""
    x = x.clone()
    x[:, :: x.shape[1] // OUTLIERS][:, :OUTLIERS] *= 10
    return x


def error_of(out: Tensor, x: Tensor, exact: Tensor) -> float:
    """Relative error of the first rows, in the Frobenius norm."""
    truth = x[: len(out)].double() @ exact.t()
    return float((out.double() - truth).norm() / truth.norm())


@dataclass
class Kept:
    """A contender's weights, and what they stand for, fp64."""

    contender: Contender
    weights: list[Any]
    exact: Tensor | None

    def call_with(self, x: Tensor) -> Call:
        return lambda i: self.contender.call(self.weights[i % len(self.weights)], x)


@dataclass
class Found:
    """What was measured with one weight and one x, by contender."""

    times: Times  # of those in graphs
    eager: dict[str, float]  # µs
    errors: dict[str, float]
    failed: dict[str, str]

    def us(self, name: str) -> float | None:
        return statistics.median(self.times[name]) if name in self.times else self.eager.get(name)

    def ratio(self, a: str, b: str) -> float | None:
        """How many times b's time a takes; where both took turns, by turn."""
        if a in self.times and b in self.times:
            return self.times.ratio(a, b)
        us, of = self.us(a), self.us(b)
        return None if us is None or of is None else us / of


def prepare(names: Iterable[str], w: Tensor) -> tuple[dict[str, Kept], dict[str, str]]:
    """Copies of the weight as each contender keeps it; of those that failed, why."""
    kept: dict[str, Kept] = {}
    failed: dict[str, str] = {}
    exact = {format: exact_weight(w, format) for format in {CONTENDERS[name].format for name in names} - {None}}
    for name in names:
        contender = CONTENDERS[name]
        try:
            first = contender.make(w)
            copies = ROTATE // (w.numel() * contender.bits // 8)
            weights = [first, *(copy.deepcopy(first) for _ in range(copies))]
            kept[name] = Kept(contender, weights, exact.get(contender.format))
        except Exception as error:  # a peer's failure is a result
            failed[name] = message(error)
            after_failure()
    return kept, failed


def measure(kept: dict[str, Kept], x: Tensor) -> Found:
    """All contenders that take so many rows of x."""
    found = Found(Times(), {}, {}, {})
    graphs: dict[str, Graph] = {}
    inputs = {False: x, True: with_outliers(x)}
    outs: dict[str, Tensor] = {}
    try:
        for name, one in kept.items():
            if len(x) > one.contender.most_rows:
                continue
            call, count = one.call_with(inputs[one.contender.outliers]), len(one.weights)
            try:
                warm_up(call, count)
                if one.contender.eager or waits(call):
                    found.eager[name], outs[name] = as_called(call)
                else:
                    graphs[name] = Graph(call, max(count, CALLS if len(x) <= 512 else LONG_CALLS))
            except Exception as error:  # a peer's failure is a result
                found.failed[name] = message(error)
                after_failure()
        found.times = race(graphs)
        outs |= {name: graph.out for name, graph in graphs.items()}
        for name, out in outs.items():
            if (exact := kept[name].exact) is not None:
                found.errors[name] = error_of(out[:CHECKED], inputs[kept[name].contender.outliers], exact)
    finally:
        for graph in graphs.values():
            graph.free()
        torch.cuda.empty_cache()
    return found


# ------------------------------------------------------------------------------------------------- rows and targets


def make_row(shape: Shape, format: str, rows: int, found: Found, speed: float) -> dict[str, Any]:
    """A row of the result: microseconds a call by role (``None`` where there is none), ratios, and the targets."""
    names = roles(format)
    limit = quantized_bytes(SPECS[format], shape) / speed * 1e6
    row: dict[str, Any] = {"shape": list(shape), "format": format, "rows": rows}
    row |= {role: found.us(name) for role, name in names.items()}
    row["limit"] = limit
    row["speedup"] = found.ratio(names["peer"], names["ours"])
    row["of_torch"] = found.ratio(names["ours"], names["torch"])
    if "ours_outliers" in names:
        row["of_torch_outliers"] = found.ratio(names["ours_outliers"], names["torch"])
    if "plain" in names:
        row["of_plain"] = found.ratio(names["ours"], names["plain"])
    row["share"] = None if row["ours"] is None else limit / row["ours"]
    row["errors"] = {role: found.errors[name] for role, name in names.items() if name in found.errors}
    row["eager"] = [role for role, name in names.items() if name in found.eager]
    row["failed"] = {name: found.failed[name] for name in names.values() if name in found.failed}
    errors = row["errors"]
    row["error"] = round(errors["ours"] / errors["peer"], 3) if {"ours", "peer"} <= errors.keys() else None
    row["targets"] = [
        judged(t.figure, row[t.figure], t.bound)
        for t in TARGETS
        if t.format == format and shape in t.shapes and t.first <= rows <= t.last and row[t.figure] is not None
    ]
    return row


def judged(figure: str, value: float, bound: float) -> dict[str, Any]:
    return {
        "figure": figure,
        "bound": bound,
        "met": value >= bound if figure in AT_LEAST else value <= bound,
    }


def said(target: dict[str, Any]) -> str:
    """A target in words."""
    words = {
        "speedup": "bnb/ours ≥ {:g}",
        "share": "copy ≥ {:.0%}",
        "of_torch": "ours/bf16 ≤ {:g}",
        "of_torch_outliers": "with outliers/bf16 ≤ {:g}",
        "of_plain": "dq/fp32 scales ≤ {:g}",
        "error": "error/bnb's ≤ {:g}",
        "more": "µs more than torch's ≤ {:g}",
    }
    return words[target["figure"]].format(target["bound"])


def verdict(row: dict[str, Any]) -> str:
    missed = [said(target) for target in row["targets"] if not target["met"]]
    return "missed: " + ", ".join(missed) if missed else "ok" if row["targets"] else ""


def cell(value: Any, form: str, width: int) -> str:
    """A number; "-" where it is ``None`` or says why there is none."""
    return f"{'-' if value is None or isinstance(value, str) else format(value, form):>{width}}"


def show(rows: list[dict[str, Any]]) -> None:
    """The table of one shape and format."""
    (n, k), name = rows[0]["shape"], rows[0]["format"]
    titles = {"torch": "bf16", "peer": "bnb", "ours": "ours"} | {role: TITLES[role] for role in MORE_ROLES[name]}
    print(f"\n{n}×{k} {name}, {rows[0]['limit']:.1f} µs to copy as many bytes")
    heads = "".join(f"{title:>9}" for title in titles.values())
    print(f"{'rows':>5}{heads}{'bnb/ours':>10}{'ours/bf16':>10}{'copy':>6}{'error':>7}")
    for row in rows:
        line = f"{row['rows']:>5}"
        for role in titles:
            line += cell(row[role], ".1f", 8) + ("*" if role in row["eager"] else " ")
        line += cell(row["speedup"], ".2f", 9) + cell(row["of_torch"], ".2f", 10) + cell(row["share"], ".0%", 6)
        print(f"{line}{cell(row['error'], '.3f', 7)}  {verdict(row)}".rstrip())
    for role, title in (("ours", "ours"), ("peer", "bnb")):
        if errors := [row["errors"][role] for row in rows if role in row["errors"]]:
            worst = max(errors, key=lambda error: (math.isnan(error), error))
            print(f"relative error at worst, {title}: {worst:.1e}")
    for contender, why in {name: why for row in rows for name, why in row["failed"].items()}.items():
        print(f"{contender} failed: {why[:150]}")
    print(end="", flush=True)


# ------------------------------------------------------------------------------------------------- host, conversions


def eager_calls(name: str, w: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    """A contender's call, and that of fewbits' module, or torch's."""
    contender = CONTENDERS[name]
    weight = contender.make(w)
    calls: dict[str, Callable[[], object]] = {name: functools.partial(contender.call, weight, x)}
    if isinstance(weight, QuantTensor) or name == "bf16":
        module = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        if isinstance(weight, QuantTensor):
            install(module, "weight", nn.Parameter(weight, requires_grad=False))
        else:
            module.weight = nn.Parameter(weight, requires_grad=False)
        calls[f"{name}, module"] = functools.partial(module, x)
    return calls


def host_times(shape: Shape, only_ours: bool) -> dict[str, dict[str, float | str]]:
    """Microseconds of the host for an eager call with one row of x, by contender, in both modes.

    All take turns, each time in a new order: a host is slower for a while after some work than after other.
    """
    n, k = shape
    w, x = torch.randn(n, k, device=DEVICE, dtype=DTYPE) * 0.02, torch.randn(1, k, device=DEVICE, dtype=DTYPE)
    result: dict[str, dict[str, float | str]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in CONTENDERS:
        if name == "torch int4" or CONTENDERS[name].outliers or (only_ours and name.startswith("bitsandbytes")):
            continue
        try:
            calls |= eager_calls(name, w, x)
        except Exception as error:  # a peer's failure is a result
            result[name] = dict.fromkeys(("no_grad", "inference_mode"), message(error))
    turns = list(itertools.product(calls, (torch.no_grad, torch.inference_mode)))
    times: dict[tuple[str, str], list[float | str]] = {}
    order = random.Random(0)
    for _ in range(HOST_TURNS):
        order.shuffle(turns)
        for title, mode in turns:
            with mode():
                times.setdefault((title, mode.__name__), []).append(attempt(host_time, calls[title]))
    for (title, mode_name), all_of_it in sorted(times.items(), key=lambda item: list(calls).index(item[0][0])):
        failures = [time for time in all_of_it if isinstance(time, str)]
        result.setdefault(title, {})[mode_name] = failures[0] if failures else statistics.median(all_of_it)
    return result


def host_targets(times: dict[str, dict[str, float | str]]) -> list[dict[str, Any]]:
    """A call beside that of ``F.linear`` in bf16, and a module's beside that of ``nn.Linear``."""
    rows = []
    for title, by_mode in times.items():
        ours, plain = by_mode["no_grad"], times["bf16, module" if title.endswith(", module") else "bf16"]["no_grad"]
        if title.startswith("fewbits") and not isinstance(ours, str) and not isinstance(plain, str):
            rows.append(
                {"what": f"host, {title}", "more": ours - plain, "targets": [judged("more", ours - plain, HOST_MORE)]}
            )
    return rows


def show_host(shape: Shape, times: dict[str, dict[str, float | str]]) -> None:
    print(f"\n{shape[0]}×{shape[1]}, one row, called: µs of the host{'no_grad':>12}{'inference_mode':>16}")
    for title, by_mode in times.items():
        print(f"{title:39}" + cell(by_mode["no_grad"], ".1f", 12) + cell(by_mode["inference_mode"], ".1f", 16))


def conversions(shape: Shape, only_ours: bool) -> list[dict[str, Any]]:
    """Quantizing a bf16 weight and dequantizing it to bf16: microseconds, bytes read and written, and the targets."""
    w = torch.randn(*shape, device=DEVICE, dtype=DTYPE) * 0.02
    target = torch.empty_like(w)
    rows = [{"what": "copy", "bytes": 2 * w.nbytes, "ours": attempt(gpu_time, lambda: target.copy_(w)), "peer": None}]
    for name, spec in SPECS.items():
        ours, peers = our_conversions(w, spec), peer_conversions(w, spec)
        for what, call, peer in zip(("quantize", "dequantize"), ours, peers, strict=True):
            rows.append({
                "what": f"{what} {name}",
                "bytes": w.nbytes + quantized_bytes(spec, shape),
                "ours": attempt(gpu_time, call),
                "peer": None if only_ours else attempt(gpu_time, peer),
            })  # fmt: skip
    for row in rows:
        both = isinstance(row["ours"], float) and isinstance(row["peer"], float)
        row["speedup"] = row["peer"] / row["ours"] if both else None
        bound = CONVERSION_TARGETS.get(row["what"]) if both else None
        row["targets"] = [] if bound is None else [judged("speedup", row["speedup"], bound)]
    return rows


def our_conversions(w: Tensor, spec: QuantSpec) -> tuple[Callable[[], object], Callable[[], object]]:
    def quantize() -> dict[str, Tensor]:
        return quantize_inner(w, spec)

    once = functools.cache(quantize)
    return quantize, lambda: dequantize_inner(once(), spec, tuple(w.shape), w.dtype)


def peer_conversions(w: Tensor, spec: QuantSpec) -> tuple[Callable[[], object], Callable[[], object]]:
    """bitsandbytes' ways there and back. Its int8 starts from fp16 and ends in fp32: the casts belong to it."""

    def quantize() -> tuple[Any, ...]:
        import bitsandbytes.functional as bnb

        if spec.format == "int8":
            return bnb.int8_vectorwise_quant(w.half())[:2]
        return bnb.quantize_4bit(w, quant_type=spec.format, compress_statistics=spec.double_quant)

    def dequantize() -> Tensor:
        import bitsandbytes.functional as bnb

        if spec.format == "int8":
            return bnb.int8_vectorwise_dequant(*once()).to(w.dtype)
        return bnb.dequantize_4bit(*once())

    once = functools.cache(quantize)
    return quantize, dequantize


def show_conversions(shape: Shape, rows: list[dict[str, Any]]) -> None:
    print(f"\n{shape[0]}×{shape[1]} bf16, µs{'ours':>9}{'bnb':>9}{'bnb/ours':>10}{'ours GB/s':>11}{'bnb GB/s':>10}")
    for row in rows:
        times = row["ours"], row["peer"]
        speeds = [row["bytes"] / t / 1e3 if isinstance(t, float) else None for t in times]
        line = "".join(cell(t, ".0f", 9) for t in times) + cell(row["speedup"], ".2f", 10)
        line += cell(speeds[0], ".0f", 11) + cell(speeds[1], ".0f", 10)
        print(f"{row['what']:20}{line}  {verdict(row)}".rstrip())
        for why in (t for t in times if isinstance(t, str)):
            print(f"  failed: {why[:150]}")
    print(end="", flush=True)


# ------------------------------------------------------------------------------------------------- all of it


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="linear.py --device cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="with blanks or commas between them, as all lists")
    parser.add_argument("--more", action="store_true", help="more shapes than the four that have targets")
    parser.add_argument("--rows", nargs="+", default=[str(m) for m in ROWS])
    parser.add_argument("--formats", nargs="+", default=list(SPECS), help="nf4 (with and without dq), nf4-dq, int8")
    parser.add_argument("--only-ours", action="store_true", help="and bf16: without bitsandbytes and torch's int4")
    parser.add_argument("--budget", type=float, default=400.0, metavar="SECONDS", help="then it stops, and writes")
    args = parser.parse_args(argv)

    def listed(values: list[str]) -> list[str]:
        return [part for value in values for part in value.split(",") if part]

    try:
        shapes = [tuple(map(int, shape.lower().split("x"))) for shape in listed(args.shapes or [])]
        args.rows = [int(m) for m in listed(args.rows)]
    except ValueError as error:
        parser.error(str(error))
    if any(len(shape) != 2 for shape in shapes):
        parser.error("a shape is N x K, as in 6144x4096")
    args.shapes = (shapes or [*SMALL, *LARGE]) + ([*MORE] if args.more else [])
    asked = set(listed(args.formats))
    if unknown := asked - {*SPECS, *(spec.format for spec in SPECS.values())}:
        parser.error(f"unknown format {', '.join(sorted(unknown))}")
    args.formats = [name for name, spec in SPECS.items() if {name, spec.format} & asked]
    return args


def run(args: argparse.Namespace, result: dict[str, Any], deadline: float) -> None:
    """Measure, print, and fill ``result`` as it goes."""
    speed = result["bytes_per_second"] = copy_speed()
    print(f"{result['device']}, {DTYPE}, a copy: {speed / 1e9:.0f} GB/s; µs a call, * as called, all else in graphs")
    result["host"] = host_times((4096, 4096), args.only_ours)
    show_host((4096, 4096), result["host"])
    result["host_rows"] = host_targets(result["host"])
    result["conversions_shape"] = list(CONVERTED)
    result["conversions"] = conversions(CONVERTED, args.only_ours)
    show_conversions(CONVERTED, result["conversions"])
    torch.cuda.empty_cache()
    names = list(dict.fromkeys(name for format in args.formats for name in roles(format).values()))
    if args.only_ours:
        names = [name for name in names if name == "bf16" or name.startswith("fewbits")]
    generator = torch.Generator(DEVICE).manual_seed(0)  # its own: torch's stays with a graph that failed
    for n, k in args.shapes:
        w = torch.randn(n, k, device=DEVICE, dtype=DTYPE, generator=generator) * 0.02
        inputs = {m: torch.randn(m, k, device=DEVICE, dtype=DTYPE, generator=generator) for m in args.rows}
        kept, failed = prepare(names, w)
        found: dict[int, Found] = {}
        try:
            for m, x in inputs.items():
                if time.perf_counter() > deadline:
                    raise OutOfTime
                found[m] = measure(kept, x)
                found[m].failed |= failed
        finally:
            for format in args.formats:
                rows = [make_row((n, k), format, m, one, speed) for m, one in found.items()]
                if rows:
                    show(rows)
                    result["rows"] += rows


def summary(result: dict[str, Any]) -> str:
    """How many targets there were, and those that were missed."""
    titled = [(f"{'×'.join(map(str, row['shape']))} {row['format']} M={row['rows']}", row) for row in result["rows"]]
    titled += [(row["what"], row) for name in ("host_rows", "conversions") for row in result.get(name, [])]
    targets = [(title, row[target["figure"]], target) for title, row in titled for target in row["targets"]]
    missed = [f"{title}: {said(target)}, is {value:.4g}" for title, value, target in targets if not target["met"]]
    return "\n".join((f"{len(missed)} of {len(targets)} targets missed", *missed))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", FewbitsWarning)  # a slower kernel than ours for the GPU at hand
    logging.disable(logging.WARNING)
    began = time.perf_counter()
    result: dict[str, Any] = {**facts(DEVICE), "complete": False, "rows": []}
    try:
        with torch.no_grad():
            run(args, result, began + args.budget)
        result["complete"] = True
    except OutOfTime:
        print(f"\nstopped: the budget of {args.budget:.0f} s is spent")
    finally:
        result["seconds"] = time.perf_counter() - began
        target = Path(__file__).parent / "results" / "linear-cuda.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{result['seconds']:.0f} s; {summary(result)}", flush=True)


if __name__ == "__main__":
    main()
