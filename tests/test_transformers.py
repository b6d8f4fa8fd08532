"""fewbits as a quantization method of transformers: loading, saving, generating, and what is refused.

The truths are fewbits' own quantization of the same weights in memory (the same bytes), the dequantized model (the
same words), and checkpoints that transformers with bitsandbytes wrote.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import nn

import fewbits
import fewbits.hf
from fewbits.errors import CheckpointError, ConfigError, FewbitsError, FewbitsWarning, UnsupportedError
from fewbits.inplace import dequantize
from fewbits.integrations.transformers import FewbitsConfig
from fewbits.modules import QuantLinear
from fewbits.tensor import QuantTensor
from models import same_tensors

FORMATS = {"nf4": {"format": "nf4", "double_quant": True}, "int8": {"format": "int8"}}
WRITERS = [name for name, a in ARCHITECTURES.items() if a.generates]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")


@pytest.fixture(autouse=True)
def _quiet():
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def _load(kind, folder: Path, config=None, device: str = "cpu", **kwargs):
    if config is not None:
        kwargs["quantization_config"] = config
    return kind.from_pretrained(folder, device_map={"": device}, **kwargs).eval()


def _quantized(model: nn.Module) -> dict[str, QuantTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantTensor)}


# ------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_quantized_run_saved_and_loaded_again(name, format, tmp_path, device):
    a = ARCHITECTURES[name]
    full = a.build()
    full.save_pretrained(tmp_path / "full")
    model = _load(a.kind, tmp_path / "full", FewbitsConfig(**FORMATS[format]), device)
    own = fewbits.quantize(copy.deepcopy(full).to(device), **{"config": format, **_settings(format)})
    assert same_tensors(model.state_dict(), own.state_dict())
    assert _quantized(model)
    assert all(type(m) is QuantLinear for m in model.modules() if type(m).__name__ == "QuantLinear")
    out = a.run(model)
    assert torch.equal(out, a.run(own))
    assert model.is_quantized
    assert model.quantization_method == "fewbits"
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (format == "nf4", format == "int8")
    assert model.num_parameters() == full.num_parameters()
    assert model.get_memory_footprint() == sum(_stored(t) for t in [*model.parameters(), *model.buffers()])
    assert model.get_memory_footprint() < full.get_memory_footprint()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_memory_footprint() == model.get_memory_footprint()

    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    recorded = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert recorded["quant_method"] == "bitsandbytes", "transformers without fewbits, and vLLM, can read it"
    again = _load(a.kind, tmp_path / "saved", device=device)
    asked = _load(a.kind, tmp_path / "saved", FewbitsConfig(), device)
    for one in (again, asked):
        assert same_tensors(one.state_dict(), model.state_dict())
        assert torch.equal(a.run(one), out)
    if name == "mixtral":  # whose experts transformers joins as it loads them
        with pytest.raises(CheckpointError, match="FewbitsConfig"):
            fewbits.from_pretrained(tmp_path / "saved", device_map=device)
    else:
        assert torch.equal(a.run(fewbits.from_pretrained(tmp_path / "saved", device_map=device)), out)


def _settings(format: str) -> dict:
    return {k: v for k, v in FORMATS[format].items() if k != "format"}


@pytest.mark.parametrize("format", list(FORMATS))
def test_experts_in_one_tensor(format, tmp_path, device):
    """Named by overrides, a stack of experts is quantized after transformers has joined it."""
    a = ARCHITECTURES["mixtral"]
    full = a.build()
    full.save_pretrained(tmp_path / "full")
    names = {"*.experts.gate_up_proj": format, "*.experts.down_proj": format}
    model = _load(a.kind, tmp_path / "full", FewbitsConfig(**FORMATS[format], overrides=names), device)
    stacks = {name: p for name, p in _quantized(model).items() if "experts" in name}
    assert len(stacks) == 4
    assert {p.dim() for p in stacks.values()} == {3}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewbitsWarning)
        warnings.filterwarnings("ignore", "the model mixes formats", FewbitsWarning)
        own = fewbits.quantize(full.to(device), format, overrides=names, **_settings(format))
        assert same_tensors(model.state_dict(), own.state_dict())
        out = a.run(model)
        assert torch.equal(out, a.run(own))
        model.save_pretrained(tmp_path / "saved")
        recorded = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        assert recorded["quant_method"] == "fewbits", "bitsandbytes has no such stacks"
        for again in (
            _load(a.kind, tmp_path / "saved", device=device),
            fewbits.from_pretrained(tmp_path / "saved", device_map=device),
        ):
            assert same_tensors(again.state_dict(), model.state_dict())
            assert torch.equal(a.run(again), out)


def test_a_record_of_our_own_without_the_integration(tmp_path):
    """What bitsandbytes' record cannot describe is not loaded as something else."""
    a = ARCHITECTURES["llama"]
    model = fewbits.quantize(a.build(), "nf4", overrides={"model.embed_tokens": "int8"})
    with pytest.warns(FewbitsWarning, match="mixes formats"):
        fewbits.save(model, tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "fewbits" in done.stderr
    assert torch.equal(a.run(_load(a.kind, tmp_path)), a.run(model))
    plan = fewbits.plan(tmp_path, max_memory={"cpu": "1GB"})
    assert plan.total == sum(_stored(t) for t in [*model.parameters(), *model.buffers()])


def _stored(p: torch.Tensor) -> int:
    return sum(t.nbytes for t in p.inner_tensors.values()) if isinstance(p, QuantTensor) else p.nbytes


# ------------------------------------------------------------------------------------------------- bitsandbytes'


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        {"load_in_8bit": True, "llm_int8_threshold": 4.0},
    ],
    ids=["nf4-dq", "fp4", "nf4-storage", "nf4-compute", "int8"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_checkpoints_of_bitsandbytes(name, settings, tmp_path, device):
    a = ARCHITECTURES[name]
    a.build().save_pretrained(tmp_path / "full")
    peer = _load(a.kind, tmp_path / "full", transformers.BitsAndBytesConfig(**settings), device, dtype=torch.float32)
    peer.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewbitsWarning)
        model = _load(a.kind, tmp_path / "theirs", FewbitsConfig(), device)
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    here = {name: value.cpu() for name, value in model.state_dict().items()}
    assert _quantized(model)
    for key, value in stored.items():
        if key in here and "quant_state" not in key:
            assert torch.equal(here[key].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), key
    spec = next(iter(_quantized(model).values())).spec
    assert spec.threshold == settings.get("llm_int8_threshold", 6.0)
    assert spec.compute_dtype == (settings.get("bnb_4bit_compute_dtype", torch.float32) if "load_in_4bit" in settings
                                  else None)  # fmt: skip
    # as near to bitsandbytes' own result as its kernels' rounding, which is that of bf16 and of 8-bit activations
    exact, theirs, ours = a.run(dequantize(copy.deepcopy(model))), a.run(peer), a.run(model)
    assert (ours - exact).norm() <= max((theirs - exact).norm(), 1e-5 * exact.norm())


