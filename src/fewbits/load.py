"""Loading: a checkpoint streams through a plan and a quantizer into a model, and never exists twice."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Checkpoint, open_checkpoint
from fewbits.config import QuantizationConfig, as_config
from fewbits.decide import STRATEGIES, make_plan
from fewbits.devices import MaxMemory, check_devices, device_name
from fewbits.errors import CheckpointError, FewbitsError, FewbitsWarning
from fewbits.files import OpenFiles, StoredTensor
from fewbits.hf import CONVERTED, is_converted, record_config, renaming
from fewbits.match import Source, Target, ignored_by, match
from fewbits.memory import Arena
from fewbits.meta import empty_copy
from fewbits.modules import quantize_parameter, stores_transposed
from fewbits.place import Heap, bar, check_values
from fewbits.plan import DeviceMap
from fewbits.reader import Staging
from fewbits.spread import CPU, Spread
from fewbits.statedict import decode
from fewbits.storage import Storage, choose_storage
from fewbits.stored import can_quantize_stored, in_turn, quantize_stored
from fewbits.structure import matches
from fewbits.tensor import QuantTensor, not_finite

_LOOK = 16 << 20  # bytes of scales on a GPU that are looked at together


def load(
    model: nn.Module | Callable[[], nn.Module],
    weights: str | PathLike[str],
    config: QuantizationConfig | str | None = None,
    *,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
    offload: str = "auto",
    offload_folder: str | PathLike[str] | None = None,
    no_split_module_classes: Iterable[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **settings: Any,
) -> nn.Module:
    """Load any model quantized, tensor by tensor, without ever holding it in full precision.

    Args:
        model: an ``nn.Module``, best built under ``init_empty_weights()``, or a function that builds one. It gives
            the structure; it is not touched, and a new model is returned.
        weights: a state-dict file, an index, a folder, or a hub id (see :func:`fewbits.checkpoint.open_checkpoint`).
        config: a format's name (``"nf4"``, ``"fp4"``, ``"int8"``), a :class:`QuantizationConfig`, or ``None`` to load
            the checkpoint as it is. One that is already quantized is taken as it is in any case, with a warning if
            that is not the format asked for.
        device_map: where its parts go. "auto": as few GPUs, from the first on, as hold it, evenly; else all of them
            as far as they go, then host memory, then disk. "balanced": all GPUs evenly; "balanced_low_0": as little
            as possible on the first; "sequential": one GPU after the other. One device: a name, an index, "cpu",
            "disk". A dictionary from names or globs of modules to devices, of which the longest name counts; a
            :class:`Plan`. What lies on no GPU is quantized all the same.
        max_memory: bytes (or ``"10GiB"``) that may be used, by device (0, "cuda:0", "cpu", "disk"). GPUs that are not
            named are not used then. By default what is free, less a tenth.
        offload: how parts in host memory run beside a GPU. "stream": their weights are brought to it, while the part
            before runs. "compute": on the CPU. "auto": whichever a short measurement found faster for one like it;
            embeddings always look up rows where the table lies. What lies on disk streams.
        offload_folder: for what lies on disk, unless the checkpoint holds it as it is to be used already: a file
            without a name, gone with the model. By default the system's folder for temporary files.
        no_split_module_classes: classes of modules that stay on one device; by default modules alike that repeat in
            a list, and what a transformers model names itself.
        strict: whether names that the model does not have are an error.
        progress: show a progress bar; by default where stderr is a terminal.
        revision, token: for a hub id.
        settings: fields of :class:`QuantizationConfig` beside a format's name.

    Returns:
        A new model of the same class, in the training mode of ``model``, its quantized parameters frozen.

    Raises:
        ConfigError: a configuration that cannot be meant.
        CheckpointError: a checkpoint that is damaged, absent, ambiguous, or does not belong to the model, or a value
            in it that is NaN, infinite, or beyond what it is to become.
    """
    return load_into(
        lambda: empty_copy(model), weights, as_config(config, **settings), device_map=device_map, max_memory=max_memory,
        offload=offload, offload_folder=offload_folder, no_split_module_classes=no_split_module_classes, strict=strict,
        progress=progress, revision=revision, token=token,
    )  # fmt: skip


def load_into(
    build: Callable[[], nn.Module],
    weights: str | PathLike[str],
    config: QuantizationConfig,
    *,
    device_map: DeviceMap,
    max_memory: MaxMemory | None,
    offload: str,
    offload_folder: str | PathLike[str] | None,
    no_split_module_classes: Iterable[str] | None,
    strict: bool,
    progress: bool | None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """:func:`load` for the empty model that ``build`` makes."""
    checkpoint = open_checkpoint(weights, revision=revision, token=token)
    with no_garbage_collection(), _staging(checkpoint, device_map, max_memory) as staging:
        empty = build()
        try:
            targets = match(empty, checkpoint, strict=strict, ignore=ignored_by(empty), rename=renaming(empty))
        except CheckpointError as error:
            error.hint = error.hint or (CONVERTED if is_converted(empty, checkpoint.tensors) else None)
            raise
        storage = _storage_for(empty, targets, config, checkpoint)
        plan = make_plan(
            empty, storage, device_map, max_memory=max_memory, offload=offload, offload_folder=offload_folder,
            no_split_module_classes=no_split_module_classes,
        )  # fmt: skip
        check_devices([*plan.devices.values(), *plan.execution.values()])
        on_disk = sum(plan.nbytes[name] for name, device in plan.devices.items() if device == "disk")
        if on_disk and (device_map is None or isinstance(device_map, str)) and device_map != "disk":
            warnings.warn(
                f"{on_disk:,} of {plan.total:,} bytes fit neither on a GPU nor in memory: they are read from disk "
                "whenever they are needed",
                FewbitsWarning,
                stacklevel=3,
            )
        spread = Spread(
            empty, storage, plan, offload_folder=offload_folder, no_split_module_classes=no_split_module_classes
        )
        stream = _read(checkpoint, targets, storage, spread, progress, staging)
        with torch.no_grad(), contextlib.closing(stream) as groups:
            heap = Heap()
            unsure: list[tuple[str, Source, Tensor]] = []  # scales on a GPU, looked at last: each look waits for it
            for group, tensors in groups:
                try:
                    _assign(group, tensors, storage, config, spread, unsure)
                except FewbitsError as error:
                    error.locate(group[0].source.file)  # type: ignore[union-attr]  # what is read has a source
                    raise
                passed = (t for t in tensors.values() if t.device == CPU and not isinstance(t, QuantTensor))
                size = sum(tensor.nbytes for tensor in passed)
                del tensors  # before the next one comes, and before its memory is given back
                heap.passed(size)
            heap.trim()
            _check_scales(unsure)
            spread.finish()
        record_config(empty)
        return empty


@contextlib.contextmanager
def _staging(
    checkpoint: Checkpoint, device_map: DeviceMap, max_memory: MaxMemory | None
) -> Generator[Staging | None, None, None]:
    """The reader's pinned buffers, begun while the model is built, where it is plain that a GPU will be read to."""
    device = None
    if max_memory is None and torch.cuda.is_available():
        if device_map is None or device_map in STRATEGIES:
            device = torch.device("cuda", torch.cuda.current_device())
        elif isinstance(device_map, (str, int, torch.device)) and device_name(device_map).startswith("cuda"):
            device = torch.device(device_name(device_map))
    if device is None or device.index >= torch.cuda.device_count():
        yield None
        return
    staging = Staging(sum(stored.nbytes for stored in checkpoint.tensors.values()), device)
    try:
        yield staging
    finally:
        staging.close()


