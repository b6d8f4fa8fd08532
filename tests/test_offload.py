"""Running with parts in host memory and on disk: the same numbers as with all of the model where it runs.

The truth is the same checkpoint loaded onto one device: the same kernels work on the same bytes there, so that results
and gradients are equal to the last bit.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fewbits
from fewbits import FewbitsWarning, init_empty_weights, offload
from fewbits.config import as_config
from fewbits.decide import make_plan
from fewbits.errors import CheckpointError, ConfigError, UnsupportedError
from fewbits.homes import Extent, FileHome, joined
from fewbits.modules import quantize_parameter
from fewbits.offload import Offload, PlacedForward, devices_of
from fewbits.spread import Spread
from fewbits.storage import choose_storage, owners_of
from models import GPT, GPTConfig, TiedGPT, random_transformers, same_tensors

MODELS = ("llama", "llama-tied", "gpt2", "opt")
FORMATS = ({"config": None}, {"config": "nf4", "double_quant": True}, {"config": "fp4"}, {"config": "int8"})


@pytest.fixture
def folder(tmp_path):
    """A function that saves a transformers model of random weights, and gives its folder."""

    def save(name: str) -> Path:
        path = tmp_path / name
        if not path.exists():
            random_transformers(name, seed=len(name)).save_pretrained(path)
        return path

    return save


def away(device: str) -> list[str]:
    """Where parts of a model may lie that runs on the device."""
    return ["disk"] if device == "cpu" else ["cpu", "disk"]


def blocks_name(model: nn.Module) -> str:
    return next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1)


def is_offloaded(model: nn.Module) -> bool:
    return any(isinstance(module.__dict__.get("forward"), PlacedForward) for module in model.modules())


def ids_for(device: str, length: int = 9) -> torch.Tensor:
    return torch.randint(2, 50, (2, length), device=device)


def pair(path: Path, device: str, device_map, **kwargs):
    """The model on one device, and spread."""
    format = kwargs.pop("config", "nf4")
    whole = fewbits.from_pretrained(path, format, device_map=device, **kwargs)
    spread = fewbits.from_pretrained(path, format, device_map=device_map, offload="stream", **kwargs)
    return whole, spread


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("settings", FORMATS, ids=lambda s: str(s["config"]))
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_wherever_it_lies(name, settings, device, folder):
    path = folder(name)
    whole = fewbits.from_pretrained(path, device_map=device, **settings)
    ids = ids_for(device)
    with torch.no_grad():
        expected = whole(ids).logits
    blocks = blocks_name(whole)
    one = next(n for n, m in whole.named_modules() if n.startswith(f"{blocks}.1.") and isinstance(m, nn.Linear)) if (
        name != "gpt2"
    ) else f"{blocks}.1.mlp"  # fmt: skip
    for place in away(device):
        for there in ("*", blocks, f"{blocks}.1", one):  # the longer name counts: with "*", all of it is away
            given = {"": device, there: place}
            spread = fewbits.from_pretrained(path, device_map=given, offload="stream", **settings)
            assert is_offloaded(spread)
            assert place in devices_of(spread).values()
            with torch.no_grad():
                for _ in range(3):  # the first call fetches what the second finds ahead of time
                    got = spread(ids).logits
                    assert got.device == expected.device
                    assert torch.equal(got, expected), (place, there)


def test_generate(device, folder):
    path = folder("llama")
    whole, spread = pair(path, device, {"": device, "model.layers": away(device)[-1]})
    ids = ids_for(device)
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        expected = whole.generate(ids, max_new_tokens=8, do_sample=False, **settings)
        assert torch.equal(spread.generate(ids, max_new_tokens=8, do_sample=False, **settings), expected)


@pytest.mark.parametrize("build", [GPT, TiedGPT])
def test_a_model_of_ones_own(build, device, tmp_path):
    config = GPTConfig(n_layer=4)
    torch.save(build(config).state_dict(), tmp_path / "m.pt")  # read through torch's own mapping
    ids = ids_for(device)
    for format in (None, "nf4", "int8"):
        whole = fewbits.load(lambda: build(config), tmp_path / "m.pt", format, device_map=device)
        for place in away(device):
            given = {"": device, "transformer.h.[13]": place, "transformer.wte": place, "lm_head": place}
            spread = fewbits.load(
                lambda: build(config), tmp_path / "m.pt", format, device_map=given, offload="stream",
                offload_folder=tmp_path / "new" / "folder",
            )  # fmt: skip
            with torch.no_grad():
                assert torch.equal(spread(ids), whole(ids))
                assert torch.equal(spread(ids=ids), whole(ids))
            assert place == "cpu" or not list((tmp_path / "new" / "folder").iterdir())  # what is there has no name


def test_computing_where_it_lies(device, folder):
    """Blocks on the CPU run there with offload="compute"; sums in another order, so close and not equal."""
    path = folder("llama")
    for place in ("cpu", "disk"):
        given = {"": device, "model.layers.1": place}
        spread = fewbits.from_pretrained(path, "nf4", device_map=given, offload="compute")
        seen = []
        spread.model.layers[1].mlp.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.device.type))
        whole = fewbits.from_pretrained(path, "nf4", device_map=device)
        ids = ids_for(device)
        with torch.no_grad():
            torch.testing.assert_close(spread(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)
        assert set(seen) == {"cpu"}


@pytest.mark.parametrize("faster", [False, True])
def test_auto_does_what_was_measured_to_be_faster(faster, device, folder, monkeypatch):
    measured = []
    monkeypatch.setattr("fewbits.spread.computes_faster", lambda entries, device: (measured.append(device), faster)[1])
    path = folder("llama")
    whole, _ = pair(path, device, {"": device})
    spread = fewbits.from_pretrained(path, "nf4", device_map={"": device, "model.layers": away(device)[0]})
    seen = []
    spread.model.layers[1].mlp.register_forward_hook(lambda m, a, out: seen.append(out.device.type))
    ids = ids_for(device)
    with torch.no_grad():
        torch.testing.assert_close(spread(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(measured) == (device == "cuda")  # once for both layers, which are alike; from disk there is no choice
    assert seen == ["cpu" if faster else device]


def test_a_plan_for_a_gpu_that_is_not_there(folder):
    """Also where nothing lies on it and all of it would stream there."""
    plan = fewbits.plan(folder("llama"), "nf4", device_map="cpu")
    plan.runs_on = "cuda:99"
    with pytest.raises(ConfigError, match="cuda:99"):
        fewbits.from_pretrained(folder("llama"), "nf4", device_map=plan)


def test_quantizing_in_place_spreads_as_well(device, tmp_path):
    torch.manual_seed(torch.seed() % 1000)
    model = GPT(GPTConfig(n_layer=3))
    whole = fewbits.quantize(copy.deepcopy(model), "nf4", device_map=device)
    given = {"": device, "transformer.h": away(device)[-1]}
    spread = fewbits.quantize(model, "nf4", device_map=given, offload="stream", offload_folder=tmp_path)
    assert spread is model
    ids = ids_for(device)
    with torch.no_grad():
        assert torch.equal(spread(ids), whole(ids))


class Residual(nn.Module):
    """Token and position embeddings added, residual blocks, a norm and a head, which may be tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 64), nn.Embedding(9, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(7)
        )
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 50, bias=False)
        self.register_buffer("order", torch.arange(9))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(self.order)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_operands_meet_on_one_device(tied, format):
    """Over GPUs that are not there: tensors without data, which all the same refuse to meet on different devices."""
    half = make_plan(Residual(tied), choose_storage(Residual(tied), as_config(format)), "cpu").total // 2 + 20_000
    maps = [
        *(
            (strategy, dict.fromkeys(range(3), half))
            for strategy in ("balanced", "balanced_low_0", "sequential", "auto")
        ),
        ({"": 0, "blocks.[3-6]": 1, "head": 1, "norm": "cuda:1"} if not tied else {"": 0, "blocks.[3-6]": 1}, None),
        ({"": 1, "blocks.[246]": 0, "norm": 2}, None),
    ]
    for device_map, max_memory in maps:
        with init_empty_weights():
            model = Residual(tied)
        storage = choose_storage(model, as_config(format))
        plan = make_plan(model, storage, device_map, max_memory=max_memory)
        assert len(set(plan.devices.values())) > 1
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            spread = Spread(model, storage, plan)
            for owner, *others in owners_of(model):
                kept, parameter = storage[owner.path], owner.module._parameters[owner.name]
                device = spread.works_on(owner.path, ready=kept.spec is None)
                value = torch.empty(parameter.shape, device=device)
                if kept.spec is not None:
                    value = quantize_parameter(owner.module, owner.name, value, kept.spec, known_finite=True)
                spread.put([owner, *others], value, requires_grad=False)
            spread.finish()
            assert {str(p.device) for p in model.parameters()} == set(plan.devices.values())
            for device in ("cpu", "cuda:0", "cuda:2"):
                out = model(torch.zeros(2, 9, dtype=torch.long, device=device))
                assert (str(out.device), out.shape) == (device, (2, 9, 50))


