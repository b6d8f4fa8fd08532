"""The plan: for each parameter, the format it gets, the dtype if it gets none, and the device.

A plan is plain data, made from the model's structure and the configuration before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from fewbits.config import QuantizationConfig
from fewbits.errors import ConfigError, UnsupportedError
from fewbits.formats import QuantSpec, quantized_bytes
from fewbits.modules import is_linear, stores_transposed
from fewbits.structure import check_patterns, matches, names_parameter, output_heads

MaxMemory = Mapping[int | str, int | str]
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None


@dataclass(frozen=True)
class Placement:
    """What becomes of one parameter.

    Attributes:
        spec: how it is quantized, or ``None``.
        dtype: what it is cast to if it is not quantized (``None``: left as it is); the logical dtype if it is.
    """

    spec: QuantSpec | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Owner:
    """A module and the name in it under which it holds a parameter."""

    module: nn.Module
    name: str
    path: str  # dotted, from the model


def owners_of(model: nn.Module) -> list[list[Owner]]:
    """The places of every parameter, those of a shared one together, in the order of registration."""
    groups: dict[int, list[Owner]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, p in module._parameters.items():
            if p is not None:
                path = f"{prefix}.{name}" if prefix else name
                groups.setdefault(id(p), []).append(Owner(module, name, path))
    return list(groups.values())


def make_plan(model: nn.Module, config: QuantizationConfig, *, strict_patterns: bool = True) -> dict[str, Placement]:
    """Decide format and dtype for every parameter, shared ones once for all their names.

    Explicit overrides go first, then ``keep_in_fp32_modules``, then ``skip_modules`` (by default the output heads),
    then ``config.format`` for the weight of every linear layer.

    Args:
        model: on any device, meta included.
        config: what is wanted.
        strict_patterns: whether a pattern that names nothing is an error (not so for one from a checkpoint).

    Raises:
        ConfigError: a pattern that names nothing, or a parameter that the wanted format cannot hold.
    """
    groups = owners_of(model)
    paths = [owner.path for owners in groups for owner in owners]
    if strict_patterns:
        names = [n for n, _ in model.named_modules(remove_duplicate=False) if n] + paths
        check_patterns((name for name, _ in config.overrides), names, "overrides")
        check_patterns(config.keep_in_fp32_modules, names, "keep_in_fp32_modules")
        check_patterns(config.skip_modules or (), names, "skip_modules")
    skipped = config.skip_modules
    if skipped is None:
        skipped = tuple(output_heads(model)) if config.format is not None else ()

    def decide(owners: list[Owner]) -> Placement:
        shape = owners[0].module._parameters[owners[0].name].shape  # type: ignore[union-attr]
        floating = owners[0].module._parameters[owners[0].name].is_floating_point()  # type: ignore[union-attr]
        for pattern, format in config.overrides:
            named = [
                o for o in owners if names_parameter(o.path, pattern) or (matches(o.path, pattern) and _may_hold(o))
            ]
            if format is not None and named:
                if len(shape) < 2 or not floating:
                    raise ConfigError(
                        f"a parameter of shape {list(shape)} cannot be {format}",
                        parameter=owners[0].path,
                        expected="a floating-point parameter of two dimensions or more",
                    )
                return Placement(config.spec(format), config.dtype)
            if format is None and any(matches(o.path, pattern) for o in owners):
                return Placement(None, config.dtype)
        if any(matches(o.path, p) for p in config.keep_in_fp32_modules for o in owners):
            return Placement(None, torch.float32)
        if any(matches(o.path, p) for p in skipped for o in owners) or config.format is None:
            return Placement(None, config.dtype)
        linear = any(o.name == "weight" and is_linear(o.module) for o in owners)
        wanted = linear and floating and len(shape) == 2 and shape.numel() > 0
        return Placement(config.spec(config.format) if wanted else None, config.dtype)

    return {owner.path: placement for owners in groups for placement in [decide(owners)] for owner in owners}


def _may_hold(owner: Owner) -> bool:
    """Whether naming a module in ``overrides`` means this parameter of it: layers' weights, not norms or biases."""
    return owner.name == "weight" and (is_linear(owner.module) or isinstance(owner.module, nn.Embedding))


