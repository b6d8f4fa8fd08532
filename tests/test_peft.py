"""PEFT's adapters on fewbits models, transformers' and others.

The truth is the same adapter on the dequantized model: a layer on a quantized weight computes what it does on the
weight that it stands for, forwards and backwards, up to the rounding of sums.
"""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from adapters import ADAPTERS, FORMATS, gradients, limit, llama, on_dequantized, quantized, relative
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbits
from fewbits.errors import ConfigError
from fewbits.formats import dequantize_inner, quantize_inner
from fewbits.integrations.peft import as_plain, fuse_lora, merge_and_unload
from fewbits.integrations.peft import prepare_model_for_kbit_training as prepare
from fewbits.modules import QuantLinear
from fewbits.tensor import QuantTensor
from models import GPT, same_tensors


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


# ------------------------------------------------------------------------------------------------- computing


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_outputs_and_gradients_are_those_on_the_dequantized_model(adapter, format, device):
    a = ARCHITECTURES["llama"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fewbits.FewbitsWarning)
        model = get_peft_model(llama(format, device), ADAPTERS[adapter]())
        plain = on_dequantized(model)
        inputs = {k: v.to(device) for k, v in a.batch().items()}
        got, want = gradients(model, inputs), gradients(plain, inputs)
        assert relative(a.run(model.eval()), a.run(plain.eval())) <= limit(format)
    assert len(got) >= 6
    for name, gradient in got.items():
        assert gradient.norm() > 0, name
        assert relative(gradient, want[name]) <= 4 * limit(format), name


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_on_a_module_that_is_not_transformers(adapter, format, device):
    torch.manual_seed(0)
    base = fewbits.quantize(GPT().to(device), format, **FORMATS[format])
    model = get_peft_model(base, ADAPTERS[adapter](target_modules=["c_attn", "c_fc", "c_proj"]))
    plain = on_dequantized(model)
    ids = torch.arange(20, device=device).remainder(50).view(2, 10)
    gradients = []
    for one in (model, plain):
        F.cross_entropy(one(ids).flatten(0, 1), ids.flatten()).backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert relative(gradient, gradients[1][name]) <= 8 * limit(format), name


def test_all_linear_means_every_linear_layer_but_the_head(format):
    model = get_peft_model(llama(format), ADAPTERS["lora"]())
    tuned = {name for name, m in model.named_modules() if hasattr(m, "base_layer")}
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {f"{name}.base_layer" for name in tuned} == quantized
    assert not any("lm_head" in name for name in tuned)


