"""Homes: where the bytes of offloaded units lie, in host memory or in files, and how they are read from there.

Whatever lies at home is a CPU tensor, so that ``state_dict``, saving and any other use of it work: in host memory a
view of the unit's pinned buffer, on disk a view of a mapped file. Only to run is it read faster, in large pieces.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, ConfigError, FewbitsWarning
from fewbits.files import StoredTensor, check_stamp, stamp
from fewbits.memory import Mapping, aligned, pin, was_written, writable_view

_PIECE = 8 << 20  # bytes read at a time


@dataclass(frozen=True)
class Extent:
    """Bytes at home, and where they go in a unit's buffer.

    Attributes:
        at: offset in the buffer.
        memory: uint8 view of them.
        home: the tensor there.
        file: of which they are a part, or ``None``.
        offset: there.
        mapped: whether to read it through the mapping: what is written to a plain tensor's ``data`` leaves no other
            trace than there.
    """

    at: int
    memory: Tensor
    home: Tensor
    file: HomeFile | None = None
    offset: int = 0
    mapped: bool = False
    version: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.home._version)

    def changed_here(self) -> bool:
        """Whether the tensor was written to by this process, which a checkpoint's file does not show."""
        return self.home._version != self.version or was_written(self.home)


def joined(extents: Sequence[Extent]) -> list[Extent]:
    """The same extents, those that follow one another both at home and in the buffer as one.

    Those of a checkpoint stay apart: which of them was written to here counts for each.
    """
    found: list[Extent] = []
    for extent in sorted(extents, key=lambda e: e.at):
        last = found[-1] if found else None
        private = extent.file is not None and not extent.file.shared
        if last is not None and not private and _storage(last.memory) == _storage(extent.memory):
            gap = extent.at - (last.at + last.memory.numel())
            apart = extent.memory.storage_offset() - (last.memory.storage_offset() + last.memory.numel())
            if 0 <= gap == apart < 4096:
                size = extent.at + extent.memory.numel() - last.at
                found[-1] = replace(last, memory=last.memory.as_strided((size,), (1,)))
                continue
        found.append(extent)
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class HomeFile:
    """An open file that is mapped, and read without the mapping."""

    def __init__(self, descriptor: int, path: Path, *, shared: bool) -> None:
        """``shared``: what is written to the mapping is written to the file; else it stays with this process."""
        self.path, self._descriptor = path, descriptor
        self.shared, self._stamp = shared, stamp(descriptor)
        self.mapping = Mapping(mmap.mmap(descriptor, 0, access=mmap.ACCESS_WRITE if shared else mmap.ACCESS_COPY))
        self.memory = self.mapping.memory

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._descriptor)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``."""
        if not hasattr(os, "pwrite"):  # Windows
            writable_view(self.memory[offset : offset + len(data)])[:] = data
            return
        while data:
            count = os.pwrite(self._descriptor, data, offset)
            offset, data = offset + count, data[count:]

    def check(self) -> None:
        """Raise if the file is not what it was when it was opened; one that was deleted or replaced still is.

        Raises:
            CheckpointError: it was written to or cut off.
        """
        if self.shared:
            return  # ours alone, and without a name
        check_stamp(self.path, self._descriptor, self._stamp)

    def read(self, extent: Extent, out: memoryview, start: int) -> None:
        """Fill ``out`` with the extent's bytes from ``start`` on.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if (not self.shared and extent.changed_here()) or not hasattr(os, "preadv"):
            out[:] = writable_view(extent.memory[start : start + len(out)])
            return
        done = 0
        try:
            while done < len(out):
                count = os.preadv(self._descriptor, [out[done:]], extent.offset + start + done)
                if count == 0:
                    raise CheckpointError("the file was cut off while a model runs from it", file=self.path)
                done += count
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot be read: {error.strerror or error}", file=self.path) from error


