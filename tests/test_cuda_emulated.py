"""The CUDA kernels and the backend's host code without a GPU: run by an emulator that changes the order of threads.

Uninitialized memory is NaN in these tests, so that whatever a kernel leaves out shows; each product is computed several
times, with other orders of blocks and threads, to the same bits.
"""

from __future__ import annotations

import random

import pytest
import torch
from emulated import EmulatorError, Kernel, cuda, limits
from products import UNIT, check, values

from fewbits import kernels
from fewbits.formats import QuantSpec
from fewbits.kernels import cuda_plans, cuda_shapes, nvrtc
from fewbits.kernels.codebooks import codebook, decision_rule
from fewbits.kernels.ways import use_way
from fewbits.tensor import QuantTensor

__all__ = ["cuda", "limits"]  # fixtures
BF16, FP16 = UNIT


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)  # of which the order of threads depends
    torch.manual_seed(0)


def quantized(spec, n, k):
    w = torch.randn(n, k) * torch.rand(n, 1) * 0.1
    w[torch.rand_like(w) < 0.001] *= 20
    return QuantTensor.quantize(w, spec)


def product(cuda, x, q, bias=None):
    if q.spec.format == "int8":
        return cuda.linear_int8(x, q.packed, q.absmax, bias, q.spec.threshold)
    state = q.packed, q.absmax, q.nested_absmax, q.nested_offset
    return cuda.linear_4bit(x, *state, bias, q.spec.format, q.spec.block_size, list(q.shape))


def embedding(cuda, ids, q, dtype):
    if q.spec.format == "int8":
        return cuda.embedding_int8(ids, q.packed, q.absmax, dtype)
    state = q.packed, q.absmax, q.nested_absmax, q.nested_offset
    return cuda.embedding_4bit(ids, *state, q.spec.format, q.spec.block_size, list(q.shape), dtype)


def check_product(cuda, file, spec, rows, n, k, dtype, bias_dtype=None):
    q, x = quantized(spec, n, k), torch.randn(rows, k, dtype=dtype)
    bias = None if bias_dtype is None else torch.randn(n, dtype=bias_dtype)
    out = product(cuda, x, q, bias)
    assert Kernel.launched == {file}
    check(out, x, q, bias)
    for _ in range(2):
        assert torch.equal(product(cuda, x, q, bias), out)


# ------------------------------------------------------------------------------------------------- decode.cu


@pytest.mark.parametrize(
    ("spec", "rows", "n", "k", "dtype", "bias"),
    [
        (QuantSpec("nf4", 64, True), 1, 48, 448, BF16, None),  # the last rows of a tile are none
        (QuantSpec("nf4", 64, True), 5, 33, 192, FP16, FP16),
        (QuantSpec("nf4", 64), 8, 17, 64, BF16, torch.float32),
        (QuantSpec("fp4", 32), 9, 17, 320, BF16, BF16),
        (QuantSpec("fp4", 32, True), 1, 200, 2112, FP16, None),  # two chunks of some warps, one of others
        (QuantSpec("nf4", 32, True), 16, 33, 192, BF16, torch.float32),
        (QuantSpec("fp4", 128), 16, 48, 384, FP16, FP16),
        (QuantSpec("nf4", 128, True), 5, 33, 256, BF16, None),
        (QuantSpec("nf4", 256, True), 2, 17, 512, BF16, None),
        (QuantSpec("nf4", 64, True), 1, 256, 2048, BF16, BF16),  # whole tiles, two a block
        (QuantSpec("nf4", 64), 9, 128, 2048, BF16, None),
        (QuantSpec("int8"), 1, 48, 448, BF16, None),
        (QuantSpec("int8"), 5, 17, 80, FP16, torch.float32),
        (QuantSpec("int8"), 9, 33, 1040, BF16, BF16),
        (QuantSpec("int8", threshold=0.0), 40, 16, 64, BF16, None),  # three times
    ],
    ids=str,
)
def test_few_rows(cuda, spec, rows, n, k, dtype, bias):
    with use_way("decode"):
        check_product(cuda, "decode.cu", spec, rows, n, k, dtype, bias)


@pytest.mark.parametrize(
    ("limits", "spec"),
    [
        ((1, 200_000), QuantSpec("nf4", 64, True)),
        ((2, 200_000), QuantSpec("nf4", 64, True)),
        ((1, 171_000), QuantSpec("nf4", 64, True)),  # no room for the sums of all tiles
        ((2, 200_000), QuantSpec("int8")),
        ((1, 90_000), QuantSpec("int8")),
    ],
    ids=str,
)
def test_several_tiles_of_a_block(cuda, spec, limits, monkeypatch):
    shape, (rows, n, k) = cuda_shapes.DecodeShape(2, 1), (3, 160, 192)
    monkeypatch.setattr(cuda_shapes, "decode_shape", lambda *_: shape)
    plan = cuda_shapes.decode_plan(shape, n, k, rows, 8 if spec.format == "int8" else 4, 64, spec.double_quant, -1)
    assert plan.kept == (0 if limits[1] in (171_000, 90_000) else plan.rounds), plan
    check_product(cuda, "decode.cu", spec, rows, n, k, BF16)


