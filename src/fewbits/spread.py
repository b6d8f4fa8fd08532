"""Carrying out a plan: each parameter to where it lies, each module made to run where it shall."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Checkpoint
from fewbits.hf import is_transformers_model
from fewbits.homes import CheckpointHome, Extent, FileHome, MemoryHome, can_be_home
from fewbits.match import Source
from fewbits.memory import aligned
from fewbits.offload import Entry, FetchedUnit, Offload, PlacedForward, Unmovable, computes_faster
from fewbits.place import put
from fewbits.plan import Plan
from fewbits.storage import Owner, Storage, inner_layout, owners_of
from fewbits.structure import blocks_of
from fewbits.tensor import QuantTensor

CPU = torch.device("cpu")


class _Runs:
    """A module that runs as a whole on one device.

    Attributes:
        name, module: the module.
        paths: of the parameters it brings along.
        device: where it runs; ``gpu`` the GPU of its surroundings, where results go from a CPU.
        fetches: whether what lies elsewhere is brought there when it is called.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.paths: list[str] = []
        self.device = self.gpu = CPU
        self.fetches = True
        self.used = 0  # bytes of its buffer that are given out
        self.entries: list[Entry] = []


class Spread:
    """The parameters and modules of one model on the devices of a plan.

    A model on one device is simply put there. For any other, parameters go home (:mod:`fewbits.homes`) and modules get
    a forward that brings what they need (:mod:`fewbits.offload`).
    """

    def __init__(
        self,
        model: nn.Module,
        storage: Mapping[str, Storage],
        plan: Plan,
        *,
        offload_folder: str | os.PathLike[str] | None = None,
        no_split_module_classes: Iterable[str] | None = None,
    ) -> None:
        self.model, self.plan = model, plan
        modules = dict(model.named_modules(remove_duplicate=False))
        names: dict[int, str] = {}
        for name, module in modules.items():
            names.setdefault(id(module), name)  # a shared module runs under one name
        groups = owners_of(model)
        own = {o.path: f"{names[id(o.module)]}.{o.name}".removeprefix(".") for owners in groups for o in owners}
        units = {path: _prefix(own[path], plan.devices) for path in own}
        self.devices = {path: plan.devices[unit] for path, unit in units.items()}  # of parameters
        execution = plan.execution
        self.main = torch.device(next(iter(execution.values()), "cpu"))
        places = set(self.devices.values())
        self.alone = len(places) <= 1 and "disk" not in places and (places <= {"cpu"}) == (self.main == CPU)
        if self.alone:
            return  # nothing of what follows is asked for
        self._runs: dict[str, _Runs] = {}
        self._of: dict[str, _Runs] = {}  # by path
        whole = set(blocks_of(model, no_split_module_classes))
        for path, unit in units.items():
            name = _prefix(own[path], whole, default=own[path].rpartition(".")[0])
            runs = self._runs.setdefault(name, _Runs(name, modules[name]))
            self._of[path] = runs
            if not runs.paths:
                runs.device = runs.gpu = torch.device(execution[unit])
            elif self.devices[path] not in ("cpu", "disk") and self.devices[runs.paths[0]] in ("cpu", "disk"):
                runs.device = runs.gpu = torch.device(self.devices[path])
            runs.paths.append(path)
        for runs in self._runs.values():
            away = {self.devices[path] for path in runs.paths} <= {"cpu", "disk"}
            if away and isinstance(runs.module, nn.Embedding):
                runs.device, runs.fetches = CPU, False  # a few rows of a table are read where it lies
            elif away and plan.offload == "compute":
                runs.device = CPU
        self._checkpoint = CheckpointHome()
        self._memory: dict[str, MemoryHome] = {}
        self._file: FileHome | None = None
        self._folder = offload_folder
        self._bytes = {
            owners[0].path: sum(
                aligned(_nbytes(layout)) for layout in inner_layout(owners[0], storage[owners[0].path]).values()
            )
            for owners in groups
        }
        self._first = {owner.path: owners[0].path for owners in groups for owner in owners}
        self._at_checkpoint: set[str] = set()

    def reserve(self) -> None:
        """Make sure of the room on disk before anything is changed.

        Raises:
            ConfigError: the folder cannot serve.
        """
        if "disk" in self.devices.values():
            self._spill_file()

    # --------------------------------------------------------------------------------------------- loading

    def works_on(self, path: str, *, ready: bool) -> torch.device:
        """The device that a parameter's tensors are read onto; ``ready``: they are stored as they are to be used."""
        device = self.devices[path]
        if self.alone or device not in ("cpu", "disk"):
            return torch.device(device)
        return CPU if ready else self._of[path].gpu  # a GPU quantizes faster

    def stays_in_checkpoint(self, path: str, source: Source, checkpoint: Checkpoint) -> list[str]:
        """The keys of the checkpoint that are used where they lie, of a parameter that is stored as it is to be used.

        None if it is not to lie on disk.
        """
        if self.devices[path] != "disk":
            return []
        keys = [source.group.keys[role] for role in ("weight", "absmax", "nested_absmax") if role in source.group.keys]
        if not all(can_be_home(checkpoint.tensors[key]) for key in keys):
            return []
        self._at_checkpoint.add(self._first[path])
        return keys

    def map(self, checkpoint: Checkpoint, key: str) -> Tensor:
        """A tensor of the checkpoint where it lies."""
        return self._checkpoint.map(checkpoint.tensors[key])

    def put(self, owners: Sequence[Owner], value: Tensor, requires_grad: bool) -> None:
        """Make one parameter of a finished value, where it shall lie, and give it to all its owners."""
        path = owners[0].path
        device = self.devices[path]
        if self.alone or device not in ("cpu", "disk"):
            put(owners, value.to(torch.device(device)), requires_grad)
            return
        units = {id(self._of[owner.path]): self._of[owner.path] for owner in owners}.values()
        fetched = [runs for runs in units if runs.device != CPU or (device == "disk" and runs.fetches)]
        if device == "cpu" and not fetched:
            put(owners, value.to(CPU), requires_grad)
            return
        where: list[tuple[Tensor, Extent]] = []
        plain = not isinstance(value, QuantTensor)

        def keep(tensor: Tensor) -> Tensor:
            if device == "disk" and path in self._at_checkpoint:
                home, extent = tensor, self._checkpoint.extent(tensor, 0, mapped=plain)
            elif device == "disk":
                home, extent = self._spill_file().keep(tensor, 0)
            else:
                home, extent = self._memory_of(path).keep(tensor, 0)
            where.append((home, extent))
            return home

        home = value._map(keep) if isinstance(value, QuantTensor) else keep(value.contiguous())
        parameter = put(owners, home, requires_grad)
        for runs in fetched:
            extents = []
            for tensor, extent in where:
                extents.append(replace(extent, at=runs.used))
                runs.used += aligned(tensor.nbytes)
            own = {(id(o.module), o.name): o for o in owners if self._of[o.path] is runs}.values()
            runs.entries.append(Entry([(o.module._parameters, o.name) for o in own], parameter, extents))

    def _memory_of(self, path: str) -> MemoryHome:
        runs = self._of[path]
        home = self._memory.get(runs.name)
        if home is None:
            own = {self._first[p] for p in runs.paths if self.devices[p] == "cpu" and self._of[self._first[p]] is runs}
            home = self._memory[runs.name] = MemoryHome(sum(self._bytes[p] for p in own), pinned=True)
        return home

    def _spill_file(self) -> FileHome:
        if self._file is None:
            own = {first for p, first in self._first.items() if self.devices[p] == "disk"} - self._at_checkpoint
            self._file = FileHome(self._folder, sum(self._bytes[path] for path in own))
        return self._file

    # --------------------------------------------------------------------------------------------- running

    def finish(self) -> nn.Module:
        """Move the buffers, and make every module run where it shall."""
        if self.alone:
            _move_buffers(self.model, lambda path: self.main)
            return self.model
        self._choose_computing()
        _move_buffers(self.model, self._buffer_device)
        # A transformers model that names what not to split takes hidden states on whatever device they come. In any
        # other a block's result may be added to its input outside of the block: it goes back to where that is.
        follows = bool(getattr(self.model, "_no_split_modules", None))
        several = len({runs.gpu for runs in self._runs.values() if runs.gpu != CPU}) > 1
        fetching = [
            FetchedUnit(runs.name, runs.device, runs.entries, _inside(runs, self._runs))
            for runs in self._runs.values()
            if runs.entries or any(self._lies_apart(path) for path in runs.paths)
        ]
        offload = Offload(fetching) if fetching else None
        units = {unit.name: unit for unit in fetching}
        for runs in self._runs.values():
            unit = units.get(runs.name)
            if unit is not None or several or runs.device != self.main:
                returns: torch.device | str | None = runs.gpu if runs.device != runs.gpu else None
                if several and not follows:
                    returns = "caller"
                forward = PlacedForward(
                    runs.module, runs.device, offload if unit is not None else None, unit, returns=returns
                )
                runs.module.forward = forward  # on this instance alone
        if self.main != CPU or offload is not None:
            forward = PlacedForward(self.model, self.main, offload, returns="caller")
            self.model.forward = forward
        above = {""} | {name[:i] for name in self._runs for i in range(len(name) + 1) if name[i : i + 1] in (".", "")}
        modules: dict[str, Any] = dict(self.model.named_modules(remove_duplicate=False))
        for name in above:
            modules[name]._apply = Unmovable()
        model: Any = self.model
        model._fewbits_devices = dict(self.devices)
        if is_transformers_model(model):  # what generate, Trainer and Accelerate ask a model for
            model.hf_device_map = {name: _plain(device) for name, device in self.plan.devices.items()}
        return self.model

    def _lies_apart(self, path: str) -> bool:
        device = self.devices[path]
        return device not in ("cpu", "disk") and torch.device(device) != self._of[path].device

    def _choose_computing(self) -> None:
        """With offload="auto", units in host memory run on the CPU where that was measured to be faster."""
        if self.plan.offload != "auto":
            return
        faster: dict[Any, bool] = {}
        for runs in self._runs.values():
            if runs.device == CPU or not runs.entries or {self.devices[path] for path in runs.paths} != {"cpu"}:
                continue
            kind = type(runs.module), tuple(tuple(e.home.shape) for e in runs.entries)
            if kind not in faster:
                faster[kind] = computes_faster(runs.entries, runs.device)
            if faster[kind]:
                runs.device, runs.entries = CPU, []

    def _buffer_device(self, path: str) -> torch.device:
        name = _prefix(path, self._runs, default="")
        return self._runs[name].device if name in self._runs else self.main


