"""QuantTensor: every use of it gives what the dequantized tensor gives, and says so when it had to become that."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fewbits.dispatch
from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.formats import QuantSpec
from fewbits.tensor import QuantTensor

SPECS = (QuantSpec("nf4"), QuantSpec("fp4", 32, True), QuantSpec("nf4", 64, True), QuantSpec("int8", threshold=1e6))
GRAD_MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


@pytest.fixture(params=SPECS, ids=str)
def spec(request):
    return request.param


def _close(actual, expected, spec, x=None, w=None):
    """Equal, but for the rounding of x to two 8-bit digits in the int8 product."""
    if spec.format == "int8" and x is not None:
        step = x.abs().amax(-1, keepdim=True) / 127
        atol = float((step * w.abs().sum(-1).max()).max())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0.51 * atol / 254 + 1e-4)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _plain(x):
    return x.dequantize() if isinstance(x, QuantTensor) else x


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_products(spec, mode, device):
    q = QuantTensor.quantize(torch.randn(50, 64, device=device), spec)
    w = q.dequantize()
    x, y, bias = (torch.randn(*s, device=device) for s in ((3, 5, 64), (7, 50), (50,)))
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these may fall to the floor
        _close(F.linear(x, q), F.linear(x, w), spec, x, w)
        _close(F.linear(x[0, 0], q, bias), F.linear(x[0, 0], w, bias), spec, x[0, 0], w)
        _close(x @ q.t(), x @ w.t(), spec, x, w)
        _close(x @ q.T, x @ w.T, spec, x, w)
        _close(x @ q.mT, x @ w.mT, spec, x, w)
        _close(torch.addmm(bias, x[0], q.t()), torch.addmm(bias, x[0], w.t()), spec, x[0], w)
        _close(y @ q, y @ w, spec)
        ids = torch.randint(0, 50, (2, 4), device=device)
        _close(F.embedding(ids, q), F.embedding(ids, w), spec)


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_data_shapes_and_dtypes_are_those_with_data(spec, mode, dtype):
    def results(device):
        w, x, bias = (torch.zeros(*s, device=device, dtype=dtype) for s in ((50, 64), (3, 5, 64), (50,)))
        q = QuantTensor.quantize(w, spec)
        ids = torch.zeros(2, 4, device=device, dtype=torch.long)
        products = F.linear(x, q, bias), x[..., :50] @ q, F.embedding(ids, q)
        return [*q.inner_tensors.values(), q.dequantize(), *products]

    with mode():
        for empty, full in zip(results("meta"), results("cpu"), strict=True):
            assert empty.is_meta
            assert (empty.shape, empty.dtype) == (full.shape, full.dtype)


def test_gradient_through_the_universal_path(spec, device):
    q = QuantTensor.quantize(torch.randn(50, 64, device=device), spec)
    x = torch.randn(3, 5, 64, device=device, requires_grad=True)
    g = torch.randn(3, 5, 50, device=device)
    F.linear(x, q).backward(g)
    torch.testing.assert_close(x.grad, g @ q.dequantize(), rtol=1e-4, atol=1e-4)


def test_rows_are_taken_and_joined_in_quantized_form(spec, device):
    q = QuantTensor.quantize(torch.randn(8, 16, 128, device=device), spec)
    w = q.dequantize()
    index = torch.tensor([1, 1, 7], device=device)
    cases = {
        "select": lambda t: t[3],
        "select twice": lambda t: t[3][1],
        "slice": lambda t: t[2:5],
        "slice with step": lambda t: t[1::3],
        "index": lambda t: t[index],
        "index_select": lambda t: t.index_select(0, index),
        "cat": lambda t: torch.cat([t[:2], t[5:]]),
        "unbind": lambda t: t.unbind(0)[2],
        "chunk": lambda t: t.chunk(3)[2],
        "split": lambda t: t.split([3, 5])[1],
        "transpose": lambda t: t.transpose(1, 2),
        "select of transpose": lambda t: t.transpose(1, 2)[4],
        "permute": lambda t: t.permute(0, 2, 1),
        "clone": lambda t: t.clone(),
        "all": lambda t: t[:],
    }
    for mode in GRAD_MODES:
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, case in cases.items():
                got = case(q)
                assert isinstance(got, QuantTensor), name
                assert got.shape == case(w).shape, name
                assert got.stride() == case(w).contiguous().stride() or got.transposed, name
                torch.testing.assert_close(got.dequantize(), case(w), rtol=0, atol=0, msg=name)
            x = torch.randn(8, 2, 128, device=device)
            _close(torch.bmm(x, q.transpose(1, 2)), torch.bmm(x, w.transpose(1, 2)), spec, x, w.flatten(0, 1))


@pytest.mark.parametrize("transposed", [True, False])
def test_rows_by_experts(spec, transposed, device):
    """A grouped product takes each expert's rows to its part of the stack, and reads no other; its gradient as well."""
    torch.manual_seed(0)
    stack = QuantTensor.quantize(torch.randn(5, 128, 64, device=device), spec, label="experts")
    weight = stack.transpose(1, 2) if transposed else stack
    w = weight.dequantize()
    ends = torch.tensor([3, 3, 10, 11, 17], dtype=torch.int32, device=device)  # the second has no rows
    x = torch.randn(17, weight.shape[1], device=device, requires_grad=True)
    g = torch.randn(17, weight.shape[2], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewbitsWarning)
        out = torch._grouped_mm(x, weight, offs=ends)
        out.backward(g)
    owner = torch.tensor([0] * 3 + [2] * 7 + [3] + [4] * 6, device=device)
    exact = torch.einsum("tk,tkn->tn", x.detach().double(), w.double()[owner])
    gradient = torch.einsum("tn,tkn->tk", g.double(), w.double()[owner])
    torch.testing.assert_close(out.double(), exact, rtol=2e-4, atol=2e-3)
    torch.testing.assert_close(x.grad.double(), gradient, rtol=2e-4, atol=2e-3)


