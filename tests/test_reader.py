"""The threads that read: order, values, how far ahead, what goes wrong on the way, and that nothing is left behind.

What comes out is compared with the bytes of the file, cut out by a few lines here that know the format.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import json
import math
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbits import files, memory, reader
from fewbits.checkpoint import Checkpoint, open_checkpoint
from fewbits.errors import CheckpointError
from fewbits.files import SAFETENSORS_DTYPES, StoredTensor

MB = 1 << 20
LINUX = Path("/proc/self/fd").exists()


# ------------------------------------------------------------------------------------------------- files, and truth


def write(path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> Path:
    """A safetensors file of random bits with its tensors in exactly this order, its data at an odd offset."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {}
    at, bits, data = 0, random.Random(path.name), []
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        raw = bits.randbytes(nbytes)
        data.append(bytes(b & 1 for b in raw) if dtype == torch.bool else raw)
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    return path


def write_bytes(path: Path, sizes: Sequence[int]) -> Path:
    """The same with tensors of so many bytes, ``t000`` and on."""
    return write(path, [(f"t{i:03}", torch.uint8, (size,)) for i, size in enumerate(sizes)])


def write_shards(folder: Path, sizes: Sequence[Sequence[int]]) -> Path:
    """A folder with an index and a shard for each list of sizes, ``a000`` and on, ``b000`` and on, …"""
    weight_map = {}
    for shard, of_shard in zip("abcdefgh", sizes, strict=False):
        named = [(f"{shard}{i:03}", torch.uint8, (size,)) for i, size in enumerate(of_shard)]
        write(folder / f"{shard}.safetensors", named)
        weight_map |= {name: f"{shard}.safetensors" for name, *_ in named}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def truth(*paths: Path) -> dict[str, bytes]:
    """The bytes of each tensor, by the format's description: eight bytes of length, JSON, data."""
    found = {}
    for path in paths:
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:begin]).items():
            first, last = entry["data_offsets"]
            found[name] = raw[begin + first : begin + last]
    return found


def data(tensor: Tensor) -> bytes:
    host = tensor.cpu()
    assert host.is_contiguous()
    return ctypes.string_at(host.data_ptr(), host.nbytes)


def wanted(checkpoint: Checkpoint, *devices: str) -> list[reader.Wanted]:
    """All its tensors in the file's order, for the devices in turn."""
    tensors = sorted(checkpoint.tensors.values(), key=lambda t: (str(t.file), t.offset))
    return [(t, torch.device(devices[i % len(devices)])) for i, t in enumerate(tensors)]


def gpus() -> list[str]:
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


# ------------------------------------------------------------------------------------------------- nothing is left


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fewbits-read-")]


def open_files(folder: Path) -> list[str]:
    if not LINUX:
        return []
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(descriptor.readlink()))
    return [name for name in found if name.startswith(str(folder))]


def assert_nothing_left(folder: Path) -> None:
    assert not readers()
    assert not open_files(folder)
    assert memory.pinned_bytes() == 0


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    gc.collect()  # models of other files' tests
    assert_nothing_left(tmp_path)
    yield
    assert_nothing_left(tmp_path)


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Counts the buffers in host memory that the reader made and that still exist. No collection of cycles helps it."""
    made: list[weakref.ref[torch.UntypedStorage]] = []

    def host_buffer(nbytes: int) -> Tensor:
        buffer = memory.host_buffer(nbytes)
        made.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    monkeypatch.setattr(reader, "host_buffer", host_buffer)
    gc.disable()
    yield lambda: sum(ref() is not None for ref in made)
    gc.enable()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a thousandth of its size, so that small files have many pieces and many of them are not read yet."""
    monkeypatch.setattr(reader, "PIECE", 8192)
    monkeypatch.setattr(reader, "_SMALL", 1024)
    monkeypatch.setattr(reader, "READ_AHEAD", 65536)


# ------------------------------------------------------------------------------------------------- values


P = reader.PIECE
SIZES = [0, 1, 2, 7, 4095, 4096, 4097, MB - 1, MB, MB + 1, P - 1, P, P + 1, 2 * P + 12345, 0, 3]