@contextlib.contextmanager
def no_garbage_collection() -> Generator[None, None, None]:
    """Python's search for cycles is off: over the many objects of a large model one costs a fifth of a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _storage_for(
    model: nn.Module, targets: list[Target], config: QuantizationConfig, checkpoint: Checkpoint
) -> dict[str, Storage]:
    """How each parameter is stored; for a quantized checkpoint as it is there: nothing is ever quantized twice."""
    stored = {t.path: t.source for t in targets if t.source is not None and t.source.spec is not None}
    if not stored:
        storage = choose_storage(model, config)
        for target in targets:  # where no dtype is asked for it is the checkpoint's
            kept = storage.get(target.path)
            if kept is not None and kept.dtype is None and target.source is not None:
                storage.update((owner.path, replace(kept, dtype=target.source.dtype)) for owner in target.owners)
        return storage
    found = {source.spec.format for source in stored.values() if source.spec is not None}
    if config.format is not None and found != {config.format}:
        warnings.warn(
            f"{checkpoint.path} is already quantized to {', '.join(sorted(found))}: it is loaded as it is, "
            f"not as {config.format}",
            FewbitsWarning,
            stacklevel=4,
        )
    storage = choose_storage(
        model, replace(config, format=None, skip_modules=None, overrides=()), strict_patterns=False
    )
    # int8 does not store its logical dtype: the model's other tensors tell
    plain = [t.source.dtype for t in targets if t.source is not None and not t.is_buffer and t.source.spec is None]
    fallback = next((d for d in plain if d is not None and d.is_floating_point), torch.float16)
    for target in targets:
        source = target.source
        if source is None or source.spec is None:
            continue
        spec = replace(source.spec, threshold=config.llm_int8_threshold, compute_dtype=config.compute_dtype)
        kept = Storage(spec, config.dtype or source.dtype or fallback)
        storage.update((owner.path, kept) for owner in target.owners)
    return storage


def _read(
    checkpoint: Checkpoint,
    targets: list[Target],
    storage: Mapping[str, Storage],
    spread: Spread,
    progress: bool | None,
    staging: Staging | None,
) -> Generator[tuple[list[Target], dict[str, Tensor]], None, None]:
    """Stream the sources: for each, all the targets that it is for and its tensors by role, once they are all there.

    Each list of targets is one tensor in the model afterwards: what shares its bytes on disk shares them again, unless
    it is to be stored in different ways, or to lie on different devices. A weight that a CPU quantizes from its file
    comes so, last.
    """
    users: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        if target.source is not None:  # no buffer is stored in any way, so that none becomes one with a parameter
            alike = target.source.identity, storage.get(target.path), spread.devices.get(target.path)
            users.setdefault(alike, []).append(target)
    awaiting: dict[str, list[tuple[list[Target], str]]] = {}
    parts: dict[int, dict[str, Tensor]] = {}
    devices: dict[str, torch.device] = {}
    complete = []
    in_files: list[tuple[StoredTensor, list[Target]]] = []
    for group in users.values():
        first, source = group[0], group[0].source
        assert source is not None
        ready = parts[id(group)] = {**source.known}
        ready_as_stored = not first.is_buffer and _is_ready(source, storage[first.path])
        if source.spec is None and not first.is_buffer and spread.works_on(first.path, ready=ready_as_stored) == CPU:
            stored, owner = checkpoint.tensors[source.group.keys["weight"]], first.owners[0]
            spec = storage[first.path].spec
            if can_quantize_stored(stored, spec) and not stores_transposed(owner.module, owner.name):
                in_files.append((stored, group))
                continue
        there = spread.stays_in_checkpoint(first.path, source, checkpoint) if ready_as_stored else []
        for role, key in source.group.keys.items():
            if role in ready:
                continue
            if key in there:
                ready[role] = spread.map(checkpoint, key)
                continue
            name = checkpoint.tensors[key].name
            awaiting.setdefault(name, []).append((group, role))
            if not first.is_buffer and role in ("weight", "absmax", "nested_absmax"):
                devices.setdefault(name, spread.works_on(first.path, ready=ready_as_stored))
        if len(ready) == len(source.group.keys):
            complete.append(group)
    in_files.sort(key=lambda item: (str(item[0].file), item[0].offset))
    total = sum(checkpoint.tensors[name].nbytes for name in awaiting) + sum(stored.nbytes for stored, _ in in_files)
    for group in complete:
        yield group, parts.pop(id(group))
    stream = checkpoint.stream(awaiting, lambda name: devices.get(name, CPU), staging)
    with bar(total, progress, "loading") as shown, contextlib.closing(stream):
        for name, tensor in stream:
            shown.set_postfix_str(checkpoint.tensors[name].file.name, refresh=False)
            shown.update(tensor.nbytes)
            for group, role in awaiting[name]:
                ready = parts[id(group)]
                ready[role] = tensor
                if len(ready) == len(group[0].source.group.keys):  # type: ignore[union-attr]
                    yield group, parts.pop(id(group))
                del ready
            del tensor
        with contextlib.closing(OpenFiles()) as files, contextlib.closing(Arena()) as arena:
            turns = in_turn([stored for stored, _ in in_files], files)
            for stored, (_, group) in zip(turns, in_files, strict=True):
                shown.set_postfix_str(stored.file.name, refresh=False)
                path = group[0].path
                yield group, {"weight": quantize_stored(stored, storage[path], path, arena, files)}
                shown.update(stored.nbytes)


def _is_ready(source: Source, storage: Storage) -> bool:
    """Whether the stored bytes are those that the model is to have."""
    return source.spec is not None or (storage.spec is None and storage.dtype in (None, source.dtype))


def _check_scales(unsure: list[tuple[str, Source, Tensor]]) -> None:
    """Raise for the first scales that are not finite; many tensors to a look, since a look at each costs more."""
    start = 0
    while start < len(unsure):
        end, size = start, 0
        while end < len(unsure) and size < _LOOK and unsure[end][2].device == unsure[start][2].device:
            size += unsure[end][2].nbytes
            end += 1
        batch = unsure[start:end]
        if not bool(torch.cat([scales.flatten() for _, _, scales in batch]).isfinite().all()):
            path, source, _ = next(item for item in batch if not bool(item[2].isfinite().all()))
            assert source.spec is not None
            error = not_finite(path, source.spec)
            error.locate(source.file)
            raise error
        start = end


def _assign(
    targets: list[Target],
    tensors: dict[str, Tensor],
    storage: Mapping[str, Storage],
    config: QuantizationConfig,
    spread: Spread,
    unsure: list[tuple[str, Source, Tensor]],
) -> None:
    first = targets[0]
    owner, source = first.owners[0], first.source
    assert source is not None
    weight = tensors["weight"]
    if first.is_buffer:
        fp32 = any(matches(first.path, pattern) for pattern in config.keep_in_fp32_modules)
        dtype = (torch.float32 if fp32 else config.dtype) if weight.is_floating_point() else None
        buffer = weight.to(dtype or weight.dtype)
        for owner in (o for target in targets for o in target.owners):
            owner.module._buffers[owner.name] = buffer
        return
    kept = storage[first.path]
    if source.group.format is None and not isinstance(weight, QuantTensor):
        check_values(weight, kept, first.path, CheckpointError)
    value: Tensor
    if isinstance(weight, QuantTensor):
        value = weight.relabelled(kept.dtype or weight.dtype)
    elif source.group.format is not None:
        assert kept.spec is not None
        assert kept.dtype is not None
        decoded = decode(source.group, tensors, kept.dtype, label=first.path, threshold=kept.spec.threshold)
        if decoded.spec.compute_dtype != kept.spec.compute_dtype:
            decoded.spec = replace(decoded.spec, compute_dtype=kept.spec.compute_dtype)
        scales = [t for t in decoded.inner_tensors.values() if t.is_floating_point()]
        if decoded.is_cuda:
            unsure += [(first.path, source, t) for t in scales]
        elif not all(bool(t.isfinite().all()) for t in scales):
            raise not_finite(first.path, kept.spec)
        decoded = decoded.relabelled(kept.dtype)
        value = decoded.t() if stores_transposed(owner.module, owner.name) else decoded
    elif kept.spec is not None:
        quantized = quantize_parameter(owner.module, owner.name, weight, kept.spec, first.path, known_finite=True)
        value = quantized.relabelled(kept.dtype or weight.dtype)
    else:
        value = weight.to((kept.dtype if weight.is_floating_point() else None) or weight.dtype)
    meta = owner.module._parameters[owner.name]
    assert meta is not None
    spread.put([o for target in targets for o in target.owners], value, meta.requires_grad)