def test_what_has_no_quantized_form_is_dequantized_and_said_once(spec, device):
    q = QuantTensor.quantize(torch.randn(33, 70, device=device), spec, label="block.weight")
    w = q.dequantize()
    fewbits.dispatch._said.clear()
    for case in (torch.relu, lambda t: t + 1, lambda t: t.sum(1), lambda t: t.view(-1), lambda t: t[:, 3], torch.svd):
        with pytest.warns(FewbitsWarning, match=r"block\.weight"):
            got = case(q)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = case(q)
        for one, two, three in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, again, case(w))), strict=True):
            assert not isinstance(one, QuantTensor)
            torch.testing.assert_close(one, three)
            torch.testing.assert_close(two, three)


def test_rows_that_share_blocks_are_dequantized(device):
    q = QuantTensor.quantize(torch.randn(4, 33, device=device), "nf4")
    w = q.dequantize()
    fewbits.dispatch._said.clear()
    with pytest.warns(FewbitsWarning, match="dequantized"):
        row = q[2]
    assert torch.equal(row, w[2])
    x = torch.randn(5, 33, device=device)
    torch.testing.assert_close(F.linear(x, q), F.linear(x, w), rtol=1e-5, atol=1e-5)


def test_in_place_arithmetic_quantizes_again(spec, device):
    w0 = torch.randn(32, 64, device=device)
    delta = torch.randn(32, 64, device=device) * 0.3
    for change in (
        lambda p: p.data.add_(delta),
        lambda p: p.data.__iadd__(delta),
        lambda p: p.add_(delta),
        lambda p: setattr(p, "data", p.data + delta),
        lambda p: p.copy_(p.dequantize() + delta),
        lambda p: p.t().add_(delta.t()),
    ):
        p = nn.Parameter(QuantTensor.quantize(w0, spec), requires_grad=False)
        fewbits.dispatch._said.add(("aten.add.Tensor", None))  # p.data + delta is the floor, and may say so
        alias = p.data
        expected = QuantTensor.quantize(p.dequantize() + delta, spec)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FewbitsWarning)
            change(p)
        assert isinstance(p, QuantTensor)
        for name, inner in expected.inner_tensors.items():
            assert torch.equal(p.inner_tensors[name], inner), name
            assert torch.equal(alias.inner_tensors[name], inner), "aliases follow"


