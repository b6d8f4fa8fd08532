"""``quantize``: a model that is in memory, in place, one parameter at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.config import QuantizationConfig, as_config
from fewbits.errors import ConfigError
from fewbits.hf import record_config
from fewbits.modules import quantize_parameter
from fewbits.place import Heap, bar, check_values, move_buffers, put
from fewbits.plan import DeviceMap, make_plan, owners_of, planned_bytes, resolve_device
from fewbits.tensor import QuantTensor


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
            if not isinstance(p, QuantTensor):
                check_values(p, plan[owners[0].path], owners[0].path)
        heap = Heap()
        total = sum(p.nbytes for p in model.parameters())
        with bar(total, progress, "quantizing") as shown:
            for owners in groups:
                p = owners[0].module._parameters[owners[0].name]
                assert p is not None
                placement = plan[owners[0].path]
                size = p.nbytes
                value: Tensor = p.data if device is None else p.data.to(device)
                dtype = (placement.dtype if value.is_floating_point() else None) or value.dtype
                if placement.spec is not None and not isinstance(value, QuantTensor):
                    value = quantize_parameter(owners[0].module, owners[0].name, value, placement.spec, owners[0].path)
                put(owners, value.to(dtype), p.requires_grad)
                del p, value
                heap.passed(size)
                shown.update(size)
        heap.trim()
        if device is not None:
            move_buffers(model, device)
    record_config(model)
    return model
