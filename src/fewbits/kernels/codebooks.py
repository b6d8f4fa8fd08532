"""The value tables of the formats, and the decision rule between their entries.

NF4: quantiles of a standard normal distribution (Dettmers et al., "QLoRA", 2023), the values bitsandbytes stores.
FP4: sign, two exponent bits, one mantissa bit; magnitudes by code are {0, 1/16, 8, 12, 4, 6, 2, 3} / 12.
Dynamic: the signed 8-bit dynamic map (Dettmers, "8-bit Approximations for Parallelism in Deep Learning", 2015) that
double quantization uses for the scales: an indicator bit that moves, fractions linear between 0.1 and 1 behind it.
"""

from __future__ import annotations

import functools

import torch

from fewbits.kernels.constants import constant

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by code 0 … 7; code 8 is the sign bit

# FP4's codes in ascending order of value. Both zeros are listed: bitsandbytes gives (0, threshold 0] the code 0 on
# its left and 8 on its right, which is how its CPU sort happens to leave them; the bytes have to agree.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


def _dynamic_map() -> torch.Tensor:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        # kept in fp32 with a double power of ten in front: the last bit of every entry depends on it
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.lru_cache(maxsize=64)
def codebook(name: str, device: torch.device) -> torch.Tensor:
    """The fp32 values by code: 16 for ``nf4`` and ``fp4``, 256 for ``dynamic``."""
    if name == "dynamic":
        values = _dynamic_map()
    elif name == "nf4":
        values = torch.tensor(NF4, dtype=torch.float32)
    else:
        magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32) / 12
        values = torch.cat([magnitudes, -magnitudes + 0.0])  # + 0.0: the second zero is not negative
    return constant(values, device)


@functools.lru_cache(maxsize=64)
def decision_rule(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 midpoints between neighbouring values (a tie takes the lower), and the code of each interval, uint8."""
    values = codebook(name, torch.device("cpu"))
    order = torch.tensor(_FP4_ORDER if name == "fp4" else range(len(values)))
    ascending = values[order]
    return constant((ascending[:-1] + ascending[1:]) / 2, device), constant(order.to(torch.uint8), device)


@functools.lru_cache(maxsize=64)
def pair_table(name: str, device: torch.device) -> torch.Tensor:
    """int64 [256]: as two fp32, the values that a packed byte holds, the high nibble (the even index) first.

    One 8-byte element is gathered in less than half the time of a row of two.
    """
    values = codebook(name, torch.device("cpu"))
    byte = torch.arange(256)
    return constant(torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).view(-1), device)
