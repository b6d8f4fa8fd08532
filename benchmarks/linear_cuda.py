"""One quantized linear layer on a GPU: fewbits beside torch's bf16 and int4 and bitsandbytes, in one run.

    PYTHONPATH=src:.peers python benchmarks/linear.py --device cuda
    PYTHONPATH=src:.peers python benchmarks/linear.py --device cuda --shapes 6144x4096 --rows 1,16 --formats nf4

What is timed is the GPU's time: each contender is one CUDA graph of calls that take copies of the weight in turn, more
than 500 MB of them, so that no weight comes from the cache. The graph is replayed, and the median of its times divided
by the number of calls. bitsandbytes' int8 waits for the GPU in the middle of a call when its threshold is not 0; no
graph can hold that, so it is timed as it is called, with the host's time (``*`` in the table; the same with threshold
0, in a graph, stands beside it).

``copy`` is the time in which a plain copy moves as many bytes as the packed weight has, divided by fewbits' time. The
targets are those of ``TARGETS``. Errors are those of the graph's last output, relative to fp64 with the weight that
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
import torch.nn.functional as F
from machine import facts
from torch import Tensor, nn

from fewbits.errors import FewbitsWarning
from fewbits.formats import QuantSpec, dequantize_inner, quantize_inner, quantized_bytes
from fewbits.modules import install
from fewbits.tensor import QuantTensor, linear

Shape = tuple[int, int]
Call = Callable[[int], Tensor]  # with a counter, by which the copies of the weight are taken in turn

DEVICE = "cuda"
DTYPE = torch.bfloat16
ROTATE = 500_000_000  # bytes of packed weights, at least: ten times the largest cache
CALLS, REPLAYS = 24, 8  # of a graph, at least; of each graph
HOST_TURNS = 7  # of each contender, when the host's time is measured
CHECKED = 512  # rows of an output whose error is looked at
SMALL: tuple[Shape, ...] = ((6144, 4096), (4096, 4096))
LARGE: tuple[Shape, ...] = ((28672, 4096), (4096, 14336))
MORE: tuple[Shape, ...] = ((5120, 5120), (11008, 4096), (13824, 5120), (2560, 9728), (3584, 18944))
ROWS = (1, 4, 16, 32, 64, 128, 512, 2048, 8192)
CONVERTED: Shape = (14336, 8192)
SPECS = {str(spec): spec for spec in (QuantSpec("nf4", double_quant=True), QuantSpec("nf4"), QuantSpec("int8"))}


@dataclass(frozen=True)
class Target:
    """What is asked of a format for some shapes, from ``first`` to ``last`` rows of x.

    Attributes:
        figure: "speedup" (the peer's time / ours, at least), "of_torch" (ours / bf16's, at most) or "share" (the time
            of copying as many bytes / ours, at least).
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
    Target("int8", SMALL + LARGE, 2048, math.inf, "of_torch", 1.0),
)
HOST_MORE = 12.0  # µs of the host for a call, at most, beside F.linear's
CONVERSION_TARGETS = {"quantize nf4-dq": 8.0, "dequantize nf4-dq": 1.5}  # the peer's time / ours, at least


class OutOfTime(Exception):
    """The budget is spent."""


# ------------------------------------------------------------------------------------------------- the contenders


@dataclass(frozen=True)
class Contender:
    """A tool, and how it multiplies.

    Attributes:
        make: from a weight, bf16 [N, K], to what the tool keeps of it; can be copied by ``copy.deepcopy``.
        call: from that and x, bf16 [M, K], to [M, N].
        bits: of a weight's element.
        format: that of fewbits whose values the tool's weight has; ``None`` where it has others.
        most_rows: above which it is left out, since it takes too long.
        eager: it waits for the GPU, which no graph can hold.
    """

    make: Callable[[Tensor], Any]
    call: Callable[[Any, Tensor], Tensor]
    bits: int
    format: str | None = None
    most_rows: float = math.inf
    eager: bool = False


def peer_4bit(w: Tensor, *, double_quant: bool) -> nn.Module:
    import bitsandbytes as bnb

    n, k = w.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=DTYPE, device="meta")
    weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=double_quant)
    layer.weight = weight.to(w.device)  # which quantizes
    return layer.eval()


def peer_8bit(w: Tensor, *, threshold: float) -> nn.Module:
    import bitsandbytes as bnb

    n, k = w.shape
    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(w.half())  # as it does for a weight that comes from a CPU
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return layer.eval()