def test_without_fewbits_config_a_checkpoint_of_bitsandbytes_is_theirs(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    a = ARCHITECTURES["llama"]
    a.build().save_pretrained(tmp_path / "full")
    peer = _load(a.kind, tmp_path / "full", transformers.BitsAndBytesConfig(load_in_4bit=True))
    peer.save_pretrained(tmp_path / "theirs")
    again = _load(a.kind, tmp_path / "theirs")
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in again.modules())
    assert not _quantized(again)


def test_another_format_than_the_checkpoints_is_said(tmp_path):
    a = ARCHITECTURES["llama"]
    fewbits.save(fewbits.quantize(a.build(), "nf4"), tmp_path)
    with pytest.warns(FewbitsWarning, match="already quantized to nf4: it is loaded as it is, not as int8"):
        model = _load(a.kind, tmp_path, FewbitsConfig("int8"))
    assert {p.spec.format for p in _quantized(model).values()} == {"nf4"}


# ------------------------------------------------------------------------------------------------- use


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("name", WRITERS)
def test_generating(name, format, device):
    """Greedily, with a static cache, and with beams: what the dequantized model writes, in fp32."""
    a = ARCHITECTURES[name]
    model = fewbits.quantize(a.build().to(device), **{"config": format, **_settings(format)})
    plain = dequantize(copy.deepcopy(model))
    given = {"input_ids": a.batch(2, seed=3)["input_ids"].to(device), "max_new_tokens": 6, "min_new_tokens": 6}
    ways = [{}, {"num_beams": 3}]
    if not name.startswith("bloom"):  # whose attention has no static cache
        ways.append({"cache_implementation": "static", "disable_compile": True})
    for way in ways:
        ours = model.generate(**given, do_sample=False, **way)
        truth = plain.generate(**given, do_sample=False, **way)
        assert torch.equal(ours, truth), way


