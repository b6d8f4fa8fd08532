"""Which modules: heads by structure, patterns by whole names, and what the plan makes of both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewbits
from fewbits.decide import make_plan
from fewbits.devices import parse_bytes
from fewbits.errors import ConfigError
from fewbits.storage import choose_storage
from fewbits.structure import matches, output_heads
from fewbits.tensor import QuantTensor


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Stack(nn.Module):
    def __init__(self, heads: dict[str, nn.Module], tied: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(16)
        for name, head in heads.items():
            setattr(self, name, head)
        if tied:
            getattr(self, tied).weight = self.embed.weight


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.policy, self.value = nn.Linear(16, 4), nn.Linear(16, 1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 256), nn.Linear(256, 256), nn.Linear(256, 10)


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10)
        self.project = nn.Linear(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, 16, 4), Block(), Block())
        self.text = nn.Sequential(nn.Embedding(50, 24), Block(24), Block(24))
        self.vision_projection, self.text_projection = nn.Linear(16, 40), nn.Linear(24, 40)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (nn.Linear(4, 4), []),
        (Wrapper(nn.Linear(4, 4)), []),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), ["2"]),
        (Mlp(), ["fc3"]),
        (Stack({"lm_head": nn.Linear(16, 50)}), ["lm_head"]),
        (Stack({"lm_head": nn.Linear(16, 50, bias=False)}, tied="lm_head"), ["embed", "lm_head"]),
        (Wrapper(Stack({"lm_head": nn.Linear(16, 50)})), ["model.lm_head"]),
        (Stack({"policy": nn.Linear(16, 7), "value": nn.Linear(16, 1)}), ["policy", "value"]),
        (TwoHeads(), ["policy", "value"]),
        (HeadFirst(), ["head"]),
        (TwoTowers(), ["vision_projection", "text_projection"]),
        (Stack({}), []),
        (Stack({"heads": nn.ModuleList(nn.Linear(16, 50) for _ in range(3))}), ["heads.0", "heads.1", "heads.2"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "-".join(value) or "none",
)
def test_output_heads(model, heads):
    assert output_heads(model) == heads
    plan = choose_storage(model, fewbits.QuantizationConfig("nf4"))
    linears = {f"{n}.weight".lstrip(".") for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n, p in plan.items() if p.spec is not None} == linears - {f"{h}.weight" for h in heads}


def test_output_heads_of_transformers_models():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}
    llama = transformers.LlamaConfig(**small, intermediate_size=32)
    tied = transformers.LlamaConfig(**small, intermediate_size=32, tie_word_embeddings=True)
    gpt2 = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=40)
    bert = transformers.BertConfig(**small, intermediate_size=32)
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40)
    with fewbits.init_empty_weights():
        assert output_heads(transformers.LlamaForCausalLM(llama)) == ["lm_head"]
        assert output_heads(transformers.LlamaForCausalLM(tied)) == ["model.embed_tokens", "lm_head"]
        assert output_heads(transformers.LlamaModel(llama)) == []
        assert output_heads(transformers.LlamaForSequenceClassification(llama)) == ["score"]
        assert output_heads(transformers.GPT2LMHeadModel(gpt2)) == ["transformer.wte", "lm_head"]
        assert output_heads(transformers.BertForSequenceClassification(bert)) == ["classifier"]
        assert "lm_head" in output_heads(transformers.T5ForConditionalGeneration(t5))


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("h.2.mlp", "2", False),
        ("h.2.mlp", "h.2", True),
        ("h.20.mlp", "h.2", False),
        ("h.2.mlp.weight", "h.*.mlp", True),
        ("h.2.mlp_extra", "h.*.mlp", False),
        ("lm_head.weight", "lm_head", True),
        ("model.lm_head.weight", "lm_head", False),
        ("model.lm_head.weight", "*.lm_head", True),
        ("h.12.attn.q", "h.1[0-5]", True),
        ("lm_head", "lm_head", True),
    ],
)
def test_patterns_match_whole_names(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_a_pattern_that_names_nothing_is_an_error():
    model = Stack({"lm_head": nn.Linear(16, 50)})
    for field, value in (
        ("skip_modules", ["lm_haed"]),
        ("keep_in_fp32_modules", ["block"]),
        ("overrides", {"embeddings": "int8"}),
    ):
        with pytest.raises(ConfigError, match=field) as error:
            fewbits.quantize(model, "nf4", **{field: value})
        assert "nearest" in str(error.value)
    assert not any(isinstance(p, QuantTensor) for p in model.parameters())


def test_overrides_skips_and_fp32():
    model = Stack({"lm_head": nn.Linear(16, 50)}).to(torch.bfloat16)
    given = {
        "skip_modules": ["blocks.1", "lm_head"],
        "keep_in_fp32_modules": ["blocks.*.down"],
        "overrides": {"embed": "int8", "blocks.2.up": "fp4", "blocks.0.up": None},
    }
    before = {k: (v.copy()) for k, v in given.items()}
    fewbits.quantize(model, "nf4", dtype=torch.float16, **given)
    assert given == before
    kinds = {
        n: str(p.spec) if isinstance(p, QuantTensor) else str(p.dtype).removeprefix("torch.")
        for n, p in model.named_parameters()
    }
    assert kinds["embed.weight"] == "int8"
    assert kinds["blocks.2.up.weight"] == "fp4"
    assert kinds["blocks.0.up.weight"] == "float16"
    assert kinds["blocks.1.up.weight"] == "float16"
    assert {kinds[f"blocks.{i}.down.weight"] for i in range(3)} == {"float32"}
    assert kinds["lm_head.weight"] == kinds["norm.weight"] == "float16"
    assert sum(isinstance(p, QuantTensor) for p in model.parameters()) == 2


def test_tied_weights_get_one_fate():
    model = Stack({"lm_head": nn.Linear(16, 50, bias=False)}, tied="lm_head")
    fewbits.quantize(model, "nf4", overrides={"embed": "int8"})
    assert model.embed.weight is model.lm_head.weight
    assert str(model.embed.weight.spec) == "int8"
    ids = torch.randint(0, 50, (2, 3))
    torch.testing.assert_close(model.embed(ids), model.embed.weight.dequantize()[ids])
    x = torch.randn(2, 16)
    step = x.abs().amax() / 127 * model.embed.weight.dequantize().abs().sum(1).max()
    torch.testing.assert_close(model.lm_head(x), x @ model.embed.weight.dequantize().T, rtol=0, atol=float(step))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_planned_bytes_are_what_the_model_takes(format):
    config = fewbits.QuantizationConfig(format, overrides={"embed": "int8"}, dtype=torch.float16)
    model = Stack({"lm_head": nn.Linear(16, 50)})
    planned = make_plan(model, choose_storage(model, config), "cpu").total
    report = fewbits.summary(fewbits.quantize(model, config))
    assert planned == report.total.nbytes + report.buffer_bytes
    assert report.total.parameters == sum(p.numel() for p in model.parameters())
    assert "int8" in str(report)
    assert f"{report.total.nbytes:,}" in str(report)


def test_bytes():
    assert [parse_bytes(s, "x") for s in (5, "5", "1KB", "1KiB", "0.5GB", "10GiB", "2 MB")] == [
        5, 5, 1000, 1024, 500_000_000, 10 * 2**30, 2_000_000,
    ]  # fmt: skip
    for bad in ("lots", -1, None, "5XB", True):
        with pytest.raises(ConfigError, match="max_memory"):
            parse_bytes(bad, "max_memory")