class MemoryHome:
    """Host memory for one unit, pinned where there is a GPU that it streams to."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._mapping, self._used = Mapping.anonymous(max(nbytes, 1)), 0
        self.buffer = self._mapping.memory
        self.pinned = pinned and pin(self.buffer)
        if pinned and not self.pinned:
            warnings.warn(
                f"{nbytes:,} bytes of host memory could not be pinned (is there a limit on locked memory?): "
                "they stream to the GPU at a fraction of the speed",
                FewbitsWarning,
                stacklevel=2,
            )

    def keep(self, tensor: Tensor, at: int) -> tuple[Tensor, Extent]:
        """Copy a tensor here: its home, and where that is; ``at`` is its place in the unit's buffer."""
        memory = self.buffer[self._used : self._used + tensor.nbytes]
        home = self._mapping.tensor(self._used, tensor.dtype, tensor.shape)
        self._used += aligned(tensor.nbytes)
        home.copy_(tensor)
        return home, Extent(at, memory, home)


class FileHome:
    """One file without a name for all units on disk: it ends with the model, however the process does.

    Raises:
        ConfigError: the folder cannot be written to, or has not the room.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, nbytes: int) -> None:
        self.folder = Path(folder if folder is not None else tempfile.gettempdir())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as handle:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle.fileno(), 0, max(nbytes, 1))
                else:
                    handle.truncate(max(nbytes, 1))
                self.file = HomeFile(os.dup(handle.fileno()), self.folder, shared=True)
        except OSError as error:
            raise ConfigError(
                f"{nbytes:,} bytes cannot be offloaded to disk: {error.strerror or error}",
                file=self.folder,
                expected="a folder that can be written to, with that much room",
                hint="give another offload_folder",
            ) from error
        self._used = 0

    def keep(self, tensor: Tensor, at: int) -> tuple[Tensor, Extent]:
        """Write a tensor: its home, and where that is; ``at`` is its place in the unit's buffer."""
        offset, data = self._used, tensor.cpu().contiguous()
        self._used += aligned(tensor.nbytes)
        try:
            self.file.write(offset, writable_view(data) if data.nbytes else memoryview(b""))
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror or error}", file=self.folder) from error
        home = self.file.mapping.tensor(offset, data.dtype, data.shape)
        return home, Extent(at, self.file.memory[offset : offset + data.nbytes], home, self.file, offset)


class CheckpointHome:
    """Checkpoint files that serve as homes themselves: no second copy of what is stored as it is to be used."""

    def __init__(self) -> None:
        self._files: dict[Path, HomeFile] = {}

    def map(self, stored: StoredTensor) -> Tensor:
        """The tensor where it lies in its file.

        Raises:
            CheckpointError: the file cannot be read, or was replaced.
        """
        file = self._files.get(stored.file)
        if file is None:
            try:
                descriptor = os.open(stored.file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror or error}", file=stored.file) from error
            file = self._files[stored.file] = HomeFile(descriptor, stored.file, shared=False)
            check_stamp(stored.file, descriptor, stored.stamp or ())
        return file.mapping.tensor(stored.offset, stored.dtype, stored.shape)

    def extent(self, tensor: Tensor, at: int, *, mapped: bool) -> Extent:
        """Where a tensor lies that is a view of a mapped one; one that is not is kept in memory."""
        for file in self._files.values():
            offset = tensor.data_ptr() - file.memory.data_ptr()
            if 0 <= offset < file.memory.numel():
                return Extent(at, file.memory[offset : offset + tensor.nbytes], tensor, file, offset, mapped)
        return Extent(at, tensor.reshape(-1).view(torch.uint8), tensor)


def can_be_home(stored: StoredTensor) -> bool:
    """Whether a tensor's bytes can be used where they lie in the file: aligned, and nothing but them."""
    return stored.stamp is not None and stored.nbytes > 0 and stored.offset % stored.dtype.itemsize == 0


def read(extents: Sequence[Extent], out: Tensor, threads: Executor) -> None:
    """Bring extents into a host buffer, files by several threads.

    Raises:
        CheckpointError: a file changed or cannot be read.
    """
    view = writable_view(out)
    for file in {id(e.file): e.file for e in extents if e.file is not None}.values():
        file.check()
    work: list[tuple[Callable[..., None], tuple[object, ...]]] = []
    for extent in extents:
        size = extent.memory.numel()
        if extent.file is None or extent.mapped:
            out[extent.at : extent.at + size].copy_(extent.memory)
            continue
        for start in range(0, size, _PIECE):
            length = min(_PIECE, size - start)
            place = view[extent.at + start : extent.at + start + length]
            work.append((extent.file.read, (extent, place, start)))
    futures = [threads.submit(function, *arguments) for function, arguments in work]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
