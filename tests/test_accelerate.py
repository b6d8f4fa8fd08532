"""The recipe of Accelerate's "bitsandbytes integration" page, with only its import lines changed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils
import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import fewbits
from fewbits.accelerate import Accelerator, init_empty_weights, init_on_device, utils
from fewbits.accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
from fewbits.errors import CheckpointError, ConfigError, FewbitsWarning, UnsupportedError
from fewbits.modules import is_linear
from fewbits.tensor import QuantTensor
from models import GPT, TiedGPT, random_transformers, same_tensors, tiny_transformers

FORMS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True, "llm_int8_threshold": 6},
    "8bit-no-outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "8bit-bf16": {"load_in_8bit": True, "torch_dtype": "bf16"},
    "4bit": {"load_in_4bit": True},
    "4bit-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "fp32"},
    "4bit-page": {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_type": "nf4",
    },
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [0, 49, 7, 7, 8, 30, 31, 2]])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What other tools saved: the models' own state dicts, in fp32."""
    found = {}
    torch.manual_seed(0)
    for name, model in [("gpt", GPT()), ("tied", TiedGPT())]:
        found[name] = tmp_path_factory.mktemp(name) / "pytorch_model.bin"
        torch.save(model.state_dict(), found[name])
    for name in ("llama", "gpt2", "opt"):
        found[name] = tmp_path_factory.mktemp(name)
        random_transformers(name).save_pretrained(found[name])
    return found


def build(name: str) -> nn.Module:
    """The model that code would build, in evaluation mode."""
    if name in ("gpt", "tied"):
        return {"gpt": GPT, "tied": TiedGPT}[name]().eval()
    import transformers

    return transformers.AutoModelForCausalLM.from_config(tiny_transformers(name)).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS.to(next(model.parameters()).device))
    return (out if isinstance(out, torch.Tensor) else out.logits).cpu()


def on_meta(model: nn.Module) -> bool:
    return all(p.is_meta for p in model.parameters())


# ------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gpt", "llama", "gpt2", "opt"])
def test_the_recipe(
    tmp_path: Path, checkpoints: dict[str, Path], model_state: Any, name: str, form: str, device: str
) -> None:
    device_map = "cpu" if device == "cpu" and torch.cuda.is_available() else "auto"
    with init_empty_weights():
        empty_model = build(name)
    assert on_meta(empty_model)
    before = model_state(empty_model)
    config = BnbQuantizationConfig(**FORMS[form])
    model = load_and_quantize_model(
        empty_model, weights_location=checkpoints[name], bnb_quantization_config=config, device_map=device_map
    )
    Accelerator().save_model(model, tmp_path / "new")
    again = load_and_quantize_model(
        empty_model, weights_location=tmp_path / "new", bnb_quantization_config=config, device_map=device_map
    )
    assert on_meta(empty_model)
    after = model_state(empty_model)
    assert [facts[:5] for facts in after.values()] == [facts[:5] for facts in before.values()]
    assert type(model) is type(again) is type(empty_model)
    assert {t.device.type for t in [*again.parameters(), *again.buffers()]} == {device}
    assert same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(outputs(again), outputs(model))
    assert outputs(again).isfinite().all()
    assert (again.is_loaded_in_8bit, again.is_loaded_in_4bit) == (config.load_in_8bit, config.load_in_4bit)
    # every linear layer is quantized but the head, and what is not quantized has the dtype asked for
    head = "lm_head"
    for path, module in again.named_modules():
        if is_linear(module):
            assert isinstance(module.weight, QuantTensor) == (path != head), path
    assert {p.dtype for p in again.parameters() if not isinstance(p, QuantTensor)} == {config.torch_dtype}
    # and it is the model of the checkpoint: close to it in full precision
    if "fp4" not in repr(again):
        full = build(name)
        full.load_state_dict(fewbits.load(empty_model, checkpoints[name], device_map="cpu").state_dict())
        error = (outputs(again).float() - outputs(full)).norm() / outputs(full).norm()
        assert error < (0.02 if config.load_in_8bit else 0.2)