def test_values_of_all_sizes(device, tmp_path):
    path = write_bytes(tmp_path / "w.safetensors", SIZES)
    expected = truth(path)
    sizes = []
    for stored, tensor in reader.read_ahead(wanted(open_checkpoint(path), device)):
        assert (tensor.device.type, tensor.dtype, tensor.shape) == (device, torch.uint8, (stored.nbytes,))
        assert data(tensor) == expected[stored.name], stored.name
        sizes.append(tensor.nbytes)
    assert sizes == SIZES


def test_many_pieces_and_shards(device, tmp_path, small):
    bits = random.Random(1)
    near = [0, 1, 1023, 1024, 1025, 8191, 8192, 8193, 16384, 70000]  # the last is more than all that is read ahead
    sizes = [[bits.choice([*near, bits.randrange(30000)]) for _ in range(count)] for count in (90, 1, 40)]
    checkpoint = open_checkpoint(write_shards(tmp_path, sizes))
    expected = truth(*sorted(tmp_path.glob("*.safetensors")))
    read = {stored.name: data(t) for stored, t in reader.read_ahead(wanted(checkpoint, device))}
    assert list(read) == list(expected)
    assert read == expected


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=SAFETENSORS_DTYPES)
def test_every_dtype(dtype, device, tmp_path):
    shapes = {"scalar": (), "none": (0, 4), "few": (3, 5), "middle": (7, 99), "large": (3, MB // 2 + 1)}
    path = write(tmp_path / "w.safetensors", [(name, dtype, shape) for name, shape in shapes.items()])
    checkpoint, expected = open_checkpoint(path), truth(path)
    assert dtype.itemsize == 1 or all(stored.offset % 2 for stored in checkpoint.tensors.values())  # misaligned
    for stored, tensor in reader.read_ahead(wanted(checkpoint, device)):
        assert (tensor.device.type, tensor.dtype, tensor.shape) == (device, dtype, shapes[stored.name])
        assert tensor.data_ptr() % dtype.itemsize == 0
        assert data(tensor.view(-1).view(torch.uint8)) == expected[stored.name], stored.name


def test_neighbours_are_read_together_and_own_their_memory(device, tmp_path, monkeypatch, buffers):
    path = write_bytes(tmp_path / "w.safetensors", [4001, 1, 5, 4096, 0, 3, 5000, 17, 4095, 2, 60000])
    checkpoint, expected = open_checkpoint(path), truth(path)
    skipped = ("t003", "t006", "t008")  # 4096 and 5000 bytes are too far apart, 4095 are read with the others
    asked = [(t, d) for t, d in wanted(checkpoint, device) if t.name not in skipped]
    views = []

    def read_into(stored: StoredTensor, view: memoryview, start: int = 0, kept: Any = None) -> None:
        views.append((stored.name, len(view)))
        files.read_into(stored, view, start, kept)

    monkeypatch.setattr(reader, "read_into", read_into)
    read = {stored.name: tensor for stored, tensor in reader.read_ahead(asked)}
    assert views == [("t000", 4007), ("t004", 3), ("t007", 17 + 4095 + 2 + 60000)]
    assert buffers() == 0  # none is kept by the tensors that came out of it
    assert {name: data(t) for name, t in read.items()} == {n: b for n, b in expected.items() if n not in skipped}
    for tensor in read.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    for tensor in read.values():
        tensor.fill_(0)
        others = [t for t in read.values() if t is not tensor and t.nbytes]
        assert not tensor.any()
        assert all(t.data_ptr() != tensor.data_ptr() for t in others)


def test_every_tensor_owns_its_memory(device, tmp_path, small, buffers):
    path = write_bytes(tmp_path / "w.safetensors", [1, 900, 1024, 8192, 8193, 50000, 5, 5])
    read = [t for _, t in reader.read_ahead(wanted(open_checkpoint(path), device))]
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.storage_offset() == 0 for t in read)
    assert len({t.data_ptr() for t in read}) == len(read)
    assert buffers() <= (len(read) if device == "cpu" else 0)
    del read
    assert buffers() == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_tensors(legacy, device, tmp_path):
    base = torch.arange(600.0).view(20, 30)
    content = {
        "plain": base.clone(),
        "transposed": base.t(),
        "strided": base[::3, 1::4],
        "expanded": torch.tensor([[1.5]]).expand(4, 6),
        "permuted": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "part of a large one": torch.randn(MB)[1000:1010],
        "scalar": torch.tensor(7, dtype=torch.int16),
        "none": torch.empty(0, 3),
        "large": torch.randint(0, 256, (9 * MB,), dtype=torch.uint8),
    }
    torch.save(content, tmp_path / "w.bin", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "w.bin")
    assert all(stored.stamp is None for stored in checkpoint.tensors.values())
    read = {stored.name: t for stored, t in reader.read_ahead(wanted(checkpoint, device))}
    assert read.keys() == content.keys()
    for name, tensor in read.items():
        assert tensor.device.type == device
        assert tensor.is_contiguous()
        assert tensor.dtype == content[name].dtype
        assert torch.equal(tensor.cpu(), content[name]), name
        assert tensor.untyped_storage().nbytes() == content[name].numel() * tensor.itemsize


def test_files_of_both_kinds_in_one_stream(device, tmp_path, small):
    path = write_bytes(tmp_path / "w.safetensors", [10, 20, 9000, 30])
    pickled = {"x": torch.randn(3), "y": torch.randn(5000)}
    torch.save(pickled, tmp_path / "w.bin")
    first, second = wanted(open_checkpoint(path), device), wanted(open_checkpoint(tmp_path / "w.bin"), device)
    expected = truth(path) | {name: data(t) for name, t in pickled.items()}
    asked = [first[0], second[0], first[1], first[2], second[1], first[3]]
    read = [(stored.name, data(t.view(-1).view(torch.uint8))) for stored, t in reader.read_ahead(asked)]
    assert read == [(stored.name, expected[stored.name]) for stored, _ in asked]


def test_devices_in_one_stream(device, tmp_path, small):
    """Each lands on the device asked for, whatever its neighbours' is; meta is one that every machine has."""
    devices = ["cpu", "meta", "cpu"] if device == "cpu" else ["cpu", "cuda", "meta", *gpus()]
    path = write_bytes(tmp_path / "w.safetensors", [5, 6, 7, 8, 9, 3000, 4000, 20000, 1, 2, 3, 9000, 8192, 4, 5, 50000])
    expected = truth(path)
    for asked in (wanted(open_checkpoint(path), *devices), wanted(open_checkpoint(path), *reversed(devices))):
        for (stored, tensor), (_, where) in zip(reader.read_ahead(asked), asked, strict=True):
            assert tensor.device.type == where.type
            assert where.index is None or tensor.device == where
            assert tensor.nbytes == stored.nbytes
            assert tensor.is_meta or data(tensor) == expected[stored.name], stored.name


def test_the_callers_modes_do_not_matter(device, tmp_path, small):
    path = write_bytes(tmp_path / "w.safetensors", [5, 6, 3000, 20000])
    torch.save({"x": torch.arange(5000.0)}, tmp_path / "w.bin")
    asked = [*wanted(open_checkpoint(path), device), *wanted(open_checkpoint(tmp_path / "w.bin"), device)]
    expected = [*truth(path).values(), data(torch.arange(5000.0))]
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.device("meta")):
        with mode:
            read = [t for _, t in reader.read_ahead(asked)]
        assert [data(t.view(-1).view(torch.uint8)) for t in read] == expected, mode
        assert {t.device.type for t in read} == {device}


