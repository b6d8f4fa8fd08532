"""How long calls take on a GPU: as graphs that take turns, one by one, and what they cost the host."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from times import Times
from torch import Tensor

Call = Callable[[int], Tensor]  # with a counter, by which copies of a weight are taken in turn

CALLS = 24  # that are timed together
LEAST_TURNS, MOST_TURNS, SECONDS = 8, 40, 0.1  # of graphs that are timed against each other


# ------------------------------------------------------------------------------------------------- graphs


@functools.cache
def _side_stream() -> Any:
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def warm_up(call: Call, weights: int) -> None:
    """On the stream of the graphs. Every weight: a tool may repack one when it is first used."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(weights + 3):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def waits(call: Call) -> bool:
    """Whether a call waits for the GPU. A graph that is tried and fails would leave the allocator in its middle."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Graph:
    """Calls with one weight after the other as one CUDA graph.

    Attributes:
        calls: how many.
        out: the result of the last one, once the graph was replayed.
    """

    def __init__(self, call: Call, calls: int) -> None:
        self.calls = calls
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=_side_stream()):
                for i in range(calls):
                    self.out = call(i)
        except Exception:
            self._graph.reset()
            raise

    def replay(self) -> None:
        self._graph.replay()

    def free(self) -> None:
        """What it allocated, but for what torch keeps."""
        del self.out
        self._graph.reset()


def race(graphs: dict[str, Graph]) -> Times:
    """Microseconds of a call of each graph. They take turns, each time in a new order: at the card's limit of power its
    clock follows from what ran before, so that who came later would find another one.
    """
    if not graphs:  # of tools that all failed
        return Times()
    names = list(graphs)
    for _ in range(2):  # the first replay is slower
        start = time.perf_counter()
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    turns = min(max(LEAST_TURNS, round(SECONDS / seconds)), MOST_TURNS)
    # all are queued behind one more without waiting, so that the GPU never stands still between them
    order, ran = random.Random(0), []
    graphs[names[0]].replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(turns * len(names) + 1)]
    marks[0].record()
    for _ in range(turns):
        order.shuffle(names)
        for name in names:
            graphs[name].replay()
            ran.append(name)
            marks[len(ran)].record()
    times = Times({name: [] for name in graphs})
    for name, span in zip(ran, _spans(marks), strict=True):
        times[name].append(span / graphs[name].calls)
    return times


def _spans(marks: list[Any]) -> list[float]:
    """Microseconds between events, once the last has come."""
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)]


# ------------------------------------------------------------------------------------------------- calls


def as_called(call: Call, rounds: int = 5) -> tuple[float, Tensor]:
    """Median microseconds of a call among ``CALLS`` without a graph, by the host's clock, the wait for the last one of
    each round shared by all; and its result."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(CALLS):
            out = call(i)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times), out


def gpu_time(call: Callable[[], object], rounds: int = 7, calls: int = 5) -> float:
    """Median microseconds of a call, long enough for the host to be ahead of the GPU, without a graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(calls):
            call()
        mark.record()
    return statistics.median(_spans(marks)) / calls


def host_time(call: Callable[[], object], rounds: int = 3, calls: int = 200) -> float:
    """Median microseconds that the host spends on a call. Rounds are short: the driver's queue is, too, and waits when
    it is full."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def copy_speed() -> float:
    """Bytes a second, read and written, of copying 1 GiB."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_time(lambda: target.copy_(source)) * 1e6


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def after_failure() -> None:
    """Back to the stream that a failed graph may have left; raises if the GPU is beyond use."""
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()


def attempt(time_it: Callable[[Callable[[], object]], float], call: Callable[[], object]) -> float | str:
    """The time, or why there is none."""
    try:
        return time_it(call)
    except Exception as error:  # a peer's failure is a result
        found = message(error)
    after_failure()
    return found
