"""Deciding where each unit of a model lies, from sizes alone, before anything is read."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from fewbits.devices import MaxMemory, budgets_of, device_name
from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.memory import ALIGN, aligned
from fewbits.partition import balance, balance_low_first, fill, pack
from fewbits.plan import OFFLOAD, DeviceMap, Plan
from fewbits.storage import Owner, Storage, owners_of, stored_bytes
from fewbits.structure import blocks_of, check_patterns, matches

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

# ------------------------------------------------------------------------------------------------- what is placed


@dataclass
class Unit:
    """What is placed as a whole: a block, or a module's own parameters.

    Attributes:
        name: of the module (of a single parameter, where even a module had to be split).
        owners: of each of its parameters.
        nbytes: of parameters as stored, and of buffers.
        slot_bytes: that its parameters take in a buffer that it streams into.
        is_table: whether it is only looked up, which needs no more than the rows. A head tied to a table is not.
    """

    name: str
    owners: list[list[Owner]] = field(default_factory=list)
    nbytes: int = 0
    slot_bytes: int = 0
    is_table: bool = False


def units_of(
    model: nn.Module, storage: Mapping[str, Storage], blocks: Iterable[str], *, split: str = ""
) -> dict[str, Unit]:
    """The units of a model by name, in its order. A parameter that several units share counts for the first.

    Args:
        model: on any device.
        storage: how each parameter is stored.
        blocks: names of the modules that stay whole.
        split: "" for none; "modules" splits blocks into the modules that own parameters, "parameters" those too.
    """
    whole = set(blocks) if not split else set()

    def unit_name(path: str) -> str:
        module, _, _ = path.rpartition(".")
        parts = module.split(".")
        outermost = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        return next((prefix for prefix in outermost if prefix in whole), path if split == "parameters" else module)

    units: dict[str, Unit] = {}

    def unit_of(path: str) -> Unit:
        name = unit_name(path)
        if name not in units:
            units[name] = Unit(name)
        return units[name]

    for owners in owners_of(model):
        size, seen_in = stored_bytes(owners[0], storage[owners[0].path]), set()
        for i, owner in enumerate(owners):
            if (id(owner.module), owner.name) in seen_in:
                continue  # a shared module is met once
            seen_in.add((id(owner.module), owner.name))
            unit = unit_of(owner.path)
            unit.is_table = isinstance(owner.module, nn.Embedding) and (unit.is_table or not unit.owners)
            unit.owners.append(owners)
            unit.slot_bytes += aligned(size) + 4 * ALIGN if size else 0  # a quantized one is four tensors at most
            unit.nbytes += size if i == 0 else 0
    seen: set[int] = set()
    order: dict[str, int] = {}
    for prefix, module in model.named_modules():
        order[prefix] = len(order)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                unit_of(f"{prefix}.{name}" if prefix else name).nbytes += buffer.nbytes
    return dict(sorted(units.items(), key=lambda kv: order.get(kv[0], order.get(kv[0].rpartition(".")[0], 0))))


def _together(units: dict[str, Unit], blocks: set[str], *, neighbours: bool) -> list[list[Unit]]:
    """Units that go to one device: those that share parameters, and neighbours outside the blocks.

    What lies beside the blocks is often joined by plain operations (token + position embeddings), which need their
    operands on one device.
    """
    leader: dict[str, str] = {}
    position = {name: i for i, name in enumerate(units)}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    holder: dict[int, str] = {}  # a parameter's owners → the first unit that has it
    before: Unit | None = None
    for unit in units.values():
        leader[unit.name] = unit.name
        joined = [holder.setdefault(id(owners), unit.name) for owners in unit.owners]
        if neighbours and blocks and before is not None and not {before.name, unit.name} & blocks:
            joined.append(before.name)
        for name in joined:
            first, second = sorted((find(name), find(unit.name)), key=position.__getitem__)
            leader[second] = first
        before = unit
    groups: dict[str, list[Unit]] = {}
    for unit in units.values():
        groups.setdefault(find(unit.name), []).append(unit)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------- deciding


def make_plan(
    model: nn.Module,
    storage: Mapping[str, Storage],
    device_map: DeviceMap = "auto",
    *,
    max_memory: MaxMemory | None = None,
    offload: str = "auto",
    offload_folder: str | os.PathLike[str] | None = None,
    no_split_module_classes: Iterable[str] | None = None,
) -> Plan:
    """Decide where each unit lies.

    Args:
        model: on any device, meta included.
        storage: how each parameter is stored (:func:`fewbits.storage.choose_storage`).
        device_map: see :func:`fewbits.load`.
        max_memory, offload, offload_folder, no_split_module_classes: as there.

    Raises:
        ConfigError: budgets that do not hold the model, a map that leaves parameters out or names none.
    """
    if offload not in OFFLOAD:
        raise ConfigError(f"offload is {offload!r}", expected=f"one of {', '.join(OFFLOAD)}")
    given = device_map if isinstance(device_map, Plan) else Plan({})
    if isinstance(device_map, Plan):
        offload = given.offload if offload == "auto" else offload
        device_map = given.devices
    blocks = set(blocks_of(model, no_split_module_classes))
    if device_map is None or (isinstance(device_map, str) and device_map in STRATEGIES):
        budgets = budgets_of(max_memory, offload_folder)
        return _decide(model, storage, blocks, budgets, device_map or "auto", offload)
    budgets = {} if max_memory is None else budgets_of(max_memory, offload_folder)  # asking a GPU takes memory there
    if isinstance(device_map, Mapping):
        devices, units = _from_mapping(model, storage, blocks, device_map)
    else:
        units = units_of(model, storage, blocks)
        devices = dict.fromkeys(units, device_name(device_map))
    named = {device: size for device, size in budgets.items() if device in devices.values()}
    plan = _describe(units, storage, devices, given.budgets or named, offload)
    mentioned = [device_name(d) for d in device_map.values()] if isinstance(device_map, Mapping) else []
    plan.runs_on = given.runs_on if given.devices else next((d for d in mentioned if d not in ("cpu", "disk")), "cpu")
    for device, used in plan.device_bytes.items():
        if device in budgets and used > budgets[device]:
            raise ConfigError(
                f"device_map puts {used:,} bytes on {device}, {used - budgets[device]:,} more than its budget",
                expected=f"at most {budgets[device]:,} (max_memory)",
                hint='raise max_memory, or use device_map="auto"',
            )
    return plan


def _describe(
    units: Mapping[str, Unit], storage: Mapping[str, Storage], devices: dict[str, str], budgets: dict[str, int],
    offload: str,
) -> Plan:  # fmt: skip
    plan = Plan(devices, budgets=budgets, offload=offload)
    counted: set[int] = set()
    for name, unit in units.items():
        plan.nbytes[name], plan.slots[name] = unit.nbytes, 0 if unit.is_table else unit.slot_bytes
        kinds: dict[str, int] = {}
        count = 0
        for owners in unit.owners:
            p = owners[0].module._parameters[owners[0].name]
            assert p is not None
            kept = storage[owners[0].path]
            kind = str(kept.spec) if kept.spec is not None else str(kept.dtype or p.dtype).removeprefix("torch.")
            kinds[kind] = kinds.get(kind, 0) + p.numel()
            count += 0 if id(owners) in counted else p.numel()
            counted.add(id(owners))
        plan.parameters[name] = count
        plan.stored[name] = ", ".join(sorted(kinds, key=lambda k: -kinds[k]))
    return plan


def _from_mapping(
    model: nn.Module, storage: Mapping[str, Storage], blocks: set[str], device_map: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Unit]]:
    """The device of each unit from a map of names or globs, the longest that names it."""
    if not device_map:
        raise ConfigError("device_map is empty", expected='at least {"": device}')
    given = {str(name): device_name(device) for name, device in device_map.items()}
    names = [n for n, _ in model.named_modules(remove_duplicate=False)] + list(storage)
    names += [n for n, _ in model.named_buffers(remove_duplicate=False)]
    check_patterns(given.keys() - set(names), names, "device_map")
    globs = [n for n in given if any(c in n for c in "*?[")]

    def device_of(path: str) -> str | None:
        parts = path.split(".")
        above = (".".join(parts[:i]) for i in range(len(parts) + 1))
        found = [n for n in above if n in given] + [n for n in globs if matches(path, n)]
        return given[max(found, key=lambda n: (len(n), n))] if found else None

    def device_of_any(owners: list[Owner]) -> str | None:
        """A shared parameter lies where the first of its names says that is named."""
        return next(filter(None, (device_of(owner.path) for owner in owners)), None)

    left_out = [owners[0].path for owners in owners_of(model) if device_of_any(owners) is None]
    if left_out:
        raise ConfigError(
            f"device_map leaves out {len(left_out)} parameters: {', '.join(left_out[:5])}"
            + ("…" if len(left_out) > 5 else ""),
            expected="a device for every parameter",
            hint='add their modules, or {"": device} for all that is not named',
        )
    for owners in owners_of(model):
        told: dict[tuple[int, str], str] = {}  # by place: a shared module has one
        for owner in owners:
            if (device := device_of(owner.path)) is not None:
                told.setdefault((id(owner.module), owner.name), f"{owner.path} on {device}")
        if len({text.rpartition(" ")[2] for text in told.values()}) > 1:
            warnings.warn(
                f"device_map puts one shared weight in several places ({', '.join(told.values())}): the first counts",
                FewbitsWarning,
                stacklevel=5,
            )
    splits = [units_of(model, storage, blocks, split=split) for split in ("", "modules", "parameters")]
    for units in sorted(splits, key=lambda units: units.keys() != given.keys()):  # a plan's own units stay as they are
        said = {name: set(map(device_of_any, unit.owners)) or {device_of(name)} for name, unit in units.items()}
        if all(len(devices) == 1 for devices in said.values()):
            break
    main = next((d for ds in said.values() for d in ds if d not in (None, "cpu", "disk")), "cpu")
    return {name: next(iter(devices)) or main for name, devices in said.items()}, units


def _decide(
    model: nn.Module, storage: Mapping[str, Storage], blocks: set[str], budgets: dict[str, int], strategy: str,
    offload: str,
) -> Plan:  # fmt: skip
    gpus = [d for d in budgets if d not in ("cpu", "disk")]
    attempts = [("", True), ("", False), ("modules", False), ("parameters", False)]
    if sum(unit.nbytes for unit in units_of(model, storage, blocks).values()) > sum(budgets.values()):
        attempts = attempts[-1:]  # for what the error says
    for split, neighbours in attempts:
        units = units_of(model, storage, blocks, split=split)
        groups = _together(units, blocks, neighbours=neighbours)
        sizes = [sum(u.nbytes for u in group) for group in groups]
        slots = [max(0 if u.is_table else u.slot_bytes for u in group) for group in groups]
        found = _resident(sizes, [budgets[g] for g in gpus], strategy)
        places = None if found is None else [gpus[i] for i in found]
        mode = offload
        if places is None:
            buffers = sum(b.nbytes for b in model.buffers())
            places, mode = _spilled(groups, sizes, slots, list(units), blocks, gpus, budgets, offload, buffers)
            if places is not None and mode != "compute" and strategy != "sequential":
                repeat = [any(u.name in blocks for u in group) for group in groups]
                places = _interleaved(places, sizes, repeat)
        if places is None and split == "parameters":
            for kept in (2 * max(slots), 0):  # the CPU's slots for what lies on disk, if there is room for them
                found = pack(sizes, list((budgets | {"cpu": budgets["cpu"] - kept}).values()))
                if found is not None:
                    places, mode = [list(budgets)[i] for i in found], "compute"
                    break
        if places is not None:
            devices = {u.name: place for group, place in zip(groups, places, strict=True) for u in group}
            plan = _describe(units, storage, {name: devices[name] for name in units}, budgets, mode)
            plan.runs_on = gpus[0] if gpus and mode != "compute" else "cpu"
            return plan
    raise _does_not_fit(sizes, budgets)


def _does_not_fit(sizes: list[int], budgets: dict[str, int]) -> ConfigError:
    """The error for tensors of these sizes that no device holds, with the budgets that would do."""
    total, room = sum(sizes), sum(budgets.values())
    enough = {}
    for device in ("disk", "cpu"):
        enough[device] = budgets[device] + max(total - room, 0)
        if pack(sizes, list((budgets | {device: enough[device]}).values())) is None:  # then: all that the others leave
            found = pack(sizes, list((budgets | {device: total}).values())) or []
            here = list(budgets).index(device)
            enough[device] = sum(size for size, place in zip(sizes, found, strict=True) if place == here)
    wrong = f"{total - room:,} are missing" if total > room else f"none splits a tensor, and one takes {max(sizes):,}"
    return ConfigError(
        f"the model takes {total:,} bytes as it is to be stored, and the budgets hold {room:,}: {wrong}",
        expected=", ".join(f"{device} {size:,}" for device, size in budgets.items()),
        hint=f'raise max_memory: "disk" to {enough["disk"]:,} or "cpu" to {enough["cpu"]:,} would do; '
        "or choose a smaller format",
    )


def _resident(sizes: list[int], capacities: list[int], strategy: str) -> list[int] | None:
    """The GPU of each group when all of them fit on GPUs."""
    if not capacities:
        return None
    if strategy == "sequential":
        return fill(sizes, capacities)
    if strategy == "balanced":
        return balance(sizes, capacities)
    if strategy == "balanced_low_0":
        return balance_low_first(sizes, capacities)
    for count in range(1, len(capacities) + 1):  # as few as hold it: what moves between GPUs costs time
        if sum(sizes) <= sum(capacities[:count]) and (found := balance(sizes, capacities[:count])) is not None:
            return found
    return None


def _interleaved(places: list[str], sizes: list[int], repeat: list[bool]) -> list[str]:
    """The same, with the blocks that spilled spread evenly among those of the GPU that runs them.

    While the others run, the link has time to bring them. Only blocks of one size change places.
    """
    spilled = [i for i, place in enumerate(places) if repeat[i] and place in ("cpu", "disk")]
    if not spilled or spilled[0] == 0 or places[spilled[0] - 1] in ("cpu", "disk"):
        return places
    start, stop, gpu = spilled[0], spilled[-1] + 1, places[spilled[0] - 1]
    while start > 0 and repeat[start - 1] and places[start - 1] == gpu:
        start -= 1
    if len(spilled) != stop - spilled[0] or len(set(sizes[start:stop])) != 1:
        return places
    count, hosts = stop - start, iter([places[i] for i in spilled])
    turns = [(i + 1) * len(spilled) // count > i * len(spilled) // count for i in range(count)]
    return places[:start] + [next(hosts) if turn else gpu for turn in turns] + places[stop:]


def _spilled(
    groups: list[list[Unit]], sizes: list[int], slots: list[int], order: list[str], blocks: set[str], gpus: list[str],
    budgets: dict[str, int], offload: str, buffers: int,
) -> tuple[list[str] | None, str]:  # fmt: skip
    """The device of each group, and how those that no GPU holds are to run: GPUs first, then "cpu", then "disk".

    Of the ways to choose what goes to the GPUs the one is taken that leaves the fewest bytes to stream. Tables in front
    (and a head that is tied to one) may stay in host memory, where looking up costs next to nothing; what follows the
    blocks, norm and head, may go to a GPU before the last blocks do, so that no buffer has to be as large as a head.
    """
    count = len(groups)
    repeat = [any(u.name in blocks for u in group) for group in groups]
    late = set(order[max((i for i, name in enumerate(order) if name in blocks), default=len(order)) :])
    streamed = [any(u.slot_bytes and not u.is_table and u.name not in late for u in group) for group in groups]
    tables = next((i for i in range(count) if repeat[i] or streamed[i]), count)
    tail = next((i for i in range(count, 0, -1) if repeat[i - 1]), count)
    # Where units of an early group (shared embeddings) come again between later ones, what follows runs on their GPU.
    position = {unit.name: i for i, group in enumerate(groups) for unit in group}
    steps = [position[b] - position[a] for a, b in pairwise(order)]
    returns = any(step > 0 for step in steps[next((i for i, step in enumerate(steps) if step < 0), len(steps)) :])
    best: tuple[int, list[str]] | None = None
    for mode in ("stream", "compute"):
        if not gpus or offload not in (mode, "auto"):
            continue
        needs = slots if mode == "stream" else [0] * count
        for first in dict.fromkeys((tables, 0)):
            for last in dict.fromkeys((tail, count)):
                found = _on_gpus_first(sizes, slots, needs, first, last, gpus, budgets, buffers, returns)
                if found is not None:
                    streams = sum(s for s, slot, d in zip(sizes, slots, found, strict=True) if slot and d not in gpus)
                    if best is None or streams < best[0]:
                        best = streams, found
        if best is not None:
            return best[1], offload if mode == "stream" else "compute"
    host = _host(sizes, slots, budgets)  # no GPU, or none that is large enough even to stream to
    return host, "compute" if gpus else offload


def _on_gpus_first(
    sizes: list[int], slots: list[int], needs: list[int], first: int, last: int, gpus: list[str],
    budgets: dict[str, int], buffers: int, everywhere: bool,
) -> list[str] | None:  # fmt: skip
    """Groups from ``last`` on, and as many as fit of those from ``first`` on, on GPUs; the others not.

    What spills runs on the GPU of the group before it, which keeps two slots of what the largest ``needs``; with
    ``everywhere`` all GPUs do. Next-fit packs the GPUs before that one as far as they go, and leaves it the least.
    """
    ends = [0, *accumulate(sizes)]
    largest = max(needs[:first], default=0)
    for stop in range(last, first - 1, -1):
        largest = max([largest, *needs[stop:last][:1]])
        if ends[first] + ends[last] - ends[stop] > budgets["cpu"] + budgets["disk"]:
            return None
        starts = [first]  # of the groups on each GPU
        used = gpus if stop > first or last < len(sizes) else gpus[:1]  # with nothing on a GPU all runs on the first
        for gpu in used:
            starts[-1] = min(starts[-1], max(stop - 1, first))
            room = budgets[gpu] - buffers - 2 * largest
            if ends[stop] - ends[starts[-1]] + ends[-1] - ends[last] <= room:
                spilled = [*range(first), *range(stop, last)]
                host = _host([sizes[i] for i in spilled], [slots[i] for i in spilled], budgets)
                if host is None:
                    break
                on_gpus = [gpus[bisect_right(starts, i) - 1] for i in range(first, stop)]
                return host[:first] + on_gpus + host[first:] + [gpu] * (len(sizes) - last)
            room = room if everywhere else budgets[gpu]
            starts.append(bisect_right(ends, ends[starts[-1]] + room) - 1 if room >= 0 else starts[-1])
    return None


def _host(sizes: list[int], slots: list[int], budgets: dict[str, int]) -> list[str] | None:
    """ "cpu" as far as it holds, then "disk", for which the CPU keeps two slots."""
    on_cpu, on_disk, largest = sum(sizes), 0, 0
    for count in range(len(sizes), -1, -1):
        if on_disk > budgets["disk"] or 2 * largest > budgets["cpu"]:
            return None
        if on_cpu + 2 * largest <= budgets["cpu"]:
            return ["cpu"] * count + ["disk"] * (len(sizes) - count)
        if count:
            on_cpu, on_disk = on_cpu - sizes[count - 1], on_disk + sizes[count - 1]
            largest = max(largest, slots[count - 1])
    return None
