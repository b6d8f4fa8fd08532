"""``from_pretrained``: a transformers model, built from its configuration and loaded quantized."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

from fewbits.checkpoint import local_path
from fewbits.config import QuantizationConfig, as_config
from fewbits.devices import MaxMemory
from fewbits.hf import build_empty, read_config, recorded_config
from fewbits.load import load_into
from fewbits.plan import DeviceMap


def from_pretrained(
    path: str | PathLike[str],
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
) -> Any:
    """Load a transformers model quantized: its class and configuration come from ``config.json``.

    A checkpoint that is already quantized (by fewbits, or by transformers with bitsandbytes) needs no format.

    Args:
        path: a folder with ``config.json`` and weights, the file of the weights in it, or a hub id.
        config, device_map, max_memory, offload, offload_folder, no_split_module_classes, strict, progress, revision,
            token, settings: as for :func:`load`.

    Returns:
        The model, in evaluation mode.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError, CheckpointError: as for :func:`load`.
    """
    weights = local_path(path, revision=revision, token=token)
    folder = weights if weights.is_dir() else weights.parent
    model_config = read_config(folder)
    config = as_config(config, **settings)
    recorded = recorded_config(model_config)
    if recorded and config == QuantizationConfig(**settings) and config.format is None:
        # no format is asked for: the tensors say which they have, the record what they do not say
        config = QuantizationConfig(**{**recorded, "format": None, "double_quant": False, **settings})
    model = load_into(
        lambda: build_empty(model_config, folder), weights, config, device_map=device_map, max_memory=max_memory,
        offload=offload, offload_folder=offload_folder, no_split_module_classes=no_split_module_classes,
        strict=strict, progress=progress,
    )  # fmt: skip
    return model.eval()
