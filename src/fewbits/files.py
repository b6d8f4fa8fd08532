"""Checkpoint files: safetensors, torch.save and indexes, to named tensors that are not read yet.

Nothing is read when a file is opened but its header, and everything that can be known from that is checked there:
that the file is whole, that offsets cover the data exactly, that shapes agree with sizes. safetensors data is read with
plain reads into memory of its own, so neither misaligned offsets nor a file that changes later matter; pickles are
opened with ``weights_only=True`` and mapped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, CheckpointNotFoundError, FewbitsError
from fewbits.memory import host_buffer, writable_view

# safetensors' names of dtypes (its README, "Format"), in the order in which its own writer sorts them
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    "F32": torch.float32, "I32": torch.int32, "U32": torch.uint32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes; the limit that safetensors' own reader sets
PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        name: its key in the checkpoint.
        file: where it lies.
        dtype, shape: of the tensor.
        nbytes: of its data.
        offset: where in the file its data begins, which is the order to read in.
        stamp: of the file whose bytes from ``offset`` on are the tensor's, or ``None`` if it has to ``read`` itself.
        identity: equal for two names of the same data.
        read: reads it into CPU memory of its own.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    stamp: tuple[int, ...] | None
    identity: tuple[Any, ...]
    read: Callable[[], Tensor]


def stamp(file: Path | int) -> tuple[int, ...]:
    """What tells a file (or an open one) from another that takes its name."""
    found = os.fstat(file) if isinstance(file, int) else file.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def check_stamp(file: Path, now: Path | int, before: tuple[int, ...]) -> None:
    """Raise if another file has taken the name since, so that parts of two checkpoints never become one model.

    Raises:
        CheckpointError: it has.
    """
    try:
        same = stamp(now) == before
    except OSError:
        same = False
    if not same:
        raise _replaced(file)


def _replaced(file: Path) -> CheckpointError:
    return CheckpointError("the file was replaced or cut off while being read", file=file, hint="load it again")


class OpenFiles:
    """Files kept open between the reads of one thread: opening one takes longer than reading many a tensor."""

    def __init__(self) -> None:
        self._handles: dict[Path, FileIO] = {}

    def open(self, file: Path) -> FileIO:
        """The file's handle; OSError if there is none."""
        if file not in self._handles:
            self._handles[file] = FileIO(file)
        return self._handles[file]

    def close(self) -> None:
        """Close them."""
        while self._handles:
            self._handles.popitem()[1].close()


@contextlib.contextmanager
def unchanged(stored: StoredTensor, files: OpenFiles | None = None) -> Iterator[FileIO]:
    """The file of a tensor, open, and still the same before and after what is read from it meanwhile.

    Raises:
        CheckpointError: the file cannot be read, was replaced, or (at an EOFError) ends early.
    """
    kept = files or OpenFiles()
    try:
        handle = kept.open(stored.file)
        if stored.stamp is not None and stamp(stored.file) != stored.stamp:
            raise _replaced(stored.file)
        yield handle
        if stored.stamp is not None:  # nor was it written over meanwhile
            check_stamp(stored.file, handle.fileno(), stored.stamp)
    except EOFError:
        raise CheckpointError(
            "the file ended before its tensor did: it was cut off while being read", file=stored.file
        ) from None
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=stored.file) from error
    finally:
        if files is None:
            kept.close()


def read_into(stored: StoredTensor, view: memoryview, start: int = 0, files: OpenFiles | None = None) -> None:
    """Fill ``view`` with the file's bytes from ``start`` after where the tensor's begin.

    Raises:
        CheckpointError: see :func:`unchanged`.
    """
    done = 0
    with unchanged(stored, files) as handle:
        handle.seek(stored.offset + start)
        while done < len(view):
            count = handle.readinto(view[done:])
            if not count:
                raise EOFError
            done += count


def read_tensor(stored: StoredTensor) -> Tensor:
    """A tensor whose bytes lie in its file as they are, in CPU memory of its own."""
    out = host_buffer(stored.nbytes)
    if out.nbytes:
        read_into(stored, writable_view(out))
    return out.view(stored.dtype).view(stored.shape)


def _read_named(tensors: dict[str, StoredTensor], name: str) -> Tensor:
    return read_tensor(tensors[name])


