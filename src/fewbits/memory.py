"""Host memory in mappings of its own: it goes back to the system when it is dropped, and can be pinned for a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 256  # bytes: where each tensor begins in a unit's buffer (as CUDA's own allocations do)
_HUGE = 2 << 20  # bytes of a huge page, on x86
_CHUNK = 64 << 20  # bytes of a mapping of an arena
_LARGE = 8 * _HUGE  # bytes of a tensor, of which most lies in whole huge pages
_pinned: dict[int, int] = {}  # address → bytes: what is registered with the driver now
_lock = threading.Lock()
_written: set[int] = set()  # addresses of storages
_writes = 0


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes in a buffer of a unit."""
    return -(-nbytes // ALIGN) * ALIGN


def host_buffer(nbytes: int) -> Tensor:
    """Uninitialized bytes, uint8 [nbytes]; many in a mapping of their own.

    From the heap, buffers that come and go between tensors that stay leave holes too small for the next. torch's own
    pinned memory would besides be rounded up to a power of two, and kept.
    """
    if nbytes < 1 << 20 or not hasattr(mmap, "MAP_PRIVATE"):  # Windows' mappings are shared
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # whatever device is the default here
    return Mapping.anonymous(nbytes).memory


def uninitialized(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor with any values. If it is large, what memory is new in it comes in huge pages.

    Pages of 4 KiB come at 2 to 3 GB/s (measured), which is less than a conversion writes. What has been used before and
    is free again comes as it is, which in a mapping of its own it would not.
    """
    out = torch.empty(shape, dtype=dtype, device="cpu")  # whatever device is the default here
    if out.nbytes >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
        first, last = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
        # a kernel without them says so, and nothing is lost
        _c_library().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Mapping:
    """Mapped memory, and tensors in it.

    Attributes:
        memory: all of it, uint8.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self.memory = torch.frombuffer(mapping, dtype=torch.uint8)

    @classmethod
    def anonymous(cls, nbytes: int) -> Mapping:
        """Memory of no file, in huge pages where there are any."""
        if not hasattr(mmap, "MAP_PRIVATE"):
            return cls(mmap.mmap(-1, nbytes))
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return cls(mapping)

    def drop(self, offset: int) -> None:
        """Give back the pages from the first one on that begins at ``offset`` or after."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and start < self.memory.numel():
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_DONTNEED, start, self.memory.numel() - start)

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor at an offset of bytes, on a storage of its own: torch.save takes no two dtypes on one."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=offset).view(tuple(shape))


@dataclass(frozen=True)
class FilePart:
    """Elements that lie in an open file one after the other, for a kernel to read.

    Attributes:
        file: its descriptor.
        offset: bytes before them.
        dtype: fp32, fp16 or bf16.
        shape: of the tensor that they are.
    """

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def numel(self) -> int:
        """How many elements there are."""
        return math.prod(self.shape)


class Arena:
    """Memory for tensors that stay together, as those of a model: one after the other in large mappings.

    New memory in pages of 4 KiB comes at 2 GB/s (measured), in huge ones at 10, and a mapping for each tensor has both:
    what is left after its huge ones. A mapping goes back when the last of its tensors does.
    """

    def __init__(self) -> None:
        self._mapping: Mapping | None = None
        self._at = 0
        self._lock = threading.Lock()
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized CPU tensor, the same memory at each call: what is new is cleared first."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._scratch.numel() < nbytes:
            self._scratch = host_buffer(nbytes)
        return self._scratch[:nbytes].view(dtype).view(tuple(shape))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized CPU tensor on a storage of its own."""
        nbytes = aligned(math.prod(shape) * dtype.itemsize)
        with self._lock:
            if self._mapping is None or self._at + nbytes > self._mapping.memory.numel():
                self._end()
                self._mapping, self._at = Mapping.anonymous(max(-(-nbytes // _HUGE) * _HUGE, _CHUNK)), 0
            at, self._at = self._at, self._at + nbytes
            return self._mapping.tensor(at, dtype, shape)

    def close(self) -> None:
        """Give back what no tensor has. More may be asked for later."""
        with self._lock:
            self._end()
            self._scratch = self._scratch[:0].clone()

    def _end(self) -> None:
        if self._mapping is not None:
            self._mapping.drop(self._at)  # a huge page may be there as a whole
            self._mapping = None


def note_write(tensor: Tensor) -> None:
    """Say that a CPU tensor was written to below autograd, where version counters do not count."""
    global _writes
    if tensor.device.type == "cpu":
        _writes += 1
        _written.add(tensor.untyped_storage().data_ptr())


def was_written(tensor: Tensor) -> bool:
    """Whether a tensor's storage was written to so, under whatever alias; or one that was there before."""
    return tensor.untyped_storage().data_ptr() in _written


def writes() -> int:
    """How many such writes there were in all."""
    return _writes


def writable_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as a memoryview (without NumPy, which torch can do without)."""
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(buffer).cast("B")


def pin(buffer: Tensor) -> bool:
    """Pin a buffer of :func:`host_buffer` until :func:`unpin`, or until it is dropped. False where that fails."""
    if not buffer.numel() or not torch.cuda.is_available():
        return False
    address, nbytes = buffer.data_ptr(), buffer.nbytes
    try:
        failed = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) != 0
    except (RuntimeError, AttributeError):
        failed = True
    if failed:
        with contextlib.suppress(RuntimeError):
            torch.cuda.current_stream().synchronize()  # takes the error off, so that it is not raised by another call
        return False
    with _lock:
        _pinned[address] = nbytes
    weakref.finalize(buffer.untyped_storage(), _unregister, address)
    return True


def unpin(buffer: Tensor) -> None:
    """Give the pinning back. What copies from the buffer must have ended."""
    _unregister(buffer.data_ptr())


def _unregister(address: int) -> None:
    with _lock:
        known = _pinned.pop(address, None)
    if known is not None:
        with contextlib.suppress(RuntimeError, AttributeError):  # at exit the driver may be gone
            torch.cuda.cudart().cudaHostUnregister(address)


def pinned_bytes() -> int:
    """Bytes that are pinned now."""
    with _lock:
        return sum(_pinned.values())
