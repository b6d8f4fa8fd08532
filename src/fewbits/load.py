"""Loading: a checkpoint streams through a plan and a quantizer into a model, and never exists twice."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fewbits.checkpoint import Checkpoint, local_folder, open_checkpoint
from fewbits.config import QuantizationConfig, as_config
from fewbits.errors import CheckpointError, ConfigError, FewbitsWarning
from fewbits.integrations.hf import build_empty, read_config, record_config, recorded_settings
from fewbits.match import Target, ignored_by, match
from fewbits.meta import empty_copy
from fewbits.modules import install, quantize_parameter, stores_transposed
from fewbits.plan import DeviceMap, Placement, make_plan, owners_of, planned_bytes, resolve_device
from fewbits.statedict import decode
from fewbits.tensor import QuantTensor, check_finite

MaxMemory = Mapping[int | str, int | str]


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
        ConfigError: a configuration that cannot be meant, or a weight that cannot be quantized.
        CheckpointError: a checkpoint that is damaged, absent, ambiguous, or does not belong to the model.
    """
    config = as_config(config, **settings)
    empty = empty_copy(model)
    checkpoint = open_checkpoint(weights, revision=revision, token=token)
    targets = match(empty, checkpoint, strict=strict, ignore=ignored_by(empty))
    plan = _plan_for(empty, targets, config, checkpoint)
    device = resolve_device(device_map, planned_bytes(empty, plan), max_memory)
    with torch.no_grad():
        for target, tensors in _read(checkpoint, targets, progress):
            _assign(target, tensors, plan, device)
        _move_buffers(empty, device)
    record_config(empty)
    return empty


def quantize(
    model: nn.Module,
    config: QuantizationConfig | str,
    *,
    device_map: DeviceMap = None,
    progress: bool | None = None,
    **settings: Any,
) -> nn.Module:
    """Quantize a model that is in memory, in place, one parameter at a time.

    Args:
        model: changed in place; parameters that are quantized already stay as they are.
        config, settings, progress: as for :func:`load`.
        device_map: one device to put the whole model on; by default each parameter stays where it is.

    Returns:
        The same model.

    Raises:
        ConfigError: a configuration that cannot be meant, a parameter without values (on the meta device), or one that
            holds a NaN or an infinity; the model is then as it was.
    """
    config = as_config(config, **settings)
    if config.format is None and not config.overrides:
        raise ConfigError("no format is given", expected='a format, such as "nf4" or "int8"')
    plan = make_plan(model, config)
    device = None if device_map is None else resolve_device(device_map, planned_bytes(model, plan))
    groups = owners_of(model)
    with torch.no_grad():
        for owners in groups:  # look at everything before anything is changed
            p = owners[0].module._parameters[owners[0].name]
            assert p is not None
            if p.is_meta:
                raise ConfigError("the parameter has no values", parameter=owners[0].path, hint="use fewbits.load")
            spec = plan[owners[0].path].spec
            if spec is not None and not isinstance(p, QuantTensor):
                limit = 65504.0 if spec.format == "int8" else torch.inf  # int8 passes through fp16
                if not bool(p.isfinite().all()) or float(p.abs().max()) > limit:
                    raise ConfigError(
                        f"the weight holds values that are NaN, infinite or beyond {limit:g}", parameter=owners[0].path
                    )
        for owners in _bar(groups, progress, "quantizing"):
            p = owners[0].module._parameters[owners[0].name]
            assert p is not None
            placement = plan[owners[0].path]
            value: Tensor = p.data if device is None else p.data.to(device)
            if placement.spec is not None and not isinstance(value, QuantTensor):
                dtype = placement.dtype or value.dtype
                value = quantize_parameter(owners[0].module, owners[0].name, value, placement.spec, owners[0].path)
                value = value.to(dtype)
            elif not isinstance(value, QuantTensor) and value.is_floating_point():
                value = value.to(placement.dtype or value.dtype)
            elif placement.dtype is not None and value.is_floating_point():
                value = value.to(placement.dtype)
            _put(owners, value, p.requires_grad)
            del p, value
        if device is not None:
            _move_buffers(model, device)
    record_config(model)
    return model


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
    checkpoint: Checkpoint, targets: list[Target], progress: bool | None
) -> Iterator[tuple[list[Target], dict[str, Tensor]]]:
    """Stream the sources: for each, all the targets that it is for and its tensors by role, once they are all there.

    Each caller's target list is one tensor in the model afterwards: bytes that are shared on disk are shared again.
    """
    users: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        if target.source is not None:
            users.setdefault(target.source.identity, []).append(target)
    awaiting: dict[str, list[tuple[list[Target], str]]] = {}
    parts: dict[int, dict[str, Tensor]] = {}
    for group in users.values():
        source = group[0].source
        assert source is not None
        parts[id(group)] = {}
        for role, key in source.group.keys.items():
            awaiting.setdefault(checkpoint.tensors[key].name, []).append((group, role))
    total = sum(checkpoint.tensors[name].nbytes for name in awaiting)
    shown = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not shown) as bar:
        for name, tensor in checkpoint.stream(awaiting):
            bar.update(tensor.nbytes)
            for group, role in awaiting[name]:
                ready = parts[id(group)]
                ready[role] = tensor
                if len(ready) == len(group[0].source.group.keys):  # type: ignore[union-attr]
                    yield group, parts.pop(id(group))
                del ready
            del tensor


