"""Reading tensors: threads read pieces of files straight to where each tensor goes, a bounded way ahead.

To the CPU a piece is read in place. To a GPU it passes through one of two pinned buffers of the thread that reads it
and goes on by an asynchronous copy, so that reading, copying, and the caller's work on the tensors before overlap.
Tensors come in the order asked for. :class:`Staging` pins those buffers while the caller still finds out what to read.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewbits.files import OpenFiles, StoredTensor, read_into
from fewbits.memory import host_buffer, pin, unpin, writable_view

THREADS = 8
PIECE = 16 << 20  # bytes read at a time (measured on an H200: with smaller ones Python's part in it shows)
READ_AHEAD = 256 << 20  # bytes read or being read that the caller has not taken yet
_SMALL = 1 << 20  # bytes: neighbours smaller than this are read together

Wanted = tuple[StoredTensor, torch.device]


class _Job:
    """One read to be waited for: a large tensor in pieces, neighbouring small ones, or one that reads itself."""

    def __init__(self, wanted: Sequence[Wanted], pinned: bool) -> None:
        """``pinned``: the threads have pinned buffers."""
        self.wanted = wanted
        first, self.device = wanted[0]
        self.nbytes = _span(wanted)
        self.whole: Tensor | None = None  # of a tensor that reads itself
        self.events: list[torch.cuda.Event] = []
        self.allocated: torch.cuda.Event | None = None
        self._lock, self._done = threading.Lock(), threading.Event()
        self._error: BaseException | None = None
        on_gpu = self.device.type == "cuda" and all(device == self.device for _, device in wanted)
        self.through_pinned = pinned and on_gpu and first.stamp is not None and self.nbytes > 0
        span = self.nbytes if first.stamp is not None else 0
        self.buffer: Tensor | None = None
        if self.through_pinned:
            with torch.inference_mode(False):  # a thread outside that mode writes to it
                self.buffer = torch.empty(span, dtype=torch.uint8, device=self.device)
            self.device = self.buffer.device  # with its index
            self.allocated = torch.cuda.Event()  # the memory may still be read by work that is queued before it
            self.allocated.record(torch.cuda.current_stream(self.device))
        elif first.stamp is not None:
            self.buffer = host_buffer(span)
        self.pieces = [(at, min(PIECE, span - at)) for at in range(0, span, PIECE)] or [(0, 0)]
        self._left = len(self.pieces)

    def finished(self, error: BaseException | None, event: torch.cuda.Event | None = None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if event is not None:
                self.events.append(event)
            if self._left == 0:
                self._done.set()

    def take(self) -> list[tuple[StoredTensor, Tensor]]:
        """Wait, and give the tensors on their devices."""
        while not self._done.wait(0.5):  # a wait without end could not be interrupted everywhere
            pass
        if self._error is not None:
            error, self._error = self._error, None  # what it will refer to, this frame, must not refer to it
            try:
                raise error
            finally:
                del error
        if self.whole is not None:
            stored, device = self.wanted[0]
            return [(stored, self.whole.to(device))]
        for event in self.events:
            torch.cuda.current_stream(self.device).wait_event(event)
        assert self.buffer is not None
        if len(self.wanted) == 1 and self.buffer.device == self.device:
            stored = self.wanted[0][0]
            return [(stored, self.buffer.view(stored.dtype).view(stored.shape))]
        # each up to where the next one begins; to another device they go together, as they are small
        starts = [stored.offset for stored, _ in self.wanted]
        sizes = [end - start for start, end in pairwise([*starts, starts[0] + self.nbytes])]
        parts = {}
        for device in {device for _, device in self.wanted}:
            there = self.buffer if self.through_pinned else self.buffer.to(device)
            parts[device] = there.split(sizes)
        found = []
        for i, (stored, device) in enumerate(self.wanted):
            data = parts[device][i]
            data = data if sizes[i] == stored.nbytes else data[: stored.nbytes]
            own = data.clone().view(stored.dtype)  # aligned, and without its neighbours
            found.append((stored, own if len(stored.shape) == 1 else own.view(stored.shape)))
        return found


class Staging:
    """Pinned buffers for the threads of one :func:`read_ahead`, made by a thread while the caller does other things.

    Pinning takes 80 ms on an H200's host, in which Python builds the model.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """``nbytes``: at most so many are read; ``device``: the GPU whose driver pins."""
        self._memory: Tensor | None = None
        self._thread = threading.Thread(target=self._make, args=(_threads(nbytes), device), daemon=True)
        self._thread.start()

    def _make(self, threads: int, device: torch.device) -> None:
        memory = host_buffer(threads * 2 * PIECE)
        with contextlib.suppress(RuntimeError), torch.cuda.device(device):
            pin(memory)  # unpinned it is slower, and right all the same
        self._memory = memory

    def take(self) -> Tensor:
        """The memory, the caller's to unpin."""
        self._thread.join()
        memory, self._memory = self._memory, None
        assert memory is not None, "it is taken once"
        return memory

    def close(self) -> None:
        """Give back what was not taken."""
        self._thread.join()
        if self._memory is not None:
            unpin(self._memory)
            self._memory = None