def test_memory_that_cannot_be_pinned_is_right_all_the_same(device, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "pin", lambda buffer: False)
    path = write_bytes(tmp_path / "w.safetensors", [10, reader.PIECE + 1, 3 * MB, 20])
    read = {stored.name: data(t) for stored, t in reader.read_ahead(wanted(open_checkpoint(path), device))}
    assert read == truth(path)


def test_the_callers_queued_work_is_not_disturbed(device, tmp_path, monkeypatch):
    """On a GPU: what the caller still does with memory that it has freed comes before what is read into it, and a piece
    of pinned memory is not filled again before its copy has run, however late that is."""
    monkeypatch.setattr(reader, "READ_AHEAD", 12 * MB)
    monkeypatch.setattr(reader, "PIECE", MB)
    path = write_bytes(tmp_path / "w.safetensors", [4 * MB] * 12)
    results = []
    for _, tensor in reader.read_ahead(wanted(open_checkpoint(path), device)):
        if device == "cuda":
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        results.append(tensor.bitwise_xor(0x5A))
        del tensor
    found = [data(t.bitwise_xor(0x5A)) for t in results]
    assert found == list(truth(path).values())


# ------------------------------------------------------------------------------------------------- order


def test_they_come_in_the_order_asked_for(device, tmp_path, small, monkeypatch):
    """However long each piece takes, and in whatever order the files have them; one asked for twice comes twice."""
    bits = random.Random(2)
    sizes = [[bits.choice([3, 800, 5000, 20000]) for _ in range(20)] for _ in range(3)]
    checkpoint = open_checkpoint(write_shards(tmp_path, sizes))
    asked = wanted(checkpoint, device)
    asked = asked[::-1] + asked[5:9] + [asked[7]] * 3 + bits.sample(asked, 30)

    def read_into(stored: StoredTensor, view: memoryview, start: int = 0, kept: Any = None) -> None:
        time.sleep(bits.random() * 0.003)
        files.read_into(stored, view, start, kept)

    monkeypatch.setattr(reader, "read_into", read_into)
    expected = truth(*tmp_path.glob("*.safetensors"))
    read = [(stored.name, data(t)) for stored, t in reader.read_ahead(asked)]
    assert [name for name, _ in read] == [stored.name for stored, _ in asked]
    assert all(raw == expected[name] for name, raw in read)


