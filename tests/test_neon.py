"""The native kernels for Arm CPUs: what the tests of each level ask, of kernels that qemu runs.

Needs a cross compiler and qemu (Debian's g++-aarch64-linux-gnu and qemu-user).
"""

from __future__ import annotations

import pytest
from foreign_cpu import COMPILER, LEVELS, QEMU, foreign_level

# pytest collects here what is imported, with this module's levels: nothing else uses the names
from test_cpu_int8 import (  # noqa: F401
    test_4bit_bytes,
    test_4bit_bytes_at_the_bounds,
    test_dequantizing_is_bit_exact,
    test_embedding_is_bit_exact,
    test_int8_bytes,
    test_integers_are_exact,
    test_linear,
    test_nested_bytes,
    test_not_a_number,
    test_outliers,
    test_rows_without_a_scale,
    test_transposed,
)
from test_cpu_kernels import (  # noqa: F401
    test_chunks_across_two_scales_of_scales,
    test_dequantizing_gives_the_references_bits,
    test_dequantizing_keeps_numbers_that_are_not_finite_and_those_near_zero,
    test_products_against_fp64,
    test_x_that_is_not_finite,
    test_x_with_a_wide_range,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (COMPILER and QEMU), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64"),
]


@pytest.fixture(params=LEVELS)
def level(request, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "aarch64"
    folder.mkdir(exist_ok=True)
    with foreign_level(request.param, folder, monkeypatch):
        yield request.param
