"""CUDA C++ compiled at run time by NVRTC for the GPU at hand, kept on disk, and launched through the driver.

torch's CUDA wheels bring NVRTC, so that no toolkit is needed. Nothing is compiled before a kernel is first wanted; the
machine code then lies in ``FEWBITS_CACHE`` (by default the user's cache folder) for the next process. The sources are
in ``fewbits/kernels/cuda``; what they are compiled for is given as macros.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "cuda"
_compiling = threading.Lock()

_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
# CUfunction_attribute, CUstreamCaptureMode and CUlaunchAttributeID of cuda.h
_MAX_DYNAMIC_SHARED_MEMORY = 8
_CAPTURE_RELAXED = 2
_CLUSTER, _PROGRAMMATIC_LAUNCH = 4, 6
_NON_BLOCKING = 1  # CUstream_flags
# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_UINT8, _UINT16 = 0, 1
_SWIZZLES = {64: 2, 128: 3}  # by bytes of a box's row; others: none
_PROMOTION_256B = 3


class CudaError(RuntimeError):
    """NVRTC or the driver refused: whoever wanted the kernel runs another one."""


# ------------------------------------------------------------------------------------------------- libraries


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the CUDA driver cannot be loaded: {error}") from error


def _candidates() -> Iterator[str]:
    """Where NVRTC of torch's CUDA version may be: known to the system, in NVIDIA's packages, in torch's own folder."""
    major = (torch.version.cuda or "").split(".")[0]
    if sys.platform == "win32":
        yield from map(str, sorted(Path(torch.__file__).parent.glob(f"lib/nvrtc64_{major}*_0.dll")))
        return
    yield f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    for folder in list(spec.submodule_search_locations or ()) if spec is not None else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}*")))
    yield from map(str, sorted(Path(torch.__file__).parent.glob("lib/libnvrtc*.so*")))


@functools.cache
def _nvrtc() -> Any:
    for name in _candidates():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise CudaError(f"NVRTC {torch.version.cuda} is not found: it comes with torch's CUDA wheels (nvidia-cuda-nvrtc)")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{what}: {(text.value or b'unknown error').decode()} ({code})")


# ------------------------------------------------------------------------------------------------- compiling


