"""The CPU half of ``linear.py``: a quantized linear layer beside bitsandbytes and torch's bf16 and fp32, in turn.

    python benchmarks/linear.py --device cpu
    python benchmarks/linear.py --device cpu --rows 1 16 --formats nf4 --shapes 4096x4096
    FEWBITS_CPU=avx2 python benchmarks/linear.py --device cpu --levels

All contenders take turns within a row of the table, each over weights that no cache holds, so that what else the
machine does meets all alike, and in a new order each time, since a call is slower after some than after others. A ratio
is the median of those of single turns, so that minutes in which the machine is slow weigh on both sides. ``read`` is
torch's sum over a weight's codes and scales in the same loop, the physical limit of one row of x. ``--levels`` names
instruction sets that are forced in processes of their own, where torch's products have the same, in turn with the best
one (by default avx2 and portable; none: no others).

Conversions are given as bytes of bf16 a second and core (quantizing, by one core alone and by all, who share the
memory) and as a share of a copy's speed (dequantizing); both make new tensors.

Writes ``benchmarks/results/linear-cpu.json``, or ``linear-cpu-amx.json`` where that is the instruction set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import facts
from times import Times
from torch import Tensor

from fewbits import kernels
from fewbits.formats import QuantSpec, quantized_bytes
from fewbits.tensor import QuantTensor, linear

DTYPE = torch.bfloat16
ROTATE = 320 << 20  # bytes of weights that are taken in turn
SPECS = {"nf4": QuantSpec("nf4"), "nf4-dq": QuantSpec("nf4", double_quant=True), "int8": QuantSpec("int8")}
SHAPES = ((4096, 4096), (11008, 4096))
ROWS = (1, 4, 16, 64, 256)
LEVELS = ("avx2", "portable")
LEVEL_ROWS = (1, 256)
# times of bitsandbytes' speed, at least, by rows of x; and the shares of a plain read and of a copy
SPEEDUPS = {
    "nf4": {1: 1.15, 4: 1.15, 16: 1.15, 64: 1.2, 256: 1.2},
    "nf4-dq": {1: 1.15, 4: 1.15, 16: 1.15, 64: 1.2, 256: 1.2},
    "int8": {1: 1.5, 4: 3.0, 16: 3.0, 64: 2.0, 256: 1.6},
}
READ, COPY, DOUBLE = 0.85, 0.7, 1.05
OF_BEST = {"avx2": {1: 0.6, 256: 0.3}}  # of the best level's speed in nf4
# torch's own products are held to the same instructions
ALIKE = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
QUANTIZED = {"nf4-dq": 10e9, "int8": 15e9}  # bytes of bf16 a second and core

Call = Callable[[int], object]


def race(calls: dict[str, Call], seconds: float, rounds: int = 7) -> Times:
    """All calls in turn; a call gets a counter, by which it changes weights."""
    times = Times({name: [] for name in calls})
    turn, order = list(calls.items()), random.Random(0)
    for call in calls.values():
        call(0)
    end, i = time.perf_counter() + seconds, 0
    while i < rounds or time.perf_counter() < end:
        order.shuffle(turn)
        for name, call in turn:
            start = time.perf_counter()
            for j in range(3):
                call(3 * i + j)
            times[name].append((time.perf_counter() - start) / 3 * 1e6)
        i += 1
    return times


def turns(nbytes: int) -> int:
    return max(2, min(40, ROTATE // nbytes))


def whole_words(part: Tensor) -> Tensor:
    """The bytes of a tensor as int64 numbers, but for up to seven."""
    data = part.view(-1).view(torch.uint8)
    return data[: len(data) // 8 * 8].view(torch.int64)


def peer_layer(name: str, w: Tensor) -> torch.nn.Module:
    import bitsandbytes as bnb

    n, k = w.shape
    if name == "int8":
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=DTYPE, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=name == "nf4-dq")
    return layer.to("cpu").eval()  # which quantizes


def at_level(name: str, call: Call) -> Call:
    """The call on another instruction set."""
    from fewbits.kernels import cpu_backend

    def run(i: int) -> object:
        with cpu_backend.use_level(name):
            return call(i)

    return run


def products(
    shape: tuple[int, int], names: list[str], rows: list[int], seconds: float, forced: str | None = None
) -> list[dict[str, Any]]:
    """A row of the table for each format and number of rows, judged.

    forced: an instruction set, on which ours are, beside ``best``; then there are no peers.
    """
    n, k = shape
    peers = forced is None
    bf16 = [torch.randn(n, k, dtype=DTYPE) * 0.02 for _ in range(turns(n * k * 2))]
    fp32 = [w.float() for w in bf16[: turns(n * k * 4)]]
    found = []
    for name in names:
        count = turns(quantized_bytes(SPECS[name], shape))
        ours = [QuantTensor.quantize(bf16[i % len(bf16)], SPECS[name]) for i in range(count)]
        plain = [] if name != "nf4-dq" else [QuantTensor.quantize(w, SPECS["nf4"]) for w in bf16]
        layers = [peer_layer(name, bf16[i % len(bf16)]) for i in range(count)] if peers else []
        parts = [[whole_words(part) for part in (q.packed, q.absmax)] for q in ours]
        for m in rows:
            x = torch.randn(m, k, dtype=DTYPE)
            if name == "int8":  # six columns with outliers
                x[:, :: k // 6][:, :6] *= 8
            wide = x.float()
            calls: dict[str, Call] = {
                "bf16": lambda i, x=x: F.linear(x, bf16[i % len(bf16)]),
                "fp32": lambda i, x=wide: F.linear(x, fp32[i % len(fp32)]),
                "ours": lambda i, x=x, ours=ours: linear(x, ours[i % len(ours)]),
            }
            if name != "int8":
                calls["ours_fp32"] = lambda i, x=wide, ours=ours: linear(x, ours[(i + len(ours) // 3) % len(ours)])
            if plain:
                calls["ours_plain"] = lambda i, x=x, plain=plain: linear(x, plain[i % len(plain)])
            if peers:
                calls["peer"] = lambda i, x=x, layers=layers: layers[i % len(layers)](x)
                for layer in layers:
                    layer(x)  # a peer may repack a weight when it is first used
            if m == 1:
                # a third of the turn behind the others: the weight that was used just now may be in a cache
                calls["read"] = lambda i, parts=parts: [p.sum() for p in parts[(i - len(parts) // 3) % len(parts)]]
            if forced is not None:
                calls["best"] = calls["ours"]
                calls |= {who: at_level(forced, calls[who]) for who in ("ours", "ours_fp32") if who in calls}
            with torch.inference_mode():
                times = race(calls, seconds)
            row = {"shape": list(shape), "format": name, "rows": m, "us": times.medians()}
            found.append(row | {"targets": judged_product(name, m, times, forced)})
    return found


def on_one_core(call: Call) -> Call:
    def run(i: int) -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call(i)
        finally:
            torch.set_num_threads(threads)

    return run


def conversions(seconds: float, peers: bool) -> list[dict[str, Any]]:
    import bitsandbytes.functional as bf

    n, k = 4096, 4096
    ws = [torch.randn(n, k, dtype=DTYPE) * 0.02 for _ in range(turns(n * k * 2))]
    found = []
    for name in ("nf4-dq", "int8"):
        spec = SPECS[name]
        qs = [QuantTensor.quantize(w, spec) for w in ws]
        calls: dict[str, Call] = {
            "quantize": lambda i, spec=spec: QuantTensor.quantize(ws[i % len(ws)], spec),
            "dequantize": lambda i, qs=qs: qs[i % len(qs)].dequantize(),
            "copy": lambda i: ws[i % len(ws)].clone(),
        }
        if peers and name != "int8":
            packed, state = bf.quantize_4bit(ws[0], quant_type="nf4", compress_statistics=True)
            calls["peer_quantize"] = lambda i: bf.quantize_4bit(
                ws[i % len(ws)], quant_type="nf4", compress_statistics=True
            )
            calls["peer_dequantize"] = lambda i, packed=packed, state=state: bf.dequantize_4bit(packed, state)
        elif peers:
            calls["peer_quantize"] = lambda i: bf.int8_vectorwise_quant(ws[i % len(ws)])
        times = race(calls, seconds)
        # by itself: meanwhile the other threads go to sleep, and the next call would wait until they are awake
        times |= race({"quantize_on_one_core": on_one_core(calls["quantize"])}, seconds / len(calls))
        row = {"format": name, "bytes": n * k * 2, "us": times.medians()}
        found.append(row | {"targets": judged_conversion(name, n * k * 2, times)})
    return found


# ------------------------------------------------------------------------------------------------- against the targets


def _target(what: str, found: float, bound: float, *, least: bool) -> dict[str, Any]:
    return {"what": what, "found": found, "bound": bound, "met": found >= bound if least else found <= bound}


def judged_product(name: str, m: int, times: Times, forced: str | None) -> list[dict[str, Any]]:
    wide = "ours_fp32" if "ours_fp32" in times else "ours"
    if forced is not None:
        targets = []
        if forced in OF_BEST:
            targets.append(_target("ours / fp32", times.ratio(wide, "fp32"), 1.0, least=False))
            if (bound := OF_BEST[forced].get(m)) is not None:
                targets.append(_target("of the best", times.ratio("best", "ours"), bound, least=True))
        return targets
    targets = [
        _target("peer / ours", times.ratio("peer", "ours"), SPEEDUPS[name].get(m, 0.0), least=True),
        _target("ours / bf16", times.ratio("ours", "bf16"), 1.0, least=False),
        _target("ours / fp32", times.ratio(wide, "fp32"), 1.0, least=False),
    ]
    if m == 1 and name == "nf4":
        targets.append(_target("of a plain read", times.ratio("read", "ours"), READ, least=True))
    if "ours_plain" in times:
        targets.append(_target("double quantization", times.ratio("ours", "ours_plain"), DOUBLE, least=False))
    return targets


def judged_conversion(name: str, nbytes: int, times: Times) -> list[dict[str, Any]]:
    us = times.medians()
    alone = nbytes / us["quantize_on_one_core"] * 1e6
    each = nbytes / us["quantize"] * 1e6 / torch.get_num_threads()
    return [
        _target("quantized, bytes/s on one core", alone, QUANTIZED[name], least=True),
        _target("by each of all cores", each, QUANTIZED[name], least=True),
        _target("dequantizing, of a copy's speed", times.ratio("copy", "dequantize"), COPY, least=True),
    ]


def show(row: dict[str, Any]) -> None:
    us = row["us"]
    what = f"{'×'.join(map(str, row.get('shape', ())))} {row['format']:<7}{row.get('rows', ''):>4}"
    times = " ".join(f"{name} {value:.0f}" for name, value in us.items())
    verdicts = ", ".join(
        f"{t['what']} {t['found']:.3g} ({'ok' if t['met'] else 'MISSED'} {t['bound']:g})"
        for t in row.get("targets", ())
    )
    print(f"{what}  {times}  |  {verdicts}", flush=True)


# ------------------------------------------------------------------------------------------------- the run


def level() -> str:
    """The instruction set of the native kernels; "reference" without them."""
    if kernels.backend_for("cpu") != "cpu":
        return "reference"
    from fewbits.kernels import cpu_backend

    return str(cpu_backend.level())


def in_a_process(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """nf4 on an instruction set that is forced, where torch's products have the same."""
    command = [sys.executable, str(Path(__file__).with_name("linear.py")), "--device", "cpu", "--child", name]
    command += ["--formats", "nf4", "--rows", *map(str, LEVEL_ROWS), "--shapes", args.shapes[0]]
    command += ["--seconds", str(args.seconds)]
    environment = {**os.environ, **ALIKE.get(name, {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        return []
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def keep(result: dict[str, Any], part: str, rows: list[dict[str, Any]], *, levels: bool = False) -> None:
    """Show rows and write the result with them, so that a run that is ended leaves what it has measured."""
    for row in rows:
        if levels:
            print(f"{part}: ", end="")
        show(row)
    within = result["levels"] if levels else result
    within[part] = within.get(part, []) + rows
    name = "linear-cpu-amx.json" if result["level"] == "amx" else "linear-cpu.json"
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="linear.py --device cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--formats", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--levels", nargs="*", default=LEVELS, help="instruction sets to force as well")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table, at least")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    shapes = [(int(n), int(k)) for n, k in (text.split("x") for text in args.shapes)]
    if args.child:
        print(json.dumps(products(shapes[0], args.formats, list(args.rows), args.seconds, args.child)))
        return
    print(f"{facts('cpu')['device']}, {threads} threads, {level()}; µs a call")
    result = {**facts("cpu"), "level": level(), "rows": [], "levels": {}, "conversions": []}
    for shape in shapes:
        keep(result, "rows", products(shape, args.formats, list(args.rows), args.seconds))
    keep(result, "conversions", conversions(args.seconds, peers=True))
    for name in args.levels:
        keep(result, name, in_a_process(name, args), levels=True)
    rows = itertools.chain(result["rows"], result["conversions"], *result["levels"].values())
    targets = [target for row in rows for target in row["targets"]]
    print(f"{sum(not t['met'] for t in targets)} of {len(targets)} bounds missed")