@pytest.mark.parametrize(
    ("limits", "spec", "rows", "n", "k", "line"),
    [
        ((2, 230_000), QuantSpec("nf4", 64, True), 2, 160, 4096, 128),  # whole lines
        ((2, 230_000), QuantSpec("nf4", 64), 7, 150, 3072, 128),  # some warps have one
        ((8, 230_000), QuantSpec("nf4", 64, True), 9, 96, 2112, 128),  # the last one is half a line
        ((2, 230_000), QuantSpec("fp4", 128, True), 4, 100, 4096, 128),
        ((2, 230_000), QuantSpec("nf4", 512, True), 1, 70, 2560, 128),
        ((2, 230_000), QuantSpec("nf4", 64, True), 5, 70, 8192, 128),  # two
        ((2, 230_000), QuantSpec("nf4", 32, True), 4, 100, 4096, 64),
        ((2, 230_000), QuantSpec("nf4", 64, True), 16, 160, 4096, 64),  # scales are read two chunks ahead
        ((2, 230_000), QuantSpec("nf4", 128, True), 11, 150, 3968, 64),
        ((1, 230_000), QuantSpec("nf4", 64, True), 13, 70, 8192, 64),
    ],
    ids=str,
)  # fmt: skip
def test_lines(cuda, spec, rows, n, k, line, monkeypatch):
    """What a warp takes of a row at a time."""
    shape = cuda_shapes.DecodeShape(2, 1)
    monkeypatch.setattr(cuda_shapes, "decode_shape", lambda *_: shape)
    plan = cuda_shapes.decode_plan(shape, n, k, rows, 4, spec.block_size, spec.double_quant, -1)
    assert plan.line == line, plan
    with use_way("decode"):
        check_product(cuda, "decode.cu", spec, rows, n, k, BF16)


@pytest.mark.parametrize(
    ("limits", "shape", "spec", "rows", "n", "k", "dtype", "bias"),
    [
        # whole lines, and blocks that share them
        ((8, 230_000), (2, 2), QuantSpec("nf4", 64, True), 3, 90, 8192, BF16, BF16),
        ((8, 230_000), (1, 2), QuantSpec("nf4", 64), 16, 60, 7168, FP16, None),
        ((4, 230_000), (3, 1), QuantSpec("nf4", 64, True), 3, 130, 2112, BF16, BF16),
        ((4, 230_000), (3, 2), QuantSpec("nf4", 64), 9, 90, 4160, FP16, None),  # one block of two has less to do
        ((8, 230_000), (2, 4), QuantSpec("fp4", 32, True), 16, 64, 8192, BF16, torch.float32),
        ((8, 230_000), (4, 4), QuantSpec("nf4", 64, True), 5, 70, 320, BF16, BF16),  # to some blocks nothing is left
        ((6, 230_000), (5, 2), QuantSpec("nf4", 128, True), 1, 200, 4352, BF16, None),
        ((4, 230_000), (4, 1), QuantSpec("int8"), 25, 200, 2064, BF16, BF16),
        ((4, 230_000), (4, 2), QuantSpec("int8"), 32, 128, 4096, FP16, torch.float32),
        ((2, 230_000), (2, 1), QuantSpec("int8"), 20, 130, 1040, BF16, None),  # several tiles a block
        ((2, 185_000), (2, 1), QuantSpec("int8"), 20, 130, 1040, BF16, None),
        ((4, 230_000), (7, 1), QuantSpec("nf4", 64, True), 7, 330, 4160, BF16, BF16),
    ],
    ids=str,
)
def test_shapes_of_blocks(cuda, shape, spec, rows, n, k, dtype, bias, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "decode_shape", lambda *_: cuda_shapes.DecodeShape(*shape))
    with use_way("decode"):
        check_product(cuda, "decode.cu", spec, rows, n, k, dtype, bias if bias is None or bias.itemsize == 4 else dtype)


