"""``plan``: what a model will take in a format, and where it will lie, from its structure alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.config import QuantizationConfig, as_config
from fewbits.decide import make_plan
from fewbits.devices import MaxMemory
from fewbits.errors import ConfigError
from fewbits.hf import build_empty, read_config, recorded_config, transformers_config
from fewbits.meta import empty_copy
from fewbits.plan import DeviceMap, Plan
from fewbits.storage import choose_storage


def plan(
    model: nn.Module | Callable[[], nn.Module] | str | PathLike[str] | Mapping[str, Any] | Any,
    config: QuantizationConfig | str | None = None,
    *,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
    offload: str = "auto",
    offload_folder: str | PathLike[str] | None = None,
    no_split_module_classes: Iterable[str] | None = None,
    **settings: Any,
) -> Plan:
    """Say whether a model will fit, where its parts will lie, and how many bytes they take. No weights are needed.

    Args:
        model: a model (best an empty one) or a function that builds one; or, of a transformers model, its
            configuration: as an object, as a dictionary, or as a folder or file that holds the ``config.json``.
        config, settings: what to quantize to, as for :func:`load`. A configuration of a model that is quantized says
            it itself.
        device_map, max_memory, offload, offload_folder, no_split_module_classes: as for :func:`load`. The GPUs of
            ``max_memory`` need not exist here.

    Returns:
        The plan: print it, edit its ``devices``, save it, give it to :func:`load` as ``device_map``.

    Raises:
        ConfigError: nothing holds the model (the message says how many bytes are missing), or a bad argument.
    """
    if isinstance(model, (str, PathLike)):
        path = Path(model).expanduser()
        model = read_config(path)
    elif isinstance(model, Mapping):
        model = transformers_config(dict(model))
    if not isinstance(model, nn.Module) and hasattr(model, "to_diff_dict"):
        recorded, built = recorded_config(model), build_empty(model, Path())
        if recorded and config is None:
            config = recorded.pop("format")
            settings = {"skip_modules": _recorded_skips(model, built), **recorded, **settings}
        model = built
    elif not isinstance(model, nn.Module) and not callable(model):
        raise ConfigError(
            f"the model is a {type(model).__name__}",
            expected="a module, a function that builds one, or a transformers configuration",
        )
    empty = model if isinstance(model, nn.Module) else empty_copy(model)
    return make_plan(
        empty, choose_storage(empty, as_config(config, **settings)), device_map, max_memory=max_memory,
        offload=offload, offload_folder=offload_folder, no_split_module_classes=no_split_module_classes,
    )  # fmt: skip


def _recorded_skips(config: Any, model: nn.Module) -> tuple[str, ...] | None:
    """The modules that a ``quantization_config`` leaves out: those it names, by the end of a name too, as transformers.

    ``None`` if it does not say: the output heads.
    """
    recorded = config.quantization_config
    names = (recorded if isinstance(recorded, dict) else recorded.to_dict()).get("llm_int8_skip_modules")
    if names is None:
        return None
    return tuple(path for path, _ in model.named_modules() if any(f".{path}".endswith(f".{name}") for name in names))
