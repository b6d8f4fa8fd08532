"""Running a model whose parts lie on several devices, in host memory, or on disk.

Each unit of the plan runs on one device. Where its parameters lie elsewhere, they come when it is called: its forward
finds them in one of two buffers ("slots") on that device, whose contents were copied while the unit before it ran. All
of a unit's bytes lie together at home and are one copy; on a GPU it goes through a stream of its own. Outside its
forward a unit's parameters are those at home, plain CPU tensors.

For autograd nothing in a slot is kept: what a backward pass needs of it is fetched again then.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fewbits.errors import UnsupportedError
from fewbits.homes import Extent, joined, read
from fewbits.memory import aligned, host_buffer, pin, writes
from fewbits.tensor import QuantTensor

_READERS = 8
_SMALL = 1 << 20  # bytes of a plain tensor that is copied again rather than trusted


# ------------------------------------------------------------------------------------------------- units and slots


@dataclass
class Entry:
    """One parameter of a unit that lies at home.

    Attributes:
        places: where it is within the unit: the modules' own dictionaries of parameters, and its name there. Nothing
            here refers to modules, so that a model that is dropped is freed at once, and not when a cycle is found.
        home: the parameter there.
        extents: where each of its tensors lies at home and in the unit's buffer, in the order of its inner tensors.
    """

    places: list[tuple[dict[str, Any], str]]
    home: nn.Parameter
    extents: list[Extent]
    address: int = 0

    def __post_init__(self) -> None:
        self.address = _first(self.home).data_ptr()

    def unchanged(self, parameter: Tensor | None) -> bool:
        """Whether this is still what lies at home, and not something the user has put in its place."""
        return parameter is self.home and _first(self.home).data_ptr() == self.address

    def view_in(self, buffer: Tensor) -> nn.Parameter:
        """The parameter on the bytes of a slot."""
        places = iter(self.extents)

        def view(tensor: Tensor) -> Tensor:
            at = next(places).at
            return buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        home = self.home.detach()
        return nn.Parameter(home._map(view) if isinstance(home, QuantTensor) else view(home), requires_grad=False)


def _first(tensor: Tensor) -> Tensor:
    return tensor.packed if isinstance(tensor, QuantTensor) else tensor


@dataclass(eq=False)
class FetchedUnit:
    """A unit whose parameters are brought to where it runs.

    Attributes:
        name: the module's.
        device: where it runs.
        entries: its parameters that lie at home.
        inside: gives the parameters, by module, that have to be on the device: others, an adapter's say, as well.
        encloses: whether other units are called while it runs. It has a buffer of its own then, which it keeps.
    """

    name: str
    device: torch.device
    entries: list[Entry]
    inside: Callable[[], Iterator[dict[str, Any]]]
    encloses: bool = False
    nbytes: int = 0
    extents: list[Extent] = field(default_factory=list)
    plain: list[Extent] = field(default_factory=list)  # of tensors whose ``data`` may be written to unseen
    quantized: list[Tensor] = field(default_factory=list)
    slot: _Slot | None = None
    users: int = 0
    replaced: list[tuple[dict[str, Any], str, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.extents = joined([extent for entry in self.entries for extent in entry.extents])
        for entry in self.entries:
            if isinstance(entry.home, QuantTensor):
                self.quantized += [extent.home for extent in entry.extents]
            else:
                self.plain += entry.extents
        self.nbytes = max((e.at + aligned(e.memory.numel()) for e in self.extents), default=0)

    def state(self) -> tuple[int, int]:
        """Changes when a quantized parameter at home is written to."""
        return writes(), sum(tensor._version for tensor in self.quantized)


class _Slot:
    """A buffer on the device that units run on, and what it holds."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        with torch.inference_mode(False):  # it outlives the mode in which it happens to be made
            self.buffer = (
                host_buffer(nbytes) if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, device=device)
            )
        self.staging: Tensor | None = None  # pinned host memory that what comes from a file passes through
        self.copied: torch.cuda.Event | None = None  # the end of the copy that reads it
        self.unit: FetchedUnit | None = None
        self.users = 0
        self.last_used = 0
        self.filled = 0  # in which pass
        self.state: tuple[int, int] | None = None  # of the unit when it was fetched
        self.arriving: Future[None] | None = None
        self.arrived: torch.cuda.Event | None = None
        self.in_use: dict[int, torch.cuda.Event] = {}  # by stream: the end of the work there that reads the buffer
        self.views: dict[int, list[nn.Parameter]] = {}  # by unit

    def used_on_current_stream(self) -> None:
        if self.device.type != "cpu":
            stream = torch.cuda.current_stream(self.device)
            event = self.in_use.setdefault(stream.cuda_stream, torch.cuda.Event())
            event.record(stream)

    def parameters_of(self, unit: FetchedUnit) -> list[nn.Parameter]:
        views = self.views.get(id(unit))
        if views is None:
            with torch.inference_mode(False), torch.no_grad():
                views = self.views[id(unit)] = [entry.view_in(self.buffer) for entry in unit.entries]
        return views