def test_the_empty_model_serves_many_times(checkpoints: dict[str, Path]) -> None:
    with init_empty_weights():
        empty_model = build("gpt")
    first = {}
    for _ in range(2):
        for form, settings in FORMS.items():
            config = BnbQuantizationConfig(**settings)
            model = load_and_quantize_model(empty_model, config, checkpoints["gpt"])
            assert on_meta(empty_model)
            assert torch.equal(first.setdefault(form, outputs(model)), outputs(model))
    # no activation of this model reaches 6; without a threshold kernels may leave x as it is, else it is in 127ths
    without = first["8bit-no-outliers"]
    assert (without - first["8bit"]).abs().max() <= 4 / 127 * without.abs().max()
    assert len({tuple(out.flatten().tolist()) for out in first.values()}) >= len(first) - 1


def test_tied_weights_made_empty_stay_tied(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    with init_empty_weights():
        empty_model = build("tied")
    assert empty_model.lm_head.weight is empty_model.transformer["wte"].weight
    config = BnbQuantizationConfig(load_in_8bit=True)
    model = load_and_quantize_model(empty_model, config, checkpoints["tied"])
    Accelerator().save_model(model, tmp_path / "new")
    again = load_and_quantize_model(empty_model, config, tmp_path / "new")
    for loaded in (model, again):
        assert loaded.lm_head.weight is loaded.transformer["wte"].weight
        assert loaded.lm_head.weight is not empty_model.lm_head.weight
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("safe", [True, False])
def test_save_model_passes_its_arguments_on(tmp_path: Path, safe: bool) -> None:
    model = fewbits.quantize(build("gpt"), "nf4")
    Accelerator().save_model(model, tmp_path, "9KB", safe)
    suffix = "safetensors" if safe else "bin"
    assert len(list(tmp_path.glob(f"*-of-*.{suffix}"))) > 1
    assert len(list(tmp_path.iterdir())) == len(list(tmp_path.glob(f"*-of-*.{suffix}"))) + 1


# ------------------------------------------------------------------------------------------- what is compared with it


@pytest.mark.parametrize("form", FORMS)
def test_quantized_bytes_are_those_of_bitsandbytes(checkpoints: dict[str, Path], form: str) -> None:
    config = BnbQuantizationConfig(**FORMS[form])
    with init_empty_weights():
        empty_model = build("gpt")
    state = load_and_quantize_model(empty_model, config, checkpoints["gpt"]).state_dict()
    source = torch.load(checkpoints["gpt"], weights_only=True)
    compared = 0
    for name, weight in source.items():
        if not name.endswith("weight") or weight.dim() != 2 or name.split(".")[-2] in ("wte", "wpe", "lm_head"):
            continue
        compared += 1
        if config.load_in_8bit:
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
            expected = {name: codes, name.removesuffix("weight") + "SCB": scales}
        else:
            codes, quant_state = bnb.functional.quantize_4bit(
                weight, quant_type=config.bnb_4bit_quant_type, compress_statistics=config.bnb_4bit_use_double_quant
            )
            expected = {name: codes, f"{name}.absmax": quant_state.absmax}
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), key
    assert compared == 8


@pytest.mark.parametrize("load_in_8bit", [True, False])
@pytest.mark.parametrize("settings", [{}, {"skip_modules": ["transformer.h.0"]}, {"keep_in_fp32_modules": ["lm_head"]}])
def test_the_modules_and_dtypes_that_accelerate_chooses(
    checkpoints: dict[str, Path], load_in_8bit: bool, settings: dict[str, list[str]]
) -> None:
    """Accelerate cannot finish without a GPU, but its first steps, which decide, run anywhere."""
    arguments = {"load_in_8bit": load_in_8bit, "load_in_4bit": not load_in_8bit}
    theirs_config = accelerate.utils.BnbQuantizationConfig(**arguments, **copy.deepcopy(settings))
    with accelerate.init_empty_weights():
        theirs = GPT()
    skipped = theirs_config.skip_modules
    if skipped is None:
        skipped = accelerate.utils.bnb.get_keys_to_not_convert(theirs)
    skipped = skipped + (theirs_config.keep_in_fp32_modules or [])
    with accelerate.init_empty_weights():
        theirs = accelerate.utils.bnb.replace_with_bnb_layers(theirs, theirs_config, modules_to_not_convert=skipped)
    kinds = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    expected = {name for name, module in theirs.named_modules() if isinstance(module, kinds)}
    with init_empty_weights():
        ours = GPT()
    config = BnbQuantizationConfig(**arguments, **settings)
    model = load_and_quantize_model(ours, config, checkpoints["gpt"])
    found = {n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), QuantTensor)}
    assert found == expected
    kept = settings.get("keep_in_fp32_modules", [])
    for name, p in model.named_parameters():
        if not isinstance(p, QuantTensor):
            fp32 = any(name.startswith(k) for k in kept)
            assert p.dtype == (torch.float32 if fp32 else theirs_config.torch_dtype), name