@pytest.mark.parametrize("reentrant", [True, False])
def test_prepared_for_training_with_checkpointing(format, reentrant, device):
    """PEFT's preparation turns checkpointing on, and the gradients stay."""
    a = ARCHITECTURES["llama"]
    inputs = {k: v.to(device) for k, v in a.batch().items()}
    config = ADAPTERS["lora"]
    plain = llama(format, device)
    torch.manual_seed(0)
    want = gradients(get_peft_model(plain, config()).train(), inputs)
    base = prepare_model_for_kbit_training(
        llama(format, device), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert base.model.gradient_checkpointing
    assert not any(p.requires_grad for p in base.parameters())
    torch.manual_seed(0)
    got = gradients(get_peft_model(base, config()).train(), inputs)
    assert got.keys() == want.keys()
    for name in want:
        assert relative(got[name], want[name]) <= 1e-5, name


def test_preparing_a_model_in_16_bits(format):
    """PEFT casts what is not quantized to fp32; the bytes of what is stay."""
    base = llama(format).to(torch.bfloat16)
    before = {n: {k: t.clone() for k, t in p.inner_tensors.items()} for n, p in quantized(base).items()}
    prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    for name, p in quantized(base).items():
        assert all(torch.equal(t, before[name][k]) for k, t in p.inner_tensors.items())
    assert {p.dtype for p in base.parameters() if not isinstance(p, QuantTensor)} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_prepared_in_less_memory(name, format, device):
    """Tables and heads stay in 16 bits, and every number is PEFT's, under the autocast that training runs in."""
    a = ARCHITECTURES[name]
    inputs = {k: v.to(device) for k, v in a.batch().items()}
    found = []
    for function in (prepare_model_for_kbit_training, prepare):
        base = a.build().to(device, torch.bfloat16)
        base = fewbits.quantize(base, format, **FORMATS[format])
        base = function(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        assert not any(p.requires_grad for p in base.parameters())
        plain = {n: p for n, p in base.named_parameters() if not isinstance(p, QuantTensor)}
        size = sum(p.nbytes for p in plain.values())
        halves = {n for n, p in plain.items() if p.dtype is torch.bfloat16}
        torch.manual_seed(0)
        model = get_peft_model(base, ADAPTERS["lora"](fan_in_fan_out=name == "gpt2")).eval()  # no dropout of its own
        model.base_model.model.train(name != "gpt2")
        with torch.autocast(device, torch.bfloat16):
            got = gradients(model, inputs)
            outputs = model(**inputs).logits
        found.append((size, halves, got, outputs))
    (their_size, their_halves, want, expected), (size, halves, got, outputs) = found
    assert not their_halves
    assert halves
    assert all("emb" in n or "wte" in n or "wpe" in n or "lm_head" in n for n in halves)
    assert size < 0.6 * their_size
    torch.testing.assert_close(outputs.float(), expected.float(), rtol=0, atol=0)
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-5, atol=1e-7)


def test_prepared_blocks_of_any_module_are_checkpointed(format):
    """They run once more in backward, in a copy of the model those of the copy; and not where nothing is trained."""
    torch.manual_seed(0)
    base = fewbits.quantize(GPT(), format, **FORMATS[format])
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    torch.manual_seed(0)
    model = get_peft_model(prepare(base), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.load_state_dict(plain.state_dict())
    model = copy.deepcopy(model)
    calls = [0]
    block = model.base_model.model.transformer["h"][1]
    block.attn.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    ids = torch.arange(20).remainder(50).view(2, 10)
    for one in (model, plain):
        F.cross_entropy(one(ids).flatten(0, 1), ids.flatten()).backward()
    assert calls == [2]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain.eval()(ids))
    assert calls == [3]


class _Checkpointed(GPT):
    def forward(self, ids):
        t = self.transformer
        x = t["wte"](ids) + t["wpe"](torch.arange(ids.shape[1], device=ids.device))
        for block in t["h"]:
            x = checkpoint(block, x, use_reentrant=False)
        return self.lm_head(t["ln_f"](x))


def test_preparing_a_module_that_is_not_transformers(format):
    torch.manual_seed(0)
    base = fewbits.quantize(_Checkpointed(), format, **FORMATS[format])
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    plain = copy.deepcopy(model)
    plain.base_model.model.__class__ = GPT
    ids = torch.arange(20).remainder(50).view(2, 10)
    for one in (model, plain):
        F.cross_entropy(one(ids).flatten(0, 1), ids.flatten()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_several_adapters_and_mixed_ones(format):
    """Two LoRAs by turns and joined, and a LoRA beside an IA³."""
    a = ARCHITECTURES["llama"]
    model = get_peft_model(llama(format), ADAPTERS["lora"]()).eval()
    model.add_adapter("second", ADAPTERS["lora"]())
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "joined", combination_type="cat")
    plain = on_dequantized(model)
    outputs = []
    for name in ("default", "second", "joined"):
        model.set_adapter(name)
        plain.set_adapter(name)
        outputs.append(a.run(model))
        assert relative(outputs[-1], a.run(plain)) <= limit(format)
    assert relative(outputs[0], outputs[1]) > 0.01
    with model.disable_adapter():
        assert torch.equal(a.run(model), a.run(llama(format)))

    torch.manual_seed(0)
    base = llama(format)
    with as_plain(base):
        mixed = get_peft_model(base, ADAPTERS["lora"](), mixed=True).eval()
        assert isinstance(mixed, PeftMixedModel)
        mixed.add_adapter("hada", peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False))
    assert base.is_loaded_in_4bit or base.is_loaded_in_8bit
    mixed.set_adapter(["default", "hada"])
    plain = on_dequantized(mixed)
    assert relative(a.run(mixed), a.run(plain)) <= limit(format)