class _Buffers:
    """The two pinned buffers of a thread, and the copies that still read them."""

    def __init__(self, memory: Tensor) -> None:
        # each with a view to read into, which takes longer to make than many a read
        self._free: deque[tuple[Tensor, memoryview, torch.cuda.Event | None]] = deque(
            (half, writable_view(half), None) for half in memory.chunk(2)
        )
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._current: torch.cuda.Stream | None = None

    def pass_on(self, job: _Job, at: int, size: int, files: OpenFiles) -> torch.cuda.Event:
        """Read a piece and start its copy; the event ends it."""
        half, view, busy = self._free[0]
        if busy is not None:
            busy.synchronize()
        read_into(job.wanted[0][0], view[:size], at, files)
        stream = self._streams.get(job.device)
        if stream is None:
            stream = self._streams[job.device] = torch.cuda.Stream(job.device)
        if stream is not self._current:
            torch.cuda.set_stream(stream)  # this thread's own
            self._current = stream
        event = torch.cuda.Event()
        if job.allocated is not None:
            stream.wait_event(job.allocated)
        assert job.buffer is not None
        job.buffer[at : at + size].copy_(half[:size], non_blocking=True)
        event.record(stream)
        self._free[0] = half, view, event
        self._free.rotate(-1)
        return event

    def finish(self) -> None:
        """Wait for the copies."""
        for _, _, busy in self._free:
            if busy is not None:
                busy.synchronize()


def _by_pieces(stored: StoredTensor) -> bool:
    return stored.stamp is not None and stored.nbytes >= _SMALL


def _threads(nbytes: int) -> int:
    return min(THREADS, max(os.cpu_count() or 1, 2), max(nbytes // PIECE, 1))


def _span(wanted: Sequence[Wanted]) -> int:
    """Bytes that are read for a batch, with what lies between its tensors."""
    first, last = wanted[0][0], wanted[-1][0]
    return last.offset + last.nbytes - first.offset


def _batches(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    batch: list[Wanted] = []
    for item in wanted:
        stored, _ = item
        if batch:
            first, last = batch[0][0], batch[-1][0]
            joins = (
                max(stored.nbytes, last.nbytes) < _SMALL
                and stored.file is last.file
                and stored.stamp is not None
                and last.stamp is not None
                and last.offset + last.nbytes <= stored.offset < last.offset + last.nbytes + 4096
                and stored.offset + stored.nbytes - first.offset <= PIECE
            )
            if not joins:
                yield batch
                batch = []
        batch.append(item)
    if batch:
        yield batch


def read_ahead(
    wanted: Sequence[Wanted], staging: Staging | None = None
) -> Generator[tuple[StoredTensor, Tensor], None, None]:
    """Read tensors in this order, each onto its device, up to ``READ_AHEAD`` bytes ahead of the caller.

    ``staging`` is for at least as many bytes; without it one is made if it is needed.

    Closing the iterator ends the threads and gives their memory back, whatever was still to come.

    Raises:
        CheckpointError: a file cannot be read any more.
    """
    tasks: queue.SimpleQueue[tuple[_Job, int, int] | None] = queue.SimpleQueue()
    stopped = threading.Event()
    on_gpu = any(device.type == "cuda" and _by_pieces(stored) for stored, device in wanted)
    count = _threads(sum(stored.nbytes for stored, _ in wanted))
    memory: Tensor | None = None

    def work(own: Tensor | None) -> None:
        halves, files = None if own is None else _Buffers(own), OpenFiles()
        del own
        while (task := tasks.get()) is not None:
            job, at, size = task
            event = None
            try:
                if not stopped.is_set():
                    if job.wanted[0][0].stamp is None:
                        job.whole = job.wanted[0][0].read()
                    elif job.through_pinned:
                        assert halves is not None
                        event = halves.pass_on(job, at, size, files)
                    elif job.buffer is not None and size:
                        read_into(job.wanted[0][0], writable_view(job.buffer)[at : at + size], at, files)
                job.finished(None, event)
            except BaseException as error:  # handed to the caller, which raises it
                traceback.clear_frames(error.__traceback__)  # or they hold their buffers for as long as it is kept
                job.finished(error)
            del job, task
        files.close()
        if halves is not None:
            with contextlib.suppress(RuntimeError):  # an error of the GPU: whoever uses it is told
                halves.finish()
        del halves

    threads: list[threading.Thread] = []
    pending: deque[_Job] = deque()
    try:
        if on_gpu:
            gpu = next(device for stored, device in wanted if device.type == "cuda")
            memory = (staging or Staging(count * PIECE, gpu)).take()
        for i in range(count):
            args = (None if memory is None else memory[i * 2 * PIECE : (i + 1) * 2 * PIECE],)
            threads.append(threading.Thread(target=work, args=args, name=f"fewbits-read-{i}", daemon=True))
            del args
            threads[-1].start()
        ahead, batches = 0, _batches(wanted)
        batch = next(batches, None)
        while pending or batch is not None:
            while batch is not None:
                if pending and ahead + _span(batch) > READ_AHEAD:
                    break
                job = _Job(batch, pinned=on_gpu)
                for at, length in job.pieces:
                    tasks.put((job, at, length))
                pending.append(job)
                ahead += job.nbytes
                batch = next(batches, None)
                del job
            nbytes = pending[0].nbytes
            taken = pending.popleft().take()
            while taken:
                yield taken.pop(0)  # nothing is held here while the caller works on it
            ahead -= nbytes
    finally:
        stopped.set()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()
        pending.clear()  # an error that is kept would keep them, and what follows
        if memory is not None:
            unpin(memory)
            memory = None