def torch_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Any codes and scales: its speed does not depend on them."""
    n, k = w.shape
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=w.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return packed, torch.full((k // 64, n, 2), 0.01, dtype=DTYPE, device=w.device)


def int4_linear(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    packed, scales_and_zeros = weight
    return torch.ops.aten._weight_int4pack_mm(x, packed, 64, scales_and_zeros)


def quantized(w: Tensor, *, format: str) -> QuantTensor:
    return QuantTensor.quantize(w, SPECS[format], known_finite=True)


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


CONTENDERS: dict[str, Contender] = {
    "bf16": Contender(lambda w: w, lambda w, x: F.linear(x, w), 16),
    **{
        f"fewbits {name}": Contender(
            functools.partial(quantized, format=name),
            lambda weight, x: linear(x, weight),
            8 if name == "int8" else 4,
            name,
        )
        for name in SPECS
    },
    "bitsandbytes nf4-dq": Contender(functools.partial(peer_4bit, double_quant=True), _called, 4, "nf4-dq"),
    "bitsandbytes nf4": Contender(functools.partial(peer_4bit, double_quant=False), _called, 4, "nf4"),
    "bitsandbytes int8": Contender(functools.partial(peer_8bit, threshold=6.0), _called, 8, "int8", eager=True),
    "bitsandbytes int8 t=0": Contender(functools.partial(peer_8bit, threshold=0.0), _called, 8, "int8"),
    "torch int4": Contender(torch_int4, int4_linear, 4, None, 128),
}


def roles(format: str) -> dict[str, str]:
    """The contenders for a format, by the key of their time in a row."""
    beside = {"peer_threshold_0": "bitsandbytes int8 t=0"} if format == "int8" else {"int4": "torch int4"}
    return {"torch": "bf16", "peer": f"bitsandbytes {format}", **beside, "ours": f"fewbits {format}"}


# ------------------------------------------------------------------------------------------------- measuring


@functools.cache
def _side_stream() -> Any:
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def warm_up(call: Call, weights: int) -> None:
    """On the stream of the graphs. Every weight: a tool may repack one when it is first used."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(weights + 3):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def waits(call: Call) -> bool:
    """Whether a call waits for the GPU. A graph that is tried and fails would leave the allocator in its middle."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _spans(marks: list[Any]) -> list[float]:
    """Microseconds between events, once the last has come."""
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)]


def in_a_graph(call: Call, weights: int) -> tuple[float, Tensor]:
    """Median microseconds of a call among as many as there are weights, and the first rows that the last of them gave.

    What the graph allocates is freed with it.
    """
    calls = max(weights, CALLS)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_side_stream()):
            for i in range(calls):
                out = call(i)
        graph.replay()
        # all are queued behind that one without waiting, so that the GPU never stands still between them
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        return statistics.median(_spans(marks)) / calls, out[:CHECKED].clone()
    finally:
        graph.reset()
        torch.cuda.empty_cache()


def as_called(call: Call, rounds: int = 5) -> tuple[float, Tensor]:
    """The same without a graph, by the host's clock, the wait for the last one of each round shared by all."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(CALLS):
            out = call(i)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times), out[:CHECKED]


