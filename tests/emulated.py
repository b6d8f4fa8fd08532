"""The CUDA backend on a CPU: its own host code, and its kernels' own sources compiled as C++ (``emulator/cuda.h``)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fewbits.kernels import cuda_backend, cuda_plans, cuda_shapes, nvrtc, ways

HEADER = Path(__file__).parent / "emulator" / "cuda.h"
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
OPTIONS = ("-O1", "-std=c++17", "-fPIC", "-pthread", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
CHECKS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")  # which the header reports
LAUNCH = """
extern "C" const char* launch(const void* a, size_t bytes, int x, int y, int threads, int shared_bytes, u32 seed) {{
  return emulated::launch<{name}, Arguments>(a, bytes, x, y, threads, shared_bytes, seed);
}}
"""


def compiled(file: str, defines: tuple[tuple[str, int], ...], folder: Path) -> Path:
    """The library of a kernel for these macros, from the folder where it was compiled before."""
    source = "\n".join([HEADER.read_text(), nvrtc.source_of(file), LAUNCH.format(name=Path(file).stem)])
    options = (*OPTIONS, *CHECKS, "-DEMULATED", *(f"-D{name}={value}" for name, value in defines))
    known = hashlib.sha256("\0".join((source, *options)).encode()).hexdigest()[:32]
    library, machine_code = (folder / f"{Path(file).stem}-{known}.{suffix}" for suffix in ("so", f"{os.getpid()}.o"))
    if not library.exists():
        ours = library.with_suffix(f".{os.getpid()}")  # other processes may be compiling it, too
        compiling = *options, "-c", "-x", "c++", "-", "-o", machine_code
        linking = "-shared", "-pthread", machine_code, "-o", ours
        for arguments in (compiling, linking):
            done = subprocess.run([COMPILER, *arguments], input=source, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{file} with {defines} does not compile:\n{done.stderr[:4000]}")
        ours.replace(library)
    return library


class Kernel:
    """As :class:`fewbits.kernels.nvrtc.Kernel`: blocks and threads run in an order that differs with each launch."""

    launched: ClassVar[set[str]] = set()  # the files whose kernels a test has run

    def __init__(self, file: str, library: Path, arguments: str, threads: int, shared: int) -> None:
        self._launch = ctypes.CDLL(str(library)).launch
        self._launch.restype = ctypes.c_char_p
        self._pack = struct.Struct(arguments)
        self._file, self._threads, self._shared = file, threads, shared

    def __call__(self, stream: int, grid_x: int, grid_y: int, *arguments: Any) -> None:
        packed, seed = self._pack.pack(*arguments), random.getrandbits(31)
        wrong = self._launch(packed, ctypes.c_size_t(len(packed)), grid_x, grid_y, self._threads, self._shared, seed)
        if wrong is not None:
            raise EmulatorError(f"{wrong.decode()} (seed {seed})")
        self.launched.add(self._file)


class EmulatorError(RuntimeError):
    """What a kernel did is wrong on any GPU."""


def tensor_map(
    pointer: int, item_bytes: int, rows: int, columns: int, stride: int, box_rows: int, box_columns: int
) -> bytes:  # fmt: skip
    """As :func:`fewbits.kernels.nvrtc.tensor_map`, laid out as ``emulated::Matrix``; refuses what the driver does."""
    sides = 0 < box_rows <= 256 and 0 < box_columns <= 256
    if pointer % 16 or stride % 16 or not sides or box_columns * item_bytes % 16:
        raise nvrtc.CudaError("describing a tensor: invalid argument")
    return struct.pack("7Q72x", pointer, item_bytes, rows, columns, stride, box_rows, box_columns)


@pytest.fixture
def limits():
    """Of the GPU that is emulated: processors, and bytes of shared memory a block may have. A test may give others."""
    return 4, (227 << 10) - 2048


@pytest.fixture
def cuda(monkeypatch, tmp_path_factory, limits):
    """The CUDA backend, which takes tensors on the CPU."""
    if COMPILER is None:
        pytest.skip("the emulator needs g++, on Linux")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"  # of all processes of a run
    folder.mkdir(exist_ok=True)

    @functools.cache
    def kernel(file, defines, device, arguments, threads, shared):
        return Kernel(file, compiled(file, defines, folder), arguments, threads, shared)

    monkeypatch.setattr(nvrtc, "kernel", kernel)
    monkeypatch.setattr(nvrtc, "has_tensor_maps", lambda: True)
    monkeypatch.setattr(nvrtc, "tensor_map", tensor_map)
    monkeypatch.setattr(nvrtc, "capture_id", lambda stream: 0)
    monkeypatch.setattr(cuda_shapes, "limits", lambda device: limits)
    monkeypatch.setattr(cuda_shapes, "most_clusters", lambda blocks, device: limits[0] // blocks)
    monkeypatch.setattr(cuda_plans, "_counters", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Emulated")
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))  # nothing is tuned there
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # as tensors on the CPU say
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    caches = (
        cuda_backend._few,
        cuda_plans.made, cuda_plans.decode, cuda_plans.decode_variant, cuda_plans.skinny, cuda_plans.skinny_variant,
        cuda_plans.wide, cuda_plans.wide_variant, cuda_plans.dequantizer, cuda_shapes.quickest, cuda_plans.value_table,
        ways._steps, ways._tuned,
    )  # fmt: skip
    for cache in caches:
        cache.cache_clear()
    Kernel.launched.clear()
    torch.use_deterministic_algorithms(True)  # and so uninitialized memory is NaN
    yield cuda_backend
    torch.use_deterministic_algorithms(False)
    for cache in caches:
        cache.cache_clear()