def _assign(
    targets: list[Target], tensors: dict[str, Tensor], plan: Mapping[str, Placement], device: torch.device
) -> None:
    first = targets[0]
    owner, source = first.owners[0], first.source
    assert source is not None
    weight = tensors["weight"]
    if first.is_buffer:
        dtype = next((p.dtype for p in plan.values() if p.spec is None), None)
        cast = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        for target in targets:
            target.owners[0].module._buffers[target.owners[0].name] = weight.to(device, cast)
        return
    placement = plan[first.path]
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
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(
                "the parameter holds values that are NaN or infinite"
                + (f" in {value.dtype}" if value.dtype != weight.dtype else ""),
                file=None,
                parameter=first.path,
                hint="repair the checkpoint, or choose a dtype that holds it",
            )
    meta = owner.module._parameters[owner.name]
    assert meta is not None
    _put([o for target in targets for o in target.owners], value, meta.requires_grad)


def _put(owners: Any, value: Tensor, requires_grad: bool) -> None:
    """Make one parameter of ``value`` and give it to all its owners."""
    quantized = isinstance(value, QuantTensor)
    floating = value.is_floating_point()
    parameter = nn.Parameter(value, requires_grad=requires_grad and floating and not quantized)
    for owner in owners:
        if quantized:
            install(owner.module, owner.name, parameter)
        else:
            owner.module._parameters[owner.name] = parameter


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _bar(items: list[Any], progress: bool | None, what: str) -> Any:
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(items, desc=what, disable=not shown)


# ------------------------------------------------------------------------------------------------- transformers


def from_pretrained(
    path: str | PathLike[str],
    config: QuantizationConfig | str | None = None,
    *,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
    strict: bool = True,
    progress: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **settings: Any,
) -> Any:
    """Load a transformers model quantized: its class and configuration come from ``config.json``.

    A checkpoint that is already quantized (by fewbits, or by transformers with bitsandbytes) needs no format.

    Args:
        path: a folder with ``config.json`` and weights, or a hub id.
        config, device_map, max_memory, strict, progress, revision, token, settings: as for :func:`load`.

    Returns:
        The model, in evaluation mode.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError, CheckpointError: as for :func:`load`.
    """
    folder = local_folder(path, revision=revision, token=token)
    model_config = read_config(folder)
    config = as_config(config, **settings)
    recorded = recorded_settings(model_config)
    if recorded and config == QuantizationConfig(**settings) and config.format is None:
        config = QuantizationConfig(**{**recorded, **settings})
    model = build_empty(model_config, folder)
    loaded = load(model, folder, config, device_map=device_map, max_memory=max_memory, strict=strict, progress=progress)
    return loaded.eval()
