"""Bad input: every error is a ``FewbitsError`` and a builtin one, names file and parameter, and changes nothing.

The helper ``refused`` checks all of that for each case: the model that was given and the files are the same afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch as st
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import fewbits
from fewbits import FewbitsError, FewbitsWarning, QuantizationConfig, init_empty_weights
from fewbits.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    MissingDependencyError,
    SaveError,
    UnsupportedError,
)
from models import same_tensors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 64)
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.head = nn.Linear(64, 11)
        self.register_buffer("count", torch.tensor(3))


def good_state() -> dict[str, Tensor]:
    return Net().state_dict()


@pytest.fixture
def refused(tmp_path, unchanged):
    """Load and expect an error: its type, what it names, and that nothing was changed by it."""

    def check(
        location=tmp_path, *says, error=CheckpointError, file=None, parameter=None, build=Net, model=None, **kwargs
    ) -> FewbitsError:
        if model is None:
            with init_empty_weights():
                model = build()
        with unchanged(model, tmp_path), pytest.raises(FewbitsError) as caught:
            fewbits.load(model, location, **kwargs)
        found = caught.value
        assert type(found) is error
        assert isinstance(found, ValueError if error is not UnsupportedError else NotImplementedError)
        text = str(found)
        for part in says:
            assert part in text, text
        if file is not None:
            assert found.file == str(file)
            assert f"file: {file}" in text
        if parameter is not None:
            assert found.parameter == parameter
            assert f"parameter: {parameter}" in text
        return found

    return check


def write(folder: Path, state: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    (st.save_file if name.endswith(".safetensors") else torch.save)(state, folder / name)
    return folder / name


# ------------------------------------------------------------------------------------------------- errors themselves


def test_every_error_is_a_fewbits_error_and_a_builtin():
    builtins = {
        ConfigError: ValueError,
        CheckpointError: ValueError,
        CheckpointNotFoundError: FileNotFoundError,
        SaveError: OSError,
        UnsupportedError: NotImplementedError,
        MissingDependencyError: ImportError,
    }
    for kind, builtin in builtins.items():
        error = kind("what", file=Path("a/b"), parameter="p.q", expected="more", hint="try")
        assert isinstance(error, FewbitsError)
        assert isinstance(error, builtin)
        assert (error.file, error.parameter, error.expected, error.hint) == ("a/b", "p.q", "more", "try")
        assert str(error) == "what\n  file: a/b\n  parameter: p.q\n  expected: more\n  what to do: try"
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # as a worker process hands it over
            assert type(twin) is kind
            assert str(twin) == str(error)
    assert str(ConfigError("what")) == "what"
    error = ConfigError("what", file="first")
    error.locate("second")
    assert error.file == "first"


# ------------------------------------------------------------------------------------------------- names


def test_missing_keys_are_all_listed_with_the_nearest_names(tmp_path, refused):
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(60))
            self.out = nn.Linear(2, 2)

    state = {"out.wieght": torch.zeros(2, 2), "out.bias": torch.zeros(2)}
    path = write(tmp_path, state)
    error = refused(path, "missing from the checkpoint (61)", "not in the model (1)", file=path, build=Deep)
    lines = [line.strip() for line in str(error).splitlines()]
    for i in range(60):
        assert f"blocks.{i}.weight" in lines
    assert "out.weight  (nearest: out.wieght)" in lines
    assert "out.wieght  (nearest: out.weight)" in lines


def test_a_missing_tied_parameter_is_named_by_all_its_names(tmp_path, refused):
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 11, bias=False)
            self.head.weight = self.emb.weight

    state = good_state()
    del state["emb.weight"], state["head.weight"], state["head.bias"]
    write(tmp_path, state)
    refused(tmp_path, "missing from the checkpoint (1)", "emb.weight = head.weight", build=Tied)


def test_unexpected_keys_and_strict_false(tmp_path, refused, unchanged):
    state = good_state()
    extra = {"third.weight": torch.zeros(3), "first.wight": torch.zeros(3)}
    write(tmp_path, state | extra)
    refused(
        tmp_path, "not in the model (2)", "third.weight", "first.wight  (nearest: first.weight)", "strict=False",
        file=tmp_path,
    )  # fmt: skip
    with init_empty_weights():
        model = Net()
    with unchanged(model, tmp_path), pytest.warns(FewbitsWarning, match=r"has no .*third\.weight.*: ignored") as said:
        loaded = fewbits.load(model, tmp_path, strict=False)
    assert len(said) == 1
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items())


def test_strict_false_still_wants_every_parameter_and_shape(tmp_path, refused):
    state = good_state()
    del state["first.bias"]
    state["second.bias"] = torch.zeros(65)
    write(tmp_path, state)
    refused(tmp_path, "missing from the checkpoint (1)", "first.bias", "second.bias: shape [65]", strict=False)


def test_many_unexpected_keys_are_cut_short(tmp_path, refused):
    write(tmp_path, good_state() | {f"other.{i}": torch.zeros(1) for i in range(50)})
    error = refused(tmp_path, "not in the model (50)", "… and 30 more")
    assert str(error).count("    other.") == 20


def test_shape_and_dtype_mismatches_come_together(tmp_path, refused):
    state = good_state() | {
        "first.weight": torch.zeros(64, 63),
        "emb.weight": torch.zeros(11 * 64),
        "second.bias": torch.zeros(64, dtype=torch.int64),
        "count": torch.tensor(3.0),
        "head.bias": torch.zeros(11).to(torch.float8_e4m3fn),
    }
    write(tmp_path, state)
    refused(
        tmp_path,
        "that differ (5)",
        "first.weight: shape [64, 63] in the checkpoint, [64, 64] in the model",
        "emb.weight: shape [704] in the checkpoint, [11, 64] in the model",
        "second.bias: torch.int64 in the checkpoint, torch.float32 in the model",
        "count: torch.float32 in the checkpoint, torch.int64 in the model",
        "head.bias: torch.float8_e4m3fn in the checkpoint",
        file=tmp_path,
        config="nf4",
    )


def test_another_floating_point_dtype_is_no_mismatch(tmp_path):
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in good_state().items()}
    write(tmp_path, state)
    loaded = fewbits.load(Net(), tmp_path)
    assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype for n, t in loaded.state_dict().items())


# ------------------------------------------------------------------------------------------------- folders, indexes


def index_of(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


def shards_in(folder: Path, suffix: str = "safetensors") -> dict[str, str]:
    """Two shards of a good state dict, and their weight map."""
    state = good_state()
    halves = list(state)[:4], list(state)[4:]
    weight_map = {}
    for i, names in enumerate(halves):
        write(folder, {n: state[n] for n in names}, f"part-{i}.{suffix}")
        weight_map |= dict.fromkeys(names, f"part-{i}.{suffix}")
    return weight_map


def test_nothing_there(tmp_path, refused):
    for location in (tmp_path / "gone", tmp_path / "gone.safetensors", tmp_path / "gone.index.json", "./gone"):
        error = refused(location, "no such file or folder", error=CheckpointNotFoundError)
        assert isinstance(error, FileNotFoundError)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link.safetensors", "no such file", error=CheckpointNotFoundError)


@pytest.mark.parametrize("location", [None, 7, {"weight": 1}, "nul\0byte", "/" + "x" * 5000])
def test_what_is_no_location(location, refused):
    refused(location, error=CheckpointNotFoundError)


def test_an_empty_folder(tmp_path, refused):
    (tmp_path / "README.md").write_text("no weights")
    (tmp_path / ".hidden.safetensors").write_text("")
    (tmp_path / "sub.safetensors").mkdir()
    refused(
        tmp_path, "the folder holds no checkpoint", "model.safetensors", error=CheckpointNotFoundError, file=tmp_path
    )


def test_two_indexes(tmp_path, refused):
    weight_map = shards_in(tmp_path)
    index_of(tmp_path, weight_map)
    index_of(tmp_path, weight_map, "other.safetensors.index.json")
    refused(
        tmp_path, "more than one checkpoint", "model.safetensors.index.json", "other.safetensors.index.json",
        file=tmp_path,
    )  # fmt: skip


def test_a_single_file_beside_an_index(tmp_path, refused):
    index = index_of(tmp_path, shards_in(tmp_path))
    write(tmp_path, good_state())
    refused(
        tmp_path, "more than one checkpoint", "model.safetensors.index.json, model.safetensors", "what to do",
        file=tmp_path,
    )  # fmt: skip
    fewbits.load(Net(), index)  # the way out that the message gives
    fewbits.load(Net(), tmp_path / "model.safetensors")


def test_several_shards_without_an_index(tmp_path, refused):
    shards_in(tmp_path)
    refused(tmp_path, "2 checkpoint files and no index", "part-0.safetensors", "part-1.safetensors", file=tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_that_names_absent_shards(suffix, tmp_path, refused):
    index = index_of(tmp_path, shards_in(tmp_path, suffix))
    (tmp_path / f"part-1.{suffix}").unlink()
    for location in (tmp_path, index):
        error = refused(
            location, "names 1 of 2 shards that are not there", f"part-1.{suffix}", error=CheckpointNotFoundError,
            file=index,
        )  # fmt: skip
        assert isinstance(error, FileNotFoundError)


def test_a_shard_that_lacks_a_tensor_of_the_index(tmp_path, refused):
    weight_map = shards_in(tmp_path)
    index_of(tmp_path, weight_map | {"second.extra": "part-0.safetensors"})
    refused(tmp_path, "the shard lacks second.extra", file=tmp_path / "part-0.safetensors")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"weight_map"', "{}", '{"weight_map": []}', '{"weight_map": 3}', "\ufeff{}", "[" * 100_000],
)
def test_an_index_that_is_none(text, tmp_path, refused):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refused(tmp_path, "not an index", "weight_map", file=path)


def test_an_index_of_other_bytes_or_without_tensors(tmp_path, refused):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b"\xff\xfe\x00")
    refused(path, "not an index", file=path)
    index_of(tmp_path, {})
    refused(path, "names no tensors", file=path)


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "sub/../../secret.safetensors", "/etc/secret.bin", "..\\secret.bin", "C:x.bin"]
)
def test_an_index_that_leaves_its_folder(outside, tmp_path, refused):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path, good_state(), "secret.safetensors")
    index = index_of(folder, dict.fromkeys(good_state(), outside))
    refused(folder, "names a file outside its folder", repr(outside), file=index)


@pytest.mark.parametrize("shard", ["", ".", "part.txt", "config.json", "folder.safetensors"])
def test_an_index_that_names_what_is_no_shard(shard, tmp_path, refused):
    for name in ("part.txt", "config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.safetensors").mkdir()
    says = "cannot be read" if shard == "folder.safetensors" else "does not end in"
    refused(index_of(tmp_path, dict.fromkeys(good_state(), shard)), says)


def test_another_ending(tmp_path, refused):
    (tmp_path / "weights.ckpt").write_bytes(b"data")
    refused(tmp_path / "weights.ckpt", "does not end in .ckpt", ".safetensors, .bin", file=tmp_path / "weights.ckpt")


# ------------------------------------------------------------------------------------------------- damaged files


def cut_points(size: int, header: int) -> list[int]:
    """Everywhere near the ends and in the header's first bytes, and evenly in between."""
    near = [*range(24), *range(max(header - 8, 0), header + 16), *range(size - 40, size)]
    return sorted({p for p in [*near, *range(0, size, max(size // 60, 1))] if 0 <= p < size})


def tiny_state() -> dict[str, Tensor]:
    return {"weight": torch.randn(64, 16), "bias": torch.randn(64)}


def tiny() -> nn.Module:
    return nn.Linear(16, 64)


def legacy_save(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def test_a_truncated_safetensors_file_at_every_cut(tmp_path, refused):
    path = write(tmp_path, tiny_state())
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert fewbits.load(tiny(), path) is not None
    for cut in cut_points(len(whole), header):
        path.write_bytes(whole[:cut])
        refused(path, build=tiny, file=path)
    path.write_bytes(whole + b"\0")
    refused(path, "follow the last tensor", build=tiny, file=path)


@pytest.mark.parametrize("save", [torch.save, legacy_save])
def test_a_truncated_pickle_at_every_cut(save, tmp_path, refused):
    path = tmp_path / "pytorch_model.bin"
    save(tiny_state(), path)
    whole = path.read_bytes()
    assert fewbits.load(tiny(), path) is not None
    for cut in cut_points(len(whole), 64):
        path.write_bytes(whole[:cut])
        refused(path, build=tiny, file=path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"PK\x03\x04" + b"\0" * 60],
)
def test_a_file_of_something_else(name, content, tmp_path, refused):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, file=tmp_path / name)


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loads_or_refuses(path: Path, model: nn.Module) -> None:
    """Whatever was done to the file, loading gives a model of the right shapes or a ``FewbitsError``."""
    expected = {n: (t.shape, t.dtype.is_floating_point) for n, t in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FewbitsWarning)  # a damaged name may differ by what looks like a prefix
            loaded = fewbits.load(model, path, strict=False)
    except FewbitsError:
        return
    assert {n: (t.shape, t.dtype.is_floating_point) for n, t in loaded.state_dict().items()} == expected


@FUZZ
@given(some.data())
def test_random_bytes_in_a_safetensors_header(tmp_path, data):
    path = write(tmp_path, tiny_state())
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(some.integers(1, 4))):
        raw[data.draw(some.integers(0, header - 1))] = data.draw(some.integers(0, 255))
    path.write_bytes(raw)
    loads_or_refuses(path, tiny())


# anything JSON can say, weighted towards what a header holds
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.sampled_from(["F32", "BF16", "I8", "", "x"])
    | some.integers(-2, 70) | some.just(2**63) | some.just(10**30),
    lambda inner: some.lists(inner, max_size=3)
    | some.dictionaries(some.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@FUZZ
@given(some.dictionaries(some.sampled_from(["weight", "bias", "__metadata__", "x", ""]), JSON, max_size=4) | JSON)
def test_any_json_as_a_safetensors_header(tmp_path, header):
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 64)
    loads_or_refuses(tmp_path / "model.safetensors", tiny())


@FUZZ
@given(some.data(), some.sampled_from([torch.save, legacy_save]))
def test_random_bytes_in_a_pickle(tmp_path, data, save):
    path = tmp_path / "w.pt"
    save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(some.integers(1, 4))):  # the old way of saving writes addresses, so that lengths differ
        raw[data.draw(some.integers(0, 65535)) % len(raw)] = data.draw(some.integers(0, 255))
    path.write_bytes(raw)
    loads_or_refuses(path, nn.Linear(2, 2))


def lying(path: Path, entries: dict[str, object], data: int, length: int | None = None) -> Path:
    raw = json.dumps(entries).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + b"\1" * data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


LIES = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b"),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "b"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "b"),
    "gap at the start": ({"a": entry(4, 8)}, 8, "a"),
    "beyond the end": ({"a": entry(0, 8), "b": entry(8, 20)}, 16, "b"),
    "far beyond the end": ({"a": entry(0, 2**62)}, 16, "a"),
    "negative": ({"a": entry(-8, 0)}, 8, "a"),
    "backwards": ({"a": entry(8, 0, [8])}, 8, "a"),
    "negative dimensions": ({"a": entry(0, 8, [-2, -4])}, 8, "a"),
    "too small for its shape": ({"a": entry(0, 8, [3], "F32")}, 8, "a"),
    "too large for its shape": ({"a": entry(0, 16, [3], "F32")}, 16, "a"),
    "size that overflows": ({"a": entry(0, 0, [2**40, 2**40], "F32")}, 0, "a"),
    "dimension that overflows": ({"a": entry(0, 0, [0, 2**70], "F32")}, 0, "a"),
    "dimension that is no integer": ({"a": entry(0, 4, [4.0])}, 4, "a"),  # type: ignore[list-item]
    "dimension that is a truth value": ({"a": entry(0, 1, [True])}, 1, "a"),
    "unknown dtype": ({"a": entry(0, 4, [4], "F3")}, 4, "a"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, 4, "a"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, 4, "a"),
    "an entry that is a list": ({"a": [0, 4]}, 4, "a"),
    "more than the tensors": ({"a": entry(0, 4)}, 9, None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_about_offsets(lie, tmp_path, refused):
    entries, data, parameter = LIES[lie]
    path = lying(tmp_path / "w.safetensors", entries, data)
    error = refused(path, file=path, parameter=parameter)
    assert "do not belong together" not in str(error)  # it is the file that is refused, not its match with the model
    with pytest.raises(Exception, match=r".*"):  # the safetensors library refuses each of these files, too
        st.load_file(path)


@pytest.mark.parametrize("length", [0, 1, 7, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(length, tmp_path, refused):
    path = lying(tmp_path / "w.safetensors", {"a": entry(0, 4)}, 4, length)
    refused(path, file=path)


def test_a_pickle_whose_tensor_reaches_beyond_its_bytes(tmp_path, refused):
    class Beyond:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __reduce__(self):
            size, stride = (1 << 20, 1), (1, 1)
            storage = self.tensor._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, {})

    for save in (torch.save, legacy_save):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save({"weight": Beyond(torch.ones(4))}, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", "not a whole file of torch.save", build=lambda: nn.Linear(1, 1 << 20, bias=False))


# ------------------------------------------------------------------------------------------------- code


class Bomb:
    """What unpickling this does is create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", [torch.save, legacy_save])
@pytest.mark.parametrize("where", ["value", "beside", "whole"])
def test_a_pickle_that_wants_to_run_code(where, save, tmp_path, refused):
    target = tmp_path / "the code ran"
    state = tiny_state()
    content = {
        "value": state | {"bias": Bomb(target)},
        "beside": {"state_dict": state, "args": Bomb(target)},
        "whole": Bomb(target),
    }[where]
    path = tmp_path / "pytorch_model.bin"
    save(content, path)
    assert not target.exists()
    refused(path, "wants to run code", "tensors only", file=path, build=tiny)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it was a live one


def test_whole_modules_are_refused(tmp_path, refused):
    for save in (torch.save, legacy_save):
        save(tiny(), tmp_path / "module.pt")
        refused(tmp_path / "module.pt", "wants to run code", build=tiny, file=tmp_path / "module.pt")


def test_torchscript_archives_are_refused(tmp_path, refused):
    path = tmp_path / "scripted.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(tiny()), path)
    refused(path, "wants to run code", build=tiny, file=path)


@pytest.mark.parametrize(
    ("content", "says", "parameter"),
    [
        ([1, 2], "holds a list", None),
        (torch.ones(3), "holds a Tensor", None),
        ({}, "holds a dict", None),
        ({"weight": [1.0]}, "holds a list among its tensors", "weight"),
        ({"state_dict": {"weight": torch.ones(1), "step": 3}}, "holds a int among its tensors", "step"),
        ({"weight": torch.eye(3).to_sparse()}, "torch.sparse_coo", "weight"),
        ({"weight": torch.ones(3, device="meta")}, "meta", "weight"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of torch, while saving these
def test_pickles_that_hold_something_else(content, says, parameter, tmp_path, refused):
    path = tmp_path / "w.pt"
    torch.save(content, path)
    refused(path, says, file=path, parameter=parameter)


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_nan_and_infinity_in_any_weight(value, suffix, tmp_path, refused):
    for name in ("first.weight", "head.weight", "first.bias"):
        state = good_state()
        state[name].view(-1)[-1] = value
        path = write(tmp_path, state, f"w.{suffix}")
        for kwargs in (
            {"config": "nf4"}, {"config": "fp4"}, {"config": "int8"}, {"config": "nf4", "double_quant": True}, {},
        ):  # fmt: skip
            refused(path, "NaN or infinite", file=path, parameter=name, **kwargs)


def test_values_beyond_fp16_for_int8(tmp_path, refused):
    state = good_state()
    state["first.weight"][3, 5] = 65520.0  # rounds to infinity in fp16
    path = write(tmp_path, state)
    refused(path, "65504", file=path, parameter="first.weight", config="int8")
    fewbits.load(Net(), path, "nf4")
    state["first.weight"][3, 5] = 65504.0
    write(tmp_path, state)
    fewbits.load(Net(), path, "int8")


def test_values_beyond_the_dtype_asked_for(tmp_path, refused):
    state = good_state()
    state["head.bias"][0] = 1e30
    path = write(tmp_path, state)
    refused(path, "torch.float16 cannot hold", file=path, parameter="head.bias", dtype=torch.float16)
    fewbits.load(Net(), path, dtype=torch.bfloat16)


def test_quantize_in_memory_refuses_before_it_changes_anything(unchanged):
    for value in (torch.nan, torch.inf):
        model = Net()
        model.second.weight.data[0, 0] = value
        with torch.no_grad():
            snapshot = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(ConfigError, match=r"second\.weight"):
            fewbits.quantize(model, "nf4")
        assert type(model.first) is nn.Linear
        assert all(torch.equal(t.nan_to_num(), snapshot[n].nan_to_num()) for n, t in model.state_dict().items())
    with init_empty_weights():
        empty = Net()
    with unchanged(empty), pytest.raises(ConfigError, match=r"no values(.|\n)*emb\.weight(.|\n)*fewbits\.load"):
        fewbits.quantize(empty, "int8")


# ------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"config": "nf5"}, "unknown format 'nf5'"),
        ({"config": "4bit"}, 'perhaps you mean "nf4"'),
        ({"config": "8-bit"}, 'perhaps you mean "int8"'),
        ({"config": 4}, "unknown format 4"),
        ({"config": ""}, "unknown format ''"),
        ({"config": "nf4", "overrides": {"first": "q4"}}, "unknown format 'q4'"),
        ({"config": "nf4", "block_size": 48}, "block size 48"),
        ({"config": "nf4", "block_size": 8192}, "32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ({"config": "nf4", "block_size": "64"}, "block size '64'"),
        ({"config": "nf4", "dtype": "int8"}, "dtype is 'int8'"),
        ({"config": "nf4", "dtype": torch.int32}, "dtype is torch.int32"),
        ({"config": "nf4", "compute_dtype": "half a float"}, "compute_dtype is 'half a float'"),
        ({"config": "int8", "llm_int8_threshold": -1.0}, "llm_int8_threshold is -1.0"),
        ({"config": "int8", "double_quant": True}, "double_quant has no meaning for int8"),
        ({"config": "nf4", "skip_modules": "head"}, "skip_modules is 'head'"),
        ({"config": "nf4", "skip_modules": [3]}, "skip_modules is [3]"),
        ({"config": "nf4", "keep_in_fp32_modules": "emb"}, "keep_in_fp32_modules is 'emb'"),
        ({"config": "nf4", "blocksize": 64}, "unknown setting: blocksize"),
        ({"config": QuantizationConfig("nf4"), "block_size": 64}, "beside a QuantizationConfig: block_size"),
        ({"config": "nf4", "overrides": {"first.bias": "nf4"}}, "a parameter of shape [64] cannot be nf4"),
        ({"config": "nf4", "device_map": "gpu"}, "'gpu' is not a device"),
        ({"config": "nf4", "device_map": 1.5}, "device_map"),
        ({"config": "nf4", "device_map": {}}, "device_map is empty"),
        ({"config": "nf4", "max_memory": {"cpu": "much"}}, "max_memory['cpu'] is 'much'"),
        ({"config": "nf4", "max_memory": {"cpu": -1}}, "max_memory['cpu'] is -1"),
        ({"config": "nf4", "max_memory": {"cpu": True}}, "max_memory['cpu'] is True"),
    ],
)
def test_arguments_that_cannot_be_meant(kwargs, says, tmp_path, refused):
    write(tmp_path, good_state())
    refused(tmp_path, says, error=ConfigError, **kwargs)


@pytest.mark.parametrize("argument", ["skip_modules", "keep_in_fp32_modules", "overrides"])
@pytest.mark.parametrize(("pattern", "nearest"), [("frist", "first"), ("first.wieght", "first.weight"), ("h.*", None)])
def test_patterns_that_match_nothing(argument, pattern, nearest, tmp_path, refused):
    write(tmp_path, good_state())
    value = {pattern: "nf4"} if argument == "overrides" else [pattern]
    says = [f"{argument}: nothing in the model is named {pattern!r}", *([f"nearest: {nearest}"] if nearest else [])]
    given = copy.deepcopy(value)
    refused(tmp_path, *says, error=ConfigError, config="nf4", **{argument: value})
    assert value == given


def test_a_part_of_a_name_is_no_pattern(tmp_path, refused):
    write(tmp_path, good_state())
    refused(tmp_path, "'fir'", error=ConfigError, config="nf4", skip_modules=["fir"])


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, {"": "cuda"}, {"": 0}, torch.device("cuda")])
def test_cuda_where_there_is_none(device_map, tmp_path, refused):
    write(tmp_path, good_state())
    refused(tmp_path, "sees no CUDA GPU", "auto", error=ConfigError, config="nf4", device_map=device_map)


def test_a_gpu_that_is_not_there(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    state = good_state()
    state["emb.weight"][0, 0] = torch.nan  # an error of its own, if it were read first
    write(tmp_path, state)
    for device_map in (99, "cuda:99", {"": "cpu", "head": 99}, {"": "disk", "first.weight": "cuda:99"}):
        refused(tmp_path, "there is no cuda:99", "below 1", error=ConfigError, config="nf4", device_map=device_map)
    plan = fewbits.plan(Net(), "nf4", max_memory={98: "20KB", "cuda:99": "1MB"}, device_map="balanced")
    refused(tmp_path, "there is no cuda:98", error=ConfigError, config="nf4", device_map=plan)
    refused(tmp_path, "there is no cuda:99", error=ConfigError, config="nf4", max_memory={99: "1MB"})


def test_max_memory_that_is_too_small(tmp_path, refused, unchanged):
    write(tmp_path, good_state())
    # two quantized 64 × 64 weights: half a byte an element, and a float for each 64; the rest in fp32; one int64
    quantized = 2 * (64 * 64 // 2 + 64 * 64 // 64 * 4)
    plain = 4 * (11 * 64 + 64 + 64 + 11 * 64 + 11) + 8
    takes = quantized + plain
    small = 4 * (64 + 64 + 11) + 8  # the tensors of less than 1 kB
    for device_map in ("auto", "balanced", "balanced_low_0", "sequential", None):
        refused(
            tmp_path, f"{takes:,} bytes", f"{takes - 1000:,} are missing", "cpu 1,000, disk 0",
            f'"disk" to {takes - small:,} or "cpu" to {takes:,} would do', error=ConfigError, config="nf4",
            max_memory={"cpu": "1KB", "disk": 0}, device_map=device_map,
        )  # fmt: skip
    for device_map in ("cpu", {"": "cpu"}, {"": "disk", "emb": "cpu", "head": "cpu"}):
        says = f"puts {takes:,} bytes on cpu, {takes - 1000:,} more" if "emb" not in device_map else "bytes on cpu"
        refused(
            tmp_path, says, "at most 1,000", error=ConfigError, config="nf4", max_memory={"cpu": "1KB"},
            device_map=device_map,
        )  # fmt: skip
    model = Net()
    with unchanged(model, tmp_path):
        want = fewbits.load(model, tmp_path, "nf4", max_memory={"cpu": takes}, device_map="cpu")
        for max_memory in ({"cpu": takes, "disk": 0}, {"cpu": "1KB"}, {"cpu": 0, "disk": takes}):  # or it goes to disk
            said = (
                contextlib.nullcontext() if max_memory["cpu"] == takes else pytest.warns(FewbitsWarning, match="disk")
            )
            with said:
                loaded = fewbits.load(model, tmp_path, "nf4", max_memory=max_memory)
            assert same_tensors(loaded.state_dict(), want.state_dict())


def test_a_map_over_several_devices(tmp_path, refused, unchanged):
    state = good_state()
    write(tmp_path, state | {"emb.weight": torch.full((11, 64), torch.nan)})  # nothing is read before the error
    for device_map, says in [
        ({"emb": "cpu", "first": "meta"}, "meta device"),
        (
            {"emb": "cpu", "first": "disk"},
            "leaves out 4 parameters: second.weight, second.bias, head.weight, head.bias",
        ),
        ({"": "cpu", "frist": "disk"}, "nothing in the model is named 'frist'"),
        ({"": "cpu", "first": "drive"}, "'drive' is not a device"),
        ({"": "cpu", "first": 0}, "sees no CUDA GPU"),
        ({"": "cpu", "first": "disk", "head.bias": "cuda:1"}, "sees no CUDA GPU"),
    ]:
        given_map = dict(device_map)
        refused(tmp_path, "device_map", says, error=ConfigError, config="nf4", device_map=device_map)
        assert device_map == given_map
    write(tmp_path, state)
    model = Net()
    with unchanged(model, tmp_path):
        want = fewbits.load(model, tmp_path, "nf4", device_map="cpu").state_dict()
        for device_map in (
            {"": "cpu"},
            {"": "disk"},
            {"": "cpu", "first": "disk"},
            {"emb": "disk", "*": "cpu", "head.bias": "disk"},
        ):
            given_map = dict(device_map)
            loaded = fewbits.load(model, tmp_path, "nf4", device_map=device_map)
            assert same_tensors(loaded.state_dict(), want)
            assert device_map == given_map


@pytest.mark.parametrize("model", ["gpt2", 3, None, lambda: 3, lambda: None, nn.Module])
def test_what_is_no_model(model, tmp_path):
    write(tmp_path, good_state())
    with pytest.raises(FewbitsError):
        fewbits.load(model, tmp_path, "nf4")


# ------------------------------------------------------------------------------------------------- quantized files


def quantized_state(format: str, **kwargs: object) -> dict[str, Tensor]:
    model = fewbits.quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), format, **kwargs)
    return {name: t.clone() for name, t in model.state_dict().items()}


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))


STATE_KEY = "0.weight.quant_state.bitsandbytes__nf4"


def blob(content: object) -> Tensor:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


def settings_of(state: dict[str, Tensor]) -> dict[str, object]:
    return json.loads(bytes(state[STATE_KEY].tolist()))


@pytest.mark.parametrize(
    ("format", "kwargs"), [("nf4", {}), ("nf4", {"double_quant": True}), ("int8", {})], ids=["nf4", "nf4-dq", "int8"]
)
def test_a_quantized_checkpoint_that_lacks_a_part(format, kwargs, tmp_path, refused):
    state = quantized_state(format, **kwargs)
    path = write(tmp_path, state)
    fewbits.load(two(), path)
    for part in [n for n in state if n.startswith("0.") and n not in ("0.bias", "0.weight_format")]:
        write(tmp_path, {n: t for n, t in state.items() if n != part})
        error = refused(path, "0.weight", build=two)
        assert error.file in (str(path), str(tmp_path))
    if format == "int8":  # the layout is the one there is; older files do not say it
        write(tmp_path, {n: t for n, t in state.items() if n != "0.weight_format"})
        assert torch.equal(fewbits.load(two(), path)[0].weight.packed, state["0.weight"])


INCONSISTENT_4BIT = {
    "too few bytes": {"0.weight": torch.zeros(1023, 1, dtype=torch.uint8)},
    "too many bytes": {"0.weight": torch.zeros(1025, 1, dtype=torch.uint8)},
    "scales of another number": {"0.weight.absmax": torch.ones(31)},
    "scales of another dtype": {"0.weight.absmax": torch.ones(32, dtype=torch.float16)},
    "double-quantized scales, no nesting": {"0.weight.absmax": torch.ones(32, dtype=torch.uint8)},
    "scales that are NaN": {"0.weight.absmax": torch.full((32,), torch.nan)},
    "a foreign table": {"0.weight.quant_map": torch.linspace(-1, 1, 16)},
    "a table of 8 values": {"0.weight.quant_map": torch.linspace(-1, 1, 8)},
    "a table of another dtype": {"0.weight.quant_map": torch.zeros(16, dtype=torch.float16)},
}


@pytest.mark.parametrize("case", INCONSISTENT_4BIT)
def test_a_4_bit_checkpoint_whose_parts_do_not_fit(case, tmp_path, refused):
    path = write(tmp_path, quantized_state("nf4") | INCONSISTENT_4BIT[case])
    error = ConfigError if "NaN" in case else CheckpointError
    refused(path, error=error, build=two, file=path, parameter="0.weight")


INCONSISTENT_NESTED = {
    "a scale's scale too many": {"0.weight.nested_absmax": torch.ones(2)},
    "a foreign nested table": {"0.weight.nested_quant_map": torch.linspace(-1, 1, 256)},
    "scales that are not nested": {"0.weight.absmax": torch.ones(32)},
    "an infinite scale of scales": {"0.weight.nested_absmax": torch.tensor([torch.inf])},
}


@pytest.mark.parametrize("case", INCONSISTENT_NESTED)
def test_a_double_quantized_checkpoint_whose_parts_do_not_fit(case, tmp_path, refused):
    path = write(tmp_path, quantized_state("nf4", double_quant=True) | INCONSISTENT_NESTED[case])
    error = ConfigError if "infinite" in case else CheckpointError
    refused(path, error=error, build=two, file=path, parameter="0.weight")


INCONSISTENT_INT8 = {
    "of another dtype": ({"0.weight": torch.zeros(32, 64, dtype=torch.uint8)}, CheckpointError),
    "in a tiled layout": ({"0.weight_format": torch.tensor(1, dtype=torch.uint8)}, CheckpointError),
    "in several layouts": ({"0.weight_format": torch.zeros(2, dtype=torch.uint8)}, CheckpointError),
    "in a layout that is NaN": ({"0.weight_format": torch.tensor(torch.nan)}, CheckpointError),
    "with too few scales": ({"0.SCB": torch.ones(31)}, CheckpointError),
    "with scales in fp16": ({"0.SCB": torch.ones(32).half()}, CheckpointError),
    "with infinite scales": ({"0.SCB": torch.full((32,), torch.inf)}, ConfigError),
}


@pytest.mark.parametrize("case", INCONSISTENT_INT8)
def test_an_int8_checkpoint_whose_parts_do_not_fit(case, tmp_path, refused):
    parts, error = INCONSISTENT_INT8[case]
    path = write(tmp_path, quantized_state("int8") | parts)
    refused(path, error=error, build=two, file=path, parameter="0.weight")


BROKEN_JSON: dict[str, object] = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe\xfa",
    "a list": [],
    "deep": b"[" * 100_000,
    "no shape": {"shape": None},
    "a shape of text": {"shape": "wide"},
    "a negative shape": {"shape": [-32, -64]},
    "an infinite shape": {"shape": [float("inf"), 64]},
    "another type": {"quant_type": "fp4"},
    "an unknown type": {"quant_type": "nf5"},
    "an unknown block size": {"blocksize": 63},
    "a block size of text": {"blocksize": "64"},
    "another block size": {"blocksize": 128},
    "a dtype that is none": {"dtype": "load"},
    "a dtype that is no float": {"dtype": "int8"},
    "a dtype that is a number": {"dtype": 7},
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_4_bit_checkpoint_with_broken_settings(case, tmp_path, refused):
    state = quantized_state("nf4")
    broken = BROKEN_JSON[case]
    content = settings_of(state) | broken if isinstance(broken, dict) else broken
    path = write(tmp_path, state | {STATE_KEY: blob(content)})
    refused(path, build=two, file=path, parameter="0.weight")


def test_settings_of_another_shape_than_the_model(tmp_path, refused):
    state = quantized_state("nf4")
    path = write(tmp_path, state | {STATE_KEY: blob(settings_of(state) | {"shape": [64, 32]})})
    refused(path, "0.weight: shape [64, 32] in the checkpoint, [32, 64] in the model", build=two)


@pytest.mark.parametrize("offset", [None, "much", float("nan"), 10**400], ids=["none", "text", "nan", "too large"])
def test_a_broken_nested_offset(offset, tmp_path, refused):
    state = quantized_state("nf4", double_quant=True)
    path = write(tmp_path, state | {STATE_KEY: blob(settings_of(state) | {"nested_offset": offset})})
    refused(path, "quantization state cannot be understood", build=two, file=path, parameter="0.weight")


def test_settings_that_are_no_row_of_bytes(tmp_path, refused):
    for wrong in (torch.tensor(2**40), torch.zeros(3), torch.tensor([-1, 300])):
        path = write(tmp_path, quantized_state("nf4") | {STATE_KEY: wrong})
        refused(path, "quantization state cannot be understood", build=two, file=path, parameter="0.weight")


def test_an_unknown_quantization_type_in_a_key(tmp_path, refused):
    state = quantized_state("nf4")
    state["0.weight.quant_state.bitsandbytes__nf3"] = state.pop(STATE_KEY)
    write(tmp_path, state)
    refused(tmp_path, "unknown quantization type 'nf3'", build=two, file=tmp_path, parameter="0.weight")


@FUZZ
@given(some.dictionaries(some.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_offset"]), JSON))
def test_any_json_as_settings(tmp_path, changes):
    state = quantized_state("nf4")
    write(tmp_path, state | {STATE_KEY: blob(settings_of(state) | changes)})
    loads_or_refuses_quantized(tmp_path)


def loads_or_refuses_quantized(folder: Path) -> None:
    try:
        loaded = fewbits.load(two(), folder)
    except FewbitsError:
        return
    assert loaded[0].weight.dequantize().shape == (32, 64)


def test_a_quantized_tensor_where_the_model_has_a_buffer(tmp_path, refused):
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(32, 64))

    state = {n.removeprefix("0."): t for n, t in quantized_state("nf4").items() if n.startswith("0.weight")}
    write(tmp_path, state)
    refused(tmp_path, "weight: nf4 in the checkpoint, a buffer in the model", build=Buffered)


def test_a_quantized_shard_that_is_absent_names_what_is_lacking(tmp_path, refused):
    state = quantized_state("nf4")
    scales = [n for n in state if n.endswith(("absmax", "quant_map"))]
    write(tmp_path, {n: t for n, t in state.items() if n not in scales}, "a.safetensors")
    index_of(tmp_path, dict.fromkeys(set(state) - set(scales), "a.safetensors"))
    refused(tmp_path, "lacks its absmax", build=two, file=tmp_path, parameter="0.weight")


def test_a_folder_that_vanishes(tmp_path, unchanged):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, good_state())
    shutil.rmtree(folder)
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder"):
        fewbits.load(Net(), folder)
