"""Checkpoints in: files, folders, indexes and hub ids to named tensors that are read one at a time, a few ahead."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, CheckpointNotFoundError
from fewbits.files import PICKLES, StoredTensor, check_stamp, open_file, read_index, stamp
from fewbits.reader import Staging, read_ahead

_TINY = 64 << 10  # bytes


class Checkpoint:
    """A checkpoint, opened: names, dtypes and shapes at hand, data still on disk.

    Attributes:
        path: the file or folder it was opened as.
        tensors: by name, tied ones under each of their names.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]) -> None:
        self.path, self.tensors = path, tensors

    def stream(
        self,
        names: Iterable[str],
        device: Callable[[str], torch.device] = lambda name: torch.device("cpu"),
        staging: Staging | None = None,
    ) -> Generator[tuple[str, Tensor], None, None]:
        """Read the named tensors, each onto its device: tiny ones first, then in the order they lie on disk.

        What describes a quantized weight is tiny, so that the weight can be used as soon as it is read.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        found = sorted((self.tensors[n] for n in names), key=lambda t: (t.nbytes >= _TINY, str(t.file), t.offset))
        with contextlib.closing(read_ahead([(stored, device(stored.name)) for stored in found], staging)) as tensors:
            for stored, tensor in tensors:
                yield stored.name, tensor
                del tensor


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
    path = local_path(location, revision=revision, token=token)
    entry = _entry_file(path) if path.is_dir() else path
    if entry.suffix == ".json":
        return Checkpoint(path, _open_index(entry))
    tensors, metadata = open_file(entry)
    return Checkpoint(path, _with_aliases(tensors, metadata, entry))


def local_path(
    location: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The local path of a checkpoint: its own, or the file that the hub's download begins with.

    Raises:
        CheckpointNotFoundError: nothing is there.
    """
    try:
        path = Path(location).expanduser()
        if path.exists():
            return path
    except (TypeError, ValueError, OSError) as error:  # no path at all, a null byte in it, too long, no access
        raise CheckpointNotFoundError(
            f"no checkpoint can be at {str(location)[:200]!r} ({error})",
            expected="a state-dict file, an index, a folder or a hub id",
        ) from error
    text = os.fspath(location)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".") and path.suffix not in (
        *PICKLES, ".safetensors", ".json",
    ):  # fmt: skip
        from fewbits.hub import download

        return download(text, revision=revision, token=token)
    raise CheckpointNotFoundError("there is no such file or folder", file=path)


def _entry_file(folder: Path) -> Path:
    """The one file that a folder's checkpoint begins with: an index, or the single file that is all of it."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    indexes = [p for p in files if p.name.endswith(".index.json")]
    singles = [p for p in files if p.name in ("model.safetensors", "pytorch_model.bin")]
    if len(indexes) == 1 and singles:  # a save that was killed between its last two steps says which file is obsolete
        singles = [p for p in singles if p.name not in _replaced(indexes[0])]
    if len(indexes) > 1 or (indexes and singles):
        raise CheckpointError(
            f"the folder holds more than one checkpoint: {', '.join(p.name for p in indexes + singles)}",
            file=folder,
            expected="one",
            hint="give the file that is meant instead of the folder, or delete the other",
        )
    if indexes or singles:
        return (indexes or singles)[0]  # of two singles model.safetensors sorts first, and is the same model
    shards = [p for p in files if p.suffix in (".safetensors", *PICKLES)]
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


def _replaced(index: Path) -> list[str]:
    """The single files that an index says it has taken the place of (see :mod:`fewbits.atomic`)."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["metadata"]["replaces"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return names if isinstance(names, list) else []


def _open_index(index: Path) -> dict[str, StoredTensor]:
    stamps = {index: stamp(index)} if index.exists() else {}
    names = read_index(index)
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
        with contextlib.suppress(OSError):  # what has vanished since is said by opening it
            stamps[index.parent / shard] = stamp(index.parent / shard)
        tensors, metadata = open_file(index.parent / shard)
        lacking = [n for n, s in names.items() if s == shard and n not in tensors and n not in metadata]
        if lacking:
            raise CheckpointError(
                f"the shard lacks {', '.join(lacking[:5])}{'…' if len(lacking) > 5 else ''} of the index",
                file=index.parent / shard,
            )
        tensors = {n: t for n, t in tensors.items() if names.get(n) == shard}
        found |= _with_aliases(tensors, metadata, index.parent / shard)
    for file, before in stamps.items():
        check_stamp(file, file, before)
    return found


def _with_aliases(tensors: dict[str, StoredTensor], metadata: dict[str, str], file: Path) -> dict[str, StoredTensor]:
    """Add the names of tied tensors, which the metadata maps to the one that was written (safetensors' convention)."""
    aliases = {alias: tensors[kept] for alias, kept in metadata.items() if kept in tensors and alias not in tensors}
    return tensors | aliases
