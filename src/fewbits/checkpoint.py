"""Checkpoints in: files, folders and indexes to named tensors that are read one at a time, a few ahead.

Nothing is read when a checkpoint is opened but the headers, and everything that can be known from them is checked
there: that the files exist and are whole, that offsets cover the data exactly, that shapes agree with sizes.
safetensors data is read with plain reads into memory of its own, so neither misaligned offsets nor a file that changes
later matter; pickles are opened with ``weights_only=True`` and mapped.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import queue
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, CheckpointNotFoundError

# safetensors' names of dtypes (its README, "Format"), in the order in which its own writer sorts them
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    "F32": torch.float32, "I32": torch.int32, "U32": torch.uint32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes; the limit that safetensors' own reader sets
_PICKLES = (".bin", ".pt", ".pth")
READ_AHEAD = 256 << 20  # bytes read but not yet taken


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        name: its key in the checkpoint.
        file: where it lies.
        dtype, shape: of the tensor.
        nbytes: of its data.
        offset: where in the file its data begins, which is the order to read in.
        read: reads it into CPU memory of its own.
        identity: equal for two names of the same data.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    read: Callable[[], Tensor]
    identity: tuple[Any, ...]


def writable_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as a memoryview (without NumPy, which torch can do without)."""
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(buffer).cast("B")


def _read_exactly(file: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes == 0:
        return out
    view, done = writable_view(out), 0
    try:
        with open(file, "rb", buffering=0) as handle:
            handle.seek(offset)
            while done < len(view) and (count := handle.readinto(view[done : done + (64 << 20)])):
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=file) from error
    if done < len(view):
        raise CheckpointError("the file ended before its tensor did: it was cut off while being read", file=file)
    return out


def open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; only the header is read.

    Raises:
        CheckpointError: the header is no header, lies about sizes or offsets, or the file is cut off.
    """

    def bad(what: str, **kwargs: Any) -> CheckpointError:
        return CheckpointError(what, file=file, hint="fetch or save the file again", **kwargs)

    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > _MAX_HEADER or length > size - 8:
            raise bad(
                f"not a whole safetensors file: {size} bytes, of which the header is said to be {length}",
                expected="a header that fits the file",
            )
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise TypeError("metadata")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise bad("the header is not the JSON of a safetensors file") from error
    data, found, spans = 8 + length, {}, []
    for name, entry in header.items():
        try:
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if not all(isinstance(v, int) and v >= 0 for v in (*shape, begin, end)):
                raise TypeError("negative")
        except (KeyError, TypeError, ValueError) as error:
            raise bad("the header's entry cannot be understood", parameter=name) from error
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes or data + end > size:
            raise bad(
                f"bytes {begin} to {end} of {size - data} cannot hold {dtype} of shape {list(shape)}",
                parameter=name,
                expected=f"{nbytes} bytes within the file (it is cut off, or the header lies)",
            )
        spans.append((begin, end, name))
        read = _reader(file, data + begin, dtype, shape)
        found[name] = StoredTensor(
            name, file, dtype, shape, nbytes, data + begin, read, (str(file), begin, entry["dtype"], shape)
        )
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise bad(f"its data begins at {begin}", parameter=name, expected=f"{position}, where the one before ends")
        position = end
    if data + position != size:
        raise bad(f"{size - data - position} bytes follow the last tensor", expected="none")
    return found, {str(k): str(v) for k, v in metadata.items()}


def _reader(file: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: _read_exactly(file, offset, dtype, shape)


def open_pickle(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that ``torch.save`` wrote, mapped rather than read where its format allows.

    A dictionary that holds the state dict under "state_dict" or "model" is taken for what it holds.

    Raises:
        CheckpointError: damaged, not a state dict, or a pickle that would run code.
    """
    hint = "fetch or save the file again; what fewbits reads is a state dict of tensors, best as safetensors"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        code = (
            "Unsupported global" in str(error)
            or "Unsupported operand" in str(error)
            or "Unsupported class" in str(error)
        )
        what = "the pickle wants to run code, which fewbits never lets it" if code else "not a whole file of torch.save"
        raise CheckpointError(what, file=file, expected="tensors only", hint=hint) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"not a whole file of torch.save ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            file=file,
            hint=hint,
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"holds a {type(content).__name__}", file=file, expected="a state dict", hint=hint)
    found = {}
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"holds a {type(tensor).__name__} among its tensors", file=file, parameter=str(name), hint=hint
            )
        where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        found[str(name)] = StoredTensor(
            str(name),
            file,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.nbytes,
            tensor.data_ptr(),
            # a copy: mapped pages would vanish with the file
            lambda tensor=tensor: tensor.detach().clone(memory_format=torch.contiguous_format),  # type: ignore[misc]
            (str(file), *where) if tensor.numel() else (str(file), str(name)),
        )
    return found


