"""The fast path: twins keep what their modules were, and any module may own a quantized parameter."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fewbits
from fewbits.errors import ShapeError
from fewbits.modules import QuantEmbedding, QuantLinear
from fewbits.tensor import QuantTensor, linear

FORMATS = ("nf4", "fp4", "int8")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with plain weights of the same values, made without any code of the modules under test."""
    plain = Net()
    for name, p in model.named_parameters():
        value = p.dequantize() if isinstance(p, QuantTensor) else p
        plain.get_parameter(name).data = value.detach().clone()
    return plain


@pytest.mark.parametrize("format", FORMATS)
def test_twins_compute_what_their_dequantized_weights_do(format, device):
    model = fewbits.quantize(Net(), format, overrides={"embed": format}).to(device)
    assert type(model.up) is type(model.down) is QuantLinear
    assert type(model.embed) is QuantEmbedding
    assert type(model.head) is nn.Linear
    ids = torch.randint(0, 40, (3, 7), device=device)
    expected = dequantized(model).to(device)(ids)
    torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-3)
    model(ids).sum().backward()  # through the quantized layers, to what is not quantized
    assert model.norm.weight.grad is not None
    assert model.embed.weight.grad is None
    assert not any(p.requires_grad for p in model.parameters() if isinstance(p, QuantTensor))


@pytest.mark.parametrize("format", FORMATS)
def test_a_module_stays_what_it_was(format):
    model = Net()
    up, calls = model.up, []
    up.register_forward_hook(lambda *_: calls.append("forward"))
    up.register_forward_pre_hook(lambda *_: calls.append("pre"))
    up.note = "mine"
    names = [n for n, _ in model.named_parameters()]
    assert fewbits.quantize(model, format) is model
    assert model.up is up
    assert isinstance(up, nn.Linear)
    assert up.note == "mine"
    assert [n for n, _ in model.named_parameters()] == names
    assert up.weight.shape == (128, 64)
    assert up.weight.dtype == torch.float32
    model(torch.tensor([[1]]))
    assert calls == ["pre", "forward"]
    assert format in repr(model)
    assert repr(model).count(format) == 2
    fewbits.quantize(model, format)  # what is quantized stays as it is
    assert repr(model).count(format) == 2


@pytest.mark.parametrize("format", FORMATS)
def test_copies_and_pickles(format):
    model = fewbits.quantize(Net(), format)
    ids = torch.randint(0, 40, (3, 7))
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        assert torch.equal(other(ids), model(ids))
        assert other.up.weight.packed.data_ptr() != model.up.weight.packed.data_ptr()
        assert set(other.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        twin.up.weight.zero_()
    assert not torch.equal(twin(ids), model(ids))
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_that_wants_a_gradient_gets_it(format):
    layer = fewbits.quantize(nn.Linear(64, 32), format)
    layer.weight.requires_grad_(True)
    x = torch.randn(5, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fewbits.FewbitsWarning)
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(32, 64), rtol=1e-4, atol=1e-4)


def test_a_plain_weight_put_back_is_used():
    layer = fewbits.quantize(nn.Linear(64, 32), "nf4")
    layer.weight = nn.Parameter(torch.randn(32, 64))
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("format", FORMATS)
def test_a_subclass_keeps_its_own_forward(format):
    layer = Scaled(64, 32)
    fewbits.quantize(layer, format)
    assert type(layer) is Scaled
    x = torch.randn(5, 64)
    expected = 3 * F.linear(x, layer.weight.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
    assert "weight.absmax" in layer.state_dict() or "SCB" in layer.state_dict()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("format", FORMATS)
def test_multihead_attention_reads_its_weights_raw(format, mode):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 4, batch_first=True), "head": nn.Linear(64, 10)}).eval()
    overrides = {"attn.in_proj_weight": format, "attn.out_proj": format}
    fewbits.quantize(model, None, overrides=overrides)
    attn = model["attn"]
    assert isinstance(attn.in_proj_weight, QuantTensor)
    assert isinstance(attn.out_proj.weight, QuantTensor)
    plain = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    with torch.no_grad():
        for name, p in attn.named_parameters():
            plain.get_parameter(name).copy_(p.dequantize() if isinstance(p, QuantTensor) else p)
    x = torch.randn(2, 5, 64)
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fewbits.FewbitsWarning)
        torch.testing.assert_close(attn(x, x, x)[0], plain(x, x, x)[0], rtol=1e-3, atol=1e-3)


