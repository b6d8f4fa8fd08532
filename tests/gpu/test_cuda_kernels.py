"""The CUDA kernels beside the weight's own values in fp64: shapes, dtypes, blocks, and how they are called.

Uninitialized memory is NaN in these tests, so that whatever a kernel leaves out shows.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from products import UNIT, check, values
from torch import nn

from fewbits import kernels
from fewbits.formats import BLOCK_SIZES, QuantSpec
from fewbits.kernels import nvrtc
from fewbits.modules import QuantLinear, install
from fewbits.tensor import QuantTensor, linear, linear_t

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs Hopper"
)
SPECS = [QuantSpec("int8"), *(QuantSpec(f, b, d) for f in ("nf4", "fp4") for b in BLOCK_SIZES for d in (False, True))]


@pytest.fixture(autouse=True)
def poisoned(gpu):
    from fewbits.kernels import cuda_backend

    kernels.BACKENDS["cuda"] = cuda_backend
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def quantized(spec, n, k, device="cuda"):
    w = torch.randn(n, k, device=device) * torch.rand(n, 1, device=device) * 0.1
    w[torch.rand_like(w) < 0.001] *= 20
    return QuantTensor.quantize(w, spec)


def served(x, q, bias=None):
    """By the CUDA kernel itself: None where it leaves the call to another backend."""
    from fewbits.kernels import cuda_backend

    if q.spec.format == "int8":
        out = cuda_backend.linear_int8(x, q.packed, q.absmax, bias, 6.0)
    else:
        state = q.packed, q.absmax, q.nested_absmax, q.nested_offset
        out = cuda_backend.linear_4bit(x, *state, bias, q.spec.format, q.spec.block_size, list(q.shape))
    return None if out is NotImplemented else out


def biases(n, dtype):
    return random.choice([None, torch.randn(n, device="cuda", dtype=dtype), torch.randn(n, device="cuda")])


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_odd_shapes(spec, dtype):
    block = spec.block_size if spec.format != "int8" else 16
    for few in (1, 3, 37 if block < 256 else 5):  # few numbers of columns, since each compiles kernels
        k = max(block, 64 if spec.format != "int8" else 16) * few
        n, rows = random.randint(1, 300), random.randint(1, 16)
        q, x, bias = quantized(spec, n, k), torch.randn(rows, k, device="cuda", dtype=dtype), biases(n, dtype)
        out = served(x, q, bias)
        assert out is not None, (n, k, rows)
        check(out, x, q, bias)
        assert torch.equal(served(x, q, bias), out)  # the same bits each time


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("fp4", 32), QuantSpec("int8")], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (6144, 4096), (5120, 5120), (520, 11008), (300, 18944)])
def test_shapes_of_models(shape, spec):
    q = quantized(spec, *shape)
    for rows in (1, 2, 7, 8, 9, 16):
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        check(served(x, q), x, q, None)


@pytest.mark.parametrize("spec", [QuantSpec("nf4"), QuantSpec("nf4", 64, True), QuantSpec("int8")], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 17, 33, 64, 100, 128, 200, 300])
def test_any_number_of_rows_by_whichever_kernel(rows, spec):
    q = quantized(spec, 391, 1088)
    for dtype in UNIT:
        x, bias = torch.randn(rows, 1088, device="cuda", dtype=dtype), biases(391, dtype)
        check(linear(x, q, bias), x, q, bias)


@pytest.mark.parametrize("spec", [QuantSpec("nf4"), QuantSpec("fp4", 128, True), QuantSpec("int8")], ids=str)
def test_many_rows(spec):
    """Tiles by several blocks, by one, and a weight and x that end within one."""
    for rows, n, k in ((129, 130, 1088), (512, 4096, 4096), (700, 1000, 11008), (2048, 4096, 2560), (300, 300, 18944)):
        q = quantized(spec, n, k - k % spec.block_size if spec.format != "int8" else k)
        for dtype in UNIT:
            x, bias = torch.randn(rows, q.shape[1], device="cuda", dtype=dtype), biases(n, dtype)
            out = served(x, q, bias)
            check(out, x, q, bias)
            assert torch.equal(served(x, q, bias), out)


def test_clusters_that_run_at_once():
    from fewbits.kernels import cuda_shapes

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    counts = {blocks: cuda_shapes.most_clusters(blocks, 0) for blocks in (1, 2, 4, 8)}
    assert counts[1] == processors
    assert all(processors // 2 < blocks * count <= processors for blocks, count in counts.items()), counts


@pytest.mark.parametrize(
    ("way", "shape", "rows", "n", "k"),
    [
        *(("decode", shape, rows, 700, k) for shape in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2))
          for rows, k in ((1, 4096), (13, 5184))),
        ("decode", (7, 1), 5, 700, 5120), ("decode", (2, 1), 3, 20000, 4096), ("decode", (2, 1), 7, 30000, 1088),
        ("decode", (2, 1), 16, 12000, 4096), ("decode", (2, 1), 7, 9000, 8192), ("decode", (2, 1), 4, 9001, 2176),
        ("decode", (3, 1), 9, 5000, 4096), ("decode", (2, 2), 6, 700, 8192),
        *(("skinny", shape, rows, 1000, 4096 + 64)
          for shape in ((2, 1), (2, 2), (3, 2), (2, 4), (3, 4), (4, 1),
                        (2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 2, 2), (4, 1, 4))
          for rows in (19, 32)),
        *(("skinny", shape, 120, 500, 3008) for shape in ((2, 2), (3, 4), (2, 8), (2, 1, 2), (2, 2, 2))),
        *(("wide", shape, 250, 500, 4096 + 64)
          for shape in ((128, 2, 1), (128, 2, 2), (128, 2, 4), (128, 3, 1), (128, 3, 2), (128, 3, 4),
                        (256, 2, 1), (256, 2, 2), (256, 2, 4))),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_every_shape_of_blocks(way, shape, rows, n, k, dtype, monkeypatch):
    """Also those that the table would not take for so small a weight."""
    from fewbits.kernels import cuda_plans, cuda_shapes
    from fewbits.kernels.ways import use_way

    kind = {"decode": cuda_shapes.DecodeShape, "skinny": cuda_shapes.SkinnyShape, "wide": cuda_shapes.WideShape}[way]
    plan = getattr(cuda_plans, way)
    monkeypatch.setattr(cuda_shapes, f"{way}_shape", lambda *_: kind(*shape))
    plan.cache_clear()
    try:
        for spec in (
            QuantSpec("nf4", 64, True),
            QuantSpec("fp4", 64),
            *([QuantSpec("int8")] if way != "skinny" else ()),
        ):
            if spec.format == "int8" and shape in ((128, 3, 1), (128, 3, 2), (128, 3, 4)):
                continue  # of 4 bits alone
            q, x, bias = quantized(spec, n, k), torch.randn(rows, k, device="cuda", dtype=dtype), biases(n, dtype)
            with use_way(way):
                out = served(x, q, bias)
                check(out, x, q, bias)
                assert torch.equal(served(x, q, bias), out)
    finally:
        plan.cache_clear()


@pytest.mark.parametrize(("format", "nested", "dtype"), [
    ("nf4", True, torch.bfloat16), ("nf4", False, torch.bfloat16), ("fp4", False, torch.bfloat16),
    ("nf4", True, torch.float16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("shape", "most"), [((256, 2, 1), 0.015), ((128, 2, 2), 0.015), ((128, 3, 1), 0.03)])
@pytest.mark.parametrize("k", [1024, 1088])
def test_values_of_many_rows_are_those_that_dequantizing_rounds(format, nested, dtype, k, shape, most, monkeypatch):
    """Tables of nf4 hold halves: rounded to bf16, all are the same but for some in a hundred, and zero is zero.

    The scales of double quantization are the product and sum of fp32, which are fused here, and may differ by a bit.
    """
    from fewbits.kernels import cuda_plans, cuda_shapes
    from fewbits.kernels.ways import use_way

    monkeypatch.setattr(cuda_shapes, "wide_shape", lambda *_: cuda_shapes.WideShape(*shape))
    cuda_plans.wide.cache_clear()
    w = torch.randn(500, k, device="cuda")
    w[torch.rand_like(w) < 0.1] = 0
    q = QuantTensor.quantize(w, QuantSpec(format, 64, nested))
    try:
        with use_way("wide"):
            out = served(torch.eye(k, device="cuda", dtype=dtype), q).t()
    finally:
        cuda_plans.wide.cache_clear()
    exact = values(q)
    assert torch.equal(out == 0, exact == 0)
    differ = (out != exact.to(dtype)).double().mean()
    assert differ <= (most if (format, dtype) == ("nf4", torch.bfloat16) else 2e-4 * nested)


@pytest.mark.parametrize("columns", [0, 6, 16, 200])
@pytest.mark.parametrize("rows", [33, 60, 128, 300, 2048])
def test_rows_of_x_in_8_bits(rows, columns):
    for n, k in ((300, 1040), (4096, 4096)):
        q = quantized(QuantSpec("int8"), n, k)
        for dtype in UNIT:
            x, bias = torch.randn(rows, k, device="cuda", dtype=dtype), biases(n, dtype)
            x[:, torch.randperm(k, device="cuda")[:columns]] *= 6
            x[5] = 0
            out = served(x, q, bias)
            check(out, x, q, bias)
            assert torch.equal(served(x, q, bias), out)
            x[7, 9] = torch.nan
            again = served(x, q, bias)
            assert again[7].isnan().all()
            assert torch.equal(again[:7], out[:7])


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("int8")], ids=str)
def test_inputs_of_any_layout(spec):
    q = quantized(spec, 96, 256)
    wide = torch.randn(3, 5, 2, 300, device="cuda", dtype=torch.bfloat16)
    for x in (
        wide[..., :256],  # rows apart
        wide[..., 7:263],  # and beginning anywhere
        wide[:, :, 0, :256].transpose(0, 1),
        torch.randn(256, 4, device="cuda", dtype=torch.bfloat16).t(),  # columns first
        torch.randn(256, device="cuda", dtype=torch.bfloat16),
        torch.randn(1, 256, device="cuda", dtype=torch.bfloat16).expand(6, 256),
    ):
        check(linear(x, q), x, q, None)
    assert linear(torch.empty(0, 256, device="cuda", dtype=torch.bfloat16), q).shape == (0, 96)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
def test_dequantized_to_the_last_bit(spec, out_dtype):
    from fewbits.kernels import cuda_backend

    for n in (1, 7, 8, 63, 4096, 100_003, 1 << 20):
        q = QuantTensor.quantize(torch.randn(n, device="cuda"), spec)
        args = q.packed, q.absmax, q.nested_absmax, q.nested_offset, spec.format, spec.block_size, [n], out_dtype
        with kernels.use_backend("reference"):
            expected = kernels.ops.dequantize_4bit(*args)
        out = cuda_backend.dequantize_4bit(*args)
        assert torch.equal(out, expected)
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_quantized_to_the_last_bit(block, dtype):
    from fewbits.kernels import cuda_backend

    for n in (8, 64, 4096, 100_000, (1 << 20) + 8):
        w = torch.randn(n, device="cuda").to(dtype)
        w[: n // 2] *= torch.logspace(-30, 4, n // 2, device="cuda").to(dtype)
        if n > 1000:
            w[256:512] = 0
            w[512:1024] = 1e-40  # below the floor of a divisor
            w[1024:1040] = torch.linspace(-1, 1, 16, device="cuda").to(dtype)
            w[3000] = torch.nan
            w[3500] = torch.inf
        with kernels.use_backend("reference"):
            packed, absmax = kernels.ops.quantize_4bit(w, "nf4", block)
            expected = packed, absmax, *kernels.ops.quantize_absmax(absmax)
        packed, absmax = cuda_backend.quantize_4bit(w, "nf4", block)
        found = packed, absmax, *cuda_backend.quantize_absmax(absmax)
        for ours, reference in zip(found, expected, strict=True):
            assert torch.equal(ours.nan_to_num(-7.0), reference.nan_to_num(-7.0)), n


def test_every_bound_between_codes():
    """Values at, just below and just above each: a tie takes the lower code."""
    from fewbits.kernels import cuda_backend
    from fewbits.kernels.codebooks import decision_rule

    bounds = decision_rule("nf4", torch.device("cuda"))[0]
    edges = torch.cat(
        [bounds, torch.arange(-16, 17, device="cuda") / 16, torch.arange(-15, 17, device="cuda") / 16 - 1 / 32]
    )
    values = torch.cat([edges, edges.nextafter(edges.new_tensor(-2.0)), edges.nextafter(edges.new_tensor(2.0))]).clamp(
        -1, 1
    )
    w = torch.ones(len(values), 32, device="cuda")
    w[:, 5] = values
    with kernels.use_backend("reference"):
        expected = kernels.ops.quantize_4bit(w.view(-1), "nf4", 32)
    for ours, reference in zip(cuda_backend.quantize_4bit(w.view(-1), "nf4", 32), expected, strict=True):
        assert torch.equal(ours, reference)


def test_scales_that_are_all_the_same():
    from fewbits.kernels import cuda_backend

    for absmax in (torch.full((300,), 0.25, device="cuda"), torch.rand(70_001, device="cuda")):
        with kernels.use_backend("reference"):
            expected = kernels.ops.quantize_absmax(absmax)
        for ours, reference in zip(cuda_backend.quantize_absmax(absmax), expected, strict=True):
            assert torch.equal(ours, reference)


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("fp4", 32)], ids=str)
def test_rows_that_are_many_and_a_weight_in_pieces(spec, monkeypatch):
    from fewbits.kernels import pieces
    from fewbits.kernels.ways import use_way

    monkeypatch.setattr(pieces, "_scratch_bytes", lambda device, rows: 300 * 1024 * 2)
    q = quantized(spec, 1111, 1024)
    for dtype in UNIT:
        x, bias = torch.randn(2, 150, 1024, device="cuda", dtype=dtype), biases(1111, dtype)
        with use_way("dequantize"):
            check(served(x, q, bias), x, q, bias)
        g = torch.randn(3, 1111, device="cuda", dtype=dtype)
        w, back = values(q), linear_t(g, q)
        bound = (UNIT[dtype] * 4 + 1111 * 2.0**-23) * (g.double().abs() @ w.abs()) + 1e-6
        assert ((back.double() - g.double() @ w).abs() <= bound).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_of_an_embedding(spec):
    from fewbits.kernels import cuda_backend

    for n, k in ((5, 8), (3001, 200), (50_000, 1024)):
        q, ids = quantized(spec, n, k), torch.randint(n, (7, 301), device="cuda")
        for dtype in (torch.float32, *UNIT):
            with kernels.use_backend("reference"):
                expected = torch.nn.functional.embedding(ids, q.relabelled(dtype).dequantize())
            if spec.format == "int8":
                out = cuda_backend.embedding_int8(ids, q.packed, q.absmax, dtype)
            else:
                state = q.packed, q.absmax, q.nested_absmax, q.nested_offset
                out = cuda_backend.embedding_4bit(ids, *state, spec.format, spec.block_size, [n, k], dtype)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("nf4"), QuantSpec("int8")], ids=str)
def test_an_expert_of_a_stack(spec):
    """One index of three: what the kernels read begins somewhere within the stack's tensors."""
    q = QuantTensor.quantize(torch.randn(5, 96, 256, device="cuda"), spec)
    w = values(q)
    for expert in (0, 1, 4):
        for rows in (1, 9, 40, 100):
            x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
            one = q[expert]
            assert isinstance(one, QuantTensor)
            assert torch.equal(values(one), w[expert])
            check(served(x, one), x, one, None)


