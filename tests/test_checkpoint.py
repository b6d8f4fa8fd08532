"""Checkpoints in: every kind of location, names, ties, foreign bytes, and the threads that read ahead.

What a load gives is compared with the state dict that was written, bit for bit, and with bitsandbytes' own results.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import safetensors
import safetensors.torch as st
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import fewbits
from fewbits import FewbitsWarning, QuantTensor, init_empty_weights, reader
from fewbits.checkpoint import Checkpoint, open_checkpoint
from fewbits.errors import CheckpointError
from fewbits.files import SAFETENSORS_DTYPES, StoredTensor
from fewbits.storage import owners_of

READER = "fewbits-read-"  # what the names of the threads begin with


class Net(nn.Module):
    """Something of everything: parameters, buffers that are trained, and one that is only computed."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 16)
        self.fc = nn.Linear(16, 40)
        self.norm = nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 11)
        self.register_buffer("steps", torch.arange(4.0))
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(self.emb(ids))).relu())


def trained(net: nn.Module) -> dict[str, Tensor]:
    """A state dict whose every value differs from what a new model would have."""
    return {
        name: torch.full_like(t, 7) if not t.is_floating_point() else 0.5 + torch.rand(t.shape, dtype=t.dtype)
        for name, t in net.state_dict().items()
    }