def _open_file(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    if not file.exists():
        raise CheckpointNotFoundError("there is no such file", file=file)
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    if file.suffix in _PICKLES:
        return open_pickle(file), {}
    raise CheckpointError(
        f"a checkpoint file does not end in {file.suffix or 'nothing'}",
        file=file,
        expected=f".safetensors, {', '.join(_PICKLES)}, or an index .json",
    )


class Checkpoint:
    """A checkpoint, opened: names, dtypes and shapes at hand, data still on disk.

    Attributes:
        path: the file or folder it was opened as.
        tensors: by name, tied ones under each of their names.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]) -> None:
        self.path, self.tensors = path, tensors

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensors in the order they lie on disk, up to ``READ_AHEAD`` bytes ahead of the caller.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        wanted = sorted((self.tensors[name] for name in names), key=lambda t: (str(t.file), t.offset))
        yield from _ahead(wanted)


def _ahead(wanted: list[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Read in a thread; the bytes waiting are bounded, so the reader never runs far ahead."""
    done: queue.SimpleQueue[tuple[str, Tensor | BaseException] | None] = queue.SimpleQueue()
    room = threading.Condition()
    waiting, stopped = 0, False

    def read() -> None:
        nonlocal waiting
        try:
            for stored in wanted:
                with room:
                    while not stopped and waiting and waiting + stored.nbytes > READ_AHEAD:
                        room.wait()
                    if stopped:
                        return
                    waiting += stored.nbytes
                done.put((stored.name, stored.read()))
            done.put(None)
        except BaseException as error:  # handed to the caller, which raises it
            done.put(("", error))

    thread = threading.Thread(target=read, name="fewbits-read-ahead", daemon=True)
    thread.start()
    sizes = {stored.name: stored.nbytes for stored in wanted}
    try:
        while (item := done.get()) is not None:
            name, tensor = item
            if isinstance(tensor, BaseException):
                raise tensor
            with room:
                waiting -= sizes[name]
                room.notify()
            yield name, tensor
            del item, tensor  # nothing is held here while the caller works on the next
    finally:
        with room:
            stopped = True
            room.notify()
        thread.join()


# ------------------------------------------------------------------------------------------------- locating


def open_checkpoint(
    location: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Checkpoint:
    """Open a state-dict file, an index, a folder that holds either, or a Hugging Face hub id.

    Args:
        location: ``.safetensors``, ``.bin``, ``.pt``, ``.pth``, an index ``.json``, a folder, or ``"owner/name"``.
        revision, token: for the hub; an earlier download is used when there is no network.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointError: it is damaged or ambiguous.
    """
    path = local_folder(location, revision=revision, token=token)
    entry = _entry_file(path) if path.is_dir() else path
    if entry.suffix == ".json":
        return Checkpoint(path, _open_index(entry))
    tensors, metadata = _open_file(entry)
    return Checkpoint(path, _with_aliases(tensors, metadata, entry))


def local_folder(
    location: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The local path of a checkpoint: its own, or that of the hub's download."""
    path = Path(location).expanduser()
    if path.exists():
        return path
    text = os.fspath(location)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".") and path.suffix not in (
        *_PICKLES, ".safetensors", ".json",
    ):  # fmt: skip
        from fewbits.hub import download

        return download(text, revision=revision, token=token)
    raise CheckpointNotFoundError("there is no such file or folder", file=path)


def _entry_file(folder: Path) -> Path:
    """The one file that a folder's checkpoint begins with: an index, or the single file that is all of it."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    indexes = [p for p in files if p.name.endswith(".index.json")]
    singles = [p for p in files if p.name in ("model.safetensors", "pytorch_model.bin")]
    if len(indexes) > 1 or (indexes and singles):
        raise CheckpointError(
            f"the folder holds more than one checkpoint: {', '.join(p.name for p in indexes + singles)}",
            file=folder,
            expected="one",
            hint="give the file that is meant instead of the folder, or delete the other",
        )
    if indexes or singles:
        return (indexes or singles)[0]  # of two singles model.safetensors sorts first, and is the same model
    shards = [p for p in files if p.suffix in (".safetensors", *_PICKLES)]
    if len(shards) == 1:
        return shards[0]
    if not shards:
        raise CheckpointNotFoundError(
            "the folder holds no checkpoint", file=folder, expected="model.safetensors, pytorch_model.bin or an index"
        )
    raise CheckpointError(
        f"the folder holds {len(shards)} checkpoint files and no index: {', '.join(p.name for p in shards[:4])}…",
        file=folder,
        expected="an index (*.index.json) that says which tensor is where",
        hint="give the file that is meant, or fetch the index",
    )


def _open_index(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = {str(k): str(v) for k, v in weight_map.items()}
    except FileNotFoundError as error:
        raise CheckpointNotFoundError("there is no such file", file=index) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("not an index", file=index, expected='JSON with a "weight_map"') from error
    if not names:
        raise CheckpointError("the index names no tensors", file=index)
    for shard in dict.fromkeys(names.values()):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(f"the index names a file outside its folder: {shard}", file=index)
    absent = [shard for shard in sorted(set(names.values())) if not (index.parent / shard).exists()]
    if absent:
        raise CheckpointNotFoundError(
            f"the index names {len(absent)} of {len(set(names.values()))} shards that are not there: "
            + ", ".join(absent),
            file=index,
            hint="fetch the missing shards into the same folder",
        )
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(names.values())):
        tensors, metadata = _open_file(index.parent / shard)
        lacking = [n for n, s in names.items() if s == shard and n not in tensors and n not in metadata]
        if lacking:
            raise CheckpointError(
                f"the shard lacks {', '.join(lacking[:5])}{'…' if len(lacking) > 5 else ''} of the index",
                file=index.parent / shard,
            )
        tensors = {n: t for n, t in tensors.items() if names.get(n) == shard}
        found |= _with_aliases(tensors, metadata, index.parent / shard)
    return found


def _with_aliases(tensors: dict[str, StoredTensor], metadata: dict[str, str], file: Path) -> dict[str, StoredTensor]:
    """Add the names of tied tensors, which the metadata maps to the one that was written (safetensors' convention)."""
    aliases = {alias: tensors[kept] for alias, kept in metadata.items() if kept in tensors and alias not in tensors}
    return tensors | aliases