def test_inputs_of_any_layout(cuda):
    q = quantized(QuantSpec("nf4", 64, True), 17, 64)
    wide = torch.randn(2, 3, 2, 100, dtype=BF16)
    for x in (
        wide[..., :1, :64],  # rows apart
        wide[..., :1, 7:71],  # and beginning anywhere
        wide[:, :, 0, :64].transpose(0, 1),
        torch.randn(64, 4, dtype=BF16).t(),  # columns first
        torch.randn(64, dtype=BF16),
        torch.randn(1, 64, dtype=BF16).expand(6, 64),
        torch.randn(1, 64, dtype=BF16).expand(130, 64),
        torch.randn(130, 100, dtype=BF16)[:, 3:67],
    ):
        check(product(cuda, x, q), x, q, None)


@pytest.mark.parametrize("rows", [17, 32, 33, 64, 65, 128, 129, 256, 257])
def test_the_quickest(cuda, rows):
    """Whichever it is, for a weight without round numbers."""
    q, x = quantized(QuantSpec("nf4", 64, True), 205, 448), torch.randn(rows, 448, dtype=BF16)
    check(product(cuda, x, q), x, q, None)


@pytest.mark.parametrize("rows", [10, 20])
def test_short_blocks_are_decoded_where_another_kernel_would_be_quicker(cuda, rows, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "quickest", lambda *_: "skinny")
    check_product(cuda, "decode.cu", QuantSpec("nf4", 32, True), rows, 40, 192, BF16)


def test_what_is_not_served(cuda):
    q = quantized(QuantSpec("nf4"), 16, 64)
    assert product(cuda, torch.randn(2, 64), q) is NotImplemented  # fp32
    assert product(cuda, torch.randn(0, 64, dtype=BF16), q) is NotImplemented
    assert cuda.quantize_4bit(torch.randn(64), "fp4", 64) is NotImplemented


# ------------------------------------------------------------------------------------------------- skinny_4bit.cu


@pytest.mark.parametrize(
    ("limits", "spec", "rows", "n", "k", "dtype", "bias"),
    [
        ((4, 230_000), QuantSpec("nf4", 64, True), 17, 300, 1152, BF16, BF16),  # two blocks to some tiles
        ((4, 230_000), QuantSpec("fp4", 64), 40, 33, 320, FP16, torch.float32),  # all at one; half a chunk at the end
        ((2, 230_000), QuantSpec("nf4", 128, True), 60, 130, 1920, BF16, None),
        ((5, 230_000), QuantSpec("nf4", 64, True), 64, 200, 704, BF16, None),  # parts of a tile by several blocks
        ((1, 115_000), QuantSpec("nf4", 64, True), 32, 128, 1216, BF16, BF16),  # the least ring of chunks
        ((2, 140_000), QuantSpec("fp4", 256), 64, 150, 1280, BF16, None),
    ],
    ids=str,
)
def test_some_tens_of_rows(cuda, spec, rows, n, k, dtype, bias, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "skinny_shape", lambda *_: cuda_shapes.SkinnyShape(2, 1))
    with use_way("skinny"):
        check_product(cuda, "skinny_4bit.cu", spec, rows, n, k, dtype, bias)
    for counters in cuda_plans._counters.values():
        assert not counters.any()  # zeros for the next launch


@pytest.mark.parametrize(
    ("shape", "spec", "rows", "n", "k", "dtype", "bias"),
    [
        ((2, 2), QuantSpec("nf4", 64, True), 17, 300, 1152, BF16, BF16),
        ((2, 4), QuantSpec("fp4", 64), 30, 130, 576, FP16, torch.float32),  # blocks with a chunk, and with two
        ((3, 8), QuantSpec("nf4", 128, True), 60, 200, 1024, BF16, None),
        ((2, 4), QuantSpec("nf4", 64, True), 90, 128, 768, BF16, BF16),  # two tiles of x, the last of 26 rows
        ((2, 2, 2), QuantSpec("nf4", 64, True), 30, 140, 1216, BF16, BF16),  # parts of two chunks, and of three
        ((2, 1, 2), QuantSpec("fp4", 128), 70, 70, 640, FP16, torch.float32),
        ((4, 2, 2), QuantSpec("nf4", 64), 20, 200, 2112, BF16, None),
    ],
    ids=str,
)
def test_some_tens_of_rows_by_clusters(cuda, shape, spec, rows, n, k, dtype, bias, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "skinny_shape", lambda *_: cuda_shapes.SkinnyShape(*shape))
    with use_way("skinny"):
        check_product(cuda, "skinny_4bit.cu", spec, rows, n, k, dtype, bias)


# ------------------------------------------------------------------------------------------------- wide.cu


