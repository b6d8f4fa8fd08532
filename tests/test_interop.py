"""Checkpoints both ways with the released transformers and bitsandbytes, and transformers' models of several kinds."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

import fewbits
from fewbits.tensor import QuantTensor

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True),
    "llama-tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=128, n_positions=64),
    "opt": transformers.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, word_embed_proj_dim=64
    ),
}
FORMATS = {
    "int8": ({"config": "int8"}, {"load_in_8bit": True}),
    "nf4": ({"config": "nf4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-dq": (
        {"config": "nf4", "double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "fp4": ({"config": "fp4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "nf4-bf16-storage": (
        {"config": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    ),
}
# bitsandbytes says these of itself on a CPU
pytestmark = [
    pytest.mark.usefixtures("without_the_integration"),
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def _model(name: str) -> transformers.PreTrainedModel:
    kind = {
        "gpt2": transformers.GPT2LMHeadModel,
        "opt": transformers.OPTForCausalLM,
    }.get(name, transformers.LlamaForCausalLM)
    model = kind(CONFIGS[name]).eval()
    with torch.no_grad():
        for p in model.parameters():  # the initial weights are so small that every logit is near 0
            if p.dim() > 1:
                p.mul_(3)
    return model


def _peer(folder: Path, device: str, **settings) -> transformers.PreTrainedModel:
    wanted = {"quantization_config": transformers.BitsAndBytesConfig(**settings)} if settings else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": device}, dtype=torch.float32, **wanted
    )
    return model.eval()


def _logits(model: torch.nn.Module, device: str) -> torch.Tensor:
    ids = torch.arange(2 * 20).view(2, 20).mul(7).remainder(128).to(device)
    with torch.no_grad():
        return model(ids).logits.float()


def _bytes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.cpu() for k, v in model.state_dict().items()}


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, format: str) -> None:
    """Within the rounding of bitsandbytes' kernels, and nearer to each other than to the unquantized logits.

    With AVX-512 its 4-bit CPU kernel computes in bf16, scales included (2^-8 at each of a block's seven layers); its
    int8 kernels round x to 8 bits as ours do.
    """
    between, quantization = (ours - theirs).norm(), (theirs - exact).norm()
    assert between <= exact.norm() * 7 * 2.0**-8
    if format != "int8":
        assert between <= 0.25 * quantization


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_theirs_load_here(name, format, tmp_path, device):
    model = _model(name)
    model.save_pretrained(tmp_path / "full")
    peer = _peer(tmp_path / "full", device, **FORMATS[format][1])
    peer.save_pretrained(tmp_path / "theirs")
    ours = fewbits.from_pretrained(tmp_path / "theirs", device_map=device, compute_dtype=torch.float32) \
        if format != "int8" else fewbits.from_pretrained(tmp_path / "theirs", device_map=device)  # fmt: skip
    quantized = [p for p in ours.parameters() if isinstance(p, QuantTensor)]
    assert quantized
    assert {p.spec.format for p in quantized} == {FORMATS[format][0]["config"]}
    stored, here = _bytes(peer), _bytes(ours)
    for key, value in stored.items():
        if "quant_state" not in key and key in here:
            assert torch.equal(here[key].flatten().view(torch.uint8), value.contiguous().flatten().view(torch.uint8)), (
                key
            )
    exact = _logits(model.to(device), device)
    _assert_close(_logits(ours, device), _logits(peer, device), exact, format)


@pytest.mark.parametrize("format", [f for f in FORMATS if "storage" not in f])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_ours_load_there(name, format, tmp_path, device):
    model = _model(name)
    model.save_pretrained(tmp_path / "full")
    ours = fewbits.from_pretrained(tmp_path / "full", device_map=device, **FORMATS[format][0])
    fewbits.save(ours, tmp_path / "ours", max_shard_size="60KB")
    peer = _peer(tmp_path / "ours", device)
    import bitsandbytes as bnb

    kind = bnb.nn.Linear8bitLt if format == "int8" else bnb.nn.Linear4bit
    replaced = {n for n, m in peer.named_modules() if isinstance(m, kind)}
    assert replaced == {n for n, m in ours.named_modules() if isinstance(getattr(m, "weight", None), QuantTensor)}
    exact = _logits(model.to(device), device)
    _assert_close(_logits(ours, device), _logits(peer, device), exact, format)
    again = fewbits.from_pretrained(tmp_path / "ours", device_map=device)
    assert torch.equal(_logits(again, device), _logits(ours, device))


@pytest.mark.parametrize("format", ["int8", "nf4-dq"])
def test_the_same_bytes_from_the_same_weights(format, tmp_path, device):
    """Quantizing here and there gives the same state dict, key by key."""
    _model("gpt2").save_pretrained(tmp_path)
    peer = _bytes(_peer(tmp_path, device, **FORMATS[format][1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fewbits.FewbitsWarning)
        ours = _bytes(fewbits.from_pretrained(tmp_path, device_map=device, **FORMATS[format][0]))
    assert set(ours) == set(peer)
    for key, value in peer.items():
        assert value.dtype == ours[key].dtype, key
        if "quant_state" in key:
            assert bytes(value.tolist()) == bytes(ours[key].tolist())
        else:
            assert torch.equal(ours[key].flatten(), value.flatten()), key


def test_generation_settings_and_mode(tmp_path):
    model = _model("llama")
    model.generation_config.max_new_tokens = 7
    model.generation_config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    ours = fewbits.from_pretrained(tmp_path, "nf4", device_map="cpu")
    assert ours.generation_config.max_new_tokens == 7
    assert not ours.training
    assert ours.generate(torch.tensor([[1, 2, 3]]), do_sample=False).shape[1] <= 10
    fewbits.save(ours, tmp_path / "saved")
    assert fewbits.from_pretrained(tmp_path / "saved").generation_config.max_new_tokens == 7
    assert ours.config.quantization_config["bnb_4bit_quant_type"] == "nf4"
    ours.save_pretrained(tmp_path / "theirs")
    assert torch.equal(
        _logits(fewbits.from_pretrained(tmp_path / "theirs", device_map="cpu"), "cpu"), _logits(ours, "cpu")
    )


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_dtypes_of_the_rest(format, dtype, compute_dtype, tmp_path, device):
    _model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    settings = {"dtype": dtype, "compute_dtype": compute_dtype, "device_map": device}
    model = fewbits.from_pretrained(tmp_path, format, **settings)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.tensor([[1, 2, 3]], device=device)).logits.dtype == dtype
    fewbits.save(model, tmp_path / "saved")
    again = fewbits.from_pretrained(tmp_path / "saved", device_map=device)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert {p.spec for p in again.parameters() if isinstance(p, QuantTensor)} == {
        p.spec for p in model.parameters() if isinstance(p, QuantTensor)
    }
    assert torch.equal(_logits(again, device), _logits(model, device))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "nf4", "nf4-dq"])
@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(**SMALL, max_position_embeddings=64, num_labels=32),
        transformers.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=128),
        transformers.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=32, patch_size=8, num_labels=32
        ),
        transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
        transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128),
    ],
    ids=lambda c: c.model_type,
)
def test_other_architectures(config, format, tmp_path):
    kind = {
        "bert": transformers.BertForSequenceClassification,
        "t5": transformers.T5ForConditionalGeneration,
        "vit": transformers.ViTForImageClassification,
        "qwen2": transformers.Qwen2ForCausalLM,
        "bloom": transformers.BloomForCausalLM,
    }[config.model_type]
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    ids = {"input_ids": torch.arange(1, 9)[None]}
    inputs = {"t5": ids | {"decoder_input_ids": ids["input_ids"]}, "vit": {"pixel_values": torch.randn(1, 3, 32, 32)}}
    given = inputs.get(config.model_type, ids)
    quantized = fewbits.from_pretrained(tmp_path, device_map="cpu", **FORMATS[format][0])
    with torch.no_grad():
        exact, out = model(**given).logits, quantized(**given).logits
        assert (out - exact).norm() <= 0.35 * exact.norm()  # of many logits: two may be nearly 0 both
        fewbits.save(quantized, tmp_path / "saved")
        assert torch.equal(fewbits.from_pretrained(tmp_path / "saved", device_map="cpu")(**given).logits, out)
