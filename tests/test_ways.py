"""The table of ways and ``fewbits bench``, without a GPU: what is taken, what is kept, and what a damaged file does."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from emulated import cuda, limits
from products import check
from test_cli import MODEL, _run

from fewbits import bench
from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.formats import QuantSpec
from fewbits.kernels import cuda_backend, cuda_shapes, ways
from fewbits.kernels.ways import MOST, TABLE, WAYS, keep, tuned_file, use_way
from fewbits.tensor import QuantTensor

__all__ = ["cuda", "limits"]  # fixtures
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The name and the architecture of a GPU, which may be changed, and a folder for what is tuned on it."""
    found = {"name": "NVIDIA Some GPU", "capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: found["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found["capability"])
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    # of an H200
    monkeypatch.setattr(cuda_shapes, "limits", lambda device: (132, 230_400))
    monkeypatch.setattr(cuda_shapes, "most_clusters", lambda blocks, device: {2: 66, 4: 30, 8: 15}[blocks])
    cuda_shapes.quickest.cache_clear()
    ways.forget()
    yield found
    cuda_shapes.quickest.cache_clear()
    ways.forget()


def first(kind, rows, n=4096, k=4096):
    return ways.ways(kind, n, k, rows, 0, cuda_shapes.quickest)[0]


def test_every_table_covers_all_rows_with_known_ways():
    for table in (*TABLE.values(), ways._OTHERS):
        assert set(table) == {"4-bit", "int8"}
        for steps in table.values():
            named = tuple((up_to, "skinny" if way == ways.QUICKEST else way) for up_to, way in steps)
            assert ways._checked([[up_to, way] for up_to, way in named]) == named


def test_a_gpu_that_is_not_in_the_table_takes_ways_for_any(gpu):
    assert [first("4-bit", m) for m in (1, 16, 64, 257, 5000)] == ["decode", "decode", "skinny", "wide", "dequantize"]
    gpu["capability"] = (12, 0)
    ways.forget()
    assert {first(kind, m) for kind in ("4-bit", "int8") for m in (1, 17, 65, 5000)} == {"decode", "dequantize"}


@pytest.mark.parametrize(
    ("rows", "n", "k", "way"),
    [
        (16, 4096, 14336, "decode"), (16, 28672, 4096, "decode"), (16, 13824, 5120, "skinny"),
        (9, 3584, 18944, "decode"), (16, 3584, 18944, "decode"),
        (24, 4096, 4096, "decode"), (32, 1024, 4096, "decode"), (24, 6144, 4096, "decode"), (24, 5120, 5120, "skinny"),
        (32, 6144, 4096, "skinny"), (32, 28672, 4096, "skinny"), (32, 4096, 14336, "skinny"),
        (64, 4096, 14336, "skinny"), (128, 4096, 4096, "skinny"), (128, 1024, 4096, "skinny"),
        (128, 4096, 14336, "wide"), (128, 28672, 4096, "wide"), (256, 6144, 4096, "wide"),
    ],
)  # fmt: skip
def test_the_quickest_is_what_was_measured_to_be(gpu, rows, n, k, way):
    assert first("4-bit", rows, n, k) == way


@pytest.mark.parametrize(
    ("bits", "rows", "n", "k", "shape"),
    [
        (4, 128, 28672, 4096, (128, 3, 1)), (4, 128, 4096, 14336, (128, 2, 1)), (4, 256, 4096, 14336, (256, 2, 1)),
        (4, 512, 2560, 9728, (256, 2, 1)), (4, 1024, 6144, 4096, (256, 2, 1)), (8, 64, 3584, 18944, (64, 2, 2)),
        (8, 128, 4096, 14336, (128, 2, 2)), (8, 128, 2560, 9728, (128, 2, 4)), (8, 512, 13824, 5120, (256, 2, 1)),
    ],
)  # fmt: skip
def test_blocks_have_the_shape_that_was_measured_to_be_quickest(gpu, bits, rows, n, k, shape):
    assert cuda_shapes.wide_shape(rows, n, k, bits, 0) == shape


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("rows", "n", "k", "shape", "line"),
    [
        (1, 28672, 4096, (2, 1), 128), (8, 28672, 4096, (2, 1), 128), (16, 28672, 4096, (2, 1), 64),
        (1, 6144, 4096, (3, 1), 128), (16, 6144, 4096, (3, 1), 128), (8, 1024, 4096, (2, 2), 64),
        (1, 4096, 14336, (2, 1), 64), (1, 13824, 5120, (7, 1), 64), (16, 5120, 5120, (3, 1), 64),
        (16, 2560, 9728, (3, 2), 64), (8, 8192, 8192, (2, 1), 128), (1, 3584, 18944, (2, 1), 64),
    ],
)  # fmt: skip
def test_few_rows_have_the_blocks_that_were_measured_to_be_quickest(gpu, rows, n, k, shape, line, nested):
    found = cuda_shapes.decode_shape(n, k, rows, 4, 64, nested, 0)
    assert found == shape
    assert cuda_shapes.decode_plan(found, n, k, rows, 4, 64, nested, 0).line == line


@pytest.mark.parametrize("bits", [4, 8])
def test_up_to_128_rows_are_in_one_tile_of_many(gpu, bits):
    for rows in range(33, 129):
        n, k = random.randrange(256, 30_000), 64 * random.randrange(4, 300)
        found = cuda_shapes.wide_shape(rows, n, k, bits, 0)
        assert found.tile_m == (64 if bits == 8 and rows <= 64 else 128), (rows, n, k, found)


