"""The native CPU kernels of 4 bits, for every instruction set that runs here; and how they are found and threaded."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.kernels import codebooks, cpu_backend, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 1e-30, torch.float16: 2.0**-24, torch.bfloat16: 1e-30}  # fp16 has few numbers near zero
LEVELS = cpu_backend.levels()
KINDS = [
    ("nf4", 64, False), ("nf4", 64, True), ("fp4", 32, False), ("nf4", 32, True), ("fp4", 128, True),
    ("nf4", 256, False), ("nf4", 4096, True),
]  # fmt: skip
# rows that are whole blocks, that share blocks, that share words or bytes; more and fewer than a strip or panel holds
SHAPES = [
    (64, 128),
    (33, 70),
    (1, 1),
    (1, 257),
    (130, 96),
    (7, 192),
    (37, 1024),
    (5, 8),
    (3, 40),
    (150, 328),
    (2, 4096),
    (200, 192),  # chunks whose scales are under two scales of scales
    (90, 352),
]


@pytest.fixture(params=LEVELS)
def level(request):
    with cpu_backend.use_level(request.param):
        yield request.param


def _weight(kind, shape, generator=None):
    """The operators' arguments for a random weight, and its exact values."""
    format, block_size, nested = kind
    w = torch.randn(shape, generator=generator)
    packed, absmax = reference.quantize_4bit(w, format, block_size)
    state = (packed, absmax, None, None)
    if nested:
        codes, nested_absmax, offset = reference.quantize_absmax(absmax)
        state = (packed, codes, nested_absmax, offset)
    exact = reference.dequantize_4bit(*state, format, block_size, list(shape), torch.float32).double()
    return state, (format, block_size, list(shape)), exact


def _bound(exact, magnitude, dtype, terms):
    """One rounding to the output's dtype and those of fp32 sums, one after the other in the worst case.

    Where the level multiplies in bf16, the weight is rounded to it; as integers of 16 bits its values are.
    """
    weight = 2.0**-8 if cpu_backend.level() in ("amx", "avx512_bf16") and dtype is torch.bfloat16 else 0.0
    if cpu_backend.level() == "avx2" and dtype is not torch.float32:
        weight = 0.5 / 8064 / min(abs(value) for value in codebooks.NF4 if value)
    sums = 2.0**-24 * (terms**0.5 * 2 + 4)  # errors of random sign; the scale's and the product's roundings
    return UNIT[dtype] * exact.abs() * 1.01 + (weight * 1.01 + sums) * magnitude + TINY[dtype]


def _check(found, x, w, dtype, bias=None):
    exact, magnitude = x.double() @ w, x.double().abs() @ w.abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert found.dtype is dtype
    bound = _bound(exact, magnitude, dtype, w.shape[0])
    if cpu_backend.level() == "avx2" and dtype is not torch.float32:  # x is rounded, too, by the largest of 64
        k = x.shape[-1]
        chunks = torch.nn.functional.pad(x.double().abs(), (0, -k % 64)).unflatten(-1, (-1, 64))
        largest = chunks.amax(-1).repeat_interleave(64, dim=-1)[..., :k]
        bound += 0.5 / 16383 * 1.01 * (largest @ w.abs())
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dequantizing_gives_the_references_bits(kind, level):
    for shape in (*SHAPES, (3, 5, 14), (100_003,)):
        state, spec, _ = _weight(kind, shape)
        for dtype in DTYPES:
            expected = reference.dequantize_4bit(*state, *spec, dtype)
            found = cpu_backend.dequantize_4bit(*state, *spec, dtype)
            assert found.dtype is dtype
            assert torch.equal(found, expected), (shape, dtype)


def test_dequantizing_keeps_numbers_that_are_not_finite_and_those_near_zero(level):
    packed = torch.randint(0, 256, (4 * 32,), dtype=torch.uint8)
    absmax = torch.tensor([torch.inf, torch.nan, 1e-40, 7e4])
    for dtype in DTYPES:
        arguments = packed, absmax, None, None, "nf4", 64, [2, 128], dtype
        expected, found = reference.dequantize_4bit(*arguments), cpu_backend.dequantize_4bit(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_against_fp64(kind, dtype, level):
    for shape in SHAPES:
        n, k = shape
        state, spec, w = _weight(kind, shape)
        for rows in (1, 2, 3, 4, 5, 8, 15, 33):
            x, g, bias = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype), torch.randn(n)
            _check(cpu_backend.linear_4bit(x, *state, None, *spec), x, w.t(), dtype)
            _check(cpu_backend.linear_4bit(x, *state, bias.to(dtype), *spec), x, w.t(), dtype, bias.to(dtype))
            _check(cpu_backend.linear_4bit_t(g, *state, *spec), g, w, dtype)
        _check(cpu_backend.linear_4bit(x, *state, bias, *spec), x, w.t(), dtype, bias)  # fp32 with any x