def open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; only the header is read.

    Raises:
        CheckpointError: the header is no header, lies about sizes or offsets, or the file is cut off.
    """

    def bad(what: str, **kwargs: Any) -> CheckpointError:
        return CheckpointError(what, file=file, hint="fetch or save the file again", **kwargs)

    with open(file, "rb") as handle:
        opened = stamp(handle.fileno())
        size = opened[-1]
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
    data, spans = 8 + length, []
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        try:
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if not all(type(v) is int and 0 <= v < 2**63 for v in (*shape, begin, end)):
                raise TypeError("not a size")
        except (KeyError, TypeError, ValueError) as error:
            raise bad(
                "the header's entry cannot be understood",
                parameter=name,
                expected=f"dtype (one of {', '.join(SAFETENSORS_DTYPES)}), shape and data_offsets",
            ) from error
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes or data + end > size:
            raise bad(
                f"bytes {begin} to {end} of {size - data} cannot hold {dtype} of shape {list(shape)}",
                parameter=name,
                expected=f"{nbytes} bytes within the file (it is cut off, or the header lies)",
            )
        spans.append((begin, end, name))
        found[name] = StoredTensor(
            name, file, dtype, shape, nbytes, data + begin, opened, (str(file), name),
            functools.partial(_read_named, found, name),
        )  # fmt: skip
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise bad(f"its data begins at {begin}", parameter=name, expected=f"{position}, where the one before ends")
        position = end
    if data + position != size:
        raise bad(f"{size - data - position} bytes follow the last tensor", expected="none")
    return found, {str(k): str(v) for k, v in metadata.items()}


def open_pickle(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that ``torch.save`` wrote, mapped rather than read where its format allows.

    A dictionary that holds the state dict under "state_dict" or "model" is taken for what it holds.

    Raises:
        CheckpointError: damaged, not a state dict, or a pickle that would run code.
    """
    hint = "fetch or save the file again; what fewbits reads is a state dict of tensors, best as safetensors"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to call torch.load
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # what a damaged pickle raises is not to be foreseen
        text = f"{type(error).__name__}: {error}"
        if "TorchScript" in text or any(f"Unsupported {what}" in text for what in ("global", "operand", "class")):
            what = "the file wants to run code, which fewbits never lets it"
        else:
            what = f"not a whole file of torch.save ({text.splitlines()[0]})"
        raise CheckpointError(what, file=file, expected="tensors only", hint=hint) from error
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
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "meta" if tensor.is_meta else tensor.layout if tensor.layout != torch.strided else tensor.dtype
            raise CheckpointError(
                f"holds a tensor of kind {kind}", file=file, parameter=str(name), expected="plain dense tensors"
            )
        where = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        found[str(name)] = StoredTensor(
            str(name),
            file,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.nbytes,
            tensor.data_ptr(),
            None,
            (str(file), *where) if tensor.numel() else (str(file), str(name)),
            # a copy: mapped pages would vanish with the file
            lambda tensor=tensor: tensor.detach().clone(memory_format=torch.contiguous_format),  # type: ignore[misc]
        )
    return found


def open_file(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file of either kind by name, and its metadata.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is damaged, or of another kind.
    """
    if not file.exists():
        raise CheckpointNotFoundError("there is no such file", file=file)
    try:
        if file.suffix == ".safetensors":
            return open_safetensors(file)
        if file.suffix in PICKLES:
            return open_pickle(file), {}
    except OSError as error:
        if isinstance(error, FewbitsError):
            raise
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=file) from error
    raise CheckpointError(
        f"a checkpoint file does not end in {file.suffix or 'nothing'}",
        file=file,
        expected=f".safetensors, {', '.join(PICKLES)}, or an index .json",
    )


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, relative to the index.

    Raises:
        CheckpointError: it is no index, or names files outside its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(k): str(v) for k, v in weight_map.items()}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=index) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError("not an index", file=index, expected='JSON with a "weight_map"') from error
    if not names:
        raise CheckpointError("the index names no tensors", file=index)
    for shard in dict.fromkeys(names.values()):
        path = PureWindowsPath(shard)  # knows both separators, and drives
        if path.is_absolute() or path.drive or path.root or ".." in path.parts or "\0" in shard:
            raise CheckpointError(f"the index names a file outside its folder: {shard!r}", file=index)
    return names