def planned_bytes(model: nn.Module, plan: Mapping[str, Placement]) -> int:
    """Bytes of all parameters and buffers once the plan is carried out."""
    total = sum(b.nbytes for b in model.buffers())
    for owners in owners_of(model):
        owner = owners[0]
        p = owner.module._parameters[owner.name]
        assert p is not None
        placement = plan[owner.path]
        if placement.spec is not None:
            shape = p.shape[::-1] if stores_transposed(owner.module, owner.name) else p.shape
            total += quantized_bytes(placement.spec, shape)
        else:
            dtype = placement.dtype if placement.dtype is not None and p.is_floating_point() else p.dtype
            total += p.numel() * dtype.itemsize
    return total


# ------------------------------------------------------------------------------------------------- devices


def parse_bytes(size: str | int, argument: str) -> int:
    """Bytes from ``"10GB"`` (10^9), ``"10GiB"`` (2^30), ``"500MB"`` or a number.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(I?)B?\s*", str(size), re.IGNORECASE)
    if match is None or isinstance(size, bool):
        raise ConfigError(f"{argument} is {size!r}", expected='bytes as a number, or like "10GiB" or "500MB"')
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _one_device(value: str | int | torch.device) -> torch.device:
    try:
        device = torch.device(f"cuda:{value}") if isinstance(value, int) else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device_map: {value!r} is not a device", expected='"auto", "cpu", "cuda:0", 0 or {"": device}'
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device_map: {device} is wanted, and torch sees no CUDA GPU", hint='use device_map="auto" or "cpu"'
            )
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device_map: there is no {device}", expected=f"an index below {torch.cuda.device_count()}"
            )
    return device


def resolve_device(device_map: DeviceMap, needed: int, max_memory: MaxMemory | None = None) -> torch.device:
    """The one device that the model goes to.

    ``None`` and the names "auto", "balanced", "balanced_low_0" and "sequential" choose the first GPU whose free memory
    (or ``max_memory``) holds ``needed`` bytes, else the CPU.

    Raises:
        ConfigError: an unknown device, or a budget that does not hold the model.
        UnsupportedError: a map over several devices.
    """
    budgets = {str(k): parse_bytes(v, f"max_memory[{k!r}]") for k, v in (max_memory or {}).items()}
    if isinstance(device_map, Mapping):
        devices = {_one_device(d) if d != "disk" else "disk" for d in device_map.values()}
        if not devices:
            raise ConfigError("device_map is empty", expected='at least {"": device}')
        if len(devices) > 1 or "disk" in devices:
            raise UnsupportedError(
                f"device_map spreads the model over {', '.join(sorted(map(str, devices)))}",
                expected="one device for the whole model",
                hint='give one device, or device_map="auto"',
            )
        device_map = devices.pop()
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        tried = []
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            room = budgets.get(str(index), 0 if budgets and str(index) not in budgets else None)
            room = torch.cuda.mem_get_info(index)[0] if room is None else room
            tried.append(f"cuda:{index} {room:,}")
            if needed <= room:
                return torch.device("cuda", index)
        room = budgets.get("cpu", psutil.virtual_memory().available)
        if needed <= room:
            return torch.device("cpu")
        raise ConfigError(
            f"the quantized model takes {needed:,} bytes, more than any one device has room for",
            expected=f"at most {', '.join([*tried, f'cpu {room:,}'])}",
            hint="choose a smaller format, or raise max_memory",
        )
    device = _one_device(device_map)
    key = str(device.index) if device.type == "cuda" else device.type
    if key in budgets and needed > budgets[key]:
        raise ConfigError(
            f"the quantized model takes {needed:,} bytes on {device}", expected=f"at most {budgets[key]:,} (max_memory)"
        )
    return device
