"""The operators: against fp64, beside bitsandbytes, their gradients, and under torch.compile, on every backend."""

from __future__ import annotations

import contextlib

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
import torch.utils._python_dispatch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import kernels
from fewbits.errors import ConfigError
from fewbits.formats import QuantSpec
from fewbits.tensor import QuantTensor, embedding, linear, linear_t

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = (
    QuantSpec("nf4"),
    QuantSpec("nf4", 32, True),
    QuantSpec("fp4", 128),
    QuantSpec("fp4", 64, True),
    QuantSpec("int8", threshold=0.0),
    QuantSpec("int8"),
)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=sorted({"cpu", *kernels.BACKENDS}), autouse=True)
def backend(request):
    if request.param == "cpu" and "device" in request.fixturenames and request.getfixturevalue("device") != "cpu":
        pytest.skip("these kernels are for CPUs")
    with kernels.use_backend(request.param):
        yield request.param


def _case(spec, shape, dtype, device, rows=5):
    n, k = shape
    w = torch.randn(n, k, device=device)
    x = torch.randn(rows, k, device=device)
    if spec.format == "int8" and spec.threshold and k > 3:
        x[:, k // 3] *= 20  # an outlier column
    bias = torch.randn(n, device=device)
    return QuantTensor.quantize(w.to(dtype), spec), x.to(dtype), bias.to(dtype)


def _int8_bound(x, q, threshold):
    """What the int8 product may differ from an exact one by: half a step of x's second digit, times |w|, by column."""
    x = x.double()
    outlier = (x.abs() >= threshold).any(0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    inner = x.masked_fill(outlier, 0)
    half_step = inner.abs().amax(1, keepdim=True) / 127 / 254 * 0.5 * (1 + 1e-2)
    return half_step * (q.dequantize().double().abs() * ~outlier).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear_against_fp64(spec, dtype, device):
    for shape in ((64, 128), (33, 70), (1, 1), (1, 257), (130, 96)):
        q, x, bias = _case(spec, shape, dtype, device)
        exact = x.double() @ q.to(torch.float32).dequantize().double().t() + bias.double()
        out = linear(x, q, bias)
        assert out.dtype == dtype
        magnitude = x.double().abs() @ q.dequantize().double().abs().t() + bias.double().abs()
        # one rounding to the output's dtype, W's to that of an accelerator's products, and those of fp32 sums
        bound = UNIT[dtype] * (2 * exact.abs() + 2 * magnitude) + 2.0**-23 * shape[1] ** 0.5 * magnitude
        if spec.format == "int8":
            bound = bound + _int8_bound(x, q, spec.threshold) + 2.0**-11 * magnitude
        assert bool(((out.double() - exact).abs() <= bound).all()), shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_the_dequantized_weight(spec, dtype, device):
    for shape in ((64, 128), (33, 70)):
        q, x, bias = _case(spec, shape, dtype, device)
        x.requires_grad_()
        bias.requires_grad_()
        out = linear(x, q, bias)
        g = torch.randn_like(out)
        out.backward(g)
        w = q.to(torch.float32).dequantize().double()
        exact, magnitude = g.double() @ w, g.double().abs() @ w.abs()
        assert x.grad.dtype == bias.grad.dtype == dtype
        assert bool(((x.grad.double() - exact).abs() <= UNIT[dtype] * 4 * magnitude + 2.0**-20 * magnitude).all())
        limit = UNIT[dtype] * 4 * g.double().abs().sum(0)
        assert bool(((bias.grad.double() - g.double().sum(0)).abs() <= limit).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_any_leading_shape(spec, device):
    q, _, bias = _case(spec, (33, 64), torch.float32, device)
    for lead in ((), (1,), (2, 3), (2, 1, 4), (0,), (2, 0)):
        x = torch.randn(*lead, 64, device=device, requires_grad=True)
        out = linear(x, q, bias)
        assert out.shape == (*lead, 33)
        out.sum().backward()
        assert x.grad.shape == x.shape
        rows = linear(x.detach().reshape(-1, 64), q, bias).view(*lead, 33)
        if spec.format != "int8" or spec.threshold == 0:  # an outlier column depends on all rows
            torch.testing.assert_close(out.detach(), rows, rtol=1e-5, atol=1e-5)  # sums in another order
    strided = torch.randn(64, 9, device=device).t()
    torch.testing.assert_close(linear(strided, q, bias), linear(strided.contiguous(), q, bias), rtol=1e-5, atol=1e-5)


def test_double_backward(device):
    q, x, _ = _case(QuantSpec("nf4"), (32, 64), torch.float32, device)
    x.requires_grad_()
    (g,) = torch.autograd.grad(linear(x, q).pow(2).sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), x)
    w = q.dequantize()
    torch.testing.assert_close(gg, (2 * w.t() @ w).sum(0).expand_as(gg), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_outputs_are_as_close_as_those_of_bitsandbytes(format, dtype, rows, device):
    """The error against fp64 over many outputs is at most bitsandbytes' own on the same bytes."""
    n, k = 256, 512
    w, x = torch.randn(n, k, device=device).to(dtype), torch.randn(rows, k, device=device).to(dtype)
    x[:, 100] *= 12
    if format == "int8":
        peer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        peer.weight = bnb.nn.Int8Params(w.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        peer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type=format)
        peer.weight = bnb.nn.Params4bit(w.cpu(), requires_grad=False, quant_type=format)
    peer = peer.to(device).eval()
    if format == "fp4" and device == "cuda":
        q = QuantTensor.quantize(w, format)
        peer.weight.data, peer.weight.quant_state.absmax = q.packed.view(-1, 1), q.absmax.flatten()
    q = QuantTensor.quantize(w, QuantSpec(format))
    exact = x.double() @ q.to(torch.float32).dequantize().double().t()
    ours, theirs = (linear(x, q).double() - exact).norm(), (peer(x).double() - exact).norm()
    # both round the same way where they do the same arithmetic; then only the order of fp32 sums differs. In the int8
    # product x has 8 bits there and here two digits of them, or 16 bits, or with many rows on a CPU or Hopper 8 as well
    eight_bits = format == "int8" and rows == 64 and kernels.backend_for(device) in ("cpu", "cuda")
    assert ours <= theirs * (0.5 if format == "int8" and not eight_bits else 1.02)


@given(st.integers(1, 40), st.integers(1, 150), st.integers(0, 20), st.sampled_from(SPECS), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_shapes(n, k, rows, spec, seed):
    generator = torch.Generator().manual_seed(seed)
    q = QuantTensor.quantize(torch.randn(n, k, generator=generator), spec)
    x, g = torch.randn(rows, k, generator=generator), torch.randn(rows, n, generator=generator)
    w = q.dequantize().double()
    error = (linear(x, q).double() - x.double() @ w.t()).abs()
    bound = 2.0**-21 * (x.double().abs() @ w.abs().t())
    if spec.format == "int8" and rows:
        bound = bound + _int8_bound(x, q, spec.threshold)
    assert bool((error <= bound + 1e-30).all())
    error = (linear_t(g, q).double() - g.double() @ w).abs()
    assert bool((error <= 2.0**-21 * (g.double().abs() @ w.abs()) + 1e-30).all())
    ids = torch.randint(0, n, (3, rows), generator=generator)
    # the scale of an int8 row is divided by 127 before or after the product: one unit in the last place
    torch.testing.assert_close(embedding(ids, q), q.dequantize()[ids], rtol=2.0**-22, atol=0)


def test_outlier_columns_are_exact(device):
    """With every column an outlier nothing is rounded to 8 bits; with none, the int8 product is exact integers."""
    q, x, _ = _case(QuantSpec("int8", threshold=1e-6), (16, 32), torch.float32, device)
    exact = x.double() @ q.dequantize().double().t()
    torch.testing.assert_close(linear(x, q).double(), exact, rtol=1e-4, atol=1e-4)
    integers = torch.randint(-127, 128, (4, 32), device=device).float()
    integers[:, 0] = 127.0
    unit = QuantTensor.from_inner(
        {"packed": q.packed, "absmax": torch.full_like(q.absmax, 127.0)},
        QuantSpec("int8", threshold=0),
        (16, 32),
        x.dtype,
    )
    product = integers.double() @ q.packed.double().t()
    torch.testing.assert_close(linear(integers, unit).double(), product, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operators_are_sound(spec, device):
    """torch's own checks: schema, fake against real, autograd registration."""
    q, x, bias = _case(spec, (32, 64), torch.float32, device)
    x.requires_grad_()
    ids = torch.randint(0, 32, (2, 3), device=device)
    state = (q.packed, q.absmax, q.nested_absmax, q.nested_offset)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    if spec.format == "int8":
        calls = [
            (kernels.ops.quantize_int8.default, (torch.randn(4, 8, device=device),)),
            (kernels.ops.linear_int8.default, (x, q.packed, q.absmax, bias, spec.threshold)),
            (kernels.ops.dequantize_int8.default, (q.packed, q.absmax, torch.float16)),
            (kernels.ops.embedding_int8.default, (ids, q.packed, q.absmax, torch.float16)),
        ]
    else:
        kind = (spec.format, spec.block_size, [32, 64])
        calls = [
            (kernels.ops.quantize_4bit.default, (torch.randn(4, 80, device=device), spec.format, 64)),
            (kernels.ops.quantize_absmax.default, (torch.rand(300, device=device),)),
            (kernels.ops.linear_4bit.default, (x, *state, bias, *kind)),
            (kernels.ops.linear_4bit_t.default, (torch.randn(3, 32, device=device), *state, *kind)),
            (kernels.ops.dequantize_4bit.default, (*state, *kind, torch.float16)),
            (kernels.ops.embedding_4bit.default, (ids, *state, *kind, torch.float16)),
        ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compiled_equals_eager(spec, device):
    torch._dynamo.reset()  # the function below has been compiled for other formats
    layer = torch.nn.Linear(64, 32).to(device)
    q = QuantTensor.quantize(layer.weight, spec)

    def run(x):
        return F.silu(linear(x, q, layer.bias)) + 1

    x = torch.randn(5, 64, device=device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x), rtol=0, atol=0)
    grads = []
    for f in (run, compiled):
        leaf = x.clone().requires_grad_()
        f(leaf).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_autocast(device):
    q, x, bias = _case(QuantSpec("nf4"), (32, 64), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out = linear(x, q, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear(x.bfloat16(), q, bias))


def test_a_compute_dtype_goes_before_autocast(device):
    """As with bitsandbytes: an fp32 input gets an fp32 result, to which an adapter can add what bf16 would lose."""
    q, x, bias = _case(QuantSpec("nf4", compute_dtype=torch.bfloat16), (32, 64), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out = linear(x, q, bias)
    assert out.dtype == torch.float32
    assert torch.equal(out, linear(x, q, bias))
    assert torch.equal(out, linear(x.bfloat16(), q, bias).float())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="reference"):
        kernels.force_backend("fast")


@pytest.mark.parametrize("needs_bias", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_recorded_past_the_dispatcher_or_through_it(spec, needs_bias, device):
    """Training's short way gives the bits of the registered operators, forwards and backwards, under autocast too."""

    class Listening(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    q = QuantTensor.quantize(torch.randn(48, 64, device=device), spec)
    given = torch.randn(9, 64, device=device), torch.randn(48, device=device), torch.randn(9, 48, device=device)
    for autocast in (False, True):
        found = []
        for way in (contextlib.nullcontext(), Listening()):
            x, bias, g = (t.clone() for t in given)
            x.requires_grad_()
            bias.requires_grad_(needs_bias)
            with way, torch.autocast(device, torch.bfloat16, enabled=autocast):
                assert kernels.undisturbed(x) == isinstance(way, contextlib.nullcontext)
                out = linear(x, q, bias)
                assert torch.is_autocast_enabled(device) == autocast
            out.backward(g.to(out.dtype))
            found.append((out.detach(), x.grad, bias.grad))
        for one, two in zip(*found, strict=True):
            assert (one is None) == (two is None)
            assert one is None or (one.dtype == two.dtype and torch.equal(one, two))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_of_the_transposed_product(spec, device):
    q = QuantTensor.quantize(torch.randn(48, 64, device=device), spec)
    w = q.dequantize()
    x, g = torch.randn(9, 48, device=device, requires_grad=True), torch.randn(9, 64, device=device)
    (x @ q).backward(g)
    torch.testing.assert_close(x.grad, g @ w.t(), rtol=2e-4, atol=2e-3)