def compile_source(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code of a CUDA C++ text for the one architecture that the options name.

    Raises:
        CudaError: NVRTC is not there, or does not compile it; with its log.
    """
    nvrtc = _nvrtc()

    def check(code: int) -> None:
        if code:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CudaError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")

    program = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"fewbits.cu", 0, None, None))
    try:
        texts = [option.encode() for option in options]
        failed = nvrtc.nvrtcCompileProgram(program, len(texts), (ctypes.c_char_p * len(texts))(*texts))
        size = ctypes.c_size_t()
        if failed:
            check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(nvrtc.nvrtcGetProgramLog(program, log))
            raise CudaError(f"NVRTC does not compile it with {' '.join(options)}:\n{log.value.decode()[:2000]}")
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path:
    """``FEWBITS_CACHE``, or ``fewbits`` in the user's folder for caches."""
    if folder := os.environ.get("FEWBITS_CACHE"):
        return Path(folder)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fewbits"


def source_of(file: str) -> str:
    """The text of a kernel, with that of the headers it includes: ``common.cuh``, and others of ours by name."""
    text = (SOURCES / file).read_text()
    included = re.sub(r'^#include "(.*)"\n', lambda name: (SOURCES / name[1]).read_text(), text, flags=re.MULTILINE)
    return (SOURCES / "common.cuh").read_text() + included


def machine_code(file: str, defines: tuple[tuple[str, int], ...], architecture: str, *, fresh: bool = False) -> bytes:
    """A source of ours compiled with these macros, from the cache where it was before unless it shall be ``fresh``.

    Raises:
        CudaError: it cannot be compiled.
    """
    source = source_of(file)
    macros = (f"-D{name}={value}" for name, value in defines)
    # generic lambdas are host code by default
    options = ("-std=c++17", "-default-device", f"-arch=sm_{architecture}", *macros)
    known = hashlib.sha256("\0".join((source, *options, str(torch.version.cuda))).encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(file).stem}-{known}.cubin"
    if not fresh:
        with contextlib.suppress(OSError):
            return path.read_bytes()
    code = compile_source(source, options)
    with contextlib.suppress(OSError):  # a folder that cannot be written to: compiled again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
            temporary.write(code)
        os.replace(temporary.name, path)
    return code


# ------------------------------------------------------------------------------------------------- launching


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: the value is a union of 64 bytes, of which a flag takes the first four."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class _Call(threading.local):
    """What a thread hands to the driver: the kernel's one argument, a struct, and where and how to launch."""

    def __init__(self, size: int, block: int, shared: int) -> None:
        self.buffer = ctypes.create_string_buffer(size)
        self.arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.attribute = _Attribute(id=_PROGRAMMATIC_LAUNCH, value=(ctypes.c_int * 16)(1))
        self.launch = _Launch(1, 1, 1, block, 1, 1, shared, None, ctypes.pointer(self.attribute), 0)
        self.launch_pointer = ctypes.pointer(self.launch)


class Kernel:
    """A kernel on one device, whose one argument is a struct of the given ``struct`` format (without padding in it)."""

    def __init__(
        self, file: str, defines: tuple[tuple[str, int], ...], device: int, arguments: str, threads: int, shared: int
    ) -> None:
        """Compile or fetch it: ``file``'s kernel has the file's name. ``shared``: bytes of dynamic shared memory.

        Raises:
            CudaError: it cannot be compiled or loaded.
        """
        major, minor = torch.cuda.get_device_capability(device)
        # what only this one architecture has (wgmma) is in the target with an "a"
        architecture = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
        driver, module, self._function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
        self._context = _context(device)
        with _on(device):
            if driver.cuModuleLoadData(ctypes.byref(module), machine_code(file, defines, architecture)):
                code = machine_code(file, defines, architecture, fresh=True)  # what the cache held is damaged
                _check(driver.cuModuleLoadData(ctypes.byref(module), code), f"loading {file}")
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, Path(file).stem.encode()), file)
        _check(driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_MEMORY, shared), f"{file}: shared memory")
        self._pack = struct.Struct(arguments)
        self._call = _Call(-(-self._pack.size // 64) * 64, threads, shared)  # as a struct with a tensor map in it
        self._cu_launch = driver.cuLaunchKernelEx
        self._programmatic = major >= 9

    def __call__(self, stream: int, grid_x: int, grid_y: int, *arguments: Any) -> None:
        """Launch on a stream of the current device.

        Raises:
            CudaError: the driver refuses.
        """
        call = self._call
        self._pack.pack_into(call.buffer, 0, *arguments)
        launch = call.launch
        launch.grid_x, launch.grid_y, launch.stream = grid_x, grid_y, stream
        # Beginning before the kernel before has ended pays where launches follow each other closely: in a graph. There
        # no weight changes; outside, what wrote to one may not have ended.
        launch.count = self._programmatic and torch._C._cuda_isCurrentStreamCapturing()
        code = self._cu_launch(call.launch_pointer, self._function, call.arguments, None)
        if code == _NO_CONTEXT:  # a thread that has called nothing of CUDA yet
            _check(_driver().cuCtxSetCurrent(self._context), "the device's context")
            code = self._cu_launch(call.launch_pointer, self._function, call.arguments, None)
        if code:
            _check(code, "launching a kernel")


def most_clusters(blocks: int, device: int) -> int:
    """How many clusters of so many blocks the device runs at once, where each block takes a multiprocessor.

    Raises:
        CudaError: the driver does not say.
    """
    threads, shared = 512, 128 << 10  # two such blocks find no room
    function = kernel("probe.cu", (("BF16", 1),), device, "P", threads, shared)._function
    attribute = _Attribute(id=_CLUSTER, value=(ctypes.c_int * 16)(blocks, 1, 1))
    launch = _Launch(blocks, 1, 1, threads, 1, 1, shared, None, ctypes.pointer(attribute), 1)
    count = ctypes.c_int()
    with _on(device):
        code = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), function, ctypes.byref(launch))
    _check(code, "asking about clusters")
    return count.value


