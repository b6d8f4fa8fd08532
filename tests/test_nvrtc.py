"""What is known of CUDA kernels without a GPU: their cache on disk, and that nothing happens before it is asked for."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import subprocess
import sys

import pytest
import torch

from fewbits.errors import FewbitsWarning
from fewbits.kernels import nvrtc
from fewbits.kernels.nvrtc import CudaError, machine_code

DEFINES = (("BF16", 1), ("BITS", 4))


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The sources that were compiled, by a compiler that gives back a text of its own for each."""
    calls = []

    def compile_source(source, options):
        calls.append((source, options))
        return f"machine code {len(calls)}".encode()

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "deep" / "cache"))
    return calls


def test_a_kernel_is_compiled_once_and_kept(compiled, tmp_path):
    code = machine_code("decode.cu", DEFINES, "90a")
    assert machine_code("decode.cu", DEFINES, "90a") == code == b"machine code 1"
    source, options = compiled[0]
    assert options == ("-std=c++17", "-default-device", "-arch=sm_90a", "-DBF16=1", "-DBITS=4")
    assert "decode(" in source
    assert "multiply_add(" in source  # common.cuh is in front of it
    assert [p.read_bytes() for p in (tmp_path / "deep" / "cache").iterdir()] == [code]  # and no temporary file


@pytest.mark.parametrize(
    "other",
    [
        ("decode.cu", DEFINES, "100"),
        ("decode.cu", (("BF16", 0), ("BITS", 4)), "90a"),
        ("probe.cu", DEFINES, "90a"),
    ],
)
def test_anything_else_is_another_kernel(other, compiled):
    assert machine_code("decode.cu", DEFINES, "90a") != machine_code(*other)


def test_a_changed_source_is_another_kernel(compiled, monkeypatch, tmp_path):
    for name in ("common.cuh", "decode.cu"):
        (tmp_path / name).write_text((nvrtc.SOURCES / name).read_text())
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    first = machine_code("decode.cu", DEFINES, "90a")
    (tmp_path / "common.cuh").write_text((tmp_path / "common.cuh").read_text() + "\n")
    assert machine_code("decode.cu", DEFINES, "90a") != first


def test_what_the_cache_holds_is_replaced_when_it_is_damaged(compiled):
    first = machine_code("decode.cu", DEFINES, "90a")
    fresh = machine_code("decode.cu", DEFINES, "90a", fresh=True)
    assert fresh != first
    assert machine_code("decode.cu", DEFINES, "90a") == fresh


def test_a_cache_that_cannot_be_written_to(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "file" / "cache"))
    assert machine_code("decode.cu", DEFINES, "90a") == b"machine code 1"
    assert machine_code("decode.cu", DEFINES, "90a") == b"machine code 2"


def test_the_folder_for_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("FEWBITS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform != "win32":
        assert nvrtc.cache_folder() == tmp_path / "fewbits"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert nvrtc.cache_folder().parts[-2:] == (".cache", "fewbits")


def test_without_nvrtc_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["no-such-library"]))
    nvrtc._nvrtc.cache_clear()
    try:
        with pytest.raises(CudaError, match="NVRTC"):
            machine_code("decode.cu", DEFINES, "90a")
    finally:
        nvrtc._nvrtc.cache_clear()
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_cannot_be_made_is_tried_and_told_once(monkeypatch):
    from fewbits.kernels import cuda_plans

    tried = []

    def refused(*args):
        tried.append(args)
        raise CudaError("no such architecture")

    monkeypatch.setattr(nvrtc, "kernel", refused)
    cuda_plans.made.cache_clear()
    try:
        with pytest.warns(FewbitsWarning, match="no such architecture") as told:
            assert [cuda_plans.made("decode.cu", DEFINES, 0, "P", 32, 0) for _ in range(3)] == [None] * 3
        assert len(tried) == len(told) == 1
    finally:
        cuda_plans.made.cache_clear()


def test_importing_loads_no_backend():
    code = """
import sys, fewbits
late = [m for m in sys.modules if m in ("fewbits.kernels.cuda_backend", "fewbits.kernels.nvrtc", "triton")]
assert not late, late
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Driver:
    """Of a GPU whose memory is the host's, and of which torch has so many bytes more than it needs."""

    def __init__(self, held):
        self.held, self.pieces = held, []

    def cuMemAlloc_v2(self, at, nbytes):
        if self.held:
            return 2  # CUDA_ERROR_OUT_OF_MEMORY
        self.pieces.append(ctypes.create_string_buffer(nbytes.value))
        at._obj.value = ctypes.addressof(self.pieces[-1])
        return 0

    def cuMemcpyHtoDAsync_v2(self, to, source, nbytes, stream):
        ctypes.memmove(to.value, source.value, nbytes.value)
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0


@pytest.mark.parametrize("held", [0, 100])
def test_memory_that_stays(held, monkeypatch):
    driver = Driver(held)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(nvrtc, "_arenas", {})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(driver, "held", 0))
    texts = [random.randbytes(n) for n in (1, 256, 300, 3 << 20, 5)]
    buffers = [ctypes.create_string_buffer(text, len(text)) for text in texts]
    found = [nvrtc.resident(ctypes.addressof(buffer), len(buffer), 0) for buffer in buffers]
    assert [ctypes.string_at(at, len(t)) for at, t in zip(found, texts, strict=True)] == texts
    assert [b - a for a, b in itertools.pairwise(found[:3])] == [256, 256]
    assert len(driver.pieces) == 3  # the large one has a piece of its own, the last one begins another
    nvrtc.resident(found[0], 1, 1)  # as another device does
    assert len(driver.pieces) == 4


def test_every_kernel_waits_for_the_one_before():
    """In a graph each is launched before the one before has ended, whose memory it may read or write."""
    kernels = [path for path in nvrtc.SOURCES.glob("*.cu") if path.stem != "probe"]
    assert len(kernels) >= 8
    for path in kernels:
        body = nvrtc.source_of(path.name).split(f" {path.stem}(const __grid_constant__ Arguments a)")[1]
        assert "wait_for_previous_kernel();" in body, path.name
