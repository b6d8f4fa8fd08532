"""LoRA on a quantized weight as one function: PEFT's own layer is the truth, or the same adapter on plain weights."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from adapters import ADAPTERS, FORMATS, gradients, limit, llama, on_dequantized, quantized, relative
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import nn

import fewbits
from fewbits.integrations.peft import FusedLoraLinear, fuse_lora
from fewbits.integrations.peft import prepare_model_for_kbit_training as prepare


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fused_lora_is_pefts_in_fp32(name, dropout, format, device):
    a = ARCHITECTURES[name]
    base = fewbits.quantize(a.build().to(device), format, **FORMATS[format])
    config = ADAPTERS["lora"](lora_dropout=dropout, fan_in_fan_out=name == "gpt2")
    model = get_peft_model(base, config).train()
    for module in base.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.1:
            module.p = 0.0  # of the model itself: random numbers are drawn in the same order then
    inputs = {k: v.to(device) for k, v in a.batch().items()}
    torch.manual_seed(1)
    want, expected = gradients(model, inputs), a.run(model.eval())
    keys = [*model.state_dict()]
    assert fuse_lora(model.train()) is model
    assert [*model.state_dict()] == keys
    fused = [m for m in model.modules() if type(m) is FusedLoraLinear]
    assert len(fused) == len(quantized(model))
    torch.manual_seed(1)
    got = gradients(model, inputs)
    assert got.keys() == want.keys()
    for key in want:  # fp32 sums in another order; of int8, without what rounding x to two digits costs
        assert relative(got[key], want[key]) <= max(1e-4, 4 * limit(format)), key
    assert relative(a.run(model.eval()), expected) <= max(1e-5, limit(format))
    if not dropout:
        truth = gradients(on_dequantized(model), inputs)
        for key in want:
            assert relative(got[key], truth[key]) <= 1e-4, key


@pytest.mark.parametrize("autocast", [True, False])
def test_fused_lora_in_bf16_is_as_accurate_as_pefts(autocast, format, device):
    """Both against fp32: what differs is where 16-bit numbers are rounded."""
    a = ARCHITECTURES["llama"]
    inputs = {k: v.to(device) for k, v in a.batch().items()}
    exact = get_peft_model(llama(format, device), ADAPTERS["lora"]())
    truth = gradients(on_dequantized(exact), inputs)
    model = copy.deepcopy(exact)
    if not autocast:
        for module in [*model.modules()]:
            for key, p in module._parameters.items():
                if p is not None and "lora" not in key and not p.requires_grad:
                    module._parameters[key] = p.to(torch.bfloat16)

    def errors() -> list[float]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            got = gradients(model, inputs)
        return [relative(got[key], truth[key]) for key in truth]

    theirs = errors()
    fuse_lora(model)
    ours = errors()
    # under autocast PEFT rounds the same things; without, it computes the adapter in fp32
    assert sum(ours) <= (1.25 if autocast else 2) * sum(theirs)
    assert max(ours) <= (2 if autocast else 4) * max(theirs)


@pytest.mark.parametrize("recorded", [True, False])
def test_fused_lora_keeps_what_a_young_adapter_adds(recorded, format, device):
    """Contributions far below half a unit in the last place of bf16: on the whole they are there.

    Rounded once, a sum is off by noise without a direction. Added to what is rounded already they are lost, which is
    what PEFT's own layer does on any weight. A checkpointed block is first run without gradients: the same numbers.
    """
    torch.manual_seed(0)
    base = fewbits.quantize(
        nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 8)).to(device), format, **FORMATS[format]
    )
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).train()
    layer = model.base_model.model[0]
    x = torch.randn(400, 256, device=device)
    up = torch.randn(512, 4, device=device)

    def contribution() -> float:
        outputs = []
        for factor in (0.0, 2e-5):
            with torch.no_grad():
                layer.lora_B["default"].weight.copy_(factor * up)
            with torch.set_grad_enabled(recorded), torch.autocast(device, torch.bfloat16):
                outputs.append(layer(x).detach().double())
        delta = layer.scaling["default"] * (x @ layer.lora_A["default"].weight.t()) @ layer.lora_B["default"].weight.t()
        assert delta.abs().mean() < 0.05 * outputs[0].abs().mean() * 2.0**-9
        delta = delta.detach().double()
        return ((outputs[1] - outputs[0]) * delta).sum().item() / delta.square().sum().item()

    assert abs(contribution()) < 0.5
    fuse_lora(model)
    assert 0.6 < contribution() < 1.4


@pytest.mark.parametrize("reentrant", [True, False])
def test_fused_lora_gives_one_loss_checkpointed_or_not(reentrant, format):
    a = ARCHITECTURES["llama"]
    losses = []
    for checkpointed in (False, True):
        base = prepare(llama(format), checkpointed, {"use_reentrant": reentrant})
        torch.manual_seed(0)
        model = fuse_lora(get_peft_model(base, ADAPTERS["lora"]()).train())
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**a.batch(), labels=a.batch()["input_ids"]).loss.item())
    assert losses[0] == losses[1]


def test_fused_lora_leaves_the_rest_to_peft(format):
    """DoRA, several adapters, one merged, one disabled, one with a bias: PEFT's own results, to the bit."""
    a = ARCHITECTURES["llama"]

    def both(config, change=lambda m: None):
        torch.manual_seed(0)
        model = get_peft_model(llama(format), config).eval()
        change(model)
        want = a.run(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(a.run(fuse_lora(model)), want)

    def two(model):
        model.add_adapter("second", ADAPTERS["lora"]())
        model.base_model.set_adapter(["default", "second"])

    both(ADAPTERS["dora"]())
    both(ADAPTERS["lora"](), two)
    both(ADAPTERS["lora"](), lambda m: m.merge_adapter())
    both(ADAPTERS["lora"](), lambda m: m.base_model.disable_adapter_layers())
    torch.manual_seed(0)
    opt = fewbits.quantize(ARCHITECTURES["opt"].build(), format, **FORMATS[format])
    model = get_peft_model(opt, ADAPTERS["lora"](target_modules=["q_proj"], lora_bias=True)).eval()
    want = ARCHITECTURES["opt"].run(model)
    assert torch.equal(ARCHITECTURES["opt"].run(fuse_lora(model)), want)


def test_fused_lora_saves_less_for_backward(format):
    """What autograd keeps of a layer: the input in the product's dtype and r numbers a row."""
    base = fewbits.quantize(nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 8)), format, **FORMATS[format])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(50, 64, requires_grad=True)
    parts = [t for p in model.parameters() for t in getattr(p, "inner_tensors", {"": p}).values()]
    own = {t.untyped_storage()._cdata for t in parts}
    layer = model.base_model.model[0]

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            held = layer(x)
        assert held.dtype is torch.bfloat16
        gc.collect()
        return sum(sizes.values())

    theirs = kept()
    fuse_lora(model)
    ours = kept()
    weights = 2 * 4 * (64 + 96)  # of the adapter, cast
    assert ours <= 2 * 50 * (64 + 4) + weights
    assert ours < theirs


def test_fused_lora_trains_offloaded_parts(tmp_path):
    """Half of the model streams from disk; gradients are those of the same model in memory."""
    a = ARCHITECTURES["llama"]
    fewbits.save(llama("nf4"), tmp_path)
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    config = ADAPTERS["lora"](target_modules=["q_proj", "down_proj"])
    grads = []
    for device_map in ("cpu", places):
        torch.manual_seed(0)
        model = get_peft_model(fewbits.from_pretrained(tmp_path, device_map=device_map), config)
        fuse_lora(model)
        grads.append(gradients(model, a.batch()))
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=0, atol=0)