# ------------------------------------------------------------------------------------------- arguments


def defaults(function: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (BnbQuantizationConfig, accelerate.utils.BnbQuantizationConfig),
        (load_and_quantize_model, accelerate.utils.load_and_quantize_model),
        (Accelerator.save_model, accelerate.Accelerator.save_model),
        (init_empty_weights, accelerate.init_empty_weights),
        (init_on_device, accelerate.init_on_device),
    ],
    ids=lambda f: f.__name__,
)
def test_arguments_and_defaults_are_those_of_accelerate(ours: Any, theirs: Any) -> None:
    assert defaults(ours) == defaults(theirs)
    assert list(defaults(ours)) == list(defaults(theirs))


VALID: list[dict[str, Any]] = [
    {"load_in_8bit": True},
    {"load_in_4bit": True},
    {"load_in_8bit": True, "llm_int8_threshold": 3},
    {"load_in_8bit": True, "torch_dtype": "fp32"},
    {"load_in_8bit": True, "torch_dtype": torch.bfloat16},
    {"load_in_8bit": True, "bnb_4bit_compute_dtype": "bf16"},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": "fp32"},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16, "torch_dtype": "bf16"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "skip_modules": [], "keep_in_fp32_modules": []},
    {"load_in_8bit": True, "skip_modules": ["a.b"], "keep_in_fp32_modules": ["c"]},
]
INVALID: list[dict[str, Any]] = [
    {},
    {"load_in_8bit": True, "load_in_4bit": True},
    {"load_in_8bit": 1},
    {"load_in_8bit": "True"},
    {"load_in_4bit": None},
    {"load_in_8bit": True, "llm_int8_threshold": "6"},
    {"load_in_8bit": True, "llm_int8_threshold": None},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": None},
    {"load_in_4bit": True, "bnb_4bit_use_double_quant": 1},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": None},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": 16},
    {"load_in_8bit": True, "torch_dtype": "half"},
    {"load_in_8bit": True, "torch_dtype": 32},
    {"load_in_8bit": True, "skip_modules": "lm_head"},
    {"load_in_8bit": True, "skip_modules": ("lm_head",)},
    {"load_in_8bit": True, "keep_in_fp32_modules": "lm_head"},
]


@pytest.mark.parametrize("settings", VALID, ids=str)
def test_what_accelerate_accepts_means_the_same(settings: dict[str, Any]) -> None:
    ours = BnbQuantizationConfig(**copy.deepcopy(settings))
    theirs = accelerate.utils.BnbQuantizationConfig(**copy.deepcopy(settings))
    fields = [field.name for field in dataclasses.fields(theirs)]
    assert [f.name for f in dataclasses.fields(ours)] == fields
    assert {f: getattr(ours, f) for f in fields} == {f: getattr(theirs, f) for f in fields}


@pytest.mark.parametrize("settings", INVALID, ids=str)
def test_what_accelerate_refuses_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        accelerate.utils.BnbQuantizationConfig(**settings)
    with pytest.raises(ValueError) as caught:
        BnbQuantizationConfig(**settings)
    assert isinstance(caught.value, ConfigError)
    assert all(name in str(caught.value) for name in settings if not name.startswith("load_in") or len(settings) == 1)


def test_a_threshold_without_a_meaning_is_said_as_accelerate_says_it() -> None:
    with pytest.warns(UserWarning, match="llm_int8_threshold"):
        accelerate.utils.BnbQuantizationConfig(load_in_4bit=True, llm_int8_threshold=5.0)
    with pytest.warns(FewbitsWarning, match="llm_int8_threshold") as caught:
        BnbQuantizationConfig(load_in_4bit=True, llm_int8_threshold=5.0)
    assert caught[0].filename == __file__