class Experts(nn.Module):
    """A stack of experts, one chosen for each row: the 3-D parameter is indexed, not multiplied whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32, 64))

    def forward(self, x: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        return torch.stack([F.linear(row, self.weight[e]) for row, e in zip(x, chosen, strict=True)])


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_of_experts(format, tmp_path):
    model = nn.Sequential(Experts())
    fewbits.quantize(model, None, overrides={"0.weight": format})
    x, chosen = torch.randn(3, 64), [2, 0, 2]
    w = model[0].weight.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # never the whole stack
        out = model[0](x, chosen)
    torch.testing.assert_close(
        out, torch.stack([w[e] @ row for row, e in zip(x, chosen, strict=True)]), rtol=1e-3, atol=1e-3
    )
    fewbits.save(model, tmp_path)
    again = fewbits.load(lambda: nn.Sequential(Experts()), tmp_path, device_map="cpu")
    assert torch.equal(again[0](x, chosen), out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    for format in FORMATS:
        model = nn.Sequential(Conv1D(128, 64), nn.GELU(), Conv1D(64, 128), nn.Linear(64, 10))
        fewbits.quantize(model, format)
        layer = model[0]
        assert isinstance(layer, Conv1D)
        assert type(layer).__name__ == "QuantConv1D"
        assert layer.weight.shape == (64, 128)
        assert layer.weight.stored_shape == (128, 64)
        x = torch.randn(2, 3, 64)
        expected = x @ layer.weight.dequantize() + layer.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert format in repr(layer)


@pytest.mark.parametrize("format", FORMATS)
def test_a_whole_model_compiles_without_a_break(format, device):
    torch._dynamo.reset()
    model = fewbits.quantize(Net(), format, overrides={"embed": format}).to(device).eval()
    ids = torch.randint(0, 40, (3, 7), device=device)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_layers_alike_share_compiled_code(format):
    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
    fewbits.quantize(model, format, skip_modules=[])
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    x = torch.randn(3, 64)
    with torch.no_grad():
        for layer in model:
            torch.compile(layer, backend=count, fullgraph=True)(x)
    assert compiled <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
def test_casting_a_model_keeps_its_bytes(format, dtype):
    model = fewbits.quantize(Net(), format)
    packed = model.up.weight.packed.clone()
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.up.weight.packed, packed)
    assert model(torch.tensor([[1, 2]])).dtype == dtype


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(4, 512), (2, 128), (3, 100), (64,)], ids=str)
def test_an_input_that_does_not_fit(shape, format, device):
    """Also one that has as many elements as some rows that would fit."""
    model = nn.Sequential(nn.Linear(256, 32)).to(device)
    fewbits.quantize(model, format, skip_modules=[])
    x = torch.randn(shape, device=device)
    weight = model[0].weight
    for call in (model, lambda x: F.linear(x, weight), lambda x: linear(x, weight)):
        with pytest.raises(ShapeError, match=r"(?s)shape.*0.weight.*last dimension is 256") as caught:
            call(x)
        assert isinstance(caught.value, RuntimeError)  # as torch's own is
    if format == "int8":
        operator, rest = torch.ops.fewbits.linear_int8, (None, 6.0)
    else:
        operator, rest = torch.ops.fewbits.linear_4bit, (None, None, None, "nf4", 64, [32, 256])
    with pytest.raises((RuntimeError, IndexError)):  # an operator called by itself says it as torch does
        operator(x, weight.packed, weight.absmax, *rest)