def test_many_rows_go_where_tiles_fill_the_gpu(gpu, monkeypatch):
    monkeypatch.setattr(ways, "_processors", lambda device: 132)
    assert first("4-bit", 1024, n=1024) == "wide"
    # 8 x 8 tiles of 132, 8 x 40 of 264 + 132, 8 x 32 of 264, 9 x 32 of 396, 16 x 32 of 528
    shapes = (2048, 1024), (2048, 5120), (2048, 4096), (2049, 4096), (4096, 4096), (4097, 4096)
    assert [first("4-bit", m, n=n) for m, n in shapes] == [
        "dequantize", "dequantize", "wide", "dequantize", "wide", "dequantize",
    ]  # fmt: skip
    keep(0, {("4-bit", 1024, 4096): ((MOST, "wide"),)})
    assert first("4-bit", 2048, n=1024) == "wide"


def test_what_is_tuned_is_taken_for_its_shape_and_gpu_alone(gpu):
    path = keep(0, {("4-bit", 4096, 4096): ((8, "decode"), (MOST, "wide"))})
    assert path == tuned_file(0)
    assert path.name == "ways-nvidia-some-gpu.json"
    ways.forget()  # as another process does
    assert [first("4-bit", m) for m in (8, 9, 9999)] == ["decode", "wide", "wide"]
    assert first("4-bit", 9, n=4095) == "decode"
    keep(0, {("int8", 64, 64): ((MOST, "decode"),)})
    assert first("4-bit", 9) == "wide"  # what was there is kept
    gpu["name"] = "Another"
    ways.forget()
    assert first("4-bit", 9) == "decode"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"4-bit 4096x4096": [[8, "fast"], [null, "wide"]]}', '{"4-bit 4096x4096": [[8, "decode"]]}',
        '{"4-bit 4096x4096": [[9, "decode"], [8, "skinny"], [null, "wide"]]}', '{"4-bit 4096x4096": 3}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_left_out_and_told(gpu, text):
    tuned_file(0).parent.mkdir()
    tuned_file(0).write_text(text)
    with pytest.warns(FewbitsWarning, match="tune again"):
        assert first("4-bit", 9) == "decode"
    keep(0, {("4-bit", 4096, 4096): ((MOST, "wide"),)})
    assert first("4-bit", 9) == "wide"


def test_a_folder_that_cannot_be_written_to(gpu, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="FEWBITS_CACHE"):
        keep(0, {("4-bit", 64, 64): ((MOST, "decode"),)})


def test_tuning_keeps_the_fastest_way(gpu):
    def timing(rows, **by_way):
        return bench.Timing((64, 128), rows, 1.0, 1.0, by_way, "decode")

    timings = [
        timing(1, decode=1.0, skinny=2.0),
        timing(64, skinny=3.0, wide=2.0),
        timing(16, decode=1.0, skinny=2.0),
        timing(256, wide=5.0, dequantize=5.5),
        timing(2048, wide=9.0, dequantize=8.0),
    ]
    path = bench.tune(timings, QuantSpec("nf4"), "cuda:0")
    assert json.loads(path.read_text()) == {"4-bit 64x128": [[16, "decode"], [256, "wide"], [None, "dequantize"]]}
    assert bench.tune([bench.Timing((64, 128), 1, 1.0, 1.0, {}, None)], QuantSpec("nf4"), "cpu") is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, True), QuantSpec("int8")], ids=str)
def test_every_way_is_right_where_it_serves(cuda, spec, way):
    """Also for rows that the table would not give it."""
    q = QuantTensor.quantize(torch.randn(40, 128), spec)
    served = []
    for rows in (1, 17, 70):
        x = torch.randn(rows, 128, dtype=BF16)
        with use_way(way):
            if spec.format == "int8":
                out = cuda_backend.linear_int8(x, q.packed, q.absmax, None, 6.0)
            else:
                state = q.packed, q.absmax, q.nested_absmax, q.nested_offset
                out = cuda_backend.linear_4bit(x, *state, None, "nf4", 64, [40, 128])
        if out is not NotImplemented:
            served.append(rows)
            check(out, x, q, None, weight_rounded=way in ("wide", "dequantize"), x_in_8_bits=way == "wide")
    expected = {"decode": [1, 17]} if spec.format == "nf4" else {"skinny": [], "dequantize": [1, 17]}
    assert served == expected.get(way, [1, 17, 70])


# ------------------------------------------------------------------------------------------------- the command


def test_bench_on_a_cpu(tmp_path):
    code, said = _run("bench", "--shape", "64x128", "--rows", "1,3", "--device", "cpu", "--format", "int8", "--tune")
    assert code == 0, said
    assert "64×128" in said
    assert "but one way" in said
    shutil.copy(MODEL / "config.json", tmp_path)
    code, said = _run("bench", tmp_path, "--rows", "1", "--device", "cpu")
    assert code == 0, said
    config = json.loads((MODEL / "config.json").read_text())
    assert f"{config['intermediate_size']}×{config['hidden_size']}" in said


@pytest.mark.parametrize("wrong", [("--shape", "64"), ("--shape", "64xb"), (), ("--shape", "0x4"), ("--rows", "1,,2")])
def test_bench_refuses_what_is_no_shape(wrong):
    code, said = _run("bench", "--device", "cpu", *wrong)
    assert code == 1
    assert said.startswith("error: ")