def test_dtype_and_modules_kept_in_fp32(tmp_path, device):
    a = ARCHITECTURES["t5"]
    a.build().save_pretrained(tmp_path)
    model = _load(a.kind, tmp_path, FewbitsConfig("int8"), device, dtype=torch.float16)
    quantized = _quantized(model)
    assert quantized
    assert {p.dtype for p in quantized.values()} == {torch.float16}
    wo = {name: p for name, p in model.named_parameters() if name.endswith("wo.weight")}
    assert {p.dtype for p in wo.values()} == {torch.float32}, "transformers keeps these in fp32 under fp16"
    assert not wo.keys() & quantized.keys()
    bf16 = _load(a.kind, tmp_path, FewbitsConfig("int8"), device, dtype=torch.bfloat16)
    assert wo.keys() <= _quantized(bf16).keys()
    assert torch.isfinite(a.run(model)).all()


def test_what_skips_and_keeps(tmp_path):
    a = ARCHITECTURES["llama"]
    a.build().save_pretrained(tmp_path)
    config = FewbitsConfig(
        "nf4", block_size=32, skip_modules=["lm_head", "model.layers.0.mlp"], overrides={"model.layers.1.mlp": "int8"},
        compute_dtype="bfloat16",
    )  # fmt: skip
    model = _load(a.kind, tmp_path, config)
    specs = {name: str(p.spec) for name, p in _quantized(model).items()}
    assert {n for n in specs if n.startswith("model.layers.0.mlp")} == set()
    assert {s for n, s in specs.items() if ".mlp." in n} == {"int8"}
    assert {s for n, s in specs.items() if ".self_attn." in n} == {"nf4-b32"}
    assert model.model.layers[0].self_attn.q_proj.weight.spec.compute_dtype is torch.bfloat16


def test_the_plain_model_again(tmp_path, device):
    a = ARCHITECTURES["gpt2"]
    a.build().save_pretrained(tmp_path)
    model = _load(a.kind, tmp_path, FewbitsConfig("nf4"), device)
    values = {name: p.dequantize() for name, p in _quantized(model).items()}
    out = a.run(model)
    plain = model.dequantize()
    assert not _quantized(plain)
    assert not any("fewbits" in type(m).__module__ for m in plain.modules())
    for name, value in values.items():
        assert torch.equal(plain.get_parameter(name), value)
    torch.testing.assert_close(a.run(plain), out, rtol=1e-4, atol=1e-4)
    assert not hasattr(plain.config, "quantization_config")
    assert not plain.is_loaded_in_4bit
    assert plain.get_memory_footprint() == sum(t.nbytes for t in [*plain.parameters(), *plain.buffers()])
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(a.run(_load(a.kind, tmp_path / "plain", device=device)), a.run(plain))


