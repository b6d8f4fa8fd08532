"""One linear layer: fewbits beside bitsandbytes and torch's own, in one run, in turn, weights rotated past the cache.

    python benchmarks/linear.py
    PYTHONPATH=src:.peers python benchmarks/linear.py --device cuda    # benchmarks/linear_cuda.py, with its options

Prints microseconds a call for each, the ratio fewbits / bitsandbytes, and the least time that reading the packed
weight once would take at the speed of a plain read measured in the same run. Absolute times on a shared CPU are noise;
the ratios are what to look at. Writes ``benchmarks/results/linear-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import facts
from torch import Tensor

from fewbits.formats import QuantSpec, quantized_bytes
from fewbits.tensor import QuantTensor, linear

DTYPE = torch.bfloat16
ROTATE = 480 << 20  # bytes of packed weights that are taken in turn


def race(calls: dict[str, Callable[[int], object]], weights: int, rounds: int, seconds: float) -> dict[str, float]:
    """Median microseconds of each call, taken in turn: ``call(i)`` with a counter that rotates the weights."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for i in range(weights):  # every one: a peer may repack a weight when it is first used
            call(i)
    end, i = time.perf_counter() + seconds, 0
    while i < rounds or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            for j in range(4):
                call(4 * i + j)
            times[name].append((time.perf_counter() - start) / 4 * 1e6)
        i += 1
    return {name: statistics.median(values) for name, values in times.items()}


def read_speed() -> float:
    """Bytes a second of a plain sum."""
    source = torch.ones(1 << 26)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        source.sum()
        best = min(best, time.perf_counter() - start)
    return source.nbytes / best


def peer_layers(format: str, weights: list[Tensor]) -> list[torch.nn.Module]:
    import bitsandbytes as bnb

    layers = []
    for w in weights:
        n, k = w.shape
        if format == "int8":
            layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=DTYPE, quant_type=format)
            layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type=format)
        layers.append(layer.to("cpu").eval())  # which quantizes
    return layers


def on_cpu(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="linear.py --device cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 16, 512))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table, at least")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    n, k = args.shape
    speed = read_speed()
    rows = []
    print(f"{n}×{k}, {DTYPE}, a plain read: {speed / 1e9:.0f} GB/s; µs a call")
    print(f"{'':8}{'rows':>6}{'torch bf16':>12}{'bitsandbytes':>14}{'fewbits':>10}{'ours/peer':>11}{'limit':>8}")
    for format in ("nf4", "int8"):
        nbytes = quantized_bytes(QuantSpec(format), (n, k))
        count = max(2, min(32, ROTATE // nbytes))
        weights = [torch.randn(n, k, dtype=DTYPE) * 0.02 for _ in range(count)]
        ours = [QuantTensor.quantize(w, format) for w in weights]
        peers = peer_layers(format, weights)
        for m in args.rows:
            x = torch.randn(m, k, dtype=DTYPE)
            with torch.no_grad():
                times = race(
                    {
                        "torch": lambda i: F.linear(x, weights[i % len(weights)]),  # noqa: B023 - called at once
                        "peer": lambda i: peers[i % len(peers)](x),  # noqa: B023
                        "ours": lambda i: linear(x, ours[i % len(ours)]),  # noqa: B023
                    },
                    count,
                    3,
                    args.seconds,
                )
            limit = nbytes / speed * 1e6
            rows.append({"format": format, "rows": m, **times, "limit": limit})
            print(
                f"{format:8}{m:>6}{times['torch']:>12.0f}{times['peer']:>14.0f}{times['ours']:>10.0f}"
                f"{times['ours'] / times['peer']:>11.2f}{limit:>8.1f}",
                flush=True,
            )
    result = {**facts("cpu"), "shape": [n, k], "bytes_per_second": speed, "rows": rows}
    target = Path(__file__).parent / "results" / "linear-cpu.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # -h goes to the half that is asked for
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args, others = parser.parse_known_args()
    if args.device == "cpu":
        on_cpu(others)
    else:
        import linear_cuda

        linear_cuda.main(others)


if __name__ == "__main__":
    main()
