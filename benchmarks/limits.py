"""What limits a quantized linear layer on a GPU: hardware counters of its kernels, by Nsight Compute (``ncu``).

    PYTHONPATH=src python benchmarks/limits.py
    PYTHONPATH=src python benchmarks/limits.py --products nf4-dq:4096x14336:1,bf16:4096x14336:1

A product is a format (or bf16, which is torch's), a weight's shape, and rows of x. Every counter is in per cent of what
the unit could do in the kernel's time, caches empty before it (ncu's way), clocks as they are.

Writes ``benchmarks/results/limits-cuda.json``. Needs ``ncu`` on the path, and a GPU whose counters may be read.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import facts

from fewbits.formats import QuantSpec
from fewbits.tensor import QuantTensor, linear

SPECS = {str(spec): spec for spec in (QuantSpec("nf4", double_quant=True), QuantSpec("nf4"), QuantSpec("int8"))}
SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
PRODUCTS = [
    *(f"nf4-dq:{shape}:{rows}" for rows in (1, 16, 64, 128, 2048) for shape in SHAPES),
    *(f"bf16:{shape}:{rows}" for rows in (1, 2048) for shape in SHAPES),
    *(f"int8:{shape}:{rows}" for rows in (1, 16, 2048) for shape in SHAPES[1:3]),
    *("nf4-dq:5120x5120:1", "nf4:5120x5120:1", "nf4-dq:2560x9728:16", "nf4:2560x9728:16"),
]
MARK = "spin_kernel"  # torch.cuda._sleep's, which stands before each product
TIME = "gpu__time_duration.sum"
COUNTERS = {
    "memory": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1, shared": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "ALU": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
}


def prepare(product: str) -> Any:
    """A call of a product."""
    format, shape, rows = product.split(":")
    n, k = map(int, shape.split("x"))
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    x = torch.randn(int(rows), k, device="cuda", dtype=torch.bfloat16)
    if format == "bf16":
        return lambda: F.linear(x, w)
    weight = QuantTensor.quantize(w, SPECS[format], known_finite=True)
    return lambda: linear(x, weight)


def run_products(products: list[str]) -> None:
    """What ncu looks at: each product once, after a mark."""
    with torch.no_grad():
        for product in products:
            call = prepare(product)
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def profile(products: list[str], ncu: str) -> list[list[dict[str, str]]]:
    """The kernels of each product, with their counters as ncu prints them."""
    metrics = ",".join([TIME, *COUNTERS.values()])
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", "--metrics",
               metrics, sys.executable, __file__, "--inside", "--products", ",".join(products)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        raise RuntimeError(f"ncu failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found: list[list[dict[str, str]]] = []
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines)))
    if units[TIME] not in ("ns", "nsecond", "us", "usecond"):
        raise RuntimeError(f"ncu gives times in {units[TIME]!r}")
    for kernel in kernels:
        if MARK in kernel["Kernel Name"]:
            found.append([])
        else:
            found[-1].append(kernel | {"scale": "1e-3" if units[TIME].startswith("n") else "1"})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--products", default=",".join(PRODUCTS), help="format:NxK:rows, by commas")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    products = args.products.split(",")
    if args.inside:
        run_products(products)
        return
    ncu = shutil.which("ncu")
    if ncu is None:
        parser.error("ncu is not on the path")
    print(f"{'':<24}{'kernel':<28}{'µs':>8}" + "".join(f"{name:>12}" for name in COUNTERS))
    rows = []
    for product, kernels in zip(products, profile(products, ncu), strict=True):
        for kernel in kernels:
            us = float(kernel[TIME].replace(",", "")) * float(kernel["scale"])
            counters = {name: float(kernel[metric]) for name, metric in COUNTERS.items()}
            rows.append({"product": product, "kernel": kernel["Kernel Name"], "us": us, "per_cent": counters})
            cells = "".join(f"{value:>12.0f}" for value in counters.values())
            print(f"{product:<24}{kernel['Kernel Name'][:26]:<28}{us:>8.1f}{cells}", flush=True)
    result = {**facts("cuda"), "rows": rows}
    (Path(__file__).parent / "results" / "limits-cuda.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
