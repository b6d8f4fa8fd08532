"""``examples/gpt2_xl.py`` at its full size, written down as ``benchmarks/results/gpt2_xl-<cpu|cuda>.json``.

Takes the options of the example (``--cache FOLDER`` keeps the 6.6 GB of random weights for the next run).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from machine import facts

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from gpt2_xl import main  # noqa: E402 - found by the line above

if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = ROOT / "benchmarks" / "results" / f"gpt2_xl-{device}.json"
    main(["--device", device, "--json", str(results), *sys.argv[1:]])
    results.write_text(json.dumps({**json.loads(results.read_text()), **facts(device)}, indent=1) + "\n")