@pytest.mark.parametrize(
    ("limits", "tile", "spec", "rows", "n", "k", "dtype", "bias"),
    [
        ((4, 230_400), 256, QuantSpec("nf4", 64, True), 150, 300, 320, BF16, BF16),  # half a chunk at the end
        ((5, 230_400), 256, QuantSpec("fp4", 64), 300, 130, 704, FP16, torch.float32),  # parts of tiles, by several
        ((1, 230_400), 256, QuantSpec("nf4", 128, True), 129, 300, 256, BF16, None),  # all tiles by one
        ((3, 230_400), 256, QuantSpec("nf4", 64), 600, 140, 192, BF16, FP16),  # whole tiles, and parts of others
        ((2, 180_000), 128, QuantSpec("nf4", 256, True), 140, 33, 768, FP16, None),  # the least ring
        ((4, 230_400), 128, QuantSpec("nf4", 64, True), 70, 300, 832, BF16, BF16),
        ((3, 230_400), 256, QuantSpec("nf4", 64, True), 130, 300, 1024, BF16, None),  # scales by sixteens, and parts
    ],
    ids=str,
)
def test_hundreds_of_rows(cuda, tile, spec, rows, n, k, dtype, bias, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "wide_shape", lambda *_: cuda_shapes.WideShape(tile, 2, 1))
    with use_way("wide"):
        check_product(cuda, "wide.cu", spec, rows, n, k, dtype, bias if bias is None or bias.itemsize == 4 else dtype)
    for counters in cuda_plans._counters.values():
        assert not counters.any()


@pytest.mark.parametrize(
    ("limits", "shape", "spec", "rows", "n", "k", "dtype", "bias"),
    [
        ((4, 230_400), (128, 3, 1), QuantSpec("nf4", 64, True), 140, 300, 320, BF16, BF16),
        ((5, 230_400), (128, 3, 1), QuantSpec("fp4", 64), 300, 210, 704, FP16, torch.float32),  # parts of tiles
        ((4, 230_400), (128, 3, 4), QuantSpec("nf4", 64, True), 100, 200, 832, BF16, None),  # one block has no row of x
        ((8, 230_400), (128, 2, 4), QuantSpec("nf4", 128, True), 200, 140, 512, FP16, FP16),
        ((4, 230_400), (256, 2, 2), QuantSpec("nf4", 64), 300, 150, 320, BF16, BF16),
    ],
    ids=str,
)
def test_hundreds_of_rows_by_shapes(cuda, shape, spec, rows, n, k, dtype, bias, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "wide_shape", lambda *_: cuda_shapes.WideShape(*shape))
    with use_way("wide"):
        check_product(cuda, "wide.cu", spec, rows, n, k, dtype, bias if bias is None or bias.itemsize == 4 else dtype)
    for counters in cuda_plans._counters.values():
        assert not counters.any()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_values_as_halves(format, shifted):
    cpu = torch.device("cpu")
    table, exact = cuda_plans.value_table(format, True, shifted, cpu), codebook(format, cpu)
    assert torch.equal(table.entries.half().float(), table.entries)
    values = (table.entries.double() + table.shift) * table.scale
    assert not values[exact == 0].any()
    assert 0 <= table.shift < 0.5  # and so 10 bits
    assert (table.shift * 2048).is_integer()
    q = QuantTensor.quantize(torch.randn(512, 512), QuantSpec(format, 64))
    codes = torch.stack([q.packed.int() >> 4, q.packed.int() & 15], dim=-1).view(-1)
    scales = q.absmax.double().repeat_interleave(64)
    off = (((values - exact.double())[codes] * scales).norm() / (exact.double()[codes] * scales).norm()).item()
    assert off < ((4.3e-5 if shifted else 8.3e-5) if format == "nf4" else 1e-7)