def test_zero_blocks_and_large_values():
    w = torch.randn(64, 256, device="cuda")
    w[:, :64] = 0
    w[3] = 0
    for spec in (QuantSpec("nf4"), QuantSpec("nf4", 64, True), QuantSpec("fp4"), QuantSpec("int8")):
        q = QuantTensor.quantize(w * 1e3, spec)
        x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
        check(served(x, q), x, q, None)


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("int8")], ids=str)
@pytest.mark.parametrize("rows", [1, 12, 40, 200])
def test_in_a_graph_several_times_in_a_row(spec, rows):
    """Launches that begin before the one before has ended, each needing its result."""
    layers = [quantized(spec, 512, 512) for _ in range(4)]
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)

    def run():
        h = x
        for _ in range(3):
            for q in layers:
                h = linear(h, q) + x
        return h

    with torch.no_grad():
        expected = run()
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        for _ in range(20):
            graph.replay()
        assert torch.equal(out, expected)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, run())


def test_from_several_threads():
    specs = QuantSpec("nf4", 64, True), QuantSpec("int8"), QuantSpec("nf4"), QuantSpec("fp4")
    layers = [quantized(spec, 256, 512) for spec in specs]
    inputs = [torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) for rows in (3, 40, 100, 300)]
    expected = [linear(x, q) for x, q in zip(inputs, layers, strict=True)]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for _ in range(200):
                if not torch.equal(linear(inputs[i], layers[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("int8")], ids=str)
def test_past_the_dispatcher_and_through_it(spec):
    """The same bits however it is called; gradients, tracing and transforms are not lost."""
    q = quantized(spec, 128, 256)
    module = nn.Linear(256, 128, device="cuda", dtype=torch.bfloat16)
    install(module, "weight", nn.Parameter(q, requires_grad=False))
    assert isinstance(module, QuantLinear)
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    assert kernels.undisturbed(x)
    assert not kernels.unrecorded(x, module.bias)  # the bias wants a gradient
    with torch.no_grad():
        assert kernels.unrecorded(x, module.bias)
        fast = module(x)
        assert torch.equal(torch.compile(module, fullgraph=True)(x), fast)
        batched = torch.func.vmap(lambda row: linear(row, q, module.bias))(x)
        torch.testing.assert_close(batched, fast, rtol=2e-2, atol=2e-2)
    assert torch.equal(module(x), fast)
    with torch.inference_mode():
        assert torch.equal(module(x), fast)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(module(x.float()), fast)
    x.requires_grad_()
    out = module(x)
    assert torch.equal(out, fast)
    out.sum().backward()
    expected = values(q).sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad.double(), expected, rtol=2e-2, atol=2e-1)
    assert module.bias.grad is not None