def test_in_place_to_values_that_are_not_finite_is_refused(spec):
    p = QuantTensor.quantize(torch.randn(32, 64), spec, label="w")
    before = {n: t.clone() for n, t in p.inner_tensors.items()}
    with pytest.raises(ConfigError, match="NaN or infinite"):
        p.mul_(torch.inf)
    with pytest.raises(ConfigError, match="shape"):
        p.data = torch.zeros(3, 3)
    assert all(torch.equal(before[n], t) for n, t in p.inner_tensors.items())


def test_copy_between_quantized_tensors_is_of_bytes(spec):
    p, other = (QuantTensor.quantize(torch.randn(32, 64), spec) for _ in range(2))
    p.copy_(other)
    assert all(torch.equal(other.inner_tensors[n], t) for n, t in p.inner_tensors.items())
    plain = torch.empty(32, 64)
    plain.copy_(other)
    assert torch.equal(plain, other.dequantize())


def test_a_cast_assigned_to_data_is_of_bytes(spec):
    """As PEFT prepares a model for training; of a transposed weight too."""
    for q in (QuantTensor.quantize(torch.randn(48, 64), spec), QuantTensor.quantize(torch.randn(48, 64), spec).t()):
        before = {name: t.clone() for name, t in q.inner_tensors.items()}
        q.data = q.data.to(torch.bfloat16)
        assert all(torch.equal(t, before[name]) for name, t in q.inner_tensors.items())


def test_moving_and_casting_leave_the_bytes(spec, device):
    q = QuantTensor.quantize(torch.randn(32, 64), spec)
    for moved in (q.to(device), q.half(), q.to(device, torch.bfloat16), q.double(), q.detach(), q.clone(), q.cpu()):
        assert isinstance(moved, QuantTensor)
        assert all(torch.equal(moved.inner_tensors[n].cpu(), t) for n, t in q.inner_tensors.items())
    assert q.half().dequantize().dtype == torch.float16
    assert torch.equal(q.half().dequantize(), q.dequantize().half())
    assert q.to(device).device.type == device


def test_as_a_parameter(spec, device):
    layer = nn.Linear(64, 32, device=device)
    layer.weight = nn.Parameter(QuantTensor.quantize(layer.weight, spec), requires_grad=False)
    p = layer.weight
    assert isinstance(p, nn.Parameter)
    assert isinstance(p, QuantTensor)
    assert isinstance(type(p)(p, requires_grad=False), QuantTensor)  # how Accelerate rebuilds a parameter
    with pytest.raises(ConfigError, match="QuantTensor"):
        type(p)(torch.zeros(2, 2))
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight.packed.data_ptr() != p.packed.data_ptr()
    assert torch.equal(twin.weight.dequantize(), p.dequantize())
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.packed, twin.weight.packed)
    assert "QuantTensor(" in repr(p)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)  # our own bytes
    assert torch.equal(again.weight.dequantize(), twin.weight.dequantize())
    for like in (torch.zeros_like(p), p.new_zeros(3), torch.empty_like(p), torch.randn_like(p)):
        assert not isinstance(like, QuantTensor)


def test_compiled_through_the_universal_path(spec, device):
    torch._dynamo.reset()
    q = QuantTensor.quantize(torch.randn(32, 64, device=device), spec)

    def run(x, weight):
        return F.relu(F.linear(x, weight)) @ weight

    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, q), run(x, q), rtol=1e-5, atol=1e-5)
