"""Hugging Face Accelerate's own functions on fewbits models: what they give equals what the model gives by itself."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from accelerate.hooks import remove_hook_from_module
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_module_tensor_to_device
from torch import nn

import fewbits
from fewbits.errors import ConfigError, UnsupportedError
from fewbits.tensor import QuantTensor
from models import GPT, TiedGPT, same_tensors

FORMATS = {"nf4": {}, "nf4-dq": {"double_quant": True}, "int8": {}}


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps its state for the whole process, and warns of parameters that it has moved away."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _model(format: str, kind=GPT) -> nn.Module:
    return fewbits.quantize(kind().eval(), format.removesuffix("-dq"), **FORMATS[format])


def _ids() -> torch.Tensor:
    return torch.arange(20).mul(7).remainder(50).view(2, 10)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepare(format, precision):
    model = _model(format)
    prepared = Accelerator(cpu=True, mixed_precision=precision).prepare(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        want = model(_ids()).float()
    with torch.no_grad():
        assert torch.equal(prepared(_ids()), want)
    assert isinstance(prepared.transformer["h"][0].attn.c_attn.weight, QuantTensor)


def test_training_with_gradient_accumulation_and_a_state_to_go_on_from(format, tmp_path):
    """An adapter's loss falls; a state that was saved goes on as the one that was not interrupted."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"])
    model = peft.get_peft_model(_model(format), config)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))

    def steps(n: int) -> list[float]:
        losses = []
        for _ in range(n):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(_ids()).flatten(0, 1), _ids().flatten())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    first = steps(10)
    assert first[-1] < first[0]
    accelerator.save_state(str(tmp_path))
    went_on = steps(4)
    accelerator.load_state(str(tmp_path))
    assert steps(4) == went_on


def test_save_model(format, tmp_path):
    model = _model(format)
    Accelerator(cpu=True).save_model(model, str(tmp_path), max_shard_size="20KB")
    again = fewbits.load(GPT, tmp_path, device_map="cpu")
    assert same_tensors(again.state_dict(), model.state_dict())


def test_hooks_that_offload(format, tmp_path, device):
    """To memory and to disk, run twice, and taken off again."""
    model = _model(format)
    ids = _ids().to(device)
    with torch.no_grad():
        want = copy.deepcopy(model).to(device)(ids)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parts = {f"transformer.h.{i}": where for i, where in enumerate(("cpu", "disk"))}
    rest = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu")
    for attach in (
        lambda m: cpu_offload(m, execution_device=device),
        lambda m: disk_offload(m, tmp_path / "all", execution_device=device),
        lambda m: dispatch_model(m, parts | rest, main_device=device, offload_dir=tmp_path / "half", force_hooks=True),
    ):
        hooked = attach(copy.deepcopy(model))
        assert hooked.transformer["h"][1].attn.c_attn.weight.is_meta
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(hooked(ids).to(want.device), want)
        assert hooked.transformer["h"][1].attn.c_attn.weight.is_meta, "taken away after each call"
        remove_hook_from_module(hooked, recurse=True)
        assert not hasattr(hooked.transformer["h"][1].attn.c_attn, "_hf_hook")
        assert same_tensors({k: v.cpu() for k, v in hooked.state_dict().items()}, state)


def test_hooks_on_conv1d_and_embeddings(format):
    """Quantized tables and transformers' ``Conv1D``, whose bytes are those of its transpose."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    settings = {"overrides": {"transformer.wpe": "int8"}, **FORMATS[format]}
    fewbits.quantize(model, format.removesuffix("-dq"), **settings)
    with torch.no_grad():
        want = model(_ids()).logits
        hooked = cpu_offload(copy.deepcopy(model), execution_device="cpu")
        assert torch.equal(hooked(_ids()).logits, want)


def test_a_tied_table_that_is_quantized_is_not_taken_for_another(format):
    """Accelerate knows tied weights by where they lie in memory."""
    model = fewbits.quantize(TiedGPT().eval(), format.removesuffix("-dq"), overrides={"transformer.wte": "int8"})
    pointers = [p.data_ptr() for p in model.parameters() if isinstance(p, QuantTensor)]
    assert len(set(pointers)) == len(pointers)
    assert 0 not in pointers
    with torch.no_grad():
        want = model(_ids())
        devices = {name: "cpu" for name, _ in model.named_children()}
        assert torch.equal(dispatch_model(model, devices, main_device="cpu", force_hooks=True)(_ids()), want)


def test_what_accelerate_cannot_load(tmp_path, unchanged):
    """Its loader goes through a file entry by entry: it is told what does."""
    for format, error in (("nf4", UnsupportedError), ("int8", ConfigError)):
        model = _model(format)
        fewbits.save(model, tmp_path / format)
        with pytest.raises(error, match=r"fewbits\.load"):
            load_checkpoint_and_dispatch(model, str(tmp_path / format), device_map={"": "cpu"})
    linear = model.transformer["h"][0].attn.c_attn
    with unchanged(model), pytest.raises(ConfigError, match=r"QuantTensor was called with a Tensor"):
        set_module_tensor_to_device(linear, "weight", "cpu", value=torch.zeros(linear.weight.shape))