@pytest.mark.parametrize("limits", [(4, 230_400)])
@pytest.mark.parametrize(("format", "nested", "dtype"), [
    ("nf4", True, BF16), ("nf4", False, BF16), ("fp4", False, BF16), ("nf4", True, FP16)
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("shape", "most"), [((256, 2, 1), 0.015), ((128, 3, 1), 0.03)])
def test_values_of_many_rows_are_those_that_dequantizing_rounds(cuda, format, nested, dtype, shape, most, monkeypatch):
    """Tables of nf4 hold halves: rounded to bf16, all are the same but for some in a hundred, and zero is zero."""
    monkeypatch.setattr(cuda_shapes, "wide_shape", lambda *_: cuda_shapes.WideShape(*shape))
    n, k = 128, 256
    w = torch.randn(n, k)
    w[torch.rand_like(w) < 0.1] = 0
    q = QuantTensor.quantize(w, QuantSpec(format, 64, nested))
    with use_way("wide"):
        out = product(cuda, torch.eye(k, dtype=dtype), q).t()
    assert Kernel.launched == {"wide.cu"}
    exact = q.dequantize()
    assert torch.equal(out == 0, exact == 0)
    differ = (out != exact.to(dtype)).double().mean()
    assert differ <= (most if (format, dtype) == ("nf4", BF16) else 0.0)
    table = 7e-5 * w.abs().amax() if dtype == BF16 else 0.0
    assert ((out.double() - exact.double()).abs() <= exact.abs() * 2.0**-8 + table).all()


@pytest.mark.parametrize("columns", [0, 3, 70], ids=lambda n: f"{n}_columns_with_outliers")
@pytest.mark.parametrize(
    ("shape", "rows", "n", "k", "dtype"),
    [((64, 2, 2), 40, 200, 272, BF16), ((128, 2, 4), 100, 33, 640, FP16), ((256, 2, 2), 300, 140, 320, BF16)],
    ids=str,
)
def test_rows_of_x_in_8_bits_by_clusters(cuda, shape, rows, n, k, dtype, columns, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "wide_shape", lambda *_: cuda_shapes.WideShape(*shape))
    q, x, bias = quantized(QuantSpec("int8"), n, k), torch.randn(rows, k, dtype=dtype), torch.randn(n)
    x[:, torch.randperm(k)[:columns]] *= 5
    out = product(cuda, x, q, bias)
    check(out, x, q, bias)
    assert torch.equal(product(cuda, x, q, bias), out)


@pytest.mark.parametrize("columns", [0, 3, 16, 70], ids=lambda n: f"{n}_columns_with_outliers")
@pytest.mark.parametrize(
    ("limits", "tile", "rows", "n", "k", "dtype"),
    [
        ((4, 230_400), 64, 37, 300, 144, BF16),  # a part of a chunk
        ((5, 230_400), 128, 100, 33, 640, FP16),  # parts of a tile by several blocks
        ((2, 230_400), 256, 200, 260, 320, BF16),
        ((5, 230_400), 256, 200, 33, 640, BF16),
        ((1, 230_400), 64, 70, 40, 80, FP16),
    ],
    ids=str,
)
def test_rows_of_x_in_8_bits(cuda, tile, rows, n, k, dtype, columns, monkeypatch):
    monkeypatch.setattr(cuda_shapes, "wide_shape", lambda *_: cuda_shapes.WideShape(tile, 2, 1))
    q, x, bias = quantized(QuantSpec("int8"), n, k), torch.randn(rows, k, dtype=dtype), torch.randn(n)
    x[:, torch.randperm(k)[:columns]] *= 5
    x[-1, : columns and 3] = 9.0
    x[3] = 0
    out = product(cuda, x, q, bias)
    assert Kernel.launched == {"quantize_rows.cu", "wide.cu"}
    check(out, x, q, bias)
    for _ in range(2):
        assert torch.equal(product(cuda, x, q, bias), out)
    for counters in cuda_plans._counters.values():
        assert not counters.any()
    x[5, 7] = torch.nan
    again = product(cuda, x, q, bias)
    assert again[5].isnan().all()
    assert torch.equal(again[:5], out[:5])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("k", [16, 4112, 70_016])  # of the last a thread takes more than 32 times eight
def test_rows_are_quantized_to_the_last_bit(cuda, k, dtype):
    rows, threshold = 3, 6.0
    x = torch.randn(rows, k, dtype=dtype) * torch.tensor([[1.0], [3.0], [1e-3]], dtype=dtype)
    x[0, ::16] = torch.tensor([2.5, -7.5, 6.0, -6.0], dtype=dtype).repeat(k)[
        : k // 16
    ]  # ties, and the threshold itself
    x[1, k - 1], x[2, 3] = torch.inf, torch.nan
    codes, scales = torch.empty(rows, k, dtype=torch.int8), torch.empty(rows)
    outliers, found = torch.empty(1 + k, dtype=torch.int32), torch.zeros(1 + -(-k // 32), dtype=torch.int32)
    kernel = cuda_plans.made("quantize_rows.cu", (("BF16", int(dtype is BF16)),), -1, "5Pq2if", 256, -(-k // 32) * 4)
    pointers = (t.data_ptr() for t in (x, codes, scales, outliers, found))
    cuda._launch(kernel, -1, 2, 1, (*pointers, k, rows, k, threshold))
    value = x.float()
    outlying = value.abs() >= threshold
    absmax = value.masked_fill(outlying, 0).abs().amax(1)
    assert torch.equal(scales[:2], (absmax * torch.tensor(1 / 127))[:2])
    assert scales[2].isnan()
    expected = (value * (127 / absmax)[:, None]).round().masked_fill(outlying, 0)
    assert torch.equal(codes[:2].float(), expected[:2])
    columns = outlying.any(0).nonzero().flatten()
    assert outliers[0] == len(columns)
    assert torch.equal(outliers[1 : 1 + len(columns)].long(), columns)
    assert not found.any()


def elsewhere(tensor):
    """A copy that begins one element after a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 32, dtype=tensor.dtype)
    first = next(i for i in range(32) if room[i:].data_ptr() % 16 == tensor.element_size())
    return room[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("nf4", 64), QuantSpec("int8")], ids=str)
def test_tensors_that_lie_otherwise(cuda, spec):
    """Few rows go the short way only where every tensor lies as the kernel reads it."""
    n, k = 33, 192
    q, x, bias = quantized(spec, n, k), torch.randn(2, 1, k, dtype=BF16), torch.randn(n, dtype=BF16)
    out = product(cuda, x, q, bias)
    check(out.view(2, n), x.view(2, k), q, bias)
    every_second = torch.empty(n, 2, dtype=BF16).copy_(bias[:, None].expand(n, 2))[:, 0]
    for other_x in (x.expand(2, 3, k)[:, 1:2], torch.stack([x, x], 3)[..., 0], elsewhere(x)):
        assert torch.equal(product(cuda, other_x, q, bias), out)
    assert torch.equal(product(cuda, x, q, every_second), out)
    assert torch.equal(product(cuda, x, q, elsewhere(bias)), out)
    q.absmax = elsewhere(q.absmax)
    assert torch.equal(product(cuda, x, q, bias), out)
    assert Kernel.launched == {"decode.cu"}
    q.packed = elsewhere(q.packed)  # another backend's
    assert product(cuda, x, q, bias) is NotImplemented


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("int8")], ids=str)
def test_a_bias_that_lies_elsewhere_is_left_to_torch(cuda, spec, monkeypatch):
    """A pointer to another device's memory must not reach a kernel."""
    q, x, bias = quantized(spec, 33, 192), torch.randn(2, 192, dtype=BF16), torch.randn(33, dtype=BF16)
    where = torch.Tensor.get_device
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 7 if self is bias else where(self))
    assert product(cuda, x, q, bias) is NotImplemented
    assert not Kernel.launched


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("int8")], ids=str)
def test_another_way_is_gone_at_once(cuda, spec):
    """What was found for a shape of x holds for as long as the table of ways does."""
    q, x = quantized(spec, 33, 192), torch.randn(2, 192, dtype=BF16)
    for way, file in (("decode", "decode.cu"), ("wide", "wide.cu"), ("decode", "decode.cu")):
        Kernel.launched.clear()
        with use_way(way):
            check(product(cuda, x, q), x, q, None)
        assert file in Kernel.launched
        assert ("decode.cu" in Kernel.launched) == (way == "decode")


# ------------------------------------------------------------------------------------------------- more rows


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("fp4", 32)], ids=str)
def test_many_rows_and_a_weight_in_pieces(cuda, spec, monkeypatch):
    from fewbits.kernels import pieces

    monkeypatch.setattr(pieces, "_scratch_bytes", lambda device, rows: 150 * 256 * 2)
    with use_way("dequantize"):
        check_product(cuda, "dequantize_4bit.cu", spec, 150, 300, 256, BF16, torch.float32)
    q, g = quantized(spec, 300, 256), torch.randn(3, 300, dtype=BF16)
    w, state = values(q), (q.packed, q.absmax, q.nested_absmax, q.nested_offset)
    back = cuda.linear_4bit_t(g, *state, spec.format, spec.block_size, [300, 256])
    bound = (UNIT[BF16] * 4 + 300 * 2.0**-23) * (g.double().abs() @ w.abs()) + 1e-6
    assert ((back.double() - g.double() @ w).abs() <= bound).all()


