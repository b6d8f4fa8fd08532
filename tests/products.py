"""What products with a quantized weight have to be, whoever computes them."""

from __future__ import annotations

import torch

from fewbits import kernels

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding adds at most so much of a value


def values(q):
    """The weight in fp64, by the reference."""
    with kernels.use_backend("reference"):
        return q.dequantize().double()


def check(out, x, q, bias):
    """Within what rounding each code's value and the result to the dtype may add, and fp32 sums over K terms.

    From 129 rows on torch multiplies, which may round the sums of parts of a row, and rounds the bias.
    """
    w, wide = values(q), x.double().reshape(-1, x.shape[-1])
    exact, size = wide @ w.t(), wide.abs() @ w.abs().t()
    unit = UNIT[x.dtype]
    roundings = 1 if len(wide) <= 128 else 3
    if bias is not None:
        exact = exact + bias.double()
        size = size + bias.double().abs()
    bound = (roundings * unit + x.shape[-1] * 2.0**-23) * size + unit * exact.abs() * (1 + 2.0**-6) + 1e-7
    assert out.shape == (*x.shape[:-1], q.shape[0])
    assert out.dtype == x.dtype
    wrong = (out.double().reshape_as(exact) - exact).abs() - bound
    assert wrong.max() <= 0, (wrong.argmax(), wrong.max())  # a NaN fails as well