def gpu_time(call: Callable[[], object], rounds: int = 7, calls: int = 5) -> float:
    """Median microseconds of a call, long enough for the host to be ahead of the GPU, without a graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(calls):
            call()
        mark.record()
    return statistics.median(_spans(marks)) / calls


def host_time(call: Callable[[], object], rounds: int = 3, calls: int = 200) -> float:
    """Median microseconds that the host spends on a call. Rounds are short: the driver's queue is, too, and waits when
    it is full."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def copy_speed() -> float:
    """Bytes a second, read and written, of copying 1 GiB."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_time(lambda: target.copy_(source)) * 1e6


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def after_failure() -> None:
    """Back to the stream that a failed graph may have left; raises if the GPU is beyond use."""
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()


def attempt(time_it: Callable[[Callable[[], object]], float], call: Callable[[], object]) -> float | str:
    """The time, or why there is none."""
    try:
        return time_it(call)
    except Exception as error:  # a peer's failure is a result
        found = message(error)
    after_failure()
    return found


def exact_weight(w: Tensor, format: str) -> Tensor:
    """What a weight of this format stands for, fp64."""
    inner = quantize_inner(w, SPECS[format])
    return dequantize_inner(inner, SPECS[format], tuple(w.shape), torch.float32).double()


def error_of(out: Tensor, x: Tensor, exact: Tensor) -> float:
    """Relative error of the first rows, in the Frobenius norm."""
    truth = x[: len(out)].double() @ exact.t()
    return float((out.double() - truth).norm() / truth.norm())


Found = dict[tuple[str, int], dict[str, Any]]  # contender and rows → us, eager and error, or failed


def measure_all(names: Iterable[str], w: Tensor, inputs: dict[int, Tensor], found: Found, deadline: float) -> None:
    """Every contender with every x, into ``found``.

    Raises:
        OutOfTime: the deadline has passed.
    """
    for name in names:
        contender = CONTENDERS[name]
        weights: list[Any] = []
        exact = None
        for rows, x in inputs.items():
            if time.perf_counter() > deadline:
                raise OutOfTime
            if rows > contender.most_rows:
                continue
            try:
                if not weights:
                    exact = None if contender.format is None else exact_weight(w, contender.format)
                    first = contender.make(w)
                    copies = ROTATE // (w.numel() * contender.bits // 8)
                    weights = [first, *(copy.deepcopy(first) for _ in range(copies))]
                found[name, rows] = measure(contender, weights, x, exact)
                continue
            except Exception as error:  # a peer's failure is a result
                found[name, rows] = {"failed": message(error)}
            after_failure()
        del weights, exact
        torch.cuda.empty_cache()


def measure(contender: Contender, weights: list[Any], x: Tensor, exact: Tensor | None) -> dict[str, Any]:
    def call(i: int) -> Tensor:
        return contender.call(weights[i % len(weights)], x)

    warm_up(call, len(weights))
    eager = contender.eager or waits(call)
    microseconds, out = as_called(call) if eager else in_a_graph(call, len(weights))
    error = {} if exact is None else {"error": error_of(out, x, exact)}
    return {"us": microseconds, "eager": eager, **error}


# ------------------------------------------------------------------------------------------------- rows and targets


def make_row(shape: Shape, format: str, rows: int, found: Found, speed: float) -> dict[str, Any]:
    """A row of the result: microseconds a call by role (``None`` where there is none), ratios, and the targets."""
    names = roles(format)
    results = {role: found.get((name, rows), {}) for role, name in names.items()}
    times: dict[str, Any] = {role: one.get("us") for role, one in results.items()}
    limit = quantized_bytes(SPECS[format], shape) / speed * 1e6
    row: dict[str, Any] = {"shape": list(shape), "format": format, "rows": rows, **times, "limit": limit}
    ours, peer, torch_time = (times[role] for role in ("ours", "peer", "torch"))
    row["speedup"] = None if ours is None or peer is None else peer / ours
    row["of_torch"] = None if ours is None or torch_time is None else ours / torch_time
    row["share"] = None if ours is None else limit / ours
    row["errors"] = {role: one["error"] for role, one in results.items() if "error" in one}
    row["eager"] = [role for role, one in results.items() if one.get("eager")]
    row["failed"] = {names[role]: one["failed"] for role, one in results.items() if "failed" in one}
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
        "met": value <= bound if figure in ("of_torch", "more") else value >= bound,
    }


def said(target: dict[str, Any]) -> str:
    """A target in words."""
    figure, bound = target["figure"], target["bound"]
    if figure == "share":
        return f"copy ≥ {bound:.0%}"
    if figure == "more":
        return f"µs more than torch's ≤ {bound:g}"
    return f"bnb/ours ≥ {bound:g}" if figure == "speedup" else f"ours/bf16 ≤ {bound:g}"


def verdict(row: dict[str, Any]) -> str:
    return ", ".join(f"{said(target)} {'ok' if target['met'] else 'MISSED'}" for target in row["targets"])


def cell(value: Any, form: str, width: int) -> str:
    """A number; "-" where it is ``None`` or says why there is none."""
    return f"{'-' if value is None or isinstance(value, str) else format(value, form):>{width}}"


def show(rows: list[dict[str, Any]]) -> None:
    """The table of one shape and format."""
    (n, k), name = rows[0]["shape"], rows[0]["format"]
    beside, title = ("peer_threshold_0", "bnb t=0") if name == "int8" else ("int4", "int4")
    print(f"\n{n}×{k} {name}, {rows[0]['limit']:.1f} µs to copy as many bytes")
    print(f"{'rows':>5}{'bf16':>9}{'bnb':>9}{title:>9}{'ours':>9}{'bnb/ours':>10}{'ours/bf16':>10}{'copy':>6}")
    for row in rows:
        line = f"{row['rows']:>5}"
        for role in ("torch", "peer", beside, "ours"):
            line += cell(row[role], ".1f", 8) + ("*" if role in row["eager"] else " ")
        line += cell(row["speedup"], ".2f", 9) + cell(row["of_torch"], ".2f", 10) + cell(row["share"], ".0%", 6)
        print(f"{line}  {verdict(row)}".rstrip())
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
        if name == "torch int4" or (only_ours and name.startswith("bitsandbytes")):
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
        found: Found = {}
        try:
            measure_all(names, w, inputs, found, deadline)
        finally:
            for format in args.formats:
                rows = [make_row((n, k), format, m, found, speed) for m in args.rows]
                if rows := [row for row in rows if row["ours"] is not None or row["failed"]]:
                    show(rows)
                    result["rows"] += rows


def summary(result: dict[str, Any]) -> str:
    """How many targets there were, and those that were missed."""
    titled = [(f"{'×'.join(map(str, row['shape']))} {row['format']} M={row['rows']}", row) for row in result["rows"]]
    titled += [(row["what"], row) for name in ("host_rows", "conversions") for row in result.get(name, [])]
    targets = [(title, row[target["figure"]], target) for title, row in titled for target in row["targets"]]
    missed = [f"{title}: {said(target)}, is {value:.2f}" for title, value, target in targets if not target["met"]]
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
