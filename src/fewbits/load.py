"""Loading: a checkpoint streams through a plan and a quantizer into a model, and never exists twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Checkpoint, open_checkpoint
from fewbits.config import QuantizationConfig, as_config
from fewbits.errors import CheckpointError, FewbitsError, FewbitsWarning
from fewbits.hf import record_config, renaming
from fewbits.match import Target, ignored_by, match
from fewbits.meta import empty_copy
from fewbits.modules import quantize_parameter, stores_transposed
from fewbits.place import Heap, bar, check_values, move_buffers, put
from fewbits.plan import DeviceMap, MaxMemory, Placement, make_plan, planned_bytes, resolve_device
from fewbits.statedict import decode
from fewbits.structure import matches
from fewbits.tensor import check_finite


def load(
    model: nn.Module | Callable[[], nn.Module],
    weights: str | PathLike[str],
    config: QuantizationConfig | str | None = None,
    *,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
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
        device_map: one device: a name, an index, ``{"": device}``, or "auto" for the first GPU with room, else the CPU.
        max_memory: bytes (or ``"10GiB"``) that may be used, by device.
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
    config = as_config(config, **settings)
    empty = empty_copy(model)
    checkpoint = open_checkpoint(weights, revision=revision, token=token)
    targets = match(empty, checkpoint, strict=strict, ignore=ignored_by(empty), rename=renaming(empty))
    plan = _plan_for(empty, targets, config, checkpoint)
    device = resolve_device(device_map, planned_bytes(empty, plan), max_memory)
    with torch.no_grad():
        heap = Heap()
        for group, tensors in _read(checkpoint, targets, plan, progress):
            try:
                _assign(group, tensors, plan, config, device)
            except FewbitsError as error:
                error.locate(group[0].source.file)  # type: ignore[union-attr]  # what is read has a source
                raise
            size = sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # before the next one comes, and before its memory is given back
            heap.passed(size)
        heap.trim()
        move_buffers(empty, device)
    record_config(empty)
    return empty


def _plan_for(
    model: nn.Module, targets: list[Target], config: QuantizationConfig, checkpoint: Checkpoint
) -> dict[str, Placement]:
    """The plan; for a checkpoint that is quantized already, what it holds: nothing is ever quantized twice."""
    stored = {t.path: t.source for t in targets if t.source is not None and t.source.spec is not None}
    if not stored:
        return make_plan(model, config)
    found = {source.spec.format for source in stored.values() if source.spec is not None}
    if config.format is not None and found != {config.format}:
        warnings.warn(
            f"{checkpoint.path} is already quantized to {', '.join(sorted(found))}: it is loaded as it is, "
            f"not as {config.format}",
            FewbitsWarning,
            stacklevel=3,
        )
    plan = make_plan(model, replace(config, format=None, skip_modules=None, overrides=()), strict_patterns=False)
    # int8 does not store its logical dtype: the model's other tensors tell
    plain = [t.source.dtype for t in targets if t.source is not None and not t.is_buffer and t.source.spec is None]
    fallback = next((d for d in plain if d is not None and d.is_floating_point), torch.float16)
    for target in targets:
        source = target.source
        if source is None or source.spec is None:
            continue
        spec = replace(source.spec, threshold=config.llm_int8_threshold, compute_dtype=config.compute_dtype)
        placement = Placement(spec, config.dtype or source.dtype or fallback)
        plan.update((owner.path, placement) for owner in target.owners)
    return plan


def _read(
    checkpoint: Checkpoint, targets: list[Target], plan: Mapping[str, Placement], progress: bool | None
) -> Iterator[tuple[list[Target], dict[str, Tensor]]]:
    """Stream the sources: for each, all the targets that it is for and its tensors by role, once they are all there.

    Each list of targets is one tensor in the model afterwards: what shares its bytes on disk shares them again, unless
    the plan makes different things of it.
    """
    users: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        if target.source is not None:  # the plan has no buffers, so that none becomes one with a parameter
            users.setdefault((target.source.identity, plan.get(target.path)), []).append(target)
    awaiting: dict[str, list[tuple[list[Target], str]]] = {}
    parts: dict[int, dict[str, Tensor]] = {}
    for group in users.values():
        source = group[0].source
        assert source is not None
        parts[id(group)] = {}
        for role, key in source.group.keys.items():
            awaiting.setdefault(checkpoint.tensors[key].name, []).append((group, role))
    total = sum(checkpoint.tensors[name].nbytes for name in awaiting)
    with bar(total, progress, "loading") as shown:
        for name, tensor in checkpoint.stream(awaiting):
            shown.update(tensor.nbytes)
            for group, role in awaiting[name]:
                ready = parts[id(group)]
                ready[role] = tensor
                if len(ready) == len(group[0].source.group.keys):  # type: ignore[union-attr]
                    yield group, parts.pop(id(group))
                del ready
            del tensor


def _assign(
    targets: list[Target],
    tensors: dict[str, Tensor],
    plan: Mapping[str, Placement],
    config: QuantizationConfig,
    device: torch.device,
) -> None:
    first = targets[0]
    owner, source = first.owners[0], first.source
    assert source is not None
    weight = tensors["weight"]
    if first.is_buffer:
        fp32 = any(matches(first.path, pattern) for pattern in config.keep_in_fp32_modules)
        dtype = (torch.float32 if fp32 else config.dtype) if weight.is_floating_point() else None
        buffer = weight.to(device, dtype or weight.dtype)
        for owner in (o for target in targets for o in target.owners):
            owner.module._buffers[owner.name] = buffer
        return
    placement = plan[first.path]
    if source.group.format is None:
        check_values(weight, placement, first.path, CheckpointError)
    value: Tensor
    if source.group.format is not None:
        moved = {role: t if role == "quant_state" else t.to(device) for role, t in tensors.items()}
        assert placement.spec is not None
        assert placement.dtype is not None
        decoded = decode(source.group, moved, placement.dtype, label=first.path, threshold=placement.spec.threshold)
        decoded.spec = replace(decoded.spec, compute_dtype=placement.spec.compute_dtype)
        check_finite(decoded)
        value = decoded.t() if stores_transposed(owner.module, owner.name) else decoded
        value = value.to(placement.dtype)
    elif placement.spec is not None:
        value = quantize_parameter(owner.module, owner.name, weight.to(device), placement.spec, first.path)
        value = value.to(placement.dtype or weight.dtype)
    else:
        value = weight.to(device, (placement.dtype if weight.is_floating_point() else None) or weight.dtype)
    meta = owner.module._parameters[owner.name]
    assert meta is not None
    put([o for target in targets for o in target.owners], value, meta.requires_grad)