# ------------------------------------------------------------------------------------------------- ways to call


class Odd(nn.Module):
    """Blocks called in an order that changes, twice, or not at all; one shared; a parameter of its own around them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(64, 64) / 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(5)])
        self.again = self.blocks[1]
        self.order = [0, 1, 2, 3, 4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.scale
        for i in self.order:
            x = x + self.blocks[i](x)
        return self.again(x)


@pytest.fixture
def odd(tmp_path):
    torch.save(Odd().state_dict(), tmp_path / "odd.pt")

    def build(device, **kwargs):
        given = {"": device, "blocks": away(device)[-1], "scale": away(device)[0]}
        whole = fewbits.load(Odd, tmp_path / "odd.pt", "nf4", device_map=device, skip_modules=[])
        spread = fewbits.load(
            Odd, tmp_path / "odd.pt", "nf4", device_map=given, skip_modules=[], offload="stream", **kwargs
        )
        return whole, spread

    return build


def test_any_order(odd, device):
    whole, spread = odd(device)
    x = torch.randn(3, 64, device=device)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 3, 3], [], [1, 0, 1, 0], [2], [0, 4, 1, 3, 2]):
        whole.order = spread.order = order
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(spread(x), whole(x)), order


def test_several_threads_run_one_model(odd, device):
    whole, spread = odd(device)
    inputs = [torch.randn(n, 64, device=device) for n in range(1, 7)]
    with torch.no_grad():
        expected = [whole(x) for x in inputs]
    wrong: list[object] = []

    def run(i: int) -> None:
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(15):
                out = spread(inputs[i])
                if stream is not None:
                    stream.synchronize()
                if not torch.equal(out, expected[i]):
                    wrong.append(i)

    if device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p.device.type == "cpu" for n, p in spread.named_parameters() if n.startswith("blocks"))


def test_a_model_that_is_dropped_is_freed_at_once(odd, device):
    _, spread = odd(device)
    with torch.no_grad():
        spread(torch.randn(3, 64, device=device))
    gone = [weakref.ref(spread), weakref.ref(spread.blocks[1].forward._offload)]
    gc.disable()
    try:
        del spread
        for _ in range(100):  # a transfer that is under way ends first
            if gone[1]() is not None:
                time.sleep(0.05)
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_inference_mode_first(odd, device):
    whole, spread = odd(device)
    x = torch.randn(3, 64, device=device)
    with torch.inference_mode():
        assert torch.equal(spread(x), whole(x))
    with torch.no_grad():
        assert torch.equal(spread(x), whole(x))


def test_hooks_of_the_users_own(odd, device):
    whole, spread = odd(device)
    calls = []
    for model in (whole, spread):
        model.blocks[2].register_forward_pre_hook(lambda m, a: calls.append("before"))
        model.blocks[2].register_forward_hook(lambda m, a, out: out * 2)
        model.blocks[2][0].register_forward_hook(lambda m, a, out: calls.append(m.weight.device.type))
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(spread(x), whole(x))
    assert calls == ["before", device, "before", device] or calls == ["before", device] * 2


def test_an_error_in_a_block_leaves_the_model_as_it_was(odd, device):
    whole, spread = odd(device)
    homes = {n: id(p) for n, p in spread.named_parameters()}

    def fail(module, args):
        raise RuntimeError("mine")

    handle = spread.blocks[3][0].register_forward_pre_hook(fail)
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="mine"):
            spread(x)
        assert {n: id(p) for n, p in spread.named_parameters()} == homes
        handle.remove()
        assert torch.equal(spread(x), whole(x))


def test_compiled(odd, device):
    whole, spread = odd(device)
    x = torch.randn(3, 64, device=device)
    compiled = torch.compile(spread, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), whole(x))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # names that older ones need
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_training_adapters_gives_the_same_gradients(format, checkpointing, device, folder):
    from peft import LoraConfig, get_peft_model

    path = folder("llama")
    found, ids = [], ids_for(device, 7)
    for model in pair(path, device, {"": device, "model.layers": away(device)[-1], "lm_head": "cpu"}, config=format):
        torch.manual_seed(1)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.train()
        for _ in range(2):
            loss = tuned(input_ids=ids, labels=ids).loss
            loss.backward()
        found.append({n: p.grad.cpu() for n, p in tuned.named_parameters() if p.requires_grad})
        assert all(grad.abs().sum() > 0 for grad in found[-1].values())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_trained_parameters_at_home_get_their_gradient(odd, device):
    whole, spread = odd(device)
    grads = []
    for model in (whole, spread):
        model.blocks[1][0].bias.requires_grad_()
        model.zero_grad()
        x = torch.ones(3, 64, device=device)
        model(x).square().sum().backward()
        grads.append(model.blocks[1][0].bias.grad.cpu())
        assert model.blocks[1][0].bias.grad.device == model.blocks[1][0].bias.device
    assert torch.equal(*grads)


def test_nothing_of_a_slot_is_saved(odd, device):
    """Every block is saved for backward, and there is room for two: each is fetched again, with the right bytes."""
    whole, spread = odd(device)
    whole.order = spread.order = [0, 1, 2, 3, 4, 0, 2, 4]
    x = torch.randn(3, 64, device=device, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    whole(x).square().sum().backward()
    out = spread(y).square().sum()
    with torch.no_grad():
        spread(torch.randn(2, 64, device=device))  # overwrites the slots
    out.backward()
    assert torch.equal(x.grad, y.grad)


# ------------------------------------------------------------------------------------------------- at home


def test_state_dict_and_saving(device, folder, tmp_path):
    path = folder("llama")
    for place in away(device):
        whole, spread = pair(path, device, {"": device, "model.layers": place}, double_quant=True)
        on_cpu = {k: v.cpu() for k, v in whole.state_dict().items()}
        assert same_tensors({k: v.cpu() for k, v in spread.state_dict().items()}, on_cpu)
        with torch.no_grad():
            spread(ids_for(device))
        torch.save(spread.state_dict(), tmp_path / "saved.pt")
        assert same_tensors(torch.load(tmp_path / "saved.pt", map_location="cpu"), on_cpu)
        save_file(spread.state_dict(), tmp_path / "saved.safetensors")
        assert same_tensors(load_file(tmp_path / "saved.safetensors"), on_cpu)
        fewbits.save(whole, tmp_path / "whole")
        fewbits.save(spread, tmp_path / "spread")
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "spread" / file).read_bytes()


def test_a_saved_checkpoint_is_the_home_itself(device, folder, tmp_path, monkeypatch):
    whole = fewbits.from_pretrained(folder("llama"), "nf4", device_map=device, double_quant=True)
    fewbits.save(whole, tmp_path / "saved")
    sizes = []
    make = FileHome.__init__
    monkeypatch.setattr(FileHome, "__init__", lambda self, f, n: (sizes.append(n), make(self, f, n))[1])
    spread = fewbits.from_pretrained(tmp_path / "saved", device_map={"": device, "model.layers": "disk"})
    assert not sizes  # no second copy
    ids = ids_for(device)
    with torch.no_grad():
        expected = whole(ids).logits
        assert torch.equal(spread(ids).logits, expected)
        # replaced by another checkpoint, even deleted: this model keeps its own
        fewbits.save(fewbits.from_pretrained(folder("llama-tied"), "int8", device_map="cpu"), tmp_path / "saved")
        assert torch.equal(spread(ids).logits, expected)
        (tmp_path / "saved" / "model.safetensors").unlink()
        assert torch.equal(spread(ids).logits, expected)
        fewbits.save(spread, tmp_path / "third")
    again = fewbits.from_pretrained(tmp_path / "third", device_map=device)
    assert same_tensors(again.state_dict(), whole.state_dict())


def test_a_checkpoint_that_is_written_to_is_noticed(device, folder, tmp_path):
    fewbits.save(fewbits.from_pretrained(folder("llama"), "nf4", device_map="cpu"), tmp_path)
    spread = fewbits.from_pretrained(
        tmp_path,
        device_map={"": "disk"}
        if device == "cpu"
        else {"": device, **dict.fromkeys(("model.layers", "lm_head", "model.norm"), "disk")},
    )
    file = tmp_path / "model.safetensors"
    ids = ids_for(device)
    with torch.no_grad():
        spread(ids)
        with open(file, "r+b") as handle:
            handle.seek(-5, os.SEEK_END)
            handle.write(b"x")
        os.utime(file, ns=(1, 1))
        with contextlib.suppress(CheckpointError):
            spread(ids)  # what was fetched ahead is from before
        with pytest.raises(CheckpointError, match="replaced or cut off") as caught:
            spread(ids)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("what", ["data", "copy_", "a view of the state dict"])
def test_one_quantized_weight_changed_in_a_checkpoint(what, device, folder, tmp_path):
    """No other write may tell of it."""
    fewbits.save(fewbits.from_pretrained(folder("llama"), "nf4", device_map="cpu"), tmp_path / "saved")
    whole, spread = pair(
        tmp_path / "saved", device, {"": device, "model.layers": "disk", "lm_head": "disk"}, config=None
    )
    ids = ids_for(device)
    with torch.no_grad():
        before = spread(ids).logits
        for model in (whole, spread):
            weight = model.model.layers[1].mlp.up_proj.weight
            if what == "data":
                weight.data += 0.1 * torch.ones(weight.shape, device=weight.device)
            elif what == "copy_":
                weight.copy_(weight.dequantize() * 2)
            else:
                model.state_dict()["model.layers.1.mlp.up_proj.weight"].fill_(0x35)
        expected = whole(ids).logits
        assert not torch.equal(before, expected)
        for _ in range(2):
            assert torch.equal(spread(ids).logits, expected)


@pytest.mark.parametrize("alone", [False, True], ids=["the model", "a block"])
def test_what_is_changed_while_a_slot_holds_it(alone, device, tmp_path):
    """With no more than two blocks off the device nothing has to be fetched twice, but for what was written to."""

    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(600, 600), nn.LayerNorm(600), nn.Linear(600, 600)) for _ in range(2))
        )

    torch.save(build().state_dict(), tmp_path / "m.pt")
    settings = {"overrides": {"0.0": "nf4", "1.0": "int8"}}  # the others stay plain, of more than a MiB
    x = torch.randn(3, 600, device=device)
    for place in away(device):
        whole = fewbits.load(build, tmp_path / "m.pt", device_map=device, **settings)
        spread = fewbits.load(
            build, tmp_path / "m.pt", device_map={"": device, "*": place}, offload="stream", **settings
        )
        call = (lambda model: model[0](x)) if alone else (lambda model: model(x))
        changes = [
            lambda model: model[0][1].weight.data.mul_(2),  # small and plain, without a trace
            lambda model: model[0][2].weight.data.add_(1),  # large
            lambda model: model[0][0].weight.data.mul_(2),
            lambda model: model[0][0].weight.copy_(torch.ones(600, 600)),
            lambda model: model[0][0].bias.zero_(),
        ]
        with torch.no_grad():
            assert torch.equal(call(spread), call(whole))
            for change in changes:
                before = call(whole)
                for model in (whole, spread):
                    change(model)
                assert not torch.equal(call(whole), before)
                for _ in range(2):
                    assert torch.equal(call(spread), call(whole))


@pytest.mark.parametrize("own_file", [True, False], ids=["offload file", "checkpoint"])
def test_what_is_changed_at_home_runs(own_file, device, folder, tmp_path):
    """Written to in place: a quantized weight, a plain one, one through ``data``; a state dict loaded."""
    path = folder("llama")
    if not own_file:
        fewbits.save(fewbits.from_pretrained(path, "nf4", device_map="cpu"), tmp_path / "saved")
        path = tmp_path / "saved"
    format = "nf4" if own_file else None
    whole, spread = pair(path, device, {"": device, "model.layers": "disk", "lm_head": "disk"}, config=format)
    original = {k: v.clone() for k, v in whole.state_dict().items()}
    bytes_before = {p: p.read_bytes() for p in path.iterdir()}
    ids = ids_for(device)
    with torch.no_grad():
        before = spread(ids).logits
        for model in (whole, spread):
            layer = model.model.layers[1]
            weight = layer.mlp.up_proj.weight
            weight.data += torch.ones(weight.shape, device=weight.device) / 10
            layer.input_layernorm.weight.mul_(2)
            model.lm_head.weight.data.mul_(3)
        expected = whole(ids).logits
        assert not torch.equal(before, expected)
        for _ in range(2):
            assert torch.equal(spread(ids).logits, expected)
        spread.load_state_dict(original)
        assert torch.equal(spread(ids).logits, before)
    assert {p: p.read_bytes() for p in path.iterdir()} == bytes_before


def test_summary_says_where_it_lies(folder):
    spread = fewbits.from_pretrained(folder("llama"), "nf4", device_map={"": "cpu", "model.layers": "disk"})
    rows = {row.module: row.device for row in fewbits.summary(spread).rows}
    assert rows["model.layers.0"] == "disk"
    assert rows["lm_head"] == "cpu"


def test_a_spread_model_gives_its_structure(folder, device):
    """An offloaded model may serve as the structure to load another by."""
    path = folder("llama")
    whole, spread = pair(path, device, {"": device, "model.layers": "disk"})
    again = fewbits.load(spread, path, "nf4", device_map=device)
    assert not is_offloaded(again)
    ids = ids_for(device)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(ids).logits)
        assert torch.equal(spread(ids).logits, whole(ids).logits)


def test_a_plan_of_ones_own_machine(device, folder):
    """Planned for budgets, printed, edited, saved, and loaded by; what has to be on disk is said."""
    path = folder("llama")
    budgets = {"cpu": "28KB"} if device == "cpu" else {0: "22KB", "cpu": "8KB"}
    plan = fewbits.plan(path, "nf4", max_memory=budgets, offload="stream")
    assert "disk" in plan.devices.values()
    whole = fewbits.from_pretrained(path, "nf4", device_map=device)
    ids = ids_for(device)
    with pytest.warns(FewbitsWarning, match="from disk"):
        spread = fewbits.from_pretrained(path, "nf4", max_memory=budgets, offload="stream")
    assert set(devices_of(spread).values()) == set(plan.devices.values())
    again = fewbits.from_pretrained(path, "nf4", device_map=fewbits.Plan.from_json(plan.to_json()))
    assert devices_of(again) == devices_of(spread)
    with torch.no_grad():
        for model in (spread, again):
            assert torch.equal(model(ids).logits, whole(ids).logits)


# ------------------------------------------------------------------------------------------------- refused


def test_moving_copying_and_pickling_are_refused(odd, device):
    whole, spread = odd(device)
    x = torch.randn(3, 64, device=device)
    before = {n: (id(p), p.dtype, p.device) for n, p in spread.named_parameters()}
    for act in (
        lambda: spread.to("cpu"),
        spread.half,
        lambda: spread.blocks.to(torch.float16),
        lambda: spread.blocks[0].cpu(),
        lambda: copy.deepcopy(spread),
        lambda: pickle.dumps(spread),
    ):
        with pytest.raises(UnsupportedError, match=r"spread|offloaded"):
            act()
    assert {n: (id(p), p.dtype, p.device) for n, p in spread.named_parameters()} == before
    with torch.no_grad():
        assert torch.equal(spread(x), whole(x))


def test_a_folder_that_cannot_serve(device, folder, tmp_path):
    path = folder("llama")
    taken = tmp_path / "file"
    taken.write_text("mine")
    for bad in (taken, taken / "below", Path("/proc/1/nowhere")):
        with pytest.raises(ConfigError, match="offloaded to disk") as caught:
            fewbits.from_pretrained(path, "nf4", device_map={"": device, "model.layers": "disk"}, offload_folder=bad)
        assert "offload_folder" in str(caught.value)
    assert taken.read_text() == "mine"


def test_a_folder_that_cannot_serve_leaves_a_model_in_memory_as_it_is(device, tmp_path, unchanged):
    model = GPT()
    (tmp_path / "file").write_text("mine")
    given = {"": "cpu", "transformer.h.1": "disk"}
    with unchanged(model, tmp_path), pytest.raises(ConfigError, match="offloaded to disk"):
        fewbits.quantize(model, "nf4", device_map=given, offload_folder=tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is made sure of with posix_fallocate")
def test_a_full_disk(device, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left"):
        fewbits.from_pretrained(
            folder("llama"), "nf4", device_map={"": device, "model.layers": "disk"}, offload_folder=tmp_path / "o"
        )
    assert not list((tmp_path / "o").iterdir())


def test_other_files_in_the_folder_stay(folder, tmp_path):
    """A folder that another model, or another tool, offloaded to: its files are neither used nor touched."""
    other = tmp_path / "offload"
    other.mkdir()
    (other / "index.json").write_text("{}")
    (other / "model.layers.0.dat").write_bytes(b"\0" * 100)
    before = {p.name: p.read_bytes() for p in other.iterdir()}
    whole, spread = pair(folder("llama"), "cpu", {"": "disk"})
    with torch.no_grad():
        ids = ids_for("cpu")
        assert torch.equal(spread(ids).logits, whole(ids).logits)
    assert {p.name: p.read_bytes() for p in other.iterdir()} == before


def test_a_read_that_fails_leaves_the_others_intact(odd, device, monkeypatch):
    whole, spread = odd(device)
    x = torch.randn(3, 64, device=device)
    real, failing = offload.read, threading.Event()

    def read(*args):
        if failing.is_set():
            raise CheckpointError("cannot be read: Input/output error")
        return real(*args)

    monkeypatch.setattr(offload, "read", read)
    with torch.no_grad():
        assert torch.equal(spread(x), whole(x))
        failing.set()
        with contextlib.suppress(CheckpointError):
            spread(x)  # what was fetched ahead is there
        with pytest.raises(CheckpointError, match="Input/output"):
            spread(x)
        failing.clear()
        for _ in range(2):
            assert torch.equal(spread(x), whole(x))
    assert all(p.device.type == "cpu" for n, p in spread.named_parameters() if n.startswith("blocks"))


# ------------------------------------------------------------------------------------------------- memory


LIMITED = """
import os, sys, threading, time, torch, fewbits
torch.set_num_threads(1)
fewbits.reader.READ_AHEAD = 32 << 20
path, budget, disk = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "disk"
ids = torch.arange(2, 8)[None]

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

