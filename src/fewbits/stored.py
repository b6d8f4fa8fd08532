"""Quantizing what lies in a checkpoint's file, on a CPU: it is read a little at a time and never exists in memory.

Reading into memory that is new for each tensor, looking at its values, and quantizing it are three ways through the
main memory, and most of the time goes into pages that the system clears first. Here each core reads what its cache
holds, and quantizes it from there.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from fewbits.errors import CheckpointError
from fewbits.files import OpenFiles, StoredTensor, read_tensor, unchanged
from fewbits.formats import QuantSpec, quantize_inner_from
from fewbits.kernels import from_files
from fewbits.memory import Arena, FilePart
from fewbits.place import check_values, limit_of
from fewbits.reader import READ_AHEAD
from fewbits.storage import Storage
from fewbits.tensor import QuantTensor

_LEAST = 1 << 20  # bytes: smaller tensors are better read together with their neighbours
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_quantize_stored(stored: StoredTensor, spec: QuantSpec | None) -> bool:
    """Whether :func:`quantize_stored` serves: a large tensor whose file holds its bytes, and the native kernels."""
    return (
        spec is not None
        and stored.stamp is not None
        and stored.nbytes >= _LEAST
        and stored.dtype in _DTYPES
        and len(stored.shape) > 0
        and from_files() is not None
    )


def quantize_stored(stored: StoredTensor, storage: Storage, path: str, arena: Arena, files: OpenFiles) -> QuantTensor:
    """Quantize the parameter ``path`` to the spec of ``storage``, in CPU memory from ``arena``.

    Raises:
        CheckpointError: the file cannot be read, was replaced or ends early, or a value in it is NaN, infinite, or
            beyond what the format holds.
    """
    spec = storage.spec
    assert spec is not None
    with unchanged(stored, files) as handle, torch.no_grad():
        part = FilePart(handle.fileno(), stored.offset, stored.dtype, stored.shape)
        inner, largest = quantize_inner_from(part, spec, arena)
    if not largest <= limit_of(storage, stored.dtype):
        try:
            check_values(read_tensor(stored), storage, path, CheckpointError)
        except CheckpointError as error:
            error.locate(stored.file)
            raise
    return QuantTensor.from_inner({**inner}, spec, stored.shape, stored.dtype, label=path)


def in_turn(tensors: Sequence[StoredTensor], files: OpenFiles) -> Iterator[StoredTensor]:
    """The tensors in this order, while the system is told to read on, up to ``READ_AHEAD`` bytes ahead."""
    pending, told, ahead = deque(tensors), deque(tensors), 0
    while pending:
        while told and (ahead + told[0].nbytes <= READ_AHEAD or len(told) == len(pending)):
            _expect(told[0], files)
            ahead += told.popleft().nbytes
        stored = pending.popleft()
        yield stored
        ahead -= stored.nbytes


def _expect(stored: StoredTensor, files: OpenFiles) -> None:
    """Have the system read a tensor's bytes into its cache, if it can and will. Whatever is wrong shows up later."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            handle = files.open(stored.file).fileno()
            os.posix_fadvise(handle, stored.offset, stored.nbytes, os.POSIX_FADV_WILLNEED)