def test_every_setting_reaches_the_layers(checkpoints: dict[str, Path]) -> None:
    with init_empty_weights():
        empty_model = build("gpt")

    def spec(**settings: Any) -> Any:
        model = load_and_quantize_model(empty_model, BnbQuantizationConfig(**settings), checkpoints["gpt"])
        return model.transformer["h"][1].mlp["c_fc"].weight.spec

    assert spec(load_in_8bit=True, llm_int8_threshold=2.5).threshold == 2.5
    assert spec(load_in_4bit=True).format == "fp4"
    assert spec(load_in_4bit=True).compute_dtype == torch.float16
    assert spec(load_in_4bit=True).double_quant is False
    assert spec(load_in_4bit=True, bnb_4bit_quant_type="nf4").format == "nf4"
    assert spec(load_in_4bit=True, bnb_4bit_use_double_quant=True).double_quant is True
    assert spec(load_in_4bit=True, bnb_4bit_compute_dtype="bf16").compute_dtype == torch.bfloat16


def test_nothing_of_the_callers_is_changed(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    lists: dict[str, list[str]] = {
        "skip_modules": ["transformer.h.1", "lm_head"],
        "keep_in_fp32_modules": ["transformer.ln_f"],
    }
    config = BnbQuantizationConfig(load_in_4bit=True, **lists)
    others = {
        "device_map": {"": "cpu"},
        "no_split_module_classes": ["Block"],
        "max_memory": {"cpu": "1GB"},
    }
    before = copy.deepcopy((lists, dataclasses.asdict(config), others))
    with init_empty_weights():
        empty_model = build("gpt")
    for _ in range(2):
        model = load_and_quantize_model(
            empty_model,
            config,
            checkpoints["gpt"],
            **others,
            offload_folder=tmp_path / "offload",
            offload_state_dict=True,
        )
        assert isinstance(model.transformer["h"][0].attn.c_attn.weight, QuantTensor)
        assert not isinstance(model.transformer["h"][1].attn.c_attn.weight, QuantTensor)
        assert model.transformer["ln_f"].weight.dtype == torch.float32
        assert model.transformer["h"][1].attn.c_attn.weight.dtype == torch.float16
    assert (lists, dataclasses.asdict(config), others) == before
    assert config.skip_modules is lists["skip_modules"]
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(empty_model, "is_loaded_in_4bit")


# ------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize(
    "device_map",
    [
        None,
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
        "cpu",
        {"": "cpu"},
        torch.device("cpu"),
        {"transformer": "cpu", "lm_head": torch.device("cpu")},
    ],
    ids=str,
)
def test_device_maps(checkpoints: dict[str, Path], device_map: Any) -> None:
    with init_empty_weights():
        empty_model = build("gpt")
    config = BnbQuantizationConfig(load_in_8bit=True)
    model = load_and_quantize_model(empty_model, config, checkpoints["gpt"], device_map=device_map)
    chosen = device_map is None or (isinstance(device_map, str) and device_map != "cpu")
    expected = "cuda" if chosen and torch.cuda.is_available() else "cpu"
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {expected}


@pytest.mark.parametrize("device_map", ["nowhere", "cuda:99", 99, {}, {"": "nowhere"}], ids=str)
def test_devices_that_are_not_there(checkpoints: dict[str, Path], device_map: Any) -> None:
    with init_empty_weights():
        empty_model = build("gpt")
    with pytest.raises(ValueError, match="device_map"):
        load_and_quantize_model(
            empty_model, BnbQuantizationConfig(load_in_8bit=True), checkpoints["gpt"], device_map=device_map
        )
    assert on_meta(empty_model)