def test_a_stream_gives_the_tiny_ones_first_and_then_the_files_order(device, tmp_path):
    tiny = 64 << 10
    sizes = [[100, 2 * tiny, 7, tiny - 1], [tiny, 0, MB, 12]]
    checkpoint = open_checkpoint(write_shards(tmp_path, sizes))
    expected = truth(*tmp_path.glob("*.safetensors"))
    asked: list[str] = []

    def where(name: str) -> torch.device:
        asked.append(name)
        return torch.device(device if name.startswith("b") else "cpu")

    read = list(checkpoint.stream(reversed(list(checkpoint.tensors)), where))
    assert [name for name, _ in read] == ["a000", "a002", "a003", "b001", "b003", "a001", "b000", "b002"]
    assert sorted(asked) == sorted(expected)
    for name, tensor in read:
        assert tensor.device.type == (device if name.startswith("b") else "cpu")
        assert data(tensor) == expected[name]


def test_nothing_asked_for_is_nothing_read(tmp_path):
    assert list(reader.read_ahead([])) == []
    assert list(open_checkpoint(write_bytes(tmp_path / "w.safetensors", [5])).stream([])) == []


# ------------------------------------------------------------------------------------------------- how far ahead


class Meter:
    """Reads as :func:`fewbits.files.read_into` does, and notes how many bytes were begun and not taken at most."""

    def __init__(self) -> None:
        self.begun = self.taken = self.most = 0
        self._lock = threading.Lock()

    def read_into(self, stored: StoredTensor, view: memoryview, start: int = 0, kept: Any = None) -> None:
        with self._lock:
            self.begun += len(view)
            self.most = max(self.most, self.begun - self.taken)
        files.read_into(stored, view, start, kept)

    def settle(self) -> None:
        """Wait until the threads have begun all that they may."""
        before = -1
        while before != self.begun:
            before = self.begun
            time.sleep(0.01)


def test_reading_ahead_is_bounded(device, tmp_path, small, monkeypatch):
    meter = Meter()
    monkeypatch.setattr(reader, "read_into", meter.read_into)
    bits = random.Random(3)
    sizes = [bits.choice([1, 500, 1023, 1024, 5000, 8192, 20000]) for _ in range(150)]
    path = write_bytes(tmp_path / "w.safetensors", sizes)
    read = 0
    for i, (_, tensor) in enumerate(reader.read_ahead(wanted(open_checkpoint(path), device))):
        if i % 10 == 0:
            meter.settle()
        assert meter.begun - read <= reader.READ_AHEAD  # what the caller is given now counts until it asks for more
        read += tensor.nbytes
        meter.taken = read
    assert read == sum(sizes) == meter.begun
    assert reader.READ_AHEAD - max(sizes) < meter.most <= reader.READ_AHEAD  # and the bound is made use of


def test_a_tensor_larger_than_the_bound_is_read_alone(device, tmp_path, small, monkeypatch):
    meter = Meter()
    monkeypatch.setattr(reader, "read_into", meter.read_into)
    path = write_bytes(tmp_path / "w.safetensors", [100, 70000, 100000, 300])
    begun = []
    for _, tensor in reader.read_ahead(wanted(open_checkpoint(path), device)):
        meter.settle()
        begun.append(meter.begun)
        del tensor
    assert begun == [100, 70100, 170100, 170400]


