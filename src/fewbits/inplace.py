"""``quantize``, and ``dequantize``: a model that is in memory, in place, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.config import QuantizationConfig, as_config
from fewbits.decide import make_plan
from fewbits.devices import MaxMemory, check_devices
from fewbits.errors import ConfigError, UnsupportedError
from fewbits.hf import record_config
from fewbits.modules import quantize_parameter, uninstall
from fewbits.offload import is_offloaded
from fewbits.place import Heap, bar, check_values, put
from fewbits.plan import DeviceMap
from fewbits.spread import Spread
from fewbits.storage import choose_storage, owners_of
from fewbits.tensor import QuantTensor


def quantize(
    model: nn.Module,
    config: QuantizationConfig | str,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory | None = None,
    offload: str = "auto",
    offload_folder: str | PathLike[str] | None = None,
    no_split_module_classes: Iterable[str] | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> nn.Module:
    """Quantize a model that is in memory, in place, one parameter at a time.

    Args:
        model: changed in place; parameters that are quantized already stay as they are.
        config, settings, progress: as for :func:`load`.
        device_map, max_memory, offload, offload_folder, no_split_module_classes: where to put it, as for
            :func:`load`; by default each parameter stays where it is.

    Returns:
        The same model.

    Raises:
        ConfigError: a configuration that cannot be meant, a parameter without values (on the meta device), or one that
            holds a NaN or an infinity; the model is then as it was.
    """
    config = as_config(config, **settings)
    if config.format is None and not config.overrides:
        raise ConfigError("no format is given", expected='a format, such as "nf4" or "int8"')
    storage = choose_storage(model, config)
    spread = None
    if device_map is not None:
        plan = make_plan(
            model, storage, device_map, max_memory=max_memory, offload=offload, offload_folder=offload_folder,
            no_split_module_classes=no_split_module_classes,
        )  # fmt: skip
        check_devices([*plan.devices.values(), *plan.execution.values()])
        spread = Spread(
            model, storage, plan, offload_folder=offload_folder, no_split_module_classes=no_split_module_classes
        )
    groups = owners_of(model)
    with torch.no_grad():
        for owners in groups:  # look at everything before anything is changed
            p = owners[0].module._parameters[owners[0].name]
            assert p is not None
            if p.is_meta:
                raise ConfigError("the parameter has no values", parameter=owners[0].path, hint="use fewbits.load")
            if not isinstance(p, QuantTensor):
                check_values(p, storage[owners[0].path], owners[0].path)
        if spread is not None:
            spread.reserve()
        heap = Heap()
        total = sum(p.nbytes for p in model.parameters())
        with bar(total, progress, "quantizing") as shown:
            for owners in groups:
                p = owners[0].module._parameters[owners[0].name]
                assert p is not None
                path, kept = owners[0].path, storage[owners[0].path]
                size = p.nbytes
                value: Tensor = p.data if spread is None else p.data.to(spread.works_on(path, ready=kept.spec is None))
                dtype = (kept.dtype if value.is_floating_point() else None) or value.dtype
                if kept.spec is not None and not isinstance(value, QuantTensor):
                    value = quantize_parameter(
                        owners[0].module, owners[0].name, value, kept.spec, path, known_finite=True
                    )
                (put if spread is None else spread.put)(owners, value.to(dtype), p.requires_grad)
                del p, value
                heap.passed(size)
                shown.update(size)
        heap.trim()
        if spread is not None:
            spread.finish()
    record_config(model)
    return model


def dequantize(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantized parameter back into a plain one, in place, one at a time: the way back from ``quantize``.

    Args:
        model: on one device or several; changed in place. Its layers become plain ones again.
        dtype: of what was quantized, by default each parameter's logical dtype.

    Returns:
        The same model. Its parameters stay frozen.

    Raises:
        UnsupportedError: parts of the model are offloaded, where a plain tensor has no place.
    """
    if is_offloaded(model):
        raise UnsupportedError("the model is offloaded", hint="load it on one device before dequantizing it")
    with torch.no_grad():
        for owners in owners_of(model):
            p: Any = owners[0].module._parameters[owners[0].name]
            if isinstance(p, QuantTensor):
                value = p.dequantize().contiguous()
                plain = nn.Parameter(value if dtype is None else value.to(dtype), requires_grad=False)
                for owner in owners:
                    uninstall(owner.module, owner.name, plain)
    record_config(model)
    return model