def test_saved_and_loaded_again(format, tmp_path, device):
    a = ARCHITECTURES["llama"]
    model = get_peft_model(llama(format, device), ADAPTERS["lora"]()).eval()
    want = a.run(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    again = PeftModel.from_pretrained(llama(format, device), tmp_path).eval()
    assert torch.equal(a.run(again), want)


# ------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_a_merged_weight_is_the_sum_quantized_again(adapter, safe, format, device):
    model = get_peft_model(llama(format, device), ADAPTERS[adapter]()).eval()
    truth = on_dequantized(model).merge_and_unload()
    specs = {n.replace(".base_layer", ""): p.spec for n, p in quantized(model.base_model.model).items()}
    if adapter == "ia3":
        with pytest.raises(ValueError, match="Cannot merge ia3 layers when the model is loaded in"):
            copy.deepcopy(model).merge_and_unload()
        twin = copy.deepcopy(model)
        with as_plain(twin):
            theirs = twin.merge_and_unload(safe_merge=safe)
    else:  # by PEFT's own function, the same bytes
        theirs = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    merged = merge_and_unload(model, safe_merge=safe)
    before = quantized(llama(format, device))
    changed = 0
    for name, p in quantized(merged).items():
        assert torch.equal(p, theirs.get_parameter(name))
        if adapter == "ia3" and not name.endswith(("k_proj.weight", "v_proj.weight", "down_proj.weight")):
            assert torch.equal(p, before[name])
            continue
        w = truth.get_parameter(name)
        expected = dequantize_inner(quantize_inner(w, specs[name]), specs[name], w.shape, w.dtype)
        # the delta is the same, its sum with the weight may round the other way in the last bit
        step = (w.abs().amax() / (127 if format == "int8" else 3)).item()
        difference = (p.dequantize() - expected).abs()
        assert (difference > 1e-5 * step).float().mean() <= 2e-3, name
        assert difference.max() <= step, name
        changed += 1
    assert changed == (6 if adapter == "ia3" else 14)
    assert not any("lora" in name or "ia3" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_merged_weights_kept_in_16_bits(adapter, dtype, format, tmp_path):
    a = ARCHITECTURES["llama"]
    base = llama(format).to(dtype)
    model = get_peft_model(base, ADAPTERS[adapter]()).eval()
    truth = on_dequantized(copy.deepcopy(model).float()).merge_and_unload()
    tuned = {n.replace("base_model.model.", "") for n, m in model.named_modules() if hasattr(m, "base_layer")}
    unmerged = a.run(model)
    merged = merge_and_unload(model, dtype=dtype)
    for name in tuned:
        weight = merged.get_submodule(name).weight
        assert not isinstance(weight, QuantTensor)
        assert weight.dtype is dtype
        assert type(merged.get_submodule(name)) is nn.Linear
        want = truth.get_parameter(f"{name}.weight")
        assert (weight.float() - want).norm() <= (2.0**-8 if dtype is torch.bfloat16 else 1e-6) * want.norm()
    rest = {n for n, m in merged.named_modules() if isinstance(getattr(m, "weight", None), QuantTensor)}
    assert len(rest) == 14 - len(tuned)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert torch.isfinite(a.run(merged)).all()
    if dtype is torch.float32:
        assert relative(a.run(merged), unmerged) <= limit(format)
    fewbits.save(merged, tmp_path)
    assert same_tensors(fewbits.from_pretrained(tmp_path, device_map="cpu").state_dict(), merged.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "plain"])
def test_prepared_trained_and_merged(name, dtype, format):
    """The whole way: what is merged runs by itself, in its own dtype, and as the adapter did."""
    torch.manual_seed(0)
    base = (GPT() if name == "plain" else ARCHITECTURES[name].build()).to(torch.bfloat16)
    base = prepare(fewbits.quantize(base, format, **FORMATS[format]))
    config = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    model = fuse_lora(get_peft_model(base, config)).train()
    ids = torch.arange(20).remainder(50).view(2, 10)

    def logits(one: nn.Module) -> torch.Tensor:
        return one(ids) if name == "plain" else one(input_ids=ids).logits

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(logits(model).flatten(0, 1).float(), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            before = logits(model).float()
        merged = merge_and_unload(model, dtype=dtype).eval()
        after = logits(merged)
    assert torch.isfinite(after).all()
    if dtype is not None:
        assert after.dtype is dtype
        assert {p.dtype for p in merged.parameters()} == {dtype}
        # 2^-8 at each of a dozen roundings in 16 bits, in the adapter's run or in this one
        assert relative(after.float(), before) <= 12 * 2.0**-8


def test_unmerged_again(format):
    """As near to what it was as quantizing twice allows; nearer than it was moved by a large delta."""
    model = get_peft_model(llama(format), ADAPTERS["lora"]()).eval()
    before = {n: p.dequantize() for n, p in quantized(model).items()}
    model.merge_adapter()
    between = {n: p.dequantize() for n, p in quantized(model).items()}
    model.unmerge_adapter()
    for name, p in quantized(model).items():
        moved, left = (between[name] - before[name]).norm(), (p.dequantize() - before[name]).norm()
        assert moved > 0
        assert left < 0.5 * moved if format == "int8" else left < moved


def test_merging_into_a_module_that_is_not_transformers(format):
    torch.manual_seed(0)
    base = fewbits.quantize(GPT().eval(), format, **FORMATS[format])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_fc"], init_lora_weights=False)).eval()
    ids = torch.arange(20).remainder(50).view(2, 10)
    with torch.no_grad():
        want = model(ids)
        merged = merge_and_unload(model, dtype=torch.float32)
        assert merged is base
        assert relative(merged(ids), want) <= limit(format)
    kinds = {n.rsplit(".", 1)[-1]: isinstance(m.weight, QuantTensor) for n, m in base.named_modules()
             if isinstance(m, nn.Linear)}  # fmt: skip
    assert kinds == {"c_attn": True, "c_proj": True, "c_fc": False, "lm_head": False}


# ------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_merged_or_fused(format):
    with pytest.raises(ConfigError, match="has no adapters to merge"):
        merge_and_unload(llama(format))
    with pytest.raises(ConfigError, match="no LoRA layer on a quantized linear layer"):
        fuse_lora(llama(format))
    with pytest.raises(ConfigError, match="no LoRA layer on a quantized linear layer"):
        fuse_lora(get_peft_model(ARCHITECTURES["llama"].build(), ADAPTERS["lora"]()))
    with pytest.raises(ConfigError, match="no LoRA layer on a quantized linear layer"):
        fuse_lora(get_peft_model(llama(format), ADAPTERS["ia3"]()))
    model = get_peft_model(llama(format), ADAPTERS["lora"]())
    before = {n: p.dequantize() for n, p in quantized(model).items()}
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8"):
        merge_and_unload(model, dtype=torch.int8)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    first = next(iter(before))
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match=r"NaNs|NaN or infinite"):
            merge_and_unload(model, safe_merge=True, dtype=dtype)
        assert isinstance(model.get_parameter(first), QuantTensor)
    assert torch.equal(quantized(model)[first].dequantize(), before[first]), "the weight is as it was"


def test_an_adapter_of_another_base(format, tmp_path):
    """PEFT's own errors, which name the layers; the base model's bytes stay."""
    get_peft_model(llama(format), ADAPTERS["lora"]()).save_pretrained(tmp_path)
    other = fewbits.quantize(ARCHITECTURES["gpt2"].build(), format, **FORMATS[format])
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    wider = ARCHITECTURES["mistral"].config()
    wider.hidden_size, wider.intermediate_size = 128, 192
    torch.manual_seed(0)
    wide = fewbits.quantize(ARCHITECTURES["mistral"].kind(wider), format, **FORMATS[format])
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.*lora_A"):
        PeftModel.from_pretrained(wide, tmp_path)
