"""Memory is a feature: what loading and quantizing take at their peak, measured in a fresh process.

Anonymous memory is counted, as Linux reports it; pages of files that the system caches are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits import place
from fewbits.kernels import backend_for, from_files

MB = 1 << 20
LAYERS, WIDTH = 32, 1024  # 32 weights of 4 MiB in fp32: 128 MiB
AHEAD = 8 * MB

PROGRAM = """
import json, sys, threading, torch, fewbits
from torch import nn
from fewbits import reader

torch.set_num_threads(1)
what, path, layers, width, ahead = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
reader.READ_AHEAD = ahead

def build():
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

# what the first call ever brings in (code, tables, threads) is not what is measured
fewbits.quantize(nn.Linear(64, 64), "nf4", double_quant=True)
fewbits.quantize(nn.Linear(64, 64), "int8")
torch.cuda.is_available()  # the driver, where there is one
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


def _measure(what: str, weights: Path, **environment: str) -> dict[str, int]:
    arguments = [sys.executable, "-c", PROGRAM, what, weights, LAYERS, WIDTH, AHEAD]
    done = subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, check=False, timeout=200,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What quantizing a weight on a CPU takes beside it and the result, in sizes of the weight, which is one piece there:
# int8 the fp16 values (1/2), those scaled (1, in fp32) and those rounded (1); nf4 less, the scaled values (1), and its
# codes and comparisons of a byte each (1/4 + 1/4)
WHILE_QUANTIZED = 5 * (4 * WIDTH * WIDTH) // 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_loading_holds_the_result_and_what_is_read_ahead(format, weights):
    # as glibc begins, but not as it goes on: every larger block goes back to the system at once, so that what the
    # process has is what is held
    found = _measure(f"load-{format}", weights, MALLOC_MMAP_THRESHOLD_=str(128 << 10))
    # the last MiB is for objects, the stacks of threads, and the half that a thread reads into
    assert found["after"] <= found["model"] + MB
    if from_files() is not None:  # a huge page may be there as a whole before it is needed
        assert found["peak"] <= found["model"] + 2 * MB + MB
    # the tensor in hand counts to what is read ahead
    assert found["peak"] <= found["model"] + AHEAD + WHILE_QUANTIZED + MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_loading_never_holds_the_model_in_full_precision(format, weights):
    found = _measure(f"load-{format}", weights)
    one = 4 * WIDTH * WIDTH
    # besides, what glibc keeps: up to what quantizing took for all that was worked through since it was last trimmed
    assert found["peak"] <= found["model"] + AHEAD + WHILE_QUANTIZED * (1 + place._HELD // one) + MB
    assert found["peak"] < LAYERS * one
    assert found["after"] <= found["model"] + 8 * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_in_place_makes_no_second_copy(format, weights):
    found = _measure(f"quantize-{format}", weights)
    one = 4 * WIDTH * WIDTH
    assert found["peak"] <= 3 * one + 16 * MB
    assert found["after"] <= found["model"] - LAYERS * one + 8 * MB  # the full-precision weights are gone


LARGE = """
import json, torch
from fewbits.kernels import backend_for
from fewbits.tensor import QuantTensor

def asked_for(tensor):
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    with open("/proc/self/smaps") as smaps:
        for first, *rest in map(str.split, smaps):
            if "-" in first:
                begin, end = (int(part, 16) for part in first.split("-"))
                inside = begin <= address < end
            elif inside and first == "VmFlags:":
                return "hg" in rest

w = torch.randn(4096, 10240).bfloat16()
q = QuantTensor.quantize(w, "nf4")
found = [asked_for(w), asked_for(q.packed), asked_for(q.dequantize())]
print(json.dumps(found if backend_for("cpu") == "cpu" else None))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="a kernel without huge pages"
)
def test_large_results_are_asked_for_in_huge_pages():
    """In a process of its own, where no memory was asked for so before."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ([False, True, True] if backend_for("cpu") == "cpu" else None)