class Offload:
    """What brings the units of one model to where they run; made by :func:`fewbits.load`."""

    def __init__(self, units: list[FetchedUnit]) -> None:
        self.units = units
        self._lock = threading.RLock()
        self._slots: dict[torch.device, list[_Slot]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._own: dict[FetchedUnit, _Slot] = {}
        self._clock = 0
        self._pass, self._inside = 0, 0  # calls of the model: how many there were, and how many are under way
        # learned: what follows a unit, and a unit after another, forwards and backwards
        self._next: dict[tuple[FetchedUnit, FetchedUnit | None, bool], FetchedUnit] = {}
        self._last: dict[bool, tuple[FetchedUnit | None, FetchedUnit | None]] = dict.fromkeys(
            (False, True), (None, None)
        )
        for unit in units:
            below = unit.name + "." if unit.name else ""
            unit.encloses = any(other is not unit and other.name.startswith(below) for other in units)
        turns = [unit for unit in units if not unit.encloses]
        for unit, following in zip(turns, [*turns[1:], *turns[:1]], strict=True):
            self._next[unit, None, False], self._next[following, None, True] = following, unit
        self._transfers = ThreadPoolExecutor(2, thread_name_prefix="fewbits-offload")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="fewbits-offload-read")
        for device in {unit.device for unit in units}:
            sizes = [unit.nbytes for unit in turns if unit.device == device]
            self._slots[device] = [_Slot(device, max(sizes)) for _ in sizes[:2]]
            if device.type != "cpu":
                self._streams[device] = torch.cuda.Stream(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedError("a model whose parts are offloaded cannot be copied", hint="load it once more")

    # --------------------------------------------------------------------------------------------- transfers

    def _free_slot(self, device: torch.device, unit: FetchedUnit, *, demand: bool) -> _Slot | None:
        """The slot, not in use, that was used longest ago; on demand one more if all are in use."""
        if unit.encloses:
            if unit not in self._own:
                self._own[unit] = _Slot(device, unit.nbytes)
            return self._own[unit]
        free = [slot for slot in self._slots[device] if slot.users == 0]
        if free:
            return min(free, key=lambda slot: (slot.unit is not None, slot.last_used))
        if not demand:
            return None
        # several threads: a slot for this once
        return _Slot(device, unit.nbytes)

    def _start(self, unit: FetchedUnit, *, demand: bool) -> _Slot | None:
        slot = self._free_slot(unit.device, unit, demand=demand)
        if slot is None:
            return None
        if slot.arriving is not None:  # something that nobody came to use
            with contextlib.suppress(Exception):
                slot.arriving.result()
        if slot.unit is not None:
            slot.unit.slot = None
        slot.unit, unit.slot = unit, slot
        slot.arriving, slot.arrived = None, None
        slot.filled, slot.state = self._pass, unit.state()
        if unit.device.type == "cpu":
            slot.arriving = self._transfers.submit(read, unit.extents, slot.buffer, self._readers)
            return slot
        # work that reads the slot may be queued where no event was left: in a backward pass
        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(unit.device))
        waits = [queued, *slot.in_use.values()]
        slot.in_use = {}
        if all(extent.file is None for extent in unit.extents):
            slot.arrived = self._copy(slot, [(e.at, e.memory) for e in unit.extents], waits)
        else:
            slot.arriving = self._transfers.submit(self._through_staging, unit, slot, waits)
        return slot

    def _copy(self, slot: _Slot, pieces: list[tuple[int, Tensor]], waits: list[torch.cuda.Event]) -> torch.cuda.Event:
        stream, event = self._streams[slot.device], torch.cuda.Event()
        with torch.cuda.stream(stream), torch.no_grad():
            for wait in waits:
                stream.wait_event(wait)
            for at, memory in pieces:
                slot.buffer[at : at + memory.numel()].copy_(memory, non_blocking=True)
            event.record(stream)
        return event

    def _through_staging(self, unit: FetchedUnit, slot: _Slot, waits: list[torch.cuda.Event]) -> None:
        if slot.staging is None:
            slot.staging = host_buffer(slot.buffer.numel())
            pin(slot.staging)
        if slot.copied is not None:
            slot.copied.synchronize()
        read(unit.extents, slot.staging, self._readers)
        slot.arrived = slot.copied = self._copy(slot, [(0, slot.staging[: unit.nbytes])], waits)

    def _present(self, unit: FetchedUnit) -> _Slot:
        """The slot that holds the unit, ready for work on the current stream."""
        if unit.slot is not None and unit.users == 0 and unit.slot.filled != self._pass:
            self._bring_up_to_date(unit, unit.slot)
        slot = unit.slot or self._start(unit, demand=True)
        assert slot is not None
        self._wait(unit, slot)
        self._clock += 1
        slot.last_used = self._clock
        return slot

    @staticmethod
    def _wait(unit: FetchedUnit, slot: _Slot) -> None:
        """Wait for what is under way to the slot; the current stream of a GPU waits, not this thread."""
        if slot.arriving is not None:
            try:
                slot.arriving.result()
            except BaseException:
                slot.unit, unit.slot = None, None
                raise  # an interrupted transfer goes on; whoever takes the slot next waits for it
            slot.arriving = None
        if slot.arrived is not None:
            torch.cuda.current_stream(unit.device).wait_event(slot.arrived)

    def _bring_up_to_date(self, unit: FetchedUnit, slot: _Slot) -> None:
        """What was fetched in an earlier pass: its home may have been written to since."""
        if unit.state() != slot.state or any(e.memory.numel() > _SMALL for e in unit.plain):
            slot.unit, unit.slot = None, None
            return
        slot.filled = self._pass
        self._wait(unit, slot)
        with torch.no_grad():
            for extent in unit.plain:
                slot.buffer[extent.at : extent.at + extent.memory.numel()].copy_(extent.memory, non_blocking=True)

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """A call of the whole model, in which nothing at home is expected to change."""
        with self._lock:
            self._pass += not self._inside
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1

    def _look_ahead(self, unit: FetchedUnit, *, backwards: bool) -> None:
        """Learn what is called after what, and start to fetch what came after this unit the last time."""
        if unit.encloses:
            return
        before, last = self._last[backwards]
        if last is not unit:
            if last is not None:
                self._next[last, None, backwards] = self._next[last, before, backwards] = unit
            self._last[backwards] = before, last = last, unit
        # after the two units that were called last, else after this one: a block may have several places
        following = self._next.get((unit, before, backwards)) or self._next[unit, None, backwards]
        if following is not unit and following.slot is None:
            self._start(following, demand=False)

    def _drop_spare(self, unit: FetchedUnit, slot: _Slot) -> None:
        """Let go of a slot that was made for one use."""
        if slot.users == 0 and not unit.encloses and slot not in self._slots[unit.device]:
            slot.unit, unit.slot = None, None

    # --------------------------------------------------------------------------------------------- use

    @contextlib.contextmanager
    def using(self, unit: FetchedUnit) -> Iterator[None]:
        """The unit's parameters are on its device within this block."""
        with self._lock:
            self._pass += not self._inside  # a part is called alone
            self._inside += 1
            try:
                slot = self._present(unit)
                if unit.users == 0:
                    self._bind(unit, slot)
            except BaseException:
                self._inside -= 1
                raise
            unit.users += 1
            slot.users += 1
        try:
            with self._lock:
                self._look_ahead(unit, backwards=False)
            if torch.is_grad_enabled():
                with self._nothing_saved_of(unit, slot):
                    yield
            else:
                yield
        finally:
            with self._lock:
                slot.used_on_current_stream()
                self._inside -= 1
                slot.users -= 1
                unit.users -= 1
                if unit.users == 0:
                    self._unbind(unit)
                self._drop_spare(unit, slot)

    def _bind(self, unit: FetchedUnit, slot: _Slot) -> None:
        training = torch.is_grad_enabled()
        replaced = unit.replaced
        try:
            for entry, view in zip(unit.entries, slot.parameters_of(unit), strict=True):
                for parameters, name in entry.places:
                    current = parameters.get(name)
                    if entry.unchanged(current) and not (training and entry.home.requires_grad):
                        parameters[name] = view
                        replaced.append((parameters, name, entry.home, view))
            for parameters in unit.inside():  # adapters, and what is trained: it has to get its gradient
                for name, current in parameters.items():
                    if current is not None and current.device != unit.device:
                        replaced.append((parameters, name, current, current.to(unit.device)))
            for parameters, name, _, moved in replaced:
                parameters[name] = moved
        except BaseException:
            self._unbind(unit)
            raise

    def _unbind(self, unit: FetchedUnit) -> None:
        for parameters, name, before, put in reversed(unit.replaced):
            if parameters.get(name) is put:
                parameters[name] = before
        unit.replaced.clear()

    # --------------------------------------------------------------------------------------------- autograd

    def _nothing_saved_of(self, unit: FetchedUnit, slot: _Slot) -> Any:
        """Within this block autograd saves no tensor of the slot, but what is needed to fetch it again."""
        start = slot.buffer.data_ptr()
        end = start + slot.buffer.numel()
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)  # another's hooks, a checkpoint's say, go on
        outer_pack, outer_unpack = top if top is not None else (None, None)

        def in_slot(tensor: Tensor) -> bool:
            return tensor.device == slot.device and start <= tensor.untyped_storage().data_ptr() < end

        def pack(tensor: Tensor) -> Any:
            if in_slot(_first(tensor)):
                return _Kept(self, unit, tensor, start)
            return _Passed(outer_pack(tensor), outer_unpack) if outer_pack is not None else tensor

        def unpack(kept: Any) -> Any:
            if isinstance(kept, _Kept):
                return kept.fetch()
            return kept.unpack(kept.value) if isinstance(kept, _Passed) else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def fetch_again(self, unit: FetchedUnit, take: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``take`` copies out of the buffer that holds the unit, for a backward pass."""
        with self._lock:
            slot = self._present(unit)
            taken = take(slot.buffer)
            slot.used_on_current_stream()
            self._drop_spare(unit, slot)
            self._look_ahead(unit, backwards=True)
        return taken


@dataclass
class _Passed:
    value: Any
    unpack: Any


class _Kept:
    """A tensor of a slot that autograd wanted to save."""

    def __init__(self, offload: Offload, unit: FetchedUnit, tensor: Tensor, start: int) -> None:
        self._offload, self._unit, self._start = offload, unit, start
        self._tensor = tensor.detach()  # its shape and its place; the bytes there will be others

    def fetch(self) -> Tensor:
        return self._offload.fetch_again(self._unit, self._take)

    def _take(self, buffer: Tensor) -> Tensor:
        def copied(tensor: Tensor) -> Tensor:
            at = tensor.data_ptr() - self._start
            span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            if not tensor.numel():
                return torch.empty_like(tensor)
            part = buffer[at : at + span * tensor.element_size()].clone().view(tensor.dtype)
            return part.as_strided(tensor.shape, tensor.stride())

        with torch.no_grad():
            return self._tensor._map(copied) if isinstance(self._tensor, QuantTensor) else copied(self._tensor)


# ------------------------------------------------------------------------------------------------- modules


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of nested arguments with every tensor on the device; what holds none is passed through."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=device.type != "cpu")
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    if type(value) is dict:
        return {k: _moved(v, device) for k, v in value.items()}
    return value


class PlacedForward:
    """The forward of a module that runs on a device of its own: takes the place of ``forward`` on the instance."""

    of_placement = True  # empty_copy leaves such attributes out

    def __init__(
        self, module: nn.Module, device: torch.device, offload: Offload | None = None, unit: FetchedUnit | None = None,
        *, returns: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """``returns``: the device that results go back to: none, one, or "caller" for that of the first argument."""
        self.__signature__ = inspect.signature(module.forward)  # transformers asks which arguments there are
        self.__doc__ = module.forward.__doc__
        self._module, self._inner = weakref.ref(module), module.__dict__.get("forward")
        self._device, self._offload, self._unit, self._returns = device, offload, unit, returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return self._run(*args, **kwargs)
        return _uncompiled(self, *args, **kwargs)  # compiled code is broken here: what moves weights is not traced

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None, "the module that is called is there"
        forward = self._inner or functools.partial(type(module).forward, module)
        back = self._returns
        if back == "caller":
            back = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        args, kwargs = _moved(args, self._device), _moved(kwargs, self._device)
        if self._offload is not None:
            unit = self._unit
            with self._offload.one_pass() if unit is None else self._offload.using(unit):
                result = forward(*args, **kwargs)
        else:
            result = forward(*args, **kwargs)
        if back is None or (back == self._device and self._returns != "caller"):
            return result  # by "caller" also from the GPU of the last block
        return tree_map(lambda v: v.to(back) if isinstance(v, Tensor) else v, result)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedError(
            "a model that is spread over devices cannot be copied", hint="load it once more with fewbits.load"
        )

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a model that is spread over devices cannot be pickled",
            hint="save its weights with fewbits.save or torch.save(model.state_dict())",
        )


def _uncompiled(forward: PlacedForward, *args: Any, **kwargs: Any) -> Any:
    global _uncompiled
    _uncompiled = torch.compiler.disable(_run)  # which imports the compiler, when it was imported anyway
    return _uncompiled(forward, *args, **kwargs)


def _run(forward: PlacedForward, *args: Any, **kwargs: Any) -> Any:
    return forward._run(*args, **kwargs)


class Unmovable:
    """``_apply`` of a module that holds placed parts: what ``.to()``, ``.half()`` and their like call first."""

    of_placement = True

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            "the model is spread over devices as its plan says, and cannot be moved or cast as a whole",
            hint="load it again with another device_map or dtype; inputs are moved to where they are needed",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Unmovable:
        return self


def computes_faster(entries: list[Entry], device: torch.device) -> bool:
    """Whether a CPU is faster at a unit of linear layers than it is to bring to a GPU, both measured, at its largest.

    Compared are a call of one row and one of 64, in proportion to the unit's bytes, with two transfers of it.
    """
    matrices = [entry for entry in entries if entry.home.dim() == 2]
    if not matrices or device.type == "cpu":
        return False
    largest = max(matrices, key=lambda entry: sum(e.memory.numel() for e in entry.extents))
    size = sum(extent.memory.numel() for extent in largest.extents)
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def transfer() -> None:
        at = 0
        for extent in largest.extents:
            target[at : at + extent.memory.numel()].copy_(extent.memory, non_blocking=True)
            at += extent.memory.numel()
        torch.cuda.synchronize(device)

    def compute(rows: int) -> None:
        weight = largest.home.detach()
        if isinstance(weight, QuantTensor) and weight.transposed:
            weight = weight.t()
        F.linear(torch.ones(rows, weight.shape[1], dtype=weight.dtype), weight)

    def best_of_two(work: Callable[[], None]) -> float:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        transferred = best_of_two(transfer)
        one = best_of_two(lambda: compute(1))
        return one < 2 * transferred and one + best_of_two(lambda: compute(64)) < 2 * transferred


def devices_of(model: nn.Module) -> dict[str, str]:
    """Where the parameters lie of a model that is spread over devices, by dotted name: "disk" is one."""
    return dict(getattr(model, "_fewbits_devices", {}))


def is_offloaded(model: nn.Module) -> bool:
    """Whether parts of a model lie off the device they belong to: in host memory beside a GPU, or on disk."""
    return isinstance(model.__dict__.get("_apply"), Unmovable) and not {"cpu", "disk"}.isdisjoint(
        devices_of(model).values()
    )