@pytest.mark.parametrize("weights", [True, False], ids=["from a file", "in memory"])
def test_a_map_over_several_devices(checkpoints: dict[str, Path], unchanged: Any, weights: bool) -> None:
    config = BnbQuantizationConfig(load_in_8bit=True)
    device_map = {"transformer": "cpu", "transformer.h.1": "disk", "lm_head": "disk"}

    def model() -> nn.Module:
        full = build("gpt")
        full.load_state_dict(torch.load(checkpoints["gpt"]))
        if not weights:
            return full
        with init_empty_weights():
            return build("gpt")

    location = checkpoints["gpt"] if weights else None
    whole = load_and_quantize_model(model(), config, location, device_map="cpu")
    given, given_map = model(), dict(device_map)
    spread = load_and_quantize_model(given, config, location, device_map=device_map)
    assert torch.equal(outputs(spread), outputs(whole))
    assert same_tensors(spread.state_dict(), whole.state_dict())
    assert device_map == given_map
    assert (spread is given, on_meta(given)) == (not weights, weights)
    # a map over GPUs that are not there is an error, and changes nothing
    for missing in ({"": "cpu", "lm_head": 7}, {"transformer": 7, "lm_head": "disk"}, "cuda:7"):
        given = model()
        with unchanged(given), pytest.raises(ConfigError, match="CUDA"):
            load_and_quantize_model(given, config, location, device_map=missing)


@pytest.mark.parametrize("weights", [True, False], ids=["from a file", "in memory"])
def test_max_memory_binds(checkpoints: dict[str, Path], weights: bool) -> None:
    config = BnbQuantizationConfig(load_in_8bit=True)
    location = checkpoints["gpt"] if weights else None

    def model() -> nn.Module:
        if not weights:
            return build("gpt")
        with init_empty_weights():
            return build("gpt")

    done = load_and_quantize_model(model(), config, location, device_map="cpu")
    needed = sum(
        sum(t.nbytes for t in p.inner_tensors.values()) if isinstance(p, QuantTensor) else p.nbytes
        for p in (*done.parameters(), *done.buffers())
    )
    masks = sum(b.numel() * 4 for b in done.buffers())  # reckoned in fp32, as they are before they are cast
    load_and_quantize_model(model(), config, location, device_map="cpu", max_memory={"cpu": needed + masks})
    refused = model()
    with pytest.raises(ConfigError, match=r"max_memory|any one device"):
        load_and_quantize_model(refused, config, location, device_map="cpu", max_memory={"cpu": needed - 1})
    assert not any(isinstance(p, QuantTensor) for p in refused.parameters())


# ------------------------------------------------------------------------------------------- models in memory


@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_values_is_quantized_in_place(checkpoints: dict[str, Path], form: str) -> None:
    config = BnbQuantizationConfig(**FORMS[form])
    with init_empty_weights():
        empty_model = build("gpt")
    expected = load_and_quantize_model(empty_model, config, checkpoints["gpt"], device_map="cpu")
    model = build("gpt")
    model.load_state_dict(torch.load(checkpoints["gpt"], weights_only=True))
    result = load_and_quantize_model(model, config, device_map="cpu")
    assert result is model
    parameters = [k for k in model.state_dict() if not k.endswith("attn.bias")]
    ours, theirs = model.state_dict(), expected.state_dict()
    assert same_tensors({k: ours[k] for k in parameters}, {k: theirs[k] for k in parameters})
    assert torch.equal(outputs(model), outputs(expected))
    assert (model.is_loaded_in_8bit, model.is_loaded_in_4bit) == (config.load_in_8bit, config.load_in_4bit)


def test_an_empty_model_without_weights_is_refused() -> None:
    with init_empty_weights():
        empty_model = build("gpt")
    with pytest.raises(ConfigError, match="weights_location") as error:
        load_and_quantize_model(empty_model, BnbQuantizationConfig(load_in_8bit=True))
    assert isinstance(error.value, RuntimeError)  # which is what Accelerate raises


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with init_empty_weights():
        empty_model = build("gpt")
    with pytest.raises(FileNotFoundError) as caught:
        load_and_quantize_model(empty_model, BnbQuantizationConfig(load_in_8bit=True), tmp_path / "nothing.bin")
    assert isinstance(caught.value, CheckpointError)