def test_the_operators_own_tests_with_this_backend():
    code = "import sys, pytest; from fewbits import kernels; kernels._load('cuda'); sys.exit(pytest.main())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "-k", "cuda-cuda")
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "tests/test_kernels.py"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_damaged_cache_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    from fewbits.kernels import cuda_backend, cuda_plans

    caches = nvrtc.kernel, cuda_plans.made, cuda_plans.decode, cuda_plans.decode_variant, cuda_backend._few

    q, x = quantized(QuantSpec("nf4"), 64, 64), torch.randn(1, 64, device="cuda", dtype=torch.bfloat16)
    try:
        for _ in range(2):
            for cache in caches:
                cache.cache_clear()
            check(served(x, q), x, q, None)
            (file,) = tmp_path.glob("decode-*.cubin")
            size = file.stat().st_size
            file.write_bytes(b"no machine code")
        assert size > 1000
    finally:
        for cache in caches:
            cache.cache_clear()


def test_the_product_of_a_module_beside_torch():
    """A whole small network, beside the same with dequantized weights."""
    plain = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().to(torch.bfloat16)
    for i in (0, 2):
        q = QuantTensor.quantize(plain[i].weight.detach(), QuantSpec("nf4", 64, True))
        plain[i].weight.data = q.dequantize()
        quant = nn.Linear(plain[i].in_features, plain[i].out_features, device="cuda", dtype=torch.bfloat16)
        install(quant, "weight", nn.Parameter(q, requires_grad=False))
        quant.bias = plain[i].bias
        x = torch.randn(5, plain[i].in_features, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(quant(x), F.linear(x, plain[i].weight, plain[i].bias), rtol=2e-2, atol=2e-2)