def test_what_lies_between_neighbours_counts(device, tmp_path, small, monkeypatch):
    """Tensors of a byte with 4,000 bytes between them that nobody wants are read with those."""
    meter = Meter()
    monkeypatch.setattr(reader, "read_into", meter.read_into)
    path = write_bytes(tmp_path / "w.safetensors", [1, 4000] * 100)
    expected = truth(path)
    stream = reader.read_ahead(wanted(open_checkpoint(path), device)[::2])
    read = [next(stream)]
    meter.settle()
    assert reader.READ_AHEAD // 2 < meter.begun <= reader.READ_AHEAD
    read += stream
    assert [(s.name, data(t)) for s, t in read] == [(n, b) for n, b in expected.items() if len(b) == 1]


def test_threads_are_as_many_as_the_work_and_the_machine_have_use_for(device, tmp_path, small):
    for pieces in (0, 1, 2, 5, 50):
        path = write_bytes(tmp_path / "w.safetensors", [8192] * pieces + [10, 10])
        stream = reader.read_ahead(wanted(open_checkpoint(path), device))
        assert not readers()  # before the first is asked for
        next(stream)
        assert len(readers()) == min(reader.THREADS, max(os.cpu_count() or 1, 2), max(pieces, 1))
        stream.close()
        assert_nothing_left(tmp_path)


# ------------------------------------------------------------------------------------------------- what goes wrong


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


