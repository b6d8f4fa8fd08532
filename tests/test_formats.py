"""Formats against bitsandbytes' bytes and against their definition, element by element."""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import ConfigError
from fewbits.formats import BLOCK_SIZES, FORMATS, QuantSpec, inner_shapes, quantized_bytes, rows_align
from fewbits.kernels.codebooks import codebook
from fewbits.tensor import QuantTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (1, 5), (64, 128), (33, 70), (7, 4097), (129, 64), (3, 5, 64), (300,))


def _weights(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    w = torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
    return w.to(device, dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_4bit_bytes_are_those_of_bitsandbytes(format, block_size, double_quant, device):
    if format == "fp4":
        device = "cpu"  # bitsandbytes' CUDA thresholds for fp4 are not the midpoints: see the test after this
    for shape in SHAPES:
        for dtype in DTYPES:
            w = _weights(shape, dtype, device)
            ours = QuantTensor.quantize(w, QuantSpec(format, block_size, double_quant))
            packed, state = bnb.quantize_4bit(
                w, blocksize=block_size, quant_type=format, compress_statistics=double_quant
            )
            case = f"{shape} {dtype}"
            assert torch.equal(ours.packed.flatten(), packed.flatten()), case
            assert torch.equal(ours.absmax.flatten(), state.absmax), case
            if double_quant:
                assert torch.equal(ours.nested_absmax, state.state2.absmax), case
                assert torch.equal(ours.nested_offset, state.offset), case
            if double_quant:
                scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            else:
                scales = state.absmax
            # not bnb.dequantize_4bit: on a CPU it takes wrong scales where blocks span rows
            codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: w.numel()].long()
            values = bnb.get_4bit_type(format, device)[codes] * scales.repeat_interleave(block_size)[: w.numel()]
            assert torch.equal(ours.dequantize(), values.view(shape).to(dtype)), case
            if shape[-1] % block_size == 0 and len(shape) == 2:
                # some of its CPU kernels multiply in the output's dtype
                torch.testing.assert_close(ours.dequantize(), bnb.dequantize_4bit(packed, state), msg=case)


def test_fp4_takes_the_nearest_value_on_every_device(device):
    for dtype in DTYPES:
        w = _weights((64, 256), dtype, "cpu")
        here, there = QuantTensor.quantize(w, "fp4"), QuantTensor.quantize(w.to(device), "fp4")
        assert torch.equal(here.packed, there.packed.cpu())
        assert torch.equal(here.absmax, there.absmax.cpu())


def test_4bit_bytes_of_special_blocks(device):
    w = torch.zeros(4, 64)
    w[1] = 1.0  # all at the largest value
    w[2, ::2] = -1e-30
    w[3, 5] = 3.0
    for format in ("nf4", "fp4"):
        ours = QuantTensor.quantize(w.to(device), format)
        packed, state = bnb.quantize_4bit(w.to(device), blocksize=64, quant_type=format)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))
        assert torch.equal(ours.dequantize()[0].cpu(), w[0])
        if device == "cpu":
            assert torch.equal(ours.packed.flatten(), packed.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_bytes_are_those_of_bitsandbytes(dtype, device):
    for shape in ((1, 1), (5, 3), (64, 128), (33, 70), (2, 4097)):
        w = _weights(shape, dtype, device)
        w[0, 0] = 0.0
        q, absmax, _ = bnb.int8_vectorwise_quant(w.half())
        ours = QuantTensor.quantize(w, "int8")
        keep = absmax > 0  # of an all-zero row bitsandbytes leaves 0/0 to the conversion
        assert torch.equal(ours.packed[keep], q[keep])
        assert torch.equal(ours.absmax, absmax)
        assert torch.equal(ours.packed[~keep], torch.zeros_like(q[~keep]))


def test_tables_are_those_of_bitsandbytes():
    cpu = torch.device("cpu")
    assert torch.equal(codebook("dynamic", cpu), bnb.create_dynamic_map())
    for format in ("nf4", "fp4"):
        assert torch.equal(codebook(format, cpu), bnb.get_4bit_type(format, "cpu"))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_4bit_takes_the_nearest_value(data):
    """By brute force, in double precision: no code in the table is nearer than the one taken."""
    format = data.draw(st.sampled_from(["nf4", "fp4"]))
    block = data.draw(st.sampled_from([32, 64]))
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 99)))
    seed = data.draw(st.integers(0, 2**31))
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    q = QuantTensor.quantize(w, QuantSpec(format, block))
    n = w.numel()
    flat = torch.nn.functional.pad(w.flatten(), (0, -n % block)).view(-1, block).double()
    absmax = flat.abs().amax(1, keepdim=True)
    distance = (flat[..., None] / absmax[..., None] - codebook(format, torch.device("cpu")).double()).abs()
    best = distance.amin(-1) * absmax
    taken = torch.nn.functional.pad(q.dequantize().flatten(), (0, -n % block)).view(-1, block).double()
    # normalizing rounds twice in fp32 (a reciprocal and a product), which near a midpoint can cost twice 2^-23
    assert bool(((taken - flat).abs()[: n // block] <= best[: n // block] + 2.0**-21 * absmax[: n // block]).all())


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_int8_error_is_half_a_step(rows, columns, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    q = QuantTensor.quantize(w, "int8")
    step = w.half().abs().amax(1, keepdim=True).float() / 127
    # half a step, the rounding of fp16 at the largest value (2^-11), and fp32's own
    bound = step * (0.5 + 1e-5) + w.abs().amax(1, keepdim=True) * 2.0**-11
    assert bool(((q.dequantize() - w).abs() <= bound).all())


@pytest.mark.parametrize("format", list(FORMATS))
def test_sizes_are_known_beforehand(format):
    for shape in ((1, 1), (64, 128), (33, 70), (3, 5, 64), (6, 2048)):
        for double_quant in (False, True) if format != "int8" else (False,):
            spec = QuantSpec(format, 64, double_quant)
            q = QuantTensor.quantize(torch.randn(shape), spec)
            assert {n: (t.dtype, list(t.shape)) for n, t in q.inner_tensors.items()} == inner_shapes(spec, shape)
            assert sum(t.nbytes for t in q.inner_tensors.values()) == quantized_bytes(spec, shape)
            n, rows = math.prod(shape), math.prod(shape[:-1])
            blocks = -(-n // 64)
            scales = blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks
            assert quantized_bytes(spec, shape) == (n + 4 * rows if format == "int8" else (n + 1) // 2 + scales)


def test_rows_align_only_where_rows_hold_whole_blocks():
    assert rows_align(QuantSpec("nf4", 64), (3, 128))
    assert rows_align(QuantSpec("nf4", 64), (3, 2, 32))
    assert not rows_align(QuantSpec("nf4", 64), (3, 96))
    assert not rows_align(QuantSpec("nf4", 64), (128,))
    assert rows_align(QuantSpec("int8"), (3, 5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", list(FORMATS))
def test_values_that_are_not_finite_are_refused(format, bad):
    w = torch.randn(8, 64)
    w[3, 7] = bad
    with pytest.raises(ConfigError, match=r"block\.weight") as error:
        QuantTensor.quantize(w, format, label="block.weight")
    assert error.value.parameter == "block.weight"
    assert isinstance(error.value, ValueError)


def test_int8_refuses_what_fp16_cannot_hold():
    with pytest.raises(ConfigError, match="65504"):
        QuantTensor.quantize(torch.full((2, 2), 7e4), "int8")
    QuantTensor.quantize(torch.full((2, 2), 7e4), "nf4")


@pytest.mark.parametrize("name", ["nf5", "4bit", "", None, 4])
def test_unknown_formats(name):
    with pytest.raises(ConfigError, match="nf4, fp4, int8"):
        QuantSpec(name)


def test_impossible_settings():
    assert QuantSpec("nf4", BLOCK_SIZES[0]).block_size == 32
    for size in (0, 16, 65, 8192):
        with pytest.raises(ConfigError, match="block size"):
            QuantSpec("nf4", size)
    with pytest.raises(ConfigError, match="threshold"):
        QuantSpec("int8", threshold=-1.0)
    for w in (torch.zeros(2, 2, dtype=torch.int32), torch.empty(0, 4), torch.tensor(1.0)):
        with pytest.raises(ConfigError, match="cannot quantize"):
            QuantTensor.quantize(w, "nf4")
