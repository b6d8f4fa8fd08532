"""The native CPU kernels of 8 bits, of quantizing, and of rows of tables, for every instruction set that runs here."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.kernels import codebooks, cpu_backend, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LEVELS = cpu_backend.levels()
INTEGERS = {"amx", "avx512_bf16", "avx512", "avx2"}  # others multiply in fp32 whatever the threshold is
FEW_ROWS, TWO_DIGITS_ROWS = 4, 8  # up to which x is not quantized, and in 16 bits
# less than a register, a group of rows or a panel; more; no multiple of any of them
SHAPES = [(1, 1), (1, 257), (3, 40), (5, 8), (33, 70), (64, 128), (67, 1000), (130, 96), (200, 64)]


@pytest.fixture(params=LEVELS)
def level(request):
    with cpu_backend.use_level(request.param):
        yield request.param


def _weight(shape, generator=None):
    """A random weight's state, and its exact values."""
    q, absmax = reference.quantize_int8(torch.randn(shape, generator=generator))
    return q, absmax, q.double() * absmax.double()[..., None] / 127


def _seen(x, threshold):
    """x [M, K] in fp64 as the product has it, in one 8-bit digit or two; columns with outliers as they are.

    A row is quantized by the largest of its numbers that are no outliers. With outliers in more than an eighth of the
    columns, few rows or no threshold it is not quantized.
    """
    wide = x.float()
    outlier = wide.abs() >= threshold
    columns = outlier.any(0)
    quantized = threshold > 0 and len(x) > FEW_ROWS and 8 * int(columns.sum()) <= x.shape[1]
    if not quantized or cpu_backend.level() not in INTEGERS:
        return wide.double()
    absmax = wide.masked_fill(outlier, 0.0).abs().amax(1, keepdim=True)
    scaled = wide * (127.0 / absmax.double().clamp(min=1e-30)).float()  # torch divides fp32 less exactly
    digits = torch.round(scaled).double()
    if x.dtype is torch.float32 or len(x) <= TWO_DIGITS_ROWS:
        digits += torch.round((scaled - torch.round(scaled)) * 254.0).double() / 254
    return torch.where(columns, wide.double(), digits * absmax.double() / 127)


