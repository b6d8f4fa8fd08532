"""What only a GPU can show: capture in a CUDA graph, other streams, and the peak of GPU memory.

Without a GPU these are not collected; ``tests/gpu/run.sh`` runs them with all others.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewbits
from fewbits import homes, reader
from fewbits.formats import QuantSpec
from fewbits.kernels import cuda_plans
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.tensor import QuantTensor, embedding, linear

SPECS = (QuantSpec("nf4"), QuantSpec("fp4", 128, True), QuantSpec("int8", threshold=0.0), QuantSpec("int8"))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_captured_in_a_graph(spec, rows, gpu):
    q = QuantTensor.quantize(torch.randn(64, 128, device=gpu), spec)
    x = torch.randn(rows, 128, device=gpu, dtype=torch.bfloat16)
    ids = torch.randint(0, 64, (rows,), device=gpu)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm up, as torch asks
        for _ in range(3):
            linear(x, q), embedding(ids, q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, rows_out = linear(x, q), embedding(ids, q)
    for _ in range(3):
        x.copy_(torch.randn_like(x) * torch.randint(1, 9, (128,), device=gpu))
        ids.copy_(torch.randint(0, 64, (rows,), device=gpu))
        out.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out, linear(x, q), rtol=1e-2, atol=1e-2)
        assert torch.equal(rows_out, embedding(ids, q))


@pytest.mark.parametrize("rows", [1, 12, 40, 150])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tables_first_wanted_in_a_capture(spec, rows, gpu, monkeypatch):
    """They are there before the graph first runs, and lie in no graph's pool."""
    monkeypatch.setattr(cuda_plans, "_counters", {})
    q = QuantTensor.quantize(torch.randn(512, 1024, device=gpu), spec)
    x = torch.randn(rows, 1024, device=gpu, dtype=torch.bfloat16)
    weight = q.dequantize().double()
    torch.mm(x, x.mT)  # cuBLAS is not to be set up in a capture
    for cache in (codebook, decision_rule, cuda_plans.value_table, cuda_plans.pairs, cuda_plans.buckets):
        cache.cache_clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, q)
    eager = linear(x, q)
    graph.replay()
    truth = x.double() @ weight.mT
    for found in (eager, out):  # bf16 rounds by 2^-9, x in 8 bits by some 0.03 / 12^0.5 of its standard deviation
        assert (found - truth).norm() <= 0.02 * truth.norm()
    again = linear(x, q)
    del graph, out  # and its pool, which others then write to
    for _ in range(4):
        torch.full((1 << 20,), torch.nan, device=gpu)
    assert torch.equal(linear(x, q), again)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_on_another_stream(spec, gpu):
    q = QuantTensor.quantize(torch.randn(64, 128, device=gpu), spec)
    x = torch.randn(5, 128, device=gpu)
    expected = linear(x, q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        out = linear(x, q)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_peak_of_gpu_memory(format, gpu, tmp_path, monkeypatch):
    """The quantized model, and what one tensor takes while it is quantized: never the model in full precision."""
    width, layers = 2048, 48

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    fewbits.save(build(), tmp_path)
    ahead = 6 * 4 * width * width
    monkeypatch.setattr(reader, "READ_AHEAD", ahead)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = fewbits.load(build, tmp_path, format, skip_modules=[], device_map=gpu)
    final = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert final <= fewbits.summary(model).total.nbytes + 512 * (2 * layers + 8)  # the allocator rounds up to 512
    # in fp32, of one weight: itself, normalized, and two temporaries; the int64 of a table look-up for int8's codes
    assert peak <= final + ahead + 6 * 4 * width * width


def test_memory_that_cannot_be_pinned(gpu, tmp_path, monkeypatch):
    """Said, and slower, but right."""
    torch.save({f"{i}.weight": torch.randn(256, 256) for i in range(4)}, tmp_path / "m.pt")

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))

    monkeypatch.setattr(homes, "pin", lambda buffer: False)
    with pytest.warns(fewbits.FewbitsWarning, match="pinned"):
        spread = fewbits.load(build, tmp_path / "m.pt", "nf4", device_map={"": gpu, "[12]": "cpu"}, offload="stream")
    whole = fewbits.load(build, tmp_path / "m.pt", "nf4", device_map=gpu)
    x = torch.randn(3, 256, device=gpu)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(spread(x), whole(x))