def enforce(limit):
    while anonymous() <= limit:
        time.sleep(0.001)
    os._exit(137)

# what the first call ever brings in (code, tables, threads) is no model's memory
warm = fewbits.from_pretrained(sys.argv[4], "nf4", device_map={"": "disk"}, progress=False)
warm.generate(ids, max_new_tokens=2, do_sample=False)
threading.Thread(target=enforce, args=(anonymous() + budget,), daemon=True).start()
model = fewbits.from_pretrained(
    path, "nf4", progress=False, device_map={"": "disk"} if disk else "cpu"
)
print(model.generate(ids, max_new_tokens=3, do_sample=False).tolist())
fewbits.save(model, sys.argv[5])
"""


def _limited(path: Path, small: Path, budget: int, place: str, out: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", LIMITED, str(path), str(budget), place, str(small), str(out)]
    # glibc shall give back what torch frees instead of keeping up to 150 MB of it for the next temporary
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_model_larger_than_the_limit_on_memory(folder, tmp_path):
    """The process may take less than the model's size: from disk it writes the right text and saves, in memory not."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(3)
    big = transformers.LlamaForCausalLM(config).eval()
    big.save_pretrained(tmp_path / "big")
    whole = fewbits.from_pretrained(tmp_path / "big", "nf4", device_map="cpu")
    size = fewbits.summary(whole).total.nbytes
    expected = whole.generate(torch.arange(2, 8)[None], max_new_tokens=3, do_sample=False).tolist()
    budget = size * 3 // 4
    done = _limited(tmp_path / "big", folder("llama"), budget, "disk", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(expected)
    fewbits.save(whole, tmp_path / "whole")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert saved[0] == saved[1]
    assert _limited(tmp_path / "big", folder("llama"), budget, "cpu", tmp_path / "none").returncode == 137


# ------------------------------------------------------------------------------------------------- the parts


def test_extents_are_joined_where_both_sides_follow():
    memory = torch.arange(4096, dtype=torch.uint8)
    other = torch.zeros(100, dtype=torch.uint8)
    extents = [
        Extent(256, memory[256:300], memory), Extent(0, memory[0:100], memory), Extent(512, memory[700:800], memory),
        Extent(1024, other, other),
    ]  # fmt: skip
    found = joined(extents)
    assert [(e.at, e.memory.numel()) for e in found] == [(0, 300), (512, 100), (1024, 100)]
    assert torch.equal(found[0].memory, memory[:300])


def test_a_file_home_is_read_back(tmp_path):
    home = FileHome(tmp_path, 1 << 16)
    tensors = [torch.randn(7, 3), torch.randint(0, 255, (1000,), dtype=torch.uint8), torch.tensor(2.5)]
    kept = [home.keep(t, at)[0] for t, at in zip(tensors, (0, 256, 2048), strict=True)]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(kept, tensors, strict=True))
    kept[0].fill_(1)
    extent = home.keep(tensors[1], 0)[1]
    out = bytearray(1000)
    home.file.read(extent, memoryview(out), 0)
    assert bytes(out) == bytes(tensors[1].tolist())


def test_slots_are_two_and_prefetch_ahead(odd, device):
    """While a block runs the next one is on its way: the second call of a model finds each block there or coming."""
    _, spread = odd(device)
    forward = spread.blocks[0].forward
    assert isinstance(forward, PlacedForward)
    runtime: Offload = forward._offload
    demanded = []
    start = runtime._start
    runtime._start = lambda unit, demand: (demanded.append((unit.name, demand)), start(unit, demand=demand))[1]
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        for _ in range(3):
            spread(x)
        demanded.clear()
        spread(x)
    assert not [name for name, demand in demanded if demand and name != ""]
    assert [name for name, demand in demanded if not demand]
    assert all(len(slots) == 2 for slots in runtime._slots.values())
