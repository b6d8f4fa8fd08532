"""One linear layer: fewbits beside bitsandbytes and torch's own, in one run, in turn, weights rotated past the cache.

    python benchmarks/linear.py
    PYTHONPATH=src:.peers python benchmarks/linear.py --device cuda

``benchmarks/linear_cpu.py`` and ``benchmarks/linear_cuda.py`` say what is measured, and with which options. Each row is
put beside its targets. Writes ``benchmarks/results/linear-<device>.json``.
"""

from __future__ import annotations

import argparse

import torch


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # -h goes to the half that is asked for
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args, others = parser.parse_known_args()
    if args.device == "cpu":
        import linear_cpu

        linear_cpu.main(others)
    else:
        import linear_cuda

        linear_cuda.main(others)


if __name__ == "__main__":
    main()