# ------------------------------------------------------------------------------------------------- to the last bit


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("fp4", 32)], ids=str)
def test_dequantized(cuda, spec, dtype):
    for n in (1, 7, 8, 63, 100_003):
        q = QuantTensor.quantize(torch.randn(n), spec)
        args = q.packed, q.absmax, q.nested_absmax, q.nested_offset, spec.format, spec.block_size, [n], dtype
        with kernels.use_backend("reference"):
            expected = kernels.ops.dequantize_4bit(*args)
        assert torch.equal(cuda.dequantize_4bit(*args), expected)


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
@pytest.mark.parametrize(
    "spec", [QuantSpec("nf4", 64, True), QuantSpec("fp4", 32), QuantSpec("nf4", 256), QuantSpec("int8")], ids=str
)
def test_rows_of_an_embedding(cuda, spec, dtype):
    for n, k in ((5, 8), (33, 200), (700, 64)):  # rows that share blocks, and a second scale of scales
        q, ids = QuantTensor.quantize(torch.randn(n, k), spec), torch.randint(n, (3, 7))
        with kernels.use_backend("reference"):
            expected = torch.nn.functional.embedding(ids, q.relabelled(dtype).dequantize())
        for which in (ids, ids.int(), ids.t(), ids[0, 0]):
            rows = expected if which is ids or which.dtype is torch.int32 else expected.transpose(0, 1)
            rows = expected[0, 0] if which.dim() == 0 else rows
            assert torch.equal(embedding(cuda, which, q, dtype), rows)
        with pytest.raises(EmulatorError, match="stopped with an error"):
            embedding(cuda, torch.tensor([0, n]), q, dtype)
        with pytest.raises(EmulatorError, match="stopped with an error"):
            embedding(cuda, torch.tensor([-1]), q, dtype)


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 64), (FP16, 32), (BF16, 128), (BF16, 256)], ids=str)
def test_quantized(cuda, dtype, block):
    for n in (block, 64 * block, 300 * 256):
        w = torch.randn(n).to(dtype)
        w[: n // 2] *= torch.logspace(-30, 4, n // 2).to(dtype)
        if n > 2048:
            w[256:512] = 0
            w[512:1024] = 1e-40  # below the floor of a divisor
            w[1024:1040] = torch.linspace(-1, 1, 16).to(dtype)
        with kernels.use_backend("reference"):
            expected = kernels.ops.quantize_4bit(w, "nf4", block)
        for ours, reference in zip(cuda.quantize_4bit(w, "nf4", block), expected, strict=True):
            assert torch.equal(ours, reference), n


def test_every_bound_between_codes(cuda):
    """Values at, just below and just above each: a tie takes the lower code."""
    bounds = decision_rule("nf4", torch.device("cpu"))[0]
    edges = torch.cat([bounds, torch.arange(-16, 17) / 16, torch.arange(-15, 17) / 16 - 1 / 32])
    near = torch.cat([edges, edges.nextafter(torch.tensor(-2.0)), edges.nextafter(torch.tensor(2.0))]).clamp(-1, 1)
    w = torch.ones(len(near), 32)
    w[:, 5] = near
    with kernels.use_backend("reference"):
        expected = kernels.ops.quantize_4bit(w.view(-1), "nf4", 32)
    for ours, reference in zip(cuda.quantize_4bit(w.view(-1), "nf4", 32), expected, strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("absmax", [torch.full((300,), 0.25), torch.rand(5001), torch.rand(256)], ids=len)
def test_scales_quantized(cuda, absmax):
    """Each to the nearest value, a tie to the lower: the rule on a GPU. On a CPU the reference follows another one."""
    codes, nested, offset = cuda.quantize_absmax(absmax)
    less = absmax - absmax.mean()
    padded = torch.zeros(len(nested) * 256)
    padded[: len(less)] = less
    largest = padded.view(-1, 256).abs().amax(1)
    scaled = (padded.view(-1, 256) * (1.0 / largest)[:, None]).view(-1)[: len(less)].nan_to_num(-1.0)
    table = codebook("dynamic", torch.device("cpu"))
    assert torch.equal(offset, absmax.mean())
    assert torch.equal(nested, largest)
    assert torch.equal(codes.long(), torch.bucketize(scaled, (table[:-1] + table[1:]) / 2))


# ------------------------------------------------------------------------------------------------- it can fail


MUTATIONS = {
    "copies are not waited for": ("decode.cu", "wait_for_copies<STAGES - 2>();", ""),
    "lanes do not wait for each other's copies": (
        "decode.cu", "<STAGES - 2>();\n      __syncwarp();", "<STAGES - 2>();",
    ),
    "sums are read before they are there": ("decode.cu", "    summed[index & 1].wait(index >> 1 & 1);\n", ""),
    "sums are overwritten": ("decode.cu", "    added[index & 1].wait(index >> 1 & 1 ^ 1);\n", ""),
    "x is read too early": ("decode.cu", "  wait_for_previous_kernel();\n", ""),
    "tables are read before they are there": (
        "decode.cu", "{__float_as_uint(value)});\n#endif\n  __syncthreads();", "{__float_as_uint(value)});\n#endif",
    ),
    "codes are not aligned": ("decode.cu", "u8* own_codes = ring + g * LINE;", "u8* own_codes = ring + g * LINE + 4;"),
    "a barrier of too many": ("decode.cu", "summed[b].init(WARPS)", "summed[b].init(WARPS + 1)"),
    "scales of few rows are read before they are there": ("decode.cu", "    scaled.wait(step & 1);\n", ""),
    "scales are overwritten": ("decode.cu", "SCALE_BUFFERS = LINE == 64 ? 4 : 3;", "SCALE_BUFFERS = 2;"),
    "a chunk is read before it is full": ("skinny_4bit.cu", "    full[slot].wait(phase);\n    __syncwarp();\n", ""),
    "a chunk is filled while it is read": ("skinny_4bit.cu", "      free[slot].wait(phase);\n", ""),
    "products of half a chunk are not waited for": ("skinny_4bit.cu", "      wait_for_products<1>();\n", ""),
    "products are not waited for": ("skinny_4bit.cu", "      wait_for_products<0>();\n", ""),
    "a slot is read before it is full": (
        "wide.cu", "codes = [&](int) {\n    full[slot].wait(phase);\n    __syncwarp();\n", "codes = [&](int) {\n",
    ),
    "a slot is filled while it is read": ("wide.cu", "      free[slot].wait(phase ^ 1);\n", ""),
    "a slot is free before its products have ended": ("wide.cu", "wait_for_products<1>();  // those", "//"),
    "a tile's products are not waited for": (
        "wide.cu", "      wait_for_products<0>();\n      sums_are_there(sums);\n      release", "      release",
    ),
    "scales of many rows are read early": (
        "wide.cu", "      __syncwarp();\n      if (lane == 0) full", "      if (lane == 0) full",
    ),
    "a cluster's sums are read before they are there": (
        "decode.cu", "      arrive_in_cluster();\n      wait_for_cluster();\n", "",
    ),
    "a block may be written to before it begins": (
        "decode.cu", "      wait_for_cluster();  // all have begun\n", "",
    ),
    "sums are written over codes that are still read": (
        "hopper.cuh", "  arrive_in_cluster();\n  wait_for_cluster();  // nobody reads any more what lay there\n", "",
    ),
    "shares are added before they are there": (
        "hopper.cuh", "  }\n  arrive_in_cluster();\n  wait_for_cluster();\n", "  }\n",
    ),
    "scales are read before they are there": ("skinny_4bit.cu", "value[3]);\n    __syncwarp();", "value[3]);"),
    "outliers are read before they are gathered": (
        "wide.cu", "int t) {\n    await_outliers();\n", "int t) {\n",
    ),
    "outliers are gathered over those that are still read": (
        "wide.cu", "        if (fill > 1) taken[buffer].wait(fill >> 1 & 1 ^ 1);\n", "",
    ),
}  # fmt: skip


CLUSTERED = "wait_for_cluster"
ROOM = {"decode.cu": 171_000, "skinny_4bit.cu": 115_000, "wide.cu": 230_400, "hopper.cuh": 115_000}
FEW = "lanes do not wait for each other's copies", "x is read too early", "a chunk is read before it is full"


@pytest.mark.parametrize(
    ("limits", "mutation"),
    [
        pytest.param(
            (2 if CLUSTERED in MUTATIONS[name][1] else 1, ROOM[MUTATIONS[name][0]]), name,
            marks=() if name in FEW else pytest.mark.slow, id=name,
        )
        for name in MUTATIONS
    ],
)  # fmt: skip
def test_a_missing_wait_is_found(cuda, mutation, monkeypatch, tmp_path):
    """With one of a few orders of threads."""
    changed, right, wrong = MUTATIONS[mutation]
    for source in nvrtc.SOURCES.iterdir():
        text = source.read_text()
        if source.name == changed:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        (tmp_path / source.name).write_text(text)
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    spec = QuantSpec("nf4", 64, True)
    way = {"decode.cu": "decode", "wide.cu": "wide"}.get(changed, "skinny")
    rows, n, k = {"decode": (3, 160, 2112), "skinny": (17, 300, 1152), "wide": (140, 140, 2048)}[way]
    if mutation == "sums are overwritten":
        k = 960  # with several chunks a warp no other one is a tile behind
    split = 2 if CLUSTERED in right else 1
    if split == 2:
        n = 30
        monkeypatch.setattr(cuda_shapes, "decode_shape", lambda *_: cuda_shapes.DecodeShape(2, 2))
    monkeypatch.setattr(cuda_shapes, "skinny_shape", lambda *_: cuda_shapes.SkinnyShape(2, split))
    if "outliers" in mutation:
        spec, (rows, n, k) = QuantSpec("int8"), (40, 100, 16) if "are read" in mutation else (70, 300, 144)
        monkeypatch.setattr(cuda_shapes, "wide_shape", lambda *_: cuda_shapes.WideShape(64, 2, 1))
    q, x = quantized(spec, n, k), torch.randn(rows, k, dtype=BF16)
    if "outliers" in mutation:
        x[:, 5:8] *= 50
    for _ in range(40):
        try:
            with use_way(way):
                check(product(cuda, x, q), x, q, None)
        except (AssertionError, EmulatorError):
            return
    pytest.fail(f"the changed kernel passes, {Kernel.launched}")
