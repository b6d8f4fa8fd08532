"""Models over two GPUs: the same numbers as on one. Collected where there are two."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits.offload import devices_of
from models import GPT, GPTConfig, random_transformers

SETTINGS = ({"config": None}, {"config": "nf4", "double_quant": True}, {"config": "int8"})


@pytest.fixture
def folder(tmp_path, gpu):
    random_transformers("llama", width=64).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: str(s["config"]))
@pytest.mark.parametrize("strategy", ["balanced", "balanced_low_0", "sequential", "auto", "halves", "streams on both"])
def test_the_same_numbers(strategy, settings, folder):
    whole = fewbits.from_pretrained(folder, device_map=0, **settings)
    ids = torch.randint(2, 50, (2, 9), device="cuda:0")
    size = fewbits.summary(whole).total.nbytes
    if strategy == "halves":
        given = {"device_map": {"": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": "cuda:1"}}
    elif strategy == "streams on both":
        given = {"device_map": {"": 0, "model.layers.0": "cpu", "model.norm": 1, "lm_head": 1, "model.layers.1": "cpu"}}
    else:
        room = 2 * size if strategy == "balanced" else size * 3 // 4
        given = {"device_map": strategy, "max_memory": {0: room, 1: room, "cpu": 0, "disk": 0}}
    spread = fewbits.from_pretrained(folder, offload="stream", **given, **settings)
    places = set(devices_of(spread).values())
    assert "cuda:1" in places
    with torch.no_grad():
        expected = whole(ids).logits
        for inputs in (ids, ids.cpu(), ids.to("cuda:1")):
            for _ in range(2):
                found = spread(inputs).logits
                assert found.device == inputs.device
                assert torch.equal(found.to(0), expected)
    text = whole.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(spread.generate(ids, max_new_tokens=6, do_sample=False), text)


def test_a_block_in_two_halves(tmp_path, gpu):
    """What a module needs from another GPU is brought for the call."""
    config = GPTConfig(n_layer=3)
    torch.save(GPT(config).state_dict(), tmp_path / "m.pt")
    whole = fewbits.load(lambda: GPT(config), tmp_path / "m.pt", "nf4", device_map=0)
    given = {"": 0, "transformer.h.1.mlp": 1, "transformer.h.2": "cuda:1", "lm_head": 1}
    spread = fewbits.load(lambda: GPT(config), tmp_path / "m.pt", "nf4", device_map=given)
    ids = torch.randint(0, 50, (2, 9), device="cuda:0")
    with torch.no_grad():
        assert torch.equal(spread(ids), whole(ids))


def test_gradients_cross(folder):
    found = []
    for device_map in (0, {"": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}):
        model = fewbits.from_pretrained(folder, "nf4", device_map=device_map)
        model.model.layers[0].input_layernorm.weight.requires_grad_()
        torch.manual_seed(0)
        ids = torch.randint(2, 50, (2, 9)).cuda()
        model(ids).logits.square().mean().backward()
        found.append(model.model.layers[0].input_layernorm.weight.grad)
    assert torch.equal(*found)
