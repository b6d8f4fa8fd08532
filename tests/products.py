"""What products with a quantized weight have to be, whoever computes them."""

from __future__ import annotations

import torch

from fewbits import kernels

MOST_OUTLIERS = 16  # columns
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding adds at most so much of a value


def values(q):
    """The weight in fp64, by the reference."""
    with kernels.use_backend("reference"):
        return q.dequantize().double()


def in_8_bits(x, threshold):
    """x [M, K] in fp64 as LLM.int8() has it: columns with outliers as they are, others rounded to 127ths of a row's
    largest number that is none (bitsandbytes takes it over all columns, too). With many such columns all are exact."""
    wide = x.float()
    outlier = wide.abs() >= threshold
    if outlier.any(0).sum() > MOST_OUTLIERS:
        return wide.double()
    absmax = wide.masked_fill(outlier, 0.0).abs().amax(1, keepdim=True)
    factor = (127.0 / absmax.double().clamp(min=1e-30)).float()  # torch divides fp32 less exactly
    rounded = torch.round(wide * factor).double() * (absmax * (1.0 / 127)).double()
    return torch.where(outlier.any(0), wide.double(), rounded)


def check(out, x, q, bias, weight_rounded=None, x_in_8_bits=None):
    """Within what rounding each code's value and the result to the dtype may add, and fp32 sums over K terms.

    From 129 rows on weights in 4 bits are rounded, and torch may multiply, which may round the sums of parts of a row,
    and rounds the bias. From 33 rows on x is in 8 bits where the weight is (from 17 on, if that is a large one). A
    caller who knows better says so.
    """
    w, wide = values(q), x.double().reshape(-1, x.shape[-1])
    if q.spec.format == "int8" and (len(wide) > 32 if x_in_8_bits is None else x_in_8_bits):
        wide = in_8_bits(x.reshape(wide.shape), q.spec.threshold)
    exact, size = wide @ w.t(), wide.abs() @ w.abs().t()
    unit = UNIT[x.dtype]
    roundings = 3 if (len(wide) > 128 if weight_rounded is None else weight_rounded) else 1
    if bias is not None:
        exact = exact + bias.double()
        size = size + bias.double().abs()
    bound = (roundings * unit + x.shape[-1] * 2.0**-23) * size + unit * exact.abs() * (1 + 2.0**-6) + 1e-7
    assert out.shape == (*x.shape[:-1], q.shape[0])
    assert out.dtype == x.dtype
    wrong = (out.double().reshape_as(exact) - exact).abs() - bound
    assert wrong.max() <= 0, (wrong.argmax(), wrong.max())  # a NaN fails as well