def test_a_module_name_that_names_nothing_is_refused(checkpoints: dict[str, Path]) -> None:
    """Accelerate matches by substring and passes over in silence what matches nothing."""
    with init_empty_weights():
        empty_model = build("gpt")
    for field in ("skip_modules", "keep_in_fp32_modules"):
        config = BnbQuantizationConfig(load_in_8bit=True, **{field: ["lm_heda"]})
        with pytest.raises(ConfigError, match=rf"(?s){field}.*lm_heda.*lm_head"):
            load_and_quantize_model(empty_model, config, checkpoints["gpt"])


# ------------------------------------------------------------------------------------------- building empty


class Everything(nn.Module):
    """Parameters and buffers of each kind, among them shared ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.register_parameter("nothing", None)
        self.register_buffer("table", torch.arange(5.0))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("none", None)


def devices(model: nn.Module) -> dict[str, tuple[str, bool, torch.dtype]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (t.device.type, t.requires_grad, t.dtype) for name, t in named}


@pytest.mark.parametrize("variable", [None, "1", "yes", "0", "false"])
@pytest.mark.parametrize("include_buffers", [None, True, False])
def test_empty_weights_are_where_accelerate_puts_them(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, include_buffers: bool | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("ACCELERATE_INIT_INCLUDE_BUFFERS", variable)
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        theirs = Everything()
    with init_empty_weights(include_buffers=include_buffers):
        ours = Everything()
    assert devices(ours) == devices(theirs)
    assert all(p.is_meta for p in ours.parameters())
    buffers = include_buffers if include_buffers is not None else variable in ("1", "yes")
    assert {b.device.type for b in ours.buffers()} == ({"meta"} if buffers else {"cpu"})
    if not buffers:
        assert ours.table.tolist() == [0, 1, 2, 3, 4]
    assert ours.head.weight is ours.embed.weight  # which Accelerate's own loses only where parameters are moved twice
    plain = Everything()
    assert {t.device.type for t in (*plain.parameters(), *plain.buffers())} == {"cpu"}


def test_init_on_device_keeps_classes_and_attributes() -> None:
    class Marked(nn.Parameter):
        pass

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Marked(torch.ones(2))
            marked = nn.Parameter(torch.ones(2))
            marked.tag = "mine"
            self.b = self.c = marked

    with init_on_device(torch.device("meta")):
        made = Holder()
    assert type(made.a) is Marked
    assert made.b.tag == "mine"
    assert made.b is made.c
    assert made.b.is_meta
    with init_on_device("cpu"):  # a name serves as well
        assert Holder().a.tolist() == [1, 1]


def test_init_on_device_is_undone_after_an_error_and_when_nested() -> None:
    register = nn.Module.register_parameter

    def fail() -> None:
        with init_empty_weights():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert nn.Module.register_parameter is register
    with init_empty_weights():
        with init_empty_weights():
            assert nn.Linear(2, 2).weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
    assert nn.Module.register_parameter is register
    assert not nn.Linear(2, 2).weight.is_meta


# ------------------------------------------------------------------------------------------- the rest of Accelerator


def other_names() -> list[str]:
    public = {name for name in dir(accelerate.Accelerator) if not name.startswith("_")}
    return sorted(public - {"save_model"})


@pytest.mark.parametrize("name", other_names())
def test_other_methods_name_the_tool_for_them(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        getattr(Accelerator(), name)
    assert isinstance(caught.value, NotImplementedError)
    assert f"accelerate.Accelerator().{name}" in str(caught.value)


def test_attributes_of_an_instance_name_the_tool_too() -> None:
    theirs = accelerate.Accelerator(cpu=True)
    for name in vars(theirs):
        if not name.startswith("_"):
            with pytest.raises(UnsupportedError):
                getattr(Accelerator(), name)


def test_names_that_nobody_has_are_ordinary_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prepair'"):
        Accelerator().prepair  # noqa: B018 - the access itself is tested
    copy.copy(Accelerator())  # looks for __deepcopy__ and its like


def test_the_names_of_the_facade() -> None:
    import fewbits.accelerate as facade

    assert set(facade.__all__) == {"Accelerator", "init_empty_weights", "init_on_device"}
    assert set(utils.__all__) == {"BnbQuantizationConfig", "load_and_quantize_model"}
    for name in facade.__all__:
        assert hasattr(accelerate, name)
    for name in utils.__all__:
        assert hasattr(accelerate.utils, name)
