"""Devices by name and what may be used of each: ``"cuda:0"``, ``"cpu"``, ``"disk"``, and bytes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import psutil
import torch

from fewbits.errors import ConfigError

MaxMemory = Mapping[int | str, int | str]


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
    return int(Fraction(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def device_name(value: str | int | torch.device, argument: str = "device_map") -> str:
    """``"cuda:0"``, ``"cpu"``, ``"disk"`` …: the one way to write each device.

    Raises:
        ConfigError: it is none.
    """
    if value == "disk":
        return "disk"
    text = f"cuda:{value}" if str(value).isdigit() else str(value)
    try:
        device = torch.device(text)
        if str(device) != text:  # torch takes an index modulo 256
            raise RuntimeError(f"torch reads it as {device}")
    except RuntimeError as error:
        raise ConfigError(
            f"{argument}: {value!r} is not a device", expected='"auto", "cpu", "disk", "cuda:0", 0 or {name: device}'
        ) from error
    if device.type == "meta":
        raise ConfigError(f"{argument}: nothing can lie on the meta device", expected="a real device")
    if device.type == "cpu":
        return "cpu"
    if text == "cuda":
        return f"cuda:{torch.cuda.current_device() if torch.cuda.is_available() else 0}"
    return str(device)


def check_devices(names: Iterable[str]) -> None:
    """Raise for a device that this machine does not have.

    Raises:
        ConfigError: with the ones it has.
    """
    for name in names:
        if name in ("cpu", "disk"):
            continue
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device_map: {device} is wanted, and torch sees no CUDA GPU", hint='use device_map="auto" or "cpu"'
            )
        if device.type == "cuda" and device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device_map: there is no {device}", expected=f"an index below {torch.cuda.device_count()}"
            )


def budgets_of(max_memory: MaxMemory | None, offload_folder: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """Bytes that may be used, by device: GPUs in order, "cpu", "disk".

    What ``max_memory`` does not name is not used if it is a GPU; for "cpu" and "disk", and for every GPU if nothing is
    given, it is what is free now, less a tenth (of a GPU 512 MiB at least) for activations and for other programs.

    Raises:
        ConfigError: an unknown device or size.
    """
    if not isinstance(max_memory, Mapping | None):
        raise ConfigError(f"max_memory is {max_memory!r}", expected='{device: bytes}, like {0: "10GiB", "cpu": 0}')
    given = {
        device_name(key, "max_memory"): parse_bytes(value, f"max_memory[{key!r}]")
        for key, value in (max_memory or {}).items()
    }
    gpus = {name: size for name, size in given.items() if name not in ("cpu", "disk")}
    if not gpus and max_memory is None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free = torch.cuda.mem_get_info(index)[0]
            gpus[f"cuda:{index}"] = max(free - max(free // 10, 512 << 20), 0)
    order = {name: (torch.device(name).type, torch.device(name).index or 0) for name in gpus}
    budgets = dict(sorted(gpus.items(), key=lambda kv: order[kv[0]]))
    if "cpu" not in given:
        given["cpu"] = psutil.virtual_memory().available * 9 // 10
    if "disk" not in given:
        folder = Path(offload_folder if offload_folder is not None else tempfile.gettempdir())
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        given["disk"] = shutil.disk_usage(folder).free * 9 // 10
    return budgets | {"cpu": given["cpu"], "disk": given["disk"]}
