"""``fewbits bench``: what a quantized linear layer takes on a device, beside torch's own, and by each way on a GPU.

On a GPU calls are replayed in a graph, on a CPU they are timed one by one; weights take turns, so that none is in the
cache. Times are of the device at hand, at this moment: only those of one run are to be compared.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import ConfigError
from fewbits.formats import QuantSpec, quantized_bytes
from fewbits.kernels import backend_for
from fewbits.kernels.ways import MOST, WAYS, Steps, keep, use_way, ways
from fewbits.tensor import QuantTensor, linear

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_CACHED = 256 << 20  # bytes of weights that no cache holds
_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Of one shape of a weight and so many rows of x.

    Attributes:
        shape: of the weight, [N, K].
        rows: of x.
        plain: microseconds of ``F.linear`` with a weight of x's dtype.
        ours: microseconds with the quantized weight.
        by_way: microseconds by each way that serves, on a GPU with fewbits' CUDA kernels; the way taken is ``way``.
    """

    shape: tuple[int, int]
    rows: int
    plain: float
    ours: float
    by_way: dict[str, float]
    way: str | None


def linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """The shapes [N, K] of a model's linear layers, each once, in their order."""
    return list(dict.fromkeys((m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)))


def bench(
    shapes: Iterable[tuple[int, int]],
    spec: QuantSpec,
    rows: Sequence[int] = ROWS,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> list[Timing]:
    """Time linear layers of these shapes, with random weights.

    Args:
        shapes: [N, K] of weights.
        spec: how they are stored.
        rows: of x.
        device: where.
        dtype: of x and the plain weight.

    Raises:
        ConfigError: a size is not positive.
    """
    device = torch.device(device)
    found = []
    for n, k in shapes:
        if min(n, k, *rows) < 1:
            raise ConfigError(f"a shape is {n}x{k}, and rows are {list(rows)}", expected="positive numbers")
        plain = [torch.randn(n, k, device=device, dtype=dtype) / k**0.5 for _ in range(_turns(n * k * dtype.itemsize))]
        first = QuantTensor.quantize(plain[0], spec)
        copies = [copy.deepcopy(first) for _ in range(_turns(quantized_bytes(spec, (n, k))))]
        for count in rows:
            x = torch.randn(count, k, device=device, dtype=dtype)
            found.append(_timing((n, k), x, plain, copies))
    return found


def tune(timings: Iterable[Timing], spec: QuantSpec, device: str | torch.device) -> Path | None:
    """Keep the fastest way for each shape and number of rows, for this process and later ones on this model of GPU.

    Returns:
        The file; None where there is but one way.
    """
    steps: dict[tuple[str, int, int], list[tuple[int, str]]] = {}
    for timing in sorted((t for t in timings if t.by_way), key=lambda t: t.rows):
        best = min(timing.by_way, key=timing.by_way.__getitem__)
        shape = steps.setdefault((_kind(spec), *timing.shape), [])
        if shape and shape[-1][1] == best:
            shape.pop()
        shape.append((timing.rows, best))
    if not steps:
        return None
    index = torch.device(device).index
    found: dict[tuple[str, int, int], Steps] = {
        key: (*shape[:-1], (MOST, shape[-1][1])) for key, shape in steps.items()
    }
    return keep(torch.cuda.current_device() if index is None else index, found)


# ------------------------------------------------------------------------------------------------- measuring


def _kind(spec: QuantSpec) -> str:
    return "int8" if spec.format == "int8" else "4-bit"


def _turns(nbytes: int) -> int:
    return min(-(-_CACHED // nbytes), 64)


def _timing(shape: tuple[int, int], x: Tensor, plain: list[Tensor], quantized: list[QuantTensor]) -> Timing:
    time_of = _graph_us if x.is_cuda else _clock_us
    calls: dict[str, Callable[[int], object]] = {
        "plain": lambda i: F.linear(x, plain[i % len(plain)]),
        "ours": lambda i: linear(x, quantized[i % len(quantized)], None),
    }
    turns = max(len(plain), len(quantized))
    with torch.no_grad():
        times = {name: time_of(call, turns) for name, call in calls.items()}
        by_way, way = {}, None
        if x.is_cuda and backend_for("cuda") == "cuda":
            by_way = {name: us for name in WAYS if (us := _way_us(name, x, quantized)) is not None}
            way = _taken(shape, x, quantized[0])
    return Timing(shape, len(x), times["plain"], times["ours"], by_way, way)


def _taken(shape: tuple[int, int], x: Tensor, weight: QuantTensor) -> str:
    from fewbits.kernels import cuda_shapes

    return ways(_kind(weight.spec), *shape, len(x), x.get_device(), cuda_shapes.quickest)[0]


def _way_us(way: str, x: Tensor, quantized: list[QuantTensor]) -> float | None:
    """None where this way does not serve."""
    from fewbits.kernels import cuda_backend

    def call(i: int) -> object:
        w = quantized[i % len(quantized)]
        if w.spec.format == "int8":
            return cuda_backend.linear_int8(x, w.packed, w.absmax, None, w.spec.threshold)
        state = w.packed, w.absmax, w.nested_absmax, w.nested_offset
        return cuda_backend.linear_4bit(x, *state, None, w.spec.format, w.spec.block_size, list(w.shape))

    with use_way(way):
        return None if call(0) is NotImplemented else _graph_us(call, len(quantized))


def _graph_us(call: Callable[[int], object], turns: int) -> float:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(turns):
            call(i)
    times: list[float] = []
    for _ in range(_ROUNDS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / turns)
    return statistics.median(times[1:])


def _clock_us(call: Callable[[int], object], turns: int) -> float:
    times: list[float] = []
    call(0)
    end = time.perf_counter() + 0.3
    while len(times) < turns or time.perf_counter() < end:
        start = time.perf_counter()
        call(len(times))
        times.append((time.perf_counter() - start) * 1e6)
        if time.perf_counter() > end + 5:
            break
    return statistics.median(times)