def empty(build: Callable[[], nn.Module] = Net, **kwargs: bool) -> nn.Module:
    with init_empty_weights(**kwargs):
        return build()


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The model's state dict is this one, bit for bit, and no more."""
    have = model.state_dict()
    assert have.keys() == state.keys()
    for name, t in state.items():
        assert have[name].dtype == t.dtype, name
        assert torch.equal(have[name], t), name
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def write_index(folder: Path, state: dict[str, Tensor], kind: str, sizes: tuple[int, ...] = (1, 3)) -> Path:
    """Shards of so many tensors (the last takes the rest), and their index."""
    names, suffix = list(state), ".safetensors" if kind == "safetensors" else ".bin"
    weight_map = {}
    for i, start in enumerate([0, *(sum(sizes[: j + 1]) for j in range(len(sizes)))]):
        part = names[start : start + sizes[i]] if i < len(sizes) else names[start:]
        shard = f"part-{i}{suffix}"
        (st.save_file if kind == "safetensors" else torch.save)({n: state[n] for n in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def write_raw(path: Path, tensors: list[tuple[str, Tensor]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file with its tensors in exactly this order, which the library's own writer would change."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, t in tensors:
        raw = bytes(t.contiguous().flatten().view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        data += raw
    raw_header = json.dumps(header).encode()
    path.write_bytes(len(raw_header).to_bytes(8, "little") + raw_header + data)
    return path


def legacy_save(content: object, path: Path) -> None:
    """The format of torch.save before 1.6, which is no zip file and cannot be mapped."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


# ------------------------------------------------------------------------------------------------- locations


def _file(name: str, save: Callable[..., None], wrap: Callable[[dict], object] = dict) -> Callable[..., Path]:
    def write(folder: Path, state: dict[str, Tensor]) -> Path:
        save(wrap(state), folder / name)
        return folder / name

    return write


LOCATIONS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "safetensors": _file("weights.safetensors", st.save_file),
    **{f"zip {ext}": _file(f"weights.{ext}", torch.save) for ext in ("bin", "pt", "pth")},
    **{f"legacy {ext}": _file(f"weights.{ext}", legacy_save) for ext in ("bin", "pt", "pth")},
    "under state_dict": _file("c.pt", torch.save, lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"lr": 0.1}}),
    "under model": _file("c.pth", legacy_save, lambda s: {"model": s, "step": 3}),
    "index safetensors": lambda folder, state: write_index(folder, state, "safetensors"),
    "index bin": lambda folder, state: write_index(folder, state, "bin"),
    "folder safetensors": lambda folder, state: _file("model.safetensors", st.save_file)(folder, state).parent,
    "folder bin": lambda folder, state: _file("pytorch_model.bin", torch.save)(folder, state).parent,
    "folder of one file of any name": lambda folder, state: _file("last.pth", torch.save)(folder, state).parent,
    "folder index safetensors": lambda folder, state: write_index(folder, state, "safetensors").parent,
    "folder index bin": lambda folder, state: write_index(folder, state, "bin").parent,
}


@pytest.mark.parametrize("kind", LOCATIONS)
def test_every_kind_of_location(kind, tmp_path, unchanged):
    state, model = trained(Net()), empty()
    location = LOCATIONS[kind](tmp_path, state)
    (tmp_path / "notes.txt").write_text("what is no checkpoint does not matter")
    with unchanged(model, tmp_path):
        loaded = fewbits.load(model, location)
        named_as_text = fewbits.load(model, str(location))
    assert_holds(loaded, state)
    assert_holds(named_as_text, state)
    reference = Net()
    reference.load_state_dict(state)
    ids = torch.arange(11)
    assert torch.equal(loaded.eval()(ids), reference.eval()(ids))


@pytest.mark.parametrize("kind", ["safetensors", "zip pt", "legacy pt", "index bin"])
def test_quantized_on_the_way_in_is_what_bitsandbytes_makes_of_it(kind, tmp_path):
    state = trained(Net())
    loaded = fewbits.load(empty(), LOCATIONS[kind](tmp_path, state), "nf4")
    packed, quant = bnb.functional.quantize_4bit(state["fc.weight"], blocksize=64, quant_type="nf4")
    have = loaded.state_dict()
    assert torch.equal(have.pop("fc.weight"), packed)
    assert torch.equal(have.pop("fc.weight.absmax"), quant.absmax)
    plain = {name: t for name, t in have.items() if not name.startswith("fc.weight.")}
    assert plain.keys() == state.keys() - {"fc.weight"}  # the head and what is no linear layer stay as they are
    assert all(torch.equal(t, state[name]) for name, t in plain.items())


def test_relative_and_home_paths(tmp_path, monkeypatch):
    state = trained(Net())
    (tmp_path / "runs" / "last").mkdir(parents=True)
    st.save_file(state, tmp_path / "runs" / "last" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for location in ("runs/last", "./runs/last/model.safetensors", "~/runs/last"):  # the first looks like a hub id
        assert_holds(fewbits.load(empty(), location), state)


def test_of_two_single_files_of_one_model_the_safe_one_is_read(tmp_path):
    state = trained(Net())
    st.save_file(state, tmp_path / "model.safetensors")
    torch.save(trained(Net()), tmp_path / "pytorch_model.bin")
    assert_holds(fewbits.load(empty(), tmp_path), state)


def test_strided_tensors_of_a_pickle_come_out_contiguous(tmp_path):
    base = torch.randn(40, 16)
    state = {"weight": base.t(), "bias": torch.randn(80)[::5]}
    for save in (torch.save, legacy_save):
        save(state, tmp_path / "w.pt")
        loaded = fewbits.load(nn.Linear(40, 16), tmp_path / "w.pt")
        assert_holds(loaded, state)
        assert loaded.weight.is_contiguous()


def test_a_loaded_model_outlives_its_files(tmp_path):
    state = trained(Net())
    torch.save(state, tmp_path / "w.pt")
    loaded = fewbits.load(empty(), tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"\0" * (tmp_path / "w.pt").stat().st_size)  # in place: mapped pages would follow
    assert_holds(loaded, state)


# ------------------------------------------------------------------------------------------------- names


PREFIXES = ["model.", "module.", "_orig_mod.", "module._orig_mod."]


class Wrapped(nn.Module):
    def __init__(self, names: list[str], net: nn.Module | None = None) -> None:
        super().__init__()
        self.add_module(names[0], Wrapped(names[1:]) if len(names) > 1 else Net())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_only_the_checkpoint_has(prefix, tmp_path, unchanged):
    state, model = trained(Net()), empty()
    st.save_file({prefix + name: t for name, t in state.items()}, tmp_path / "w.safetensors")
    with unchanged(model, tmp_path), pytest.warns(FewbitsWarning, match=f"without the prefix '{prefix}'") as said:
        loaded = fewbits.load(model, tmp_path / "w.safetensors")
    assert len(said) == 1
    assert said[0].filename == __file__
    assert_holds(loaded, state)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_only_the_model_has(prefix, tmp_path, unchanged):
    state, model = trained(Net()), empty(lambda: Wrapped(prefix.split(".")[:-1]))
    torch.save(state, tmp_path / "w.bin")
    with unchanged(model, tmp_path), pytest.warns(FewbitsWarning, match=f"with the prefix '{prefix}'") as said:
        loaded = fewbits.load(model, tmp_path / "w.bin")
    assert len(said) == 1
    assert_holds(loaded, {prefix + name: t for name, t in state.items()})


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_prefix_of_a_quantized_checkpoint(format, tmp_path):
    source = fewbits.quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), format)
    st.save_file({f"model.{name}": t.clone() for name, t in source.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.warns(FewbitsWarning, match=r"without the prefix 'model\.'"):
        loaded = fewbits.load(empty(lambda: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))), tmp_path)
    assert_holds(loaded, source.state_dict())


def test_no_prefix_is_guessed_where_two_names_would_become_one(tmp_path):
    state = trained(Net())
    twice = {f"model.{name}": t for name, t in state.items()} | {"head.bias": torch.zeros(11)}
    st.save_file(twice, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint(.|\n)*emb\.weight"):
        fewbits.load(empty(), tmp_path)


# ------------------------------------------------------------------------------------------------- ties


class Assigned(nn.Module):
    """The head is given the embedding's parameter, as most models do."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 64)
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.emb.weight


class OneParameter(Assigned):
    """One parameter, made by hand, is given to two modules."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(64, 64))
        self.emb.weight = shared
        self.head.weight = shared


class Untied(Assigned):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(64, 64))


def save_with_alias(net: nn.Module, folder: Path) -> Path:
    st.save_model(net, str(folder / "w.safetensors"))  # writes one of the two names, the other into the metadata
    with safetensors.safe_open(folder / "w.safetensors", "pt") as file:
        assert len({"emb.weight", "head.weight"} & set(file.keys())) == 1
    return folder / "w.safetensors"


def save_without_alias(net: nn.Module, folder: Path) -> Path:
    state = net.state_dict()
    del state["head.weight"]  # as transformers does, which ties again by itself
    st.save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def save_shared_storage(net: nn.Module, folder: Path) -> Path:
    torch.save(net.state_dict(), folder / "w.pt")
    return folder / "w.pt"


def save_shared_storage_legacy(net: nn.Module, folder: Path) -> Path:
    legacy_save(net.state_dict(), folder / "w.bin")
    return folder / "w.bin"


def save_alias_in_shards(net: nn.Module, folder: Path) -> Path:
    state = net.state_dict()
    st.save_file({"emb.weight": state["emb.weight"]}, folder / "a.safetensors", {"head.weight": "emb.weight"})
    st.save_file({n: state[n] for n in ("fc.weight", "fc.bias")}, folder / "b.safetensors")
    weight_map = dict.fromkeys(["fc.weight", "fc.bias"], "b.safetensors")
    weight_map |= dict.fromkeys(["emb.weight", "head.weight"], "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


SHARED_ON_DISK = [save_with_alias, save_shared_storage, save_shared_storage_legacy, save_alias_in_shards]


@pytest.mark.parametrize("save", [*SHARED_ON_DISK, save_without_alias])
@pytest.mark.parametrize("build", [Assigned, OneParameter])
def test_tied_in_the_model(build, save, tmp_path, unchanged):
    source, model = build(), empty(build)
    location = save(source, tmp_path)
    assert model.head.weight is model.emb.weight
    assert model.emb.weight.is_meta
    with unchanged(model, tmp_path):
        loaded = fewbits.load(model, location, "nf4")
        small = fewbits.load(model, location, overrides={"emb": "int8"})
    assert loaded.head.weight is loaded.emb.weight  # plain: what is tied to a head is left out
    assert torch.equal(loaded.emb.weight, source.emb.weight)
    assert isinstance(loaded.fc.weight, QuantTensor)
    assert small.head.weight is small.emb.weight
    assert isinstance(small.head.weight, QuantTensor)
    assert torch.equal(small.head.weight.packed, bnb.functional.int8_vectorwise_quant(source.emb.weight.half())[0])


@pytest.mark.parametrize("save", SHARED_ON_DISK)
def test_tied_only_by_the_file(save, tmp_path):
    source = Assigned()
    location = save(source, tmp_path)
    loaded = fewbits.load(empty(Untied), location)
    assert loaded.head.weight is loaded.emb.weight
    assert torch.equal(loaded.emb.weight, source.emb.weight)


@pytest.mark.parametrize("save", SHARED_ON_DISK)
def test_tied_by_the_file_but_planned_differently(save, tmp_path):
    source = Assigned()
    loaded = fewbits.load(empty(Untied), save(source, tmp_path), overrides={"head": "nf4"})
    assert isinstance(loaded.head.weight, QuantTensor)
    assert not isinstance(loaded.emb.weight, QuantTensor)
    assert torch.equal(loaded.emb.weight, source.emb.weight)


def test_equal_values_are_not_a_tie(tmp_path):
    state = Untied().state_dict()
    state["head.weight"] = state["emb.weight"].clone()
    for save, name in ((st.save_file, "w.safetensors"), (torch.save, "w.pt")):
        save(state, tmp_path / name)
        loaded = fewbits.load(empty(Untied), tmp_path / name)
        assert loaded.head.weight is not loaded.emb.weight


def test_empty_tensors_are_not_a_tie(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0, 4))

    for save, name in ((st.save_file, "w.safetensors"), (torch.save, "w.pt")):
        save({"a": torch.empty(0, 4), "b": torch.empty(0, 4)}, tmp_path / name)
        loaded = fewbits.load(empty(Two), tmp_path / name)
        assert loaded.a is not loaded.b


def test_a_buffer_that_shares_its_bytes_with_a_parameter_stays_a_buffer(tmp_path):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("average", self.weight.detach())

    source = Both()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    loaded = fewbits.load(empty(Both), tmp_path / "w.pt")
    assert_holds(loaded, source.state_dict())
    assert isinstance(loaded.weight, nn.Parameter)
    assert list(loaded._buffers) == ["average"]


def test_one_module_at_two_places(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
            self.b = self.a

    state = Twice().state_dict()
    assert "b.1.running_mean" in state
    for t in state.values():
        t.fill_(3)
    torch.save(state, tmp_path / "w.pt")
    loaded = fewbits.load(empty(Twice), tmp_path / "w.pt")
    assert_holds(loaded, state)
    assert len(owners_of(loaded)) == 4


# ------------------------------------------------------------------------------------------------- foreign bytes


def test_misaligned_tensors_behind_blobs_of_odd_length(tmp_path):
    tensors = [
        ("blob", torch.arange(167, dtype=torch.uint8)),
        ("f32", torch.randn(5, 3)),
        ("flag", torch.tensor([True, False, True])),
        ("f64", torch.randn(7, dtype=torch.float64)),
        ("u8", torch.tensor([255], dtype=torch.uint8)),
        ("bf16", torch.randn(3, 3).bfloat16()),
        ("i64", torch.tensor(-(2**62))),
    ]
    path = write_raw(tmp_path / "w.safetensors", tensors)
    opened = open_checkpoint(path)
    assert any(t.offset % t.dtype.itemsize for t in opened.tensors.values())  # they are misaligned in the file
    read = dict(opened.stream(opened.tensors))
    assert list(read) == [name for name, _ in tensors]  # in the order of the file
    for name, t in tensors:
        assert read[name].dtype == t.dtype
        assert torch.equal(read[name], t), name


def four_bit_peer(storage: torch.dtype, quant_type: str = "nf4", nested: bool = True) -> nn.Sequential:
    """A model that bitsandbytes quantized."""
    linear = bnb.nn.Linear4bit(
        64, 24, quant_type=quant_type, compress_statistics=nested, quant_storage=storage, compute_dtype=torch.float32
    )
    return nn.Sequential(linear, nn.Linear(24, 5)).to("cpu")


def plain_twin() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 5))


@pytest.mark.parametrize("save", [st.save_file, torch.save])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_every_quant_storage_of_bitsandbytes(storage, quant_type, nested, save, tmp_path):
    peer = four_bit_peer(storage, quant_type, nested)
    state = peer.state_dict()
    assert state["0.weight"].dtype == storage
    path = tmp_path / ("w.safetensors" if save is st.save_file else "w.pt")
    save(state, path)
    loaded = fewbits.load(empty(plain_twin), path)
    weight = loaded[0].weight
    assert isinstance(weight, QuantTensor)
    assert weight.spec.format == quant_type
    assert weight.spec.double_quant == nested
    want = bnb.functional.dequantize_4bit(peer[0].weight.data.view(torch.uint8), peer[0].weight.quant_state)
    assert torch.equal(weight.dequantize(), want)
    assert torch.equal(loaded[1].weight, peer[1].weight)
    again = loaded.state_dict()
    assert again.keys() == state.keys()
    for name, t in state.items():  # the same bytes, whatever dtype they were stored under
        assert torch.equal(again[name].contiguous().view(-1).view(torch.uint8), t.view(-1).view(torch.uint8)), name


def test_an_8_bit_checkpoint_with_a_4_bit_config_is_loaded_as_it_is(tmp_path, unchanged):
    peer = nn.Sequential(bnb.nn.Linear8bitLt(64, 24, has_fp16_weights=False), nn.Linear(24, 5)).to("cpu")
    state, model = peer.state_dict(), empty(plain_twin)
    st.save_file(state, tmp_path / "model.safetensors")
    with unchanged(model, tmp_path):
        with pytest.warns(FewbitsWarning, match="already quantized to int8: it is loaded as it is, not as nf4") as said:
            loaded = fewbits.load(model, tmp_path, "nf4", double_quant=True)
        asked_for, as_it_is = fewbits.load(model, tmp_path, "int8"), fewbits.load(model, tmp_path)
    assert len(said) == 1
    assert said[0].filename == __file__
    for result in (loaded, asked_for, as_it_is):
        assert_holds(result, state)
        assert str(result[0].weight.spec) == "int8"


def test_a_4_bit_checkpoint_with_an_8_bit_config_is_loaded_as_it_is(tmp_path):
    state = four_bit_peer(torch.uint8).state_dict()
    st.save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(FewbitsWarning, match="already quantized to nf4: it is loaded as it is, not as int8"):
        loaded = fewbits.load(empty(plain_twin), tmp_path, "int8")
    assert_holds(loaded, state)


# ------------------------------------------------------------------------------------------------- buffers


def test_a_buffer_that_has_its_value_is_not_missing(tmp_path):
    state = trained(Net())
    del state["steps"], state["norm.num_batches_tracked"]
    st.save_file(state, tmp_path / "w.safetensors")
    loaded = fewbits.load(empty(), tmp_path)
    assert torch.equal(loaded.steps, torch.arange(4.0))
    assert torch.equal(loaded.mask, torch.ones(3))
    assert torch.equal(loaded.norm.running_mean, state["norm.running_mean"])


def test_a_buffer_without_a_value_is_missing(tmp_path, unchanged):
    state, model = trained(Net()), empty(include_buffers=True)
    del state["steps"]
    st.save_file(state, tmp_path / "w.safetensors")
    with unchanged(model, tmp_path), pytest.raises(CheckpointError) as caught:
        fewbits.load(model, tmp_path)
    text = str(caught.value)
    assert "missing from the checkpoint (2)" in text
    assert "    steps" in text
    assert "    mask" in text
    st.save_file(trained(Net()) | {"mask": torch.zeros(3)}, tmp_path / "w.safetensors")
    loaded = fewbits.load(model, tmp_path)
    assert torch.equal(loaded.mask, torch.zeros(3))  # the only value there is


def test_a_computed_buffer_is_not_read_from_an_old_checkpoint(tmp_path):
    state = trained(Net())
    old = {"mask": torch.ones(5, 5, dtype=torch.uint8)}  # of before it was made non-persistent: another shape and dtype
    st.save_file(state | old, tmp_path / "w.safetensors")
    loaded = fewbits.load(empty(), tmp_path)
    assert_holds(loaded, state)
    assert torch.equal(loaded.mask, torch.ones(3))


def test_dtype_casts_what_is_read_and_keep_in_fp32_wins(tmp_path):
    st.save_file(trained(Net()), tmp_path / "w.safetensors")
    loaded = fewbits.load(empty(), tmp_path, dtype="bfloat16", keep_in_fp32_modules=["emb", "norm"])
    dtypes = {name: t.dtype for name, t in loaded.state_dict().items()}
    assert dtypes == {
        "emb.weight": torch.float32,
        **{f"norm.{n}": torch.float32 for n in ("weight", "bias", "running_mean", "running_var")},
        "norm.num_batches_tracked": torch.int64,
        **{f"{m}.{n}": torch.bfloat16 for m in ("fc", "head") for n in ("weight", "bias")},
        "steps": torch.bfloat16,
    }


# ------------------------------------------------------------------------------------------------- the model given


def test_a_template_with_weights_is_not_touched_and_shares_nothing(tmp_path, unchanged):
    state, template = trained(Net()), Net().train()
    st.save_file(state, tmp_path / "w.safetensors")
    with unchanged(template, tmp_path):
        loaded = fewbits.load(template, tmp_path, "int8")
        with torch.no_grad():
            for t in [*loaded.buffers(), *(p for p in loaded.parameters() if not isinstance(p, QuantTensor))]:
                t.add_(1)
    assert type(loaded) is Net
    assert loaded.training


def test_the_same_empty_model_serves_again_and_after_an_error(tmp_path, unchanged):
    state, model = trained(Net()), empty().eval()
    st.save_file(state, tmp_path / "good.safetensors")
    st.save_file(state | {"fc.weight": torch.full((40, 16), torch.nan)}, tmp_path / "bad.safetensors")
    with unchanged(model, tmp_path):
        first = fewbits.load(model, tmp_path / "good.safetensors", "nf4")
        with pytest.raises(CheckpointError, match=r"fc\.weight"):
            fewbits.load(model, tmp_path / "bad.safetensors", "nf4")
        second = fewbits.load(model, tmp_path / "good.safetensors", "nf4")
    assert all(p.is_meta for p in model.parameters())
    assert not second.training
    assert_holds(second, first.state_dict())


def test_a_factory_is_called_once_and_without_memory(tmp_path):
    state, built = trained(Net()), []
    st.save_file(state, tmp_path / "w.safetensors")

    def factory() -> nn.Module:
        built.append(Net())
        return built[-1]

    assert_holds(fewbits.load(factory, tmp_path), state)
    assert len(built) == 1
    assert all(p.is_meta for p in built[0].parameters())
    assert not any(p.is_meta for p in Net().parameters())  # and what is built afterwards is as ever
    assert_holds(fewbits.load(Net, tmp_path), state)


# ------------------------------------------------------------------------------------------------- the reader

DTYPES = [d for d in SAFETENSORS_DTYPES.values() if d != torch.bool]
TENSORS = some.dictionaries(
    some.text(some.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    some.tuples(some.sampled_from(DTYPES), some.lists(some.integers(0, 5), max_size=3), some.integers(0, 2**32)),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_the_reader_gives_what_the_safetensors_library_gives(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("round") / "w.safetensors"
    state = {}
    for name, (dtype, shape, seed) in drawn.items():
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        state[name] = raw.view(dtype).reshape(shape)  # any bit pattern, NaNs and all
    st.save_file(state, path)
    peer = st.load_file(path)
    opened = open_checkpoint(path)
    read = dict(opened.stream(opened.tensors))
    assert read.keys() == peer.keys() == state.keys()
    for name, t in peer.items():
        assert (read[name].dtype, read[name].shape) == (t.dtype, t.shape)
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)), name


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(READER)]


def stored(count: int, nbytes: int, started: list[int], fail_at: int = -1) -> dict[str, StoredTensor]:
    """Tensors that read themselves, and note when each is read."""

    def reading(i: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if i == fail_at:
                raise CheckpointError("cannot be read", file="disk")
            started.append(i)
            return torch.full((nbytes,), i, dtype=torch.uint8)

        return read

    return {
        f"t{i:03}": StoredTensor(
            f"t{i:03}", Path("f"), torch.uint8, (nbytes,), nbytes, i * nbytes, None, (i,), reading(i)
        )
        for i in range(count)
    }


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline, "the reader did not get there"
        time.sleep(0.001)


def test_the_reader_runs_ahead_but_not_far(monkeypatch):
    monkeypatch.setattr(reader, "READ_AHEAD", 1000)
    started: list[int] = []
    tensors = stored(12, 300, started)
    stream = Checkpoint(Path("f"), tensors).stream(tensors)
    assert not readers()  # nothing runs before the first is asked for
    for taken in range(1, 13):
        name, tensor = next(stream)
        assert name == f"t{taken - 1:03}"
        assert torch.equal(tensor, torch.full((300,), taken - 1, dtype=torch.uint8))
        ahead = min(taken + 2, 12)  # three of 300 bytes, the one in hand among them, are within 1000, a fourth is not
        wait_until(lambda ahead=ahead: len(started) >= ahead)
        time.sleep(0.005)  # it would go on now if nothing held it
        assert len(started) == ahead
    assert next(stream, None) is None
    assert not readers()


def test_a_tensor_larger_than_the_bound_is_read_alone(monkeypatch):
    monkeypatch.setattr(reader, "READ_AHEAD", 100)
    started: list[int] = []
    tensors = stored(4, 300, started)
    stream = Checkpoint(Path("f"), tensors).stream(tensors)
    for taken in range(1, 5):
        next(stream)
        time.sleep(0.005)  # it would go on now if nothing held it
        assert len(started) == taken  # nothing beside the one in hand
    assert next(stream, None) is None
    assert not readers()


def test_no_thread_is_left_after_an_error_midway(monkeypatch):
    monkeypatch.setattr(reader, "READ_AHEAD", 900)
    started: list[int] = []
    tensors = stored(8, 300, started, fail_at=5)
    stream = Checkpoint(Path("f"), tensors).stream(tensors)
    names = []
    with pytest.raises(CheckpointError, match="cannot be read"):
        names.extend(name for name, _ in stream)
    assert names == ["t000", "t001", "t002", "t003", "t004"]
    assert started[:5] == [0, 1, 2, 3, 4]
    assert len(started) <= 7  # of the three that were under way one failed
    assert not readers()


def test_no_thread_is_left_when_the_caller_stops_early(monkeypatch):
    monkeypatch.setattr(reader, "READ_AHEAD", 1000)
    started: list[int] = []
    tensors = stored(50, 300, started)
    stream = Checkpoint(Path("f"), tensors).stream(tensors)
    next(stream)
    assert len(readers()) == 1
    stream.close()
    assert not readers()
    assert len(started) <= 3
    fresh = Checkpoint(Path("f"), tensors).stream(tensors)
    next(fresh)
    del fresh  # without being closed by name
    assert not readers()


def test_no_thread_is_left_after_load_succeeded_or_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "READ_AHEAD", 64)  # so that the threads have to wait for the caller
    state = trained(Net())
    st.save_file(state, tmp_path / "good.safetensors")
    st.save_file(state | {"emb.weight": torch.full((11, 16), torch.inf)}, tmp_path / "bad.safetensors")
    assert_holds(fewbits.load(empty(), tmp_path / "good.safetensors"), state)
    assert not readers()
    with pytest.raises(CheckpointError, match=r"emb\.weight") as caught:
        fewbits.load(empty(), tmp_path / "bad.safetensors")
    assert not readers()  # although the error, and with it the frames it went through, is still held
    assert caught.value.file == str(tmp_path / "bad.safetensors")


def test_a_file_that_is_cut_off_after_it_was_opened(tmp_path):
    state = trained(Net())
    path = tmp_path / "w.safetensors"
    st.save_file(state, path)
    opened = open_checkpoint(path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="cut off while being read") as caught:
        list(opened.stream(opened.tensors))
    assert caught.value.file == str(path)
    assert not readers()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(opened.stream(opened.tensors))
    assert not readers()


def test_many_small_tensors_and_several_files_come_in_order(tmp_path):
    state = {f"p{i}": torch.tensor([float(i)]) for i in range(300)}
    write_index(tmp_path, state, "safetensors", sizes=(100, 100))
    opened = open_checkpoint(tmp_path)
    read = list(opened.stream(state))
    assert {name: t.item() for name, t in read} == {f"p{i}": float(i) for i in range(300)}
    files = [str(opened.tensors[name].file) for name, _ in read]
    offsets = [(f, opened.tensors[name].offset) for f, (name, _) in zip(files, read, strict=True)]
    assert offsets == sorted(offsets)


def test_only_what_is_wanted_is_read():
    started: list[int] = []
    tensors = stored(8, 10, started)
    assert [name for name, _ in Checkpoint(Path("f"), tensors).stream(["t006", "t002"])] == ["t002", "t006"]
    assert started == [2, 6]


def test_opening_reads_no_data(tmp_path):
    # a file of holes, far larger than memory: it would show if the data were touched
    size = 1 << 36
    header = json.dumps({"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + size)
    assert open_checkpoint(path).tensors["big"].nbytes == size


def test_a_layer_that_fits_many_prefixes_is_none_of_them(tmp_path):
    st.save_file(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict(), tmp_path / "w.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="missing from the checkpoint") as error:
            fewbits.load(nn.Linear(4, 4), tmp_path)
    assert "0.weight" in str(error.value)
    assert "1.weight" in str(error.value)


def test_the_progress_bar(tmp_path, capsys):
    """Bytes, their rate and the file, where it is asked for; nothing where stderr is no terminal."""
    st.save_file({"weight": torch.randn(512, 512), "bias": torch.randn(512)}, tmp_path / "model.safetensors")
    fewbits.load(lambda: nn.Linear(512, 512), tmp_path, "nf4", skip_modules=[], device_map="cpu")
    assert not capsys.readouterr().err
    fewbits.load(lambda: nn.Linear(512, 512), tmp_path, "nf4", skip_modules=[], device_map="cpu", progress=True)
    shown = capsys.readouterr().err
    for part in ("loading", "100%", "1.05M", "B/s", "model.safetensors"):
        assert part in shown
