"""The native kernels of another architecture, compiled for it and run by qemu, in the place of this machine's.

A process of ``foreign/driver.cpp`` gets a call's struct and whatever memory it points to, and gives back what was
written. What each pointer points to is known here, from ``kernels.h``.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbits.kernels import cpu_backend

COMPILER, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
LEVELS = ("neon",)
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "fewbits" / "kernels" / "cpu"
ITEM = {0: 4, 1: 2, 2: 2}  # bytes, by dtype


@functools.cache
def program(folder: Path) -> Path:
    """The driver and the kernels, compiled with the options of ``CMakeLists.txt``."""
    made = folder / "driver"
    options = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", f"-I{SOURCES}"]
    shared = [SOURCES / name for name in ("dispatch.cpp", "parallel.cpp", "reading.cpp")]
    kernels = [path for path in sorted(SOURCES.glob("*.cpp")) if path not in shared]
    levels = " ".join(f"LEVEL({level})" for level in LEVELS)
    objects = []
    for level in LEVELS:
        for source in kernels:
            objects.append(folder / f"{level}-{source.stem}.o")
            defines = [f"-DFEWBITS_LEVEL={level}", f"-DFEWBITS_IS_{level}"]
            subprocess.run([COMPILER, *options, *defines, "-c", source, "-o", objects[-1]], check=True)
    sources = [Path(__file__).parent / "foreign" / "driver.cpp", *shared]
    command = [COMPILER, *options, f"-DFEWBITS_LEVELS={levels}", "-static", *sources, *objects, "-o", made]
    subprocess.run(command, check=True)
    return made


def _weight_4bit(v: tuple) -> list[tuple[int, int]]:
    block_size, n, k = v[6:9]
    blocks = -(-n * k // block_size)
    return [
        (0, (n * k + 1) // 2),
        (1, blocks * (1 if v[2] else 4)),
        (2, -(-blocks // 256) * 4),
        (3, 4),
        (4, 1024),
        (5, 64),
    ]


def _product(v: tuple, at: int, inner: int, width: int) -> list[tuple[int, int]]:
    """x, its stride and rows, dtype, the bias and its dtype, the result."""
    stride, rows, dtype, _, bias_dtype = v[at + 1 : at + 6]
    size = ITEM[dtype]
    x = ((rows - 1) * stride + inner) * size
    return [(at, x), (at + 4, width * ITEM[bias_dtype]), (at + 6, rows * width * size)]


def _pieces(name: str, v: tuple) -> tuple[list[tuple[int, int]], set[int]]:
    """Fields of a kernel's struct that are pointers, with the bytes there, and those that are written to."""
    if name in ("linear_4bit", "linear_4bit_t"):
        n, k = v[7:9] if name == "linear_4bit" else (v[8], v[7])
        return _weight_4bit(v) + _product(v, 9, k, n), {15}
    if name == "dequantize_4bit":
        return [*_weight_4bit(v), (9, v[7] * v[8] * ITEM[v[10]])], {9}
    if name == "embedding_4bit":
        return [*_weight_4bit(v), (9, v[10] * 8), (11, v[10] * v[8] * ITEM[v[12]])], {11}
    if name == "quantize_4bit":
        count, block_size = v[4:6]
        sizes = count * ITEM[v[3]], 60, 16, (count + 1) // 2, -(-count // block_size) * 4, 16
        return list(zip((0, 6, 7, 8, 9, 10), sizes, strict=True)), {8, 9, 10}
    if name == "quantize_absmax":
        return [(0, v[1] * 4), (2, 4), (3, 65536), (4, v[1]), (5, -(-v[1] // 256) * 4)], {4, 5}
    if name == "quantize_int8":
        n, k = v[4:6]
        return [(0, n * k * ITEM[v[3]]), (6, n * k), (7, n * 4), (8, 16)], {6, 7, 8}
    n, k = v[2:4]
    weight = [(0, n * k), (1, n * 4)]
    if name == "dequantize_int8":
        return [*weight, (4, n * k * ITEM[v[5]])], {4}
    if name == "embedding_int8":
        return [*weight, (4, v[5] * 8), (6, v[5] * k * ITEM[v[7]])], {6}
    inner, width = (k, n) if name == "linear_int8" else (n, k)
    return weight + _product(v, 4, inner, width), {10}


@contextmanager
def foreign_level(level: str, folder: Path, monkeypatch) -> Iterator[None]:
    """Every kernel of ``cpu_backend`` runs there, by one thread."""
    command = [QEMU, program(folder), level]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def run(name, arguments, *values):
            fields = (*values, 1)
            pieces, written = _pieces(name, fields)
            pieces = [(field, size) for field, size in pieces if fields[field]]
            packed = struct.pack(f"={arguments.replace('P', 'Q')}", *fields)
            call = [struct.pack("=q", len(name)), name.encode(), struct.pack("=q", len(packed)), packed]
            call.append(struct.pack("=q", len(pieces)))
            for field, size in pieces:
                call += [struct.pack("=3q", field, size, field in written), ctypes.string_at(fields[field], size)]
            process.stdin.write(b"".join(call))
            process.stdin.flush()
            answer = process.stdout.read(8)
            assert len(answer) == 8, f"{name} ended with {process.wait()}"
            for field, size in pieces:
                if field in written:
                    ctypes.memmove(fields[field], process.stdout.read(size), size)
            return struct.unpack("=q", answer)[0] == 0

        monkeypatch.setattr(cpu_backend, "_run", run)
        monkeypatch.setattr(cpu_backend, "_level", level)
        yield
        monkeypatch.undo()
    assert process.returncode == 0
