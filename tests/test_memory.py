"""Memory is a feature: what loading and quantizing take at their peak, measured in a fresh process.

Anonymous memory is counted, as Linux reports it; pages of files that the system caches are not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits import place

MB = 1 << 20
LAYERS, WIDTH = 24, 1024  # 24 weights of 4 MiB in fp32: 96 MiB
AHEAD = 8 * MB

PROGRAM = """
import json, sys, threading, torch, fewbits
from torch import nn
from fewbits import checkpoint

torch.set_num_threads(1)
what, path, layers, width, ahead = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
checkpoint.READ_AHEAD = ahead

def build():
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

# what the first call ever brings in (code, tables, threads) is not what is measured
fewbits.quantize(nn.Linear(64, 64), "nf4", double_quant=True)
fewbits.quantize(nn.Linear(64, 64), "int8")
if what.startswith("quantize"):
    model = build()
    for p in model.parameters():
        nn.init.normal_(p)
start, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous() - start)

thread = threading.Thread(target=watch)
thread.start()
format = what.split("-")[1]
if what.startswith("quantize"):
    fewbits.quantize(model, format, skip_modules=[])
else:
    model = fewbits.load(build, path, format, skip_modules=[], device_map="cpu")
done.set()
thread.join()
print(json.dumps({"peak": peak, "after": anonymous() - start, "model": fewbits.summary(model).total.nbytes}))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file({f"{i}.weight": torch.randn(WIDTH, WIDTH) for i in range(LAYERS)}, folder / "model.safetensors")
    return folder


def _measure(what: str, weights: Path) -> dict[str, int]:
    arguments = [sys.executable, "-c", PROGRAM, what, weights, LAYERS, WIDTH, AHEAD]
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_loading_never_holds_the_model_in_full_precision(format, weights):
    found = _measure(f"load-{format}", weights)
    one = 4 * WIDTH * WIDTH
    # what is read ahead, the tensor in hand, its pieces while it is quantized (about as much again), and what is freed
    # but not yet given back to the system; a model that was ever held in full precision would add 96 MiB
    assert found["peak"] <= found["model"] + AHEAD + 4 * one + place._HELD
    assert found["peak"] < LAYERS * one
    assert found["after"] <= found["model"] + 8 * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_in_place_makes_no_second_copy(format, weights):
    found = _measure(f"quantize-{format}", weights)
    one = 4 * WIDTH * WIDTH
    assert found["peak"] <= 3 * one + 16 * MB
    assert found["after"] <= found["model"] - LAYERS * one + 8 * MB  # the full-precision weights are gone