def replace_by_the_same(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def write_over(path: Path) -> None:
    """In place, as long as it was, at a time that the file system can tell from the one before."""
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        time.sleep(0.002)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def put_a_folder_in_its_place(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.mkdir()


def make_unreadable(path: Path) -> None:
    """So that nobody may read it, the superuser neither: a link to itself."""
    link = path.with_name("other")
    link.symlink_to(path)
    os.replace(link, path)


HARM = {
    replace: "replaced",
    replace_by_the_same: "replaced",
    write_over: "replaced",
    truncate: "cut off",
    Path.unlink: "cannot be read: No such file",
    put_a_folder_in_its_place: "replaced|cannot be read",  # of a moment in between
    make_unreadable: "cannot be read: Too many levels",
}


@pytest.mark.parametrize("size", [20, 5000, 20000], ids=["batches", "a piece each", "pieces"])
@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_a_file_that_is_changed_midway(harm, size, device, tmp_path, small, monkeypatch):
    monkeypatch.setattr(reader, "READ_AHEAD", 3 * size)
    monkeypatch.setattr(reader, "PIECE", 8192 if size > 20 else 64)  # three neighbours at a time
    path = write_bytes(tmp_path / "w.safetensors", [size] * 40)
    expected = list(truth(path).values())
    stream = reader.read_ahead(wanted(open_checkpoint(path), device))
    read = [next(stream)[1]]
    harm(path)
    with pytest.raises(CheckpointError, match=HARM[harm]) as caught:
        read.extend(tensor for _, tensor in stream)
    assert caught.value.file == str(path)
    assert_nothing_left(tmp_path)  # although the error, and with it the frames it went through, is still held
    assert 1 <= len(read) <= 3  # no more had been read
    assert [data(t) for t in read] == expected[: len(read)]


def test_a_shard_that_is_gone_is_named(device, tmp_path, small):
    checkpoint = open_checkpoint(write_shards(tmp_path, [[5000] * 20, [5000] * 20, [5000] * 20]))
    (tmp_path / "b.safetensors").unlink()
    read = []
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read.extend(stored.name for stored, _ in reader.read_ahead(wanted(checkpoint, device)))
    assert caught.value.file == str(tmp_path / "b.safetensors")
    assert read == [f"a{i:03}" for i in range(20)]


def test_a_file_that_is_written_over_while_a_piece_is_read(device, tmp_path, small, monkeypatch):
    path = write_bytes(tmp_path / "w.safetensors", [20000])
    checkpoint = open_checkpoint(path)

    class Late(io.FileIO):
        def readinto(self, view: memoryview) -> int:
            if self.tell() > 8192:
                write_over(path)
            return super().readinto(view[:4096])

    monkeypatch.setattr(files, "FileIO", Late)
    with pytest.raises(CheckpointError, match="replaced") as caught:
        list(reader.read_ahead(wanted(checkpoint, device)))
    assert caught.value.file == str(path)


def test_a_file_that_is_cut_off_while_a_piece_is_read(device, tmp_path, small, monkeypatch):
    path = write_bytes(tmp_path / "w.safetensors", [20000] * 3)
    checkpoint, check_stamp = open_checkpoint(path), files.check_stamp

    def cut_after(*args: object) -> None:
        check_stamp(*args)
        os.truncate(path, 30000)

    monkeypatch.setattr(files, "check_stamp", cut_after)
    with pytest.raises(CheckpointError, match="cut off while being read") as caught:
        list(reader.read_ahead(wanted(checkpoint, device)))
    assert caught.value.file == str(path)


def test_a_disk_that_fails(device, tmp_path, small, monkeypatch):
    path = write_bytes(tmp_path / "w.safetensors", [20000] * 20)
    checkpoint = open_checkpoint(path)
    limit = checkpoint.tensors["t012"].offset

    class Failing(io.FileIO):
        def readinto(self, view: memoryview) -> int:
            if self.tell() >= limit:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(view)

    monkeypatch.setattr(files, "FileIO", Failing)
    read = []
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as caught:
        read.extend(stored.name for stored, _ in reader.read_ahead(wanted(checkpoint, device)))
    assert caught.value.file == str(path)
    assert read == [f"t{i:03}" for i in range(12)]


def test_reads_that_give_less_than_was_asked_for_go_on(device, tmp_path, small, monkeypatch):
    path = write_bytes(tmp_path / "w.safetensors", [10, 20, 20000, 5000])
    checkpoint, expected = open_checkpoint(path), truth(path)

    class Short(io.FileIO):
        def readinto(self, view: memoryview) -> int:
            return super().readinto(view[:999])

    monkeypatch.setattr(files, "FileIO", Short)
    assert {s.name: data(t) for s, t in reader.read_ahead(wanted(checkpoint, device))} == expected


@pytest.mark.parametrize("harm", [Path.unlink, replace], ids=["deleted", "replaced"])
def test_a_pickle_gives_what_was_opened(harm, device, tmp_path):
    content = {f"x{i}": torch.randn(MB // 4) for i in range(4)}
    torch.save(content, tmp_path / "w.bin")
    stream = reader.read_ahead(wanted(open_checkpoint(tmp_path / "w.bin"), device))
    read = [next(stream)]
    harm(tmp_path / "w.bin")
    read += stream
    assert {s.name: data(t) for s, t in read} == {n: data(t) for n, t in content.items()}


def test_a_pickled_tensor_that_raises(device, tmp_path, small):
    def read() -> Tensor:
        raise MemoryError("none")

    path = write_bytes(tmp_path / "w.safetensors", [3000] * 4)
    asked = wanted(open_checkpoint(path), device)
    broken = StoredTensor("broken", path, torch.uint8, (5,), 5, 0, None, ("broken",), read)
    found = []
    with pytest.raises(MemoryError, match="none"):
        found.extend(s.name for s, _ in reader.read_ahead([*asked[:2], (broken, torch.device(device)), *asked[2:]]))
    assert found == ["t000", "t001"]


def test_an_error_keeps_at_most_the_buffer_it_is_about(device, tmp_path, small, buffers):
    path = write_bytes(tmp_path / "w.safetensors", [20000] * 20)
    checkpoint = open_checkpoint(path)
    stream = reader.read_ahead(wanted(checkpoint, device))
    next(stream)
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        list(stream)
    assert buffers() <= (device == "cpu")  # the others, and the pinned ones, are gone while it is still held
    del caught
    assert buffers() == 0  # no cycle holds that one either


def test_a_thread_that_cannot_be_started(device, tmp_path, small, monkeypatch):
    path = write_bytes(tmp_path / "w.safetensors", [20000] * 20)
    start = threading.Thread.start

    def second_fails(self: threading.Thread) -> None:
        if self.name == "fewbits-read-1":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(reader.read_ahead(wanted(open_checkpoint(path), device)))


# ------------------------------------------------------------------------------------------------- ending early


@pytest.mark.parametrize("taken", [0, 1, 7, 39])
def test_closing_early(taken, device, tmp_path, small, buffers):
    path = write_bytes(tmp_path / "w.safetensors", [20000, 30, 40, 3000] * 10)
    stream = reader.read_ahead(wanted(open_checkpoint(path), device))
    for _ in range(taken):
        next(stream)
    assert bool(readers()) == (taken > 0)
    stream.close()
    assert_nothing_left(tmp_path)
    assert buffers() == 0
    assert next(stream, None) is None


def test_dropping_it_is_closing_it(device, tmp_path, small, buffers):
    checkpoint = open_checkpoint(write_bytes(tmp_path / "w.safetensors", [20000] * 20))
    stream = checkpoint.stream(checkpoint.tensors, lambda name: torch.device(device))
    next(stream)
    assert readers()
    assert memory.pinned_bytes() == 0 or device == "cuda"
    del stream
    assert_nothing_left(tmp_path)
    assert buffers() == 0


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_in_the_caller(raised, device, tmp_path, small, buffers):
    checkpoint = open_checkpoint(write_bytes(tmp_path / "w.safetensors", [20000] * 20))
    stream = checkpoint.stream(checkpoint.tensors, lambda name: torch.device(device))

    def consume() -> None:
        with contextlib.closing(stream):
            for i, (_, tensor) in enumerate(stream):
                del tensor
                if i == 3:
                    raise raised

    with pytest.raises(raised):
        consume()
    assert_nothing_left(tmp_path)
    assert buffers() == 0


@pytest.mark.parametrize("end", ["close", "error"])
def test_memory_of_a_gpu_is_given_back(end, device, tmp_path, monkeypatch, buffers):
    """And what is allocated there next is not written to by a copy that was still to come."""
    monkeypatch.setattr(reader, "READ_AHEAD", 12 * MB)
    path = write_bytes(tmp_path / "w.safetensors", [4 * MB] * 12)
    stream = reader.read_ahead(wanted(open_checkpoint(path), device))

    def allocated() -> int:
        return torch.cuda.memory_allocated() if device == "cuda" else 0

    before = allocated()
    if device == "cuda":
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s: the copies that the first call starts come after it
    next(stream)
    if device == "cuda":
        assert allocated() - before in (8 * MB, 12 * MB)  # the first one may be gone already
        assert memory.pinned_bytes() == len(readers()) * 2 * reader.PIECE
    if end == "error":
        path.unlink()
        with pytest.raises(CheckpointError) as caught:
            list(stream)
        del caught
    stream.close()
    if device == "cuda":
        assert torch.cuda.current_stream().query()  # nor are they under way
    assert (allocated(), buffers()) == (before, 0)
    assert_nothing_left(tmp_path)
    fresh = torch.full((48 * MB,), 7, dtype=torch.uint8, device=device)
    time.sleep(0.05)
    assert torch.all(fresh == 7)


PROGRAM = """
import contextlib, json, os, signal, sys, threading, time
from pathlib import Path
import torch
from torch import nn
import fewbits
from fewbits import files, memory, reader

path, device, slow = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
reader.PIECE, reader._SMALL, reader.READ_AHEAD = 64 << 10, 16 << 10, 1 << 20
began = []

def read_into(stored, view, start=0, kept=None):
    began.append(start)
    if len(began) == 5:
        print("loading", flush=True)
    if slow == "disk" and len(began) >= 5:
        time.sleep(0.1)
    files.read_into(stored, view, start, kept)

def aminmax(*args, real=torch.aminmax):
    if slow == "caller":
        time.sleep(0.1)
    return real(*args)

reader.read_into, torch.aminmax = read_into, aminmax
model = None
try:
    model = fewbits.load(
        lambda: nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(60))), path, "int8",
        skip_modules=[], device_map=device,
    )
except KeyboardInterrupt:
    threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(entry.readlink()))
    left = {"threads": [t for t in threads if t.startswith("fewbits")], "pinned": memory.pinned_bytes(),
            "files": [n for n in names if n.startswith(str(Path(path).parent))], "pieces": len(began)}
    print(json.dumps(left), flush=True)
"""


@pytest.mark.skipif(not LINUX, reason="open files are listed in /proc")
@pytest.mark.parametrize("slow", ["disk", "caller"])
def test_control_c_while_a_model_is_loaded(slow, device, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({f"{i}.weight": torch.randn(256, 256) for i in range(60)}, path)  # 256 KiB each, four pieces
    program = [sys.executable, "-c", PROGRAM, str(path), device, slow]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            first = process.stdout.readline()
            assert first == "loading\n", process.stderr.read()
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    left = json.loads(out)
    assert left["pieces"] < 240  # it came midway
    assert left == {"threads": [], "pinned": 0, "files": [], "pieces": left["pieces"]}


# ------------------------------------------------------------------------------------------------- more than one


def test_two_readers_in_turn(device, tmp_path, small):
    paths = [write_bytes(tmp_path / f"{name}.safetensors", [20000, 30, 40, 3000] * 10) for name in "xy"]
    checkpoints = [open_checkpoint(path) for path in paths]
    first, second, third = (reader.read_ahead(wanted(c, device)) for c in (*checkpoints, checkpoints[0]))
    read: tuple[list[bytes], list[bytes]] = [], []
    next(third)
    for i, ((_, a), (_, b)) in enumerate(zip(first, second, strict=True)):
        read[0].append(data(a))
        read[1].append(data(b))
        if i == 10:
            third.close()  # ends its own threads only
            assert readers()
    assert list(read) == [list(truth(path).values()) for path in paths]


def test_readers_in_several_threads(device, tmp_path, small):
    paths = [write_bytes(tmp_path / f"{i}.safetensors", [20000, 30, 40, 3000] * 10) for i in range(4)]
    results: queue.SimpleQueue[tuple[int, list[bytes] | BaseException]] = queue.SimpleQueue()

    def read(i: int) -> None:
        try:
            tensors = reader.read_ahead(wanted(open_checkpoint(paths[i]), device))
            results.put((i, [data(t) for _, t in tensors]))
        except BaseException as error:
            results.put((i, error))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = dict(results.get_nowait() for _ in threads)
    assert found == {i: list(truth(path).values()) for i, path in enumerate(paths)}


def test_pinning_ends_with_the_buffer_or_before(device):
    """Where there is a GPU, whatever is tested now; elsewhere nothing is pinned."""
    pinned = 3 * MB if torch.cuda.is_available() else 0
    for unpin in (False, True):
        buffer = memory.host_buffer(3 * MB)
        assert memory.pin(buffer) == bool(pinned)
        part = buffer[5:10]
        assert memory.pinned_bytes() == pinned
        if unpin:
            memory.unpin(buffer)
            assert memory.pinned_bytes() == 0
            memory.unpin(buffer)  # once more does nothing
        del buffer
        assert memory.pinned_bytes() == (0 if unpin else pinned)  # a part of it is in use
        del part
        assert memory.pinned_bytes() == 0
    assert memory.pin(memory.host_buffer(0)) is False


FORKING = """
import ctypes, os, sys, threading
import torch
from fewbits import memory, reader
from fewbits.checkpoint import open_checkpoint

path, device = sys.argv[1:]
reader.PIECE, reader._SMALL, reader.READ_AHEAD = 8192, 1024, 65536
checkpoint = open_checkpoint(path)
tensors = sorted(checkpoint.tensors.values(), key=lambda t: t.offset)

def wanted(device):
    return [(t, torch.device(device)) for t in tensors]

def total(stream):
    return sum(int(t.sum()) for _, t in stream)

def first_and_rest(stream):
    return int(next(stream)[1].sum()), stream

expected = sum(total(reader.read_ahead([item])) for item in wanted("cpu"))
first, stream = first_and_rest(reader.read_ahead(wanted(device)))
pinned = memory.pinned_bytes()
assert device == "cpu" or pinned
child = os.fork()
if child == 0:
    ours = threading.active_count() == 1
    if device == "cpu":  # torch lets no child touch what lies on a GPU
        stream.close()  # of the parent's threads none is here
    again = reader.read_ahead(wanted("cpu"))
    right = total(again) == expected
    os._exit(0 if ours and right and threading.active_count() == 1 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert memory.pinned_bytes() == pinned
assert first + total(stream) == expected
assert threading.active_count() == 1
assert memory.pinned_bytes() == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_one_is_open(device, tmp_path):
    """The child can read by itself, and close it if no GPU is involved; the parent's goes on."""
    path = write_bytes(tmp_path / "w.safetensors", [20000, 30, 40, 3000] * 30)
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, str(path), device]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