def _prefix(path: str, names: Iterable[str], default: str | None = None) -> str:
    """The longest of the names that is the path or lies above it."""
    known = names if isinstance(names, (dict, set)) else set(names)
    while True:
        if path in known:
            return path
        if not path:
            assert default is not None, "a plan has a unit for every parameter"
            return default
        path = path.rpartition(".")[0]


def _nbytes(layout: tuple[torch.dtype, list[int]]) -> int:
    dtype, shape = layout
    return dtype.itemsize * torch.Size(shape).numel()


def _plain(device: str) -> str | int:
    kind, _, index = device.partition(":")
    return int(index) if kind == "cuda" else device


def _inside(runs: _Runs, others: Mapping[str, _Runs]) -> Callable[[], Iterator[dict[str, Any]]]:
    """The parameters of all that runs as this module does: of all below it, unless it only owns some itself."""
    below, module = runs.name + "." if runs.name else "", weakref.ref(runs.module)
    alone = any(name != runs.name and name.startswith(below) for name in others)

    def parameters() -> Iterator[dict[str, Any]]:
        found = module()
        if found is not None:
            yield from (part._parameters for part in ([found] if alone else found.modules()))

    return parameters


def _move_buffers(model: nn.Module, device_of: Any) -> None:
    """Move every buffer to the device of its path, those that modules share on a device once."""
    moved: dict[tuple[int, torch.device], Tensor] = {}
    kept: list[Tensor] = []  # so that no id is used twice meanwhile

    def walk() -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield f"{prefix}.{name}" if prefix else name, module, name, buffer

    for path, module, name, buffer in list(walk()):
        device = device_of(path)
        if buffer.device != device:
            kept.append(buffer)
            if (id(buffer), device) not in moved:
                moved[id(buffer), device] = buffer.to(device)
            module._buffers[name] = moved[id(buffer), device]