def _check(found, x, w, dtype, bias=None):
    """Within one rounding to the output's dtype and those of fp32 sums and scales."""
    exact, magnitude = x @ w, x.abs() @ w.abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    sums = 2.0**-24 * (2 * w.shape[0] ** 0.5 + 8)  # errors of random sign; scales and the product with them
    assert found.dtype is dtype
    tiny = 2.0**-24 if dtype is torch.float16 else 1e-30
    assert bool(((found.double() - exact).abs() <= UNIT[dtype] * 1.01 * exact.abs() + sums * magnitude + tiny).all())


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, threshold, level):
    for n, k in SHAPES:
        q, absmax, w = _weight((n, k))
        bias = torch.randn(n).to(DTYPES[n % 3])
        for rows in (1, 2, 3, 4, 5, 6, 7, 13, 40):
            x = torch.randn(rows, k)
            if k > 3:
                x[:, k // 3] *= 20  # an outlier column
            x = x.to(dtype)
            for b in (None, bias):
                found = cpu_backend.linear_int8(x, q, absmax, b, threshold)
                _check(found, _seen(x, threshold), w.t(), dtype, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_and_many_rows(dtype, level):
    """Several blocks of columns, and of rows; also the other way around, where they are summed over."""
    for n, k, rows in ((6, 9001, 9), (70, 4096, 6), (9, 50, 1100)):
        q, absmax, w = _weight((n, k))
        x = torch.randn(rows, k).clamp(-5, 5).to(dtype)
        x[rows // 2, k // 2] = 30.0
        for threshold in (0.0, 6.0):
            _check(cpu_backend.linear_int8(x, q, absmax, None, threshold), _seen(x, threshold), w.t(), dtype)
        g = torch.randn(rows, n).to(dtype)
        _check(cpu_backend.linear_int8_t(g, q, absmax), g.double(), w, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed(dtype, level):
    for n, k in SHAPES:
        q, absmax, w = _weight((n, k))
        for rows in (1, 5, 13):
            g = torch.randn(rows, n).to(dtype)
            _check(cpu_backend.linear_int8_t(g, q, absmax), g.double(), w, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outliers(dtype, level):
    """None, some, an eighth of the columns, one more, and nearly all of them."""
    q, absmax, w = _weight((40, 160))
    for count in (0, 6, 20, 21, 159, 160):
        x = torch.randn(9, 160).clamp(-4, 4)
        columns = torch.randperm(160)[:count]
        x[torch.randint(9, (count,)), columns] = torch.where(torch.rand(count) < 0.5, -40.0, 40.0)
        x = x.to(dtype)
        _check(cpu_backend.linear_int8(x, q, absmax, None, 6.0), _seen(x, 6.0), w.t(), dtype)
        assert int((x.abs() >= 6).any(0).sum()) == count


@pytest.mark.parametrize("rows", [3, 9])
def test_not_a_number(rows, level):
    """A row with NaN is NaN, infinity is an outlier, and the other rows are as if the row were not there."""
    q, absmax, w = _weight((20, 70))
    x = torch.randn(rows, 70).clamp(-4, 4)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    for threshold in (0.0, 6.0):
        found = cpu_backend.linear_int8(x, q, absmax, None, threshold)
        expected = reference.linear_int8(x, q, absmax, None, 6.0)
        assert bool(found[1].isnan().all())
        assert not bool(found[2].isfinite().any())
        assert torch.equal(found[2].isnan(), expected[2].isnan())
        others = [row for row in range(rows) if row not in (1, 2)]
        x[2, 7] = 100.0  # an outlier as well
        _check(found[others], _seen(x[[*others, 2]], threshold if rows > FEW_ROWS else 0.0)[:-1], w.t(), x.dtype)
        x[2, 7] = torch.inf


def test_rows_without_a_scale(level):
    """Zeros, and numbers that overflow or vanish when divided by or into 127."""
    q, absmax, w = _weight((20, 70))
    x = torch.randn(9, 70)
    for row, factor in enumerate((0.0, 1e-30, 1e-37, 1e-39, 1e-44, 1e30)):
        x[row] *= factor
    found = cpu_backend.linear_int8(x, q, absmax, None, 1e35)
    size = x.double().abs() @ w.t().abs()
    assert bool(((found.double() - x.double() @ w.t()).abs() <= size / 100 + 1e-36).all())


def test_integers_are_exact(level):
    q = torch.randint(-128, 128, (37, 300), dtype=torch.int8)
    x = torch.randint(-127, 128, (11, 300)).float()
    x[:, 0] = 127.0
    for threshold in (0.0, 1000.0):
        found = cpu_backend.linear_int8(x, q, torch.full((37,), 127.0), None, threshold)
        torch.testing.assert_close(found.double(), x.double() @ q.double().t(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("rows", "n", "k"), [(97, 300, 70), (100, 257, 333), (96, 260, 4096), (33, 270, 4161), (130, 384, 8300)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # with two digits, and with one
def test_many_rows(rows, n, k, dtype, level):
    """With enough of both the weight is put in another order first, which depends on the threads: the same bits."""
    x = torch.randint(-127, 128, (rows, k)).to(dtype)
    x[:, 0] = 127.0
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    exact = x.double() @ q.double().t()
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(cpu_backend.linear_int8(x, q, torch.full((n,), 127.0), None, 1000.0))
            # of integers that fp32 holds, and sums of some blocks of columns of them
            unit = UNIT[dtype] + 2.0**-22
            assert bool(((outs[-1].double() - exact).abs() <= unit * exact.abs()).all())
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
    finally:
        torch.set_num_threads(before)
    q, absmax, w = _weight((n, k))
    x, bias = torch.randn(rows, k).clamp(-5, 5).to(dtype), torch.randn(n)
    x[rows // 2, k // 2] = 30.0
    _check(cpu_backend.linear_int8(x, q, absmax, bias, 6.0), _seen(x, 6.0), w.t(), dtype, bias)


def test_shapes_strides_and_threads(level):
    q, absmax, w = _weight((200, 700))
    x = torch.randn(3, 700, 7).transpose(1, 2)  # rows that do not lie together
    found = cpu_backend.linear_int8(x, q, absmax, None, 6.0)
    assert found.shape == (3, 7, 200)
    _check(found.view(21, 200), _seen(x.reshape(21, 700), 6.0), w.t(), x.dtype)
    part = torch.randn(21, 900)[:, 100:800]  # rows further apart than they are long
    _check(cpu_backend.linear_int8(part, q, absmax, None, 6.0), _seen(part, 6.0), w.t(), x.dtype)
    g = torch.randn(30, 200)
    strided = q.t().contiguous().t()
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(
                (
                    cpu_backend.linear_int8(x, strided, absmax, None, 6.0),
                    cpu_backend.linear_int8(x, q, absmax, None, 0.0),
                    cpu_backend.linear_int8(x[0, :2], q, absmax, None, 6.0),
                    cpu_backend.linear_int8_t(g, strided, absmax),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))
    assert torch.equal(outs[0][0], found)


def test_left_to_the_reference(level):
    q, absmax, _ = _weight((4, 8))
    x = torch.randn(3, 8)
    assert cpu_backend.linear_int8(x.double(), q, absmax, None, 6.0) is NotImplemented
    assert cpu_backend.linear_int8(x[:0], q, absmax, None, 6.0) is NotImplemented
    assert cpu_backend.linear_int8(x[:, :7], q, absmax, None, 6.0) is NotImplemented
    assert cpu_backend.linear_int8(x, q, absmax, torch.randn(5), 6.0) is NotImplemented
    assert cpu_backend.linear_int8_t(x, q, absmax) is NotImplemented
    assert cpu_backend.quantize_4bit(x, "nf4", 7) is NotImplemented
    for ids in (torch.tensor([4]), torch.tensor([-5]), torch.tensor([[0, 4]])):
        assert cpu_backend.embedding_int8(ids, q, absmax, x.dtype) is NotImplemented
        with pytest.raises(IndexError):
            torch.ops.fewbits.embedding_int8(ids, q, absmax, x.dtype)


def test_other_devices(level):
    """What the default device is does not matter; a weight elsewhere is left to the reference, which says so."""
    q, absmax, _ = _weight((4, 8))
    x = torch.randn(3, 8)
    expected = cpu_backend.linear_int8(x, q, absmax, None, 6.0), *cpu_backend.quantize_4bit(x, "nf4", 8)
    with torch.device("meta"):
        found = cpu_backend.linear_int8(x, q, absmax, None, 6.0), *cpu_backend.quantize_4bit(x, "nf4", 8)
    _same(found, expected)
    assert cpu_backend.linear_int8(x, q.to("meta"), absmax.to("meta"), None, 6.0) is NotImplemented
    assert cpu_backend.linear_int8(x, q, absmax, torch.empty(4, device="meta"), 6.0) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_close_as_bitsandbytes(dtype, level):
    """With many rows and x in 8 bits as well, the same arithmetic: but for bitsandbytes' rounding of sums to fp16."""
    n, k = 256, 512
    w, x = torch.randn(n, k), torch.randn(64, k).to(dtype)
    x[:, 100] *= 12
    peer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
    peer.weight = bnb.nn.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False)
    q, absmax = reference.quantize_int8(w)
    exact = x.double() @ (q.double() * absmax.double()[:, None] / 127).t()
    ours = (cpu_backend.linear_int8(x, q, absmax, None, 6.0).double() - exact).norm()
    with torch.no_grad():
        assert ours <= 1.02 * (peer.eval()(x).double() - exact).norm()


# ------------------------------------------------------------------------------------------------- rows, dequantizing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantizing_is_bit_exact(dtype, level):
    for shape in ((1, 1), (33, 70), (3, 5, 130), (2, 4097)):
        q, absmax, _ = _weight(shape)
        assert torch.equal(cpu_backend.dequantize_int8(q, absmax, dtype), reference.dequantize_int8(q, absmax, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_bit_exact(dtype, level):
    q, absmax, _ = _weight((50, 70))
    for ids in (torch.randint(0, 50, (2, 7)), torch.tensor(49), torch.randint(0, 50, (5,), dtype=torch.int32)):
        found = cpu_backend.embedding_int8(ids, q, absmax, dtype)
        assert torch.equal(found, reference.embedding_int8(ids, q, absmax, dtype))
    for format, shape, block, nested in (
        ("nf4", (50, 128), 64, False),
        ("fp4", (50, 128), 32, True),
        ("nf4", (40, 520), 64, True),
        ("fp4", (9, 33), 64, False),
    ):
        state = (*reference.quantize_4bit(torch.randn(shape), format, block), None, None)
        if nested:
            codes, nested_absmax, offset = reference.quantize_absmax(state[1])
            state = (state[0], codes, nested_absmax, offset)
        for ids in (torch.randint(0, shape[0], (2, 7)), torch.tensor(shape[0] - 1)):
            arguments = (ids, *state, format, block, list(shape), dtype)
            assert torch.equal(cpu_backend.embedding_4bit(*arguments), reference.embedding_4bit(*arguments))


# ------------------------------------------------------------------------------------------------- quantizing


def _same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _with_special_values(w):
    """Zeros, tiny numbers, infinity and NaN, each in blocks of their own; and a last number that is -0."""
    flat = w.view(-1)
    if len(flat) > 600:
        flat[64:128], flat[192:256] = 0.0, 1e-39
        flat[330], flat[400] = torch.nan, torch.inf
        flat[512:576] *= 1e-20
    flat[-1] = -0.0
    return w


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4bit_bytes(dtype, format, level):
    for n in (1, 2, 31, 63, 64, 65, 130, 1000, 4096, 9001):
        for block in (8, 32, 64, 256, 4096):
            w = torch.randn(n)
            for case in (w.to(dtype), _with_special_values(w.to(dtype).clone())):
                _same(cpu_backend.quantize_4bit(case, format, block), reference.quantize_4bit(case, format, block))
    wide = torch.randn(60, 70).to(dtype).t()
    _same(cpu_backend.quantize_4bit(wide, format, 64), reference.quantize_4bit(wide, format, 64))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_4bit_bytes_at_the_bounds(format, level):
    """Values on a bound, and one unit in the last place beside it; and where look-ups of bounds begin."""
    bounds = torch.cat([codebooks.decision_rule(format, torch.device("cpu"))[0], torch.arange(-16, 17) / 15.99])
    values = torch.cat([bounds, *(torch.nextafter(bounds, torch.tensor(to)) for to in (-2.0, 2.0))])
    w = torch.ones(len(values), 64)
    w[:, 5], w[:, 40] = values, -values
    _same(cpu_backend.quantize_4bit(w, format, 64), reference.quantize_4bit(w, format, 64))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_4bit_bytes_of_every_bf16_number(format, block, level):
    """All from 2^-9 of a block's largest number on, for every mantissa of that one: the rest is powers of two."""
    ones = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # from 1 to 2
    fractions = torch.arange(0x3B00, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    for scale in (1.0, 2.0**-70, 2.0**90):
        for largest in ones.tolist():
            values = fractions[fractions <= largest] * scale
            values = torch.cat([values, -values, values[: -2 * len(values) % (block - 1)]]).view(-1, block - 1)
            w = torch.cat([torch.full((len(values), 1), largest * scale, dtype=torch.bfloat16), values], dim=1)
            _same(cpu_backend.quantize_4bit(w, format, block), reference.quantize_4bit(w, format, block))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_large_weights(dtype, format, level):
    """Whose bytes go past the caches, if they lie where they can: 2 MiB and more."""
    n, k = 4113, 1056
    w = _with_special_values((torch.randn(n, k) * 0.02).to(dtype))
    expected = reference.quantize_int8(w) if format == "int8" else reference.quantize_4bit(w, format, 32)
    for offset in (0, 8, 16, 32):
        room = torch.full((expected[0].numel() + 64,), 99, dtype=expected[0].dtype)
        codes, absmax = room[offset : offset + expected[0].numel()], torch.empty_like(expected[1])
        if format == "int8":
            cpu_backend.quantize_int8_to(w, codes.view(n, k), absmax)
        else:
            cpu_backend.quantize_4bit_to(w, format, 32, codes, absmax)
        _same((codes.view(expected[0].shape), absmax), expected)
        assert (room[:offset] == 99).all()
        assert (room[offset + len(codes) :] == 99).all()


@given(st.integers(1, 1500), st.sampled_from([32, 64]), st.sampled_from(["nf4", "fp4"]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_4bit_bytes_of_any_bits(n, block, format, seed):
    """Of any 16 bits as fp16 and bf16, and any 32 as fp32."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (2 * n,), generator=generator, dtype=torch.int16)
    for level in LEVELS:
        with cpu_backend.use_level(level):
            for dtype in DTYPES:
                w = bits.view(dtype)
                _same(cpu_backend.quantize_4bit(w, format, block), reference.quantize_4bit(w, format, block))


def test_nested_bytes(level):
    for n in (1, 2, 255, 256, 257, 5000):
        for absmax in (
            torch.rand(n) + 0.5,
            torch.full((n,), 0.25),
            torch.rand(n) * 1e-30,
            torch.where(torch.arange(n) == n // 2, torch.nan, 1.0),
            torch.where(torch.arange(n) == n // 2, torch.inf, torch.rand(n)),
        ):
            _same(cpu_backend.quantize_absmax(absmax), reference.quantize_absmax(absmax))
    every_step = torch.linspace(-1, 1, 4 * 65536, dtype=torch.float64).float()
    every_step[::256] = 1.0  # the largest of each 256
    _same(cpu_backend.quantize_absmax(every_step), reference.quantize_absmax(every_step))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_bytes(dtype, level):
    for shape in ((1, 1), (5, 3), (3, 17), (64, 128), (33, 70), (2, 4097), (2, 9, 40), (300,)):
        for factor in (1.0, 0.01, 1e-5, 1e-7, 3e4):  # where fp16 is exact, subnormal, zero, and overflows
            w = (torch.randn(shape) * factor).to(dtype)
            _same(cpu_backend.quantize_int8(w), reference.quantize_int8(w))
            w.view(-1)[0] = torch.nan
            w.view(-1)[-1] = -0.0
            _same(cpu_backend.quantize_int8(w), reference.quantize_int8(w))
    ties = torch.full((2, 256), 127.0)
    ties[:, :128] = torch.arange(-64, 64) + 0.5
    _same(cpu_backend.quantize_int8(ties.to(dtype)), reference.quantize_int8(ties.to(dtype)))