@given(
    st.sampled_from(LEVELS), st.integers(1, 90), st.integers(1, 700), st.integers(1, 40), st.sampled_from(KINDS),
    st.sampled_from(DTYPES), st.integers(0, 3), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_shape_and_strides(name, n, k, rows, kind, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    state, spec, w = _weight(kind, (n, k), generator)

    def rows_of(width):
        padded = torch.randn(2 * rows, width + 3, generator=generator).to(dtype)
        if layout == 0:
            return padded[:rows, :width].contiguous()
        if layout == 1:  # rows apart
            return padded[::2, 1 : width + 1]
        if layout == 2:  # the same row again
            return padded[:1, :width].expand(rows, width)
        return padded[:rows, :width].t().contiguous().t()

    x, g = rows_of(k), rows_of(n)
    with cpu_backend.use_level(name):
        _check(cpu_backend.linear_4bit(x, *state, None, *spec), x, w.t(), dtype)
        _check(cpu_backend.linear_4bit_t(g, *state, *spec), g, w, dtype)


def test_many_rows_are_worked_on_in_parts(level):
    state, spec, w = _weight(KINDS[1], (40, 320))
    x = torch.randn(2500, 320)
    _check(cpu_backend.linear_4bit(x, *state, None, *spec), x, w.t(), torch.float32)
    _check(cpu_backend.linear_4bit_t(x[:, :40], *state, *spec), x[:, :40], w, torch.float32)


@pytest.mark.parametrize("shape", [(334, 2496), (40, 1984), (33, 960)], ids=str)
@pytest.mark.parametrize("kind", [("nf4", 64, True), ("fp4", 64, False), ("nf4", 192, True)], ids=str)
def test_many_rows_of_large_weights(kind, shape, level):
    """More rows of both, and more columns, than are worked on at a time, or not quite as many."""
    (n, k), (state, spec, w) = shape, _weight(kind, shape)
    before = torch.get_num_threads()
    for rows in (4, 16, 17, 33, 100, 530):
        x, bias = torch.randn(rows, k).bfloat16(), torch.randn(n)
        outs = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                outs.append(cpu_backend.linear_4bit(x, *state, bias, *spec))
        finally:
            torch.set_num_threads(before)
        _check(outs[0], x, w.t(), torch.bfloat16, bias)
        assert torch.equal(outs[0], outs[1])
        g = torch.randn(rows, n).bfloat16()
        _check(cpu_backend.linear_4bit_t(g, *state, *spec), g, w, torch.bfloat16)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_chunks_across_two_scales_of_scales(block_size, level):
    """Of 256 blocks each, which end within a chunk where a row has an odd number of them."""
    state, spec, w = _weight(("nf4", block_size, True), (300, 3 * block_size))
    assert len(state[2]) > 3
    for rows in (1, 2, 4, 9):
        for dtype in DTYPES:
            x = torch.randn(rows, 3 * block_size).to(dtype)
            _check(cpu_backend.linear_4bit(x, *state, None, *spec), x, w.t(), dtype)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_x_with_a_wide_range(rows, level):
    state, spec, w = _weight(("nf4", 64, False), (50, 256))
    for dtype in DTYPES:
        x = torch.randn(rows, 256) * torch.logspace(-4, 3, 256)[torch.randperm(256)]
        x[:, 64:128] = 0
        x = x.to(dtype)
        _check(cpu_backend.linear_4bit(x, *state, None, *spec), x, w.t(), dtype)
    tiny = torch.randn(rows, 256).to(torch.bfloat16) * 1e-33
    found = cpu_backend.linear_4bit(tiny, *state, None, *spec).double()
    assert bool(((found - tiny.double() @ w.t()).abs() <= 2.0**-7 * (tiny.double().abs() @ w.t().abs())).all())


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_x_that_is_not_finite(rows, level):
    state, spec, w = _weight(("nf4", 64, False), (50, 256))
    for dtype in DTYPES:
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(rows, 256).to(dtype)
            x[-1, 77] = value
            found = cpu_backend.linear_4bit(x, *state, None, *spec)
            expected = x.double() @ w.t()
            assert torch.equal(found[-1].isnan(), expected[-1].isnan())
            assert torch.equal(found[-1].isposinf(), expected[-1].isposinf())
            assert found[:-1].isfinite().all()


def test_what_is_not_served_is_left_to_the_reference():
    state, spec, _ = _weight(KINDS[0], (16, 64))
    x = torch.randn(2, 64)
    assert cpu_backend.linear_4bit(x.double(), *state, None, *spec) is NotImplemented
    assert cpu_backend.linear_4bit(x[:, :60], *state, None, *spec) is NotImplemented
    assert cpu_backend.linear_4bit(x, *state, torch.zeros(15), *spec) is NotImplemented
    short = state[0][:-1], *state[1:]
    assert cpu_backend.linear_4bit(x, *short, None, *spec) is NotImplemented
    assert cpu_backend.dequantize_4bit(*state, *spec, torch.float64) is NotImplemented
    assert cpu_backend.linear_4bit(x.to("meta"), *state, None, *spec) is NotImplemented


# ------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_same_bits_whatever_the_number_of_threads(threads, level):
    state, spec, _ = _weight(KINDS[1], (1000, 512))
    for rows in (1, 4, 40):
        x, g = torch.randn(rows, 512), torch.randn(rows, 1000)
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append((cpu_backend.linear_4bit(x, *state, None, *spec), cpu_backend.linear_4bit_t(g, *state, *spec)))
        for other in found[1:]:
            assert torch.equal(found[0][0], other[0])
            assert torch.equal(found[0][1], other[1])


def test_python_threads_may_call_at_once():
    cases = [(_weight(kind, (300, 256)), torch.randn(rows, 256)) for kind in KINDS[:2] for rows in (1, 3, 20)]

    def run(case):
        (state, spec, _), x = case
        return cpu_backend.linear_4bit(x, *state, None, *spec)

    expected = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(run, cases), expected, strict=True):
                assert torch.equal(found, wanted)


_PRELUDE = """
import os, sys, torch
from fewbits.kernels import cpu_backend, reference
w = torch.randn(512, 512)
state = *reference.quantize_4bit(w, "nf4", 64), None, None
x = torch.randn(8, 512)
def run(rows=8):
    return cpu_backend.linear_4bit(x[:rows], *state, None, "nf4", 64, [512, 512])
"""


def _python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_threads_as_torch_was_told_on_torchs_own_runtime(count):
    code = f"""
torch.set_num_threads({count})
run()
own = lambda: len(os.listdir("/proc/self/task"))
runtimes = lambda: {{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}}
before, loaded = own(), runtimes()
torch.randn(4096, 64).sum(1)  # torch's threads, if they were not there yet
for rows in (1, 8):
    run(rows)
print(before, own(), len(loaded ^ runtimes()))
"""
    started = _python(
        f"torch.set_num_threads({count}); torch.zeros(1 << 22).add_(1); print(len(os.listdir('/proc/self/task')))"
    )
    before, after, more = map(int, _python(code).split())
    assert before == after == int(started)  # as many as after an operation of torch, and no more
    assert more == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_the_same():
    code = """
expected = run()
child = os.fork()
if not child:
    import signal
    signal.alarm(60)  # a child that waits for threads that it has not dies of it
    os._exit(0 if torch.equal(run(), expected) and torch.equal(run(1)[0], run(1)[0]) else 3)
print(os.waitpid(child, 0)[1])
"""
    assert _python(code) == "0"


def test_workers_of_a_data_loader():
    code = """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return run()[index]
expected = run()
found = torch.cat(list(torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2)))
print(torch.equal(found, expected[:6]))
"""
    assert _python(code) == "True"


# ------------------------------------------------------------------------------------------------- the library


@pytest.mark.parametrize("name", LEVELS)
def test_the_environment_forces_a_level(name):
    assert _python("print(cpu_backend.level())", FEWBITS_CPU=name) == name
    # without it the first, or on Intel's CPUs with bf16 the next
    assert _python("print(cpu_backend.level() in cpu_backend.levels()[:2])", FEWBITS_CPU="") == "True"


def test_a_level_that_is_not_there_is_refused():
    code = """
from fewbits.errors import ConfigError
from fewbits.kernels import ops
try:
    ops.linear_4bit(x, *state, None, "nf4", 64, [512, 512])
except ConfigError as error:
    print(error)
"""
    assert "portable" in _python(code, FEWBITS_CPU="mmx")


def test_without_the_library_the_reference_runs_and_says_so_once():
    code = """
import pathlib, warnings
cpu_backend._LIBRARY = pathlib.Path("nowhere.so")
from fewbits.kernels import backend_for, ops
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for rows in (1, 8):
        found = ops.linear_4bit(x[:rows], *state, None, "nf4", 64, [512, 512])
        ops.dequantize_4bit(*state, "nf4", 64, [512, 512], torch.float32)
assert torch.equal(found, reference.linear_4bit(x, *state, None, "nf4", 64, [512, 512]))
print(backend_for("cpu"), *(f"{warning.category.__name__}: {warning.message}" for warning in told))
"""
    said = _python(code, FEWBITS_CPU="")
    assert said.startswith("reference FewbitsWarning: ")
    assert said.count("FewbitsWarning") == 1
    assert "compiler" in said
