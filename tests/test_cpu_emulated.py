"""The levels of the native CPU kernels that this CPU has not got: AVX-512 and AMX in terms of AVX2 (``emulator/``)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fewbits.kernels import cpu_backend

REPOSITORY = Path(__file__).parent.parent
FILES = ("tests/test_cpu_kernels.py", "tests/test_cpu_int8.py")
RUN = """
import sys
from pathlib import Path
import pytest
from fewbits.kernels import cpu_backend
cpu_backend._LIBRARY = Path(sys.argv[1])
assert cpu_backend.levels()[:3] == ["amx", "avx512_bf16", "avx512"]
chosen = "(amx or avx512) and not environment"  # which would force a level of the library that is installed
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in cpu_backend.levels(), reason="emulated by AVX2")
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="compiles kernels")
def test_levels_of_other_cpus(tmp_path):
    for part in ("CMakeLists.txt", "src/fewbits/kernels/cpu", "tests/emulator"):  # it builds into its own tree
        source, target = REPOSITORY / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so"))
        else:
            shutil.copy(source, target)
    options = "-DFEWBITS_EMULATE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"
    for command in (("cmake", "-S", ".", "-B", "build", *options), ("cmake", "--build", "build", "-j2")):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    library = tmp_path / "src/fewbits/kernels/cpu/libfewbits_cpu.so"
    command = sys.executable, "-c", RUN, str(library), *FILES
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
