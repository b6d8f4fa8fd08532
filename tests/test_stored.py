"""Quantizing what lies in a file without reading it first: the same bytes, the same errors, and what may change."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import stored
from fewbits.errors import CheckpointError
from fewbits.files import OpenFiles, StoredTensor, open_safetensors
from fewbits.formats import QuantSpec, quantize_inner, quantize_inner_from
from fewbits.kernels import cpu_backend, ops, use_backend
from fewbits.memory import Arena, FilePart
from fewbits.storage import Storage

load = importlib.import_module("fewbits.load")  # the name is the function's

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [
    QuantSpec("nf4"), QuantSpec("nf4", double_quant=True), QuantSpec("fp4", block_size=256),
    QuantSpec("nf4", block_size=4096, double_quant=True), QuantSpec("int8"),
]  # fmt: skip
# what one thread reads at a time holds many of the blocks and rows, or less than one of them
SHAPES = [(1,), (63,), (3, 5), (2, 130, 70), (700, 1000), (3, 300_001), (1, 1_000_003)]


@pytest.fixture(params=cpu_backend.levels())
def level(request):
    with cpu_backend.use_level(request.param):
        yield request.param


def in_file(path: Path, w: torch.Tensor, offset: int) -> FilePart:
    path.write_bytes(os.urandom(offset) + w.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return FilePart(os.open(path, os.O_RDONLY), offset, w.dtype, tuple(w.shape))


def check(path: Path, w: torch.Tensor, spec: QuantSpec, offset: int) -> None:
    with use_backend("reference"):
        expected = quantize_inner(w, replace(spec, double_quant=False))
    if spec.double_quant:  # which follows from the scales, and their mean from the order of its terms
        scales = ops.quantize_absmax(expected["absmax"].flatten())
        expected["absmax"] = scales[0].view(expected["absmax"].shape)
        expected |= {"nested_absmax": scales[1], "nested_offset": scales[2]}
    part = in_file(path, w, offset)
    try:
        found, largest = quantize_inner_from(part, spec, Arena())
    finally:
        os.close(part.file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert largest == w.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_references_bytes(spec, dtype, level, tmp_path):
    for shape in SHAPES:
        check(tmp_path / "w", torch.randn(shape).to(dtype), spec, offset=7)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS), st.sampled_from(DTYPES), st.integers(1, 900), st.integers(1, 900),
    st.integers(0, 5000), st.integers(1, 5), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_offset_and_number_of_threads(tmp_path_factory, spec, dtype, rows, columns, offset, threads, seed):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3
        check(tmp_path_factory.mktemp("part") / "w", w.to(dtype), spec, offset)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_found_wherever_they_are(dtype, value, spec, level, tmp_path):
    for at in (0, 1, 63_999, 640 * 1000 - 1):
        w = torch.randn(640, 1000).to(dtype)
        w.view(-1)[at] = value
        part = in_file(tmp_path / "w", w, 3)
        _, largest = quantize_inner_from(part, spec, Arena())
        os.close(part.file)
        assert not largest <= torch.finfo(torch.float32).max
        assert (largest != largest) == (value != value)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_file_that_cannot_be_read(spec, tmp_path):
    part = in_file(tmp_path / "w", torch.randn(700, 1000), 0)
    os.truncate(tmp_path / "w", 700 * 1000 * 4 - 1)
    with pytest.raises(EOFError):
        quantize_inner_from(part, spec, Arena())
    os.close(part.file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        quantize_inner_from(part, spec, Arena())


# ------------------------------------------------------------------------------------------------- of a checkpoint


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(1024, 640), nn.Linear(640, 64)
        self.head = nn.Linear(1024, 640, bias=False)
        self.head.weight = self.large.weight


def checkpoint(folder: Path, dtype: torch.dtype, **changes: torch.Tensor) -> Path:
    state = {name: t.to(dtype).clone() for name, t in Two().state_dict().items() if name != "head.weight"}
    save_file(state | changes, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture
def quantized_there(monkeypatch):
    """Names of the parameters that were quantized from their file."""
    names = []

    def quantize_stored(stored_, storage, path, arena, files):
        names.append(path)
        return stored.quantize_stored(stored_, storage, path, arena, files)

    monkeypatch.setattr(load, "quantize_stored", quantize_stored)
    return names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_loading_gives_what_it_gives_from_memory(spec, dtype, tmp_path, quantized_there):
    path = checkpoint(tmp_path, dtype)
    settings = {"double_quant": spec.double_quant, "block_size": spec.block_size, "skip_modules": []}
    found = fewbits.load(Two, path, spec.format, device_map="cpu", **settings)
    assert quantized_there == (["large.weight"] if dtype.itemsize * 1024 * 640 >= 1 << 20 else [])
    assert found.head.weight is found.large.weight
    assert found.large.weight.dtype == dtype
    with use_backend("reference"):
        expected = fewbits.load(Two, path, spec.format, device_map="cpu", **settings)
    assert len(quantized_there) == 1
    before, after = expected.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if spec.double_quant and "absmax" in name:
            continue
        assert tensor.dtype == after[name].dtype
        if "quant_state" not in name or not spec.double_quant:
            assert torch.equal(tensor, after[name]), name
    torch.testing.assert_close(found.large.weight.dequantize(), expected.large.weight.dequantize())


@pytest.mark.parametrize(
    ("format", "value", "what"),
    [
        ("nf4", torch.nan, "NaN or infinite"), ("int8", torch.inf, "NaN or infinite"),
        ("int8", 65505.0, "from .* to 65505"), ("int8", -70000.0, "from -70000 to"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(format, value, what, tmp_path, quantized_there):
    weight = torch.randn(640, 1024)
    weight[400, 17] = value
    path = checkpoint(tmp_path, torch.float32, **{"large.weight": weight})
    with pytest.raises(CheckpointError, match=what) as caught:
        fewbits.load(Two, path, format, skip_modules=[], device_map="cpu")
    assert quantized_there == ["large.weight"]
    assert (caught.value.file, caught.value.parameter) == (str(path), "large.weight")


def test_the_largest_that_int8_holds(tmp_path):
    weight = torch.randn(640, 1024)
    weight[400, 17] = -65504.0
    path = checkpoint(tmp_path, torch.float32, **{"large.weight": weight})
    model = fewbits.load(Two, path, "int8", skip_modules=[], device_map="cpu")
    assert model.large.weight.dequantize()[400, 17].item() == -65504.0


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def written_over(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"else")
    os.utime(path, ns=(1, 1))


def cut_off(path: Path) -> None:
    os.truncate(path, 4000)


# what takes the name of a file that is being read leaves the file itself whole
@pytest.mark.parametrize(
    ("when", "change"),
    [
        ("before", replaced), ("before", written_over), ("before", cut_off), ("before", os.unlink),
        ("meanwhile", written_over), ("meanwhile", cut_off),
    ],
)  # fmt: skip
def test_a_file_that_is_changed_midway(when, change, tmp_path, monkeypatch):
    path = checkpoint(tmp_path, torch.float32)
    real = stored.quantize_inner_from

    def quantize(part, spec, arena):
        if when == "meanwhile":
            change(path)
        return real(part, spec, arena)

    def turns(tensors, files):
        for tensor in real_turns(tensors, files):
            if when == "before":
                change(path)
            yield tensor

    real_turns = stored.in_turn
    monkeypatch.setattr(stored, "quantize_inner_from", quantize)
    monkeypatch.setattr(load, "in_turn", turns)
    with pytest.raises(CheckpointError, match=r"replaced|cut off|cannot be read") as caught:
        fewbits.load(Two, path, "nf4", skip_modules=[], device_map="cpu")
    assert caught.value.file == str(path)
    if Path("/proc/self/fd").exists():
        open_now = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        assert not [name for name in open_now if name.startswith(str(tmp_path))]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told")
def test_the_system_is_told_to_read_on_so_far_and_no_further(tmp_path, monkeypatch):
    sizes = [300, 500, 200, 2000, 100, 100, 400]
    save_file({f"{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}, tmp_path / "w.safetensors")
    tensors = list(open_safetensors(tmp_path / "w.safetensors")[0].values())
    told: list[StoredTensor] = []
    monkeypatch.setattr(stored, "READ_AHEAD", 1000)
    monkeypatch.setattr(stored, "_expect", lambda tensor, files: told.append(tensor))
    for i, tensor in enumerate(stored.in_turn(tensors, OpenFiles())):
        assert tensor is tensors[i]
        assert told == tensors[: len(told)]
        assert len(told) > i
        ahead = sum(t.nbytes for t in told[i:])
        assert ahead <= 1000 or len(told) == i + 1
        assert len(told) == len(tensors) or ahead + tensors[len(told)].nbytes > 1000
    monkeypatch.undo()
    files = OpenFiles()
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *what: asked.append(what[1:]))
    assert list(stored.in_turn(tensors, files)) == tensors
    assert asked == [(t.offset, t.nbytes, os.POSIX_FADV_WILLNEED) for t in tensors]
    files.close()


def test_small_tensors_and_those_stored_transposed_are_read_as_before(tmp_path, quantized_there):
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(640, 1024)
    save_file({name: t.clone() for name, t in conv.state_dict().items()}, tmp_path / "model.safetensors")
    found = fewbits.load(conv, tmp_path, "nf4", skip_modules=[], device_map="cpu")
    assert not quantized_there
    assert found.weight.spec.format == "nf4"
    spec = Storage(QuantSpec("nf4"), None)
    assert not stored.can_quantize_stored(open_safetensors(tmp_path / "model.safetensors")[0]["bias"], spec.spec)


# ------------------------------------------------------------------------------------------------- memory


def test_tensors_of_an_arena_have_memory_of_their_own():
    arena, made = Arena(), []
    for nbytes in [1, 255, 256, 257, 5 << 20, 100 << 20, 3, 60 << 20, 30 << 20]:
        tensor = arena.empty([nbytes], torch.uint8)
        tensor.fill_(len(made))
        made.append(tensor)
    arena.close()
    made.append(arena.empty([7, 5], torch.float32).fill_(9.5))
    arena.close()
    for i, tensor in enumerate(made[:-1]):
        assert bool((tensor == i).all())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert bool((made[-1] == 9.5).all())
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in made)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(start % 256 == 0 for start, _ in spans)
    assert arena.empty([0, 3], torch.int8).shape == (0, 3)


def test_scratch_is_the_same_memory_again():
    arena = Arena()
    first = arena.scratch([1000], torch.float32)
    assert arena.scratch([20, 10], torch.float32).data_ptr() == first.data_ptr()
    assert arena.scratch([4000], torch.float32).shape == (4000,)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_an_arena_takes_what_its_tensors_take_and_gives_it_back():
    def anonymous() -> int:
        text = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:"))

    before, arena = anonymous(), Arena()
    made = [arena.empty([3 << 20], torch.uint8).fill_(1) for _ in range(50)]
    arena.close()
    assert anonymous() - before <= (150 << 20) + (2 << 20)
    made.clear()
    assert anonymous() - before <= 2 << 20