def test_counting_parameters_without_bitsandbytes(monkeypatch):
    """transformers imports bitsandbytes to count those of a model in 4 bits."""
    full = ARCHITECTURES["llama"].build()
    monkeypatch.setattr(fewbits.hf, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = fewbits.quantize(copy.deepcopy(full), "nf4")
    assert model.is_loaded_in_4bit
    for kwargs in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**kwargs) == full.num_parameters(**kwargs)
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_transformers_own_adapters(tmp_path):
    """``add_adapter`` and ``load_adapter`` of the model itself, on which fused LoRA works as well."""
    from peft import LoraConfig

    from fewbits.integrations.peft import fuse_lora

    a = ARCHITECTURES["llama"]
    a.build().save_pretrained(tmp_path / "full")
    model = _load(a.kind, tmp_path / "full", FewbitsConfig("nf4"))
    without = a.run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    out = a.run(model)
    assert not torch.allclose(out, without, atol=1e-2)
    torch.testing.assert_close(a.run(fuse_lora(model)), out, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = _load(a.kind, tmp_path / "full", FewbitsConfig("nf4"))
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(a.run(again), out)
    again.disable_adapters()
    assert torch.equal(a.run(again), without)


def test_a_device_map_knows_the_sizes(tmp_path):
    from fewbits.integrations.transformers import FewbitsHfQuantizer

    a = ARCHITECTURES["llama"]
    for format in FORMATS:
        config = FewbitsConfig(**FORMATS[format])
        quantizer = FewbitsHfQuantizer(config, pre_quantized=False)
        empty = a.build()
        quantizer._process_model_before_weight_loading(empty, dtype=torch.float32)
        planned = sum(quantizer.param_element_size(empty, n, p) * p.numel() for n, p in empty.named_parameters())
        real = fewbits.quantize(a.build(), config.config)
        assert planned == sum(_stored(p) for p in real.parameters())


def test_a_configuration_as_json():
    config = FewbitsConfig(
        "nf4",
        double_quant=True,
        compute_dtype=torch.bfloat16,
        skip_modules=["a", "b"],
        overrides={"c": "int8", "d": None},
    )
    again = FewbitsConfig.from_dict(json.loads(config.to_json_string()))
    assert again.config == config.config
    assert again.to_dict() == config.to_dict() == dict(config)
    assert FewbitsConfig().to_dict() == {"quant_method": "fewbits"}
    assert FewbitsConfig(config.config).config == config.config


def test_weights_that_are_not_in_the_checkpoint_stay_plain(tmp_path):
    """A layer that transformers makes anew is to be trained: it is not frozen in 4 bits."""
    a = ARCHITECTURES["bert"]
    a.build().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = "bert.pooler.dense.weight"
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    model = _load(a.kind, tmp_path, FewbitsConfig("nf4"))
    assert gone not in _quantized(model)
    assert model.get_parameter(gone).requires_grad
    assert torch.isfinite(a.run(model)).all()


# ------------------------------------------------------------------------------------------------- bad input


class _NothingToQuantize(transformers.PreTrainedModel):
    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()


def test_a_model_with_nothing_to_quantize(tmp_path):
    _NothingToQuantize(transformers.BertConfig(hidden_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="_NothingToQuantize has no layer to quantize"):
        _load(_NothingToQuantize, tmp_path, FewbitsConfig("nf4"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FewbitsConfig("nf5"), "unknown format 'nf5'"),
        (lambda: FewbitsConfig("nf4", double_quantize=True), "unknown setting: double_quantize"),
        (lambda: FewbitsConfig("nf4", dtype=torch.float16), "takes no dtype"),
        (lambda: FewbitsConfig("nf4", block_size=48), "block size 48"),
        (lambda: FewbitsConfig(fewbits.QuantizationConfig("nf4"), double_quant=True), "beside a QuantizationConfig"),
    ],
)
def test_a_configuration_that_cannot_be_meant(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_cannot_be_loaded(tmp_path, unchanged):
    a = ARCHITECTURES["llama"]
    full = a.build()
    full.save_pretrained(tmp_path)
    with unchanged(full, tmp_path):
        with pytest.raises(ConfigError, match="no format is given"):
            _load(a.kind, tmp_path, FewbitsConfig())
        with pytest.raises(UnsupportedError, match=r"fewbits\.from_pretrained"):
            a.kind.from_pretrained(tmp_path, quantization_config=FewbitsConfig("nf4"), device_map={"": "disk"})
        with pytest.raises(ConfigError, match="skip_modules: nothing in the model is named 'head'"):
            _load(a.kind, tmp_path, FewbitsConfig("nf4", skip_modules=["head"]))


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(format, bad, tmp_path):
    a = ARCHITECTURES["llama"]
    model = a.build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        _load(a.kind, tmp_path, FewbitsConfig(**FORMATS[format]))


def test_a_damaged_quantized_checkpoint(tmp_path):
    a = ARCHITECTURES["llama"]
    fewbits.save(fewbits.quantize(a.build(), "nf4"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    part = "model.layers.0.mlp.up_proj.weight"
    for key, value in {
        f"{part}.quant_state.bitsandbytes__nf4": torch.tensor([123, 125], dtype=torch.uint8),
        f"{part}.absmax": state[f"{part}.absmax"][:-1].clone(),
        f"{part}.absmax ": state[f"{part}.absmax"] * float("inf"),
        f"{part}.quant_map": state[f"{part}.quant_map"] * 2,
    }.items():
        save_file({**state, key.strip(): value}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(FewbitsError, match=r"up_proj\.weight") as raised:
            _load(a.kind, tmp_path)
        assert raised.value.file == str(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != f"{part}.absmax"}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks its absmax"):
        _load(a.kind, tmp_path)


def test_quantized_experts_that_transformers_would_join(tmp_path):
    """As bitsandbytes wrote them when each expert was a module of its own."""
    a = ARCHITECTURES["mixtral"]
    fewbits.quantize(a.build(), "nf4").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(k for k in state if k.endswith("experts.0.w1.weight"))
    spec = fewbits.QuantTensor.quantize(state.pop(name), "nf4")
    from fewbits.statedict import encode

    save_file({**state, **encode(name, spec)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="as part of another one"):
        _load(a.kind, tmp_path)


def test_an_old_transformers_is_told_apart(tmp_path):
    code = (
        "import sys, types; sys.modules['transformers.core_model_loading'] = None\n"
        "try:\n import fewbits.integrations.transformers\n"
        "except ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "needs transformers 5.17 or newer" in done.stdout