@functools.cache
def has_tensor_maps() -> bool:
    """Whether the driver describes tensors for copies of boxes: since CUDA 12."""
    return hasattr(_driver(), "cuTensorMapEncodeTiled")


@functools.lru_cache(maxsize=4096)
def tensor_map(
    pointer: int, item_bytes: int, rows: int, columns: int, stride: int, box_rows: int, box_columns: int
) -> bytes:  # fmt: skip
    """CUtensorMap of a matrix whose rows are ``stride`` bytes apart, for copies of boxes.

    ``item_bytes``: 1 or 2. Where a row of a box takes 64 or 128 bytes, its pieces of 16 are permuted, by the number of
    the 128 bytes that it is in.

    Raises:
        CudaError: an address or stride that is not a multiple of 16 bytes.
    """
    memory = (ctypes.c_char * 192)()
    at = -ctypes.addressof(memory) % 64
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + at), _UINT8 if item_bytes == 1 else _UINT16, 2,
        ctypes.c_void_p(pointer), (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(stride),
        (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1), 0,
        _SWIZZLES.get(box_columns * item_bytes, 0), _PROMOTION_256B, 0,
    )  # fmt: skip
    _check(code, "describing a tensor")
    return memory.raw[at : at + 128]


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """torch's own of this device."""
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "the device's context")
    return context


@contextlib.contextmanager
def _on(device: int) -> Iterator[None]:
    """The device is the current one, and what is done there no part of a capture by this thread, which it would end."""
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    with torch.cuda.device(device):
        _check(_driver().cuCtxSetCurrent(_context(device)), "the device's context")
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


_arenas: dict[int, tuple[int, int]] = {}  # by device: where the next piece of memory begins, and the bytes left
_taking = threading.Lock()
_ARENA_BYTES = 2 << 20  # the least the driver gives
_PIECE_BYTES = 256


def resident(source: int, nbytes: int, device: int) -> int:
    """The address of memory on a GPU that torch's allocator does not know, with the bytes at ``source``, of the host.

    They are there when it returns, for every stream, also while one is captured. The memory is never freed.

    Raises:
        CudaError: the driver has none.
    """
    driver, at, stream = _driver(), ctypes.c_uint64(), ctypes.c_void_p()
    size = -(-nbytes // _PIECE_BYTES) * _PIECE_BYTES
    with _taking, _on(device):
        begin, left = _arenas.get(device, (0, 0))
        if left < size:
            left = max(size, _ARENA_BYTES)
            if driver.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(left)):
                torch.cuda.empty_cache()  # torch may hold all that is left, for itself
                _check(driver.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(left)), "GPU memory")
            begin = at.value
        _arenas[device] = begin + size, left - size
        # the default stream waits for others, also for one that is captured
        _check(driver.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING), "a stream")
        try:
            to, count = ctypes.c_uint64(begin), ctypes.c_size_t(nbytes)
            _check(driver.cuMemcpyHtoDAsync_v2(to, ctypes.c_void_p(source), count, stream), "a copy to the GPU")
            _check(driver.cuStreamSynchronize(stream), "a copy to the GPU")
        finally:
            driver.cuStreamDestroy_v2(stream)
    return begin


def capture_id(stream: int) -> int:
    """Which capture into a graph the stream takes part in: 0 for none."""
    status, found = ctypes.c_int(), ctypes.c_ulonglong()
    _check(
        _driver().cuStreamGetCaptureInfo(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(found)),
        "asking about a capture",
    )
    return found.value if status.value else 0


@functools.cache
def kernel(
    file: str, defines: tuple[tuple[str, int], ...], device: int, arguments: str, threads: int, shared: int
) -> Kernel:
    """The :class:`Kernel`, made once in a process."""
    with _compiling:
        return Kernel(file, defines, device, arguments, threads, shared)
