"""Accelerate's offloading hooks (``cpu_offload``, ``disk_offload``, ``dispatch_model``) on quantized layers.

Before a module runs, such a hook takes each of its parameters from a map by name and puts it in place of an empty one.
The map is made of the model's state dict, where a quantized parameter is several entries. So when a hook is put on a
quantized layer, its map is wrapped into one that has the parameter itself. (On other modules that own a quantized
parameter, an ``nn.MultiheadAttention`` say, Accelerate says that a shape does not fit.)

fewbits' own offloading (:func:`fewbits.load`) moves whole units ahead of time; this is here so that code written for
Accelerate works.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fewbits.statedict import Group, decode, part_keys
from fewbits.tensor import QuantTensor


class HookSlot:
    """The attribute ``_hf_hook`` of a quantized layer, in which Accelerate keeps its hook."""

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["_hf_hook"]
        except KeyError:
            raise AttributeError(f"{owner.__name__} has no attribute '_hf_hook'") from None

    def __set__(self, module: nn.Module, hook: Any) -> None:
        for part in getattr(hook, "hooks", (hook,)):  # of several hooks in a row
            if getattr(part, "offload", False) and not isinstance(part.weights_map, _WithQuantized):
                part.weights_map = _WithQuantized(part.weights_map, module)
        module.__dict__["_hf_hook"] = hook

    def __delete__(self, module: nn.Module) -> None:
        del module.__dict__["_hf_hook"]


class _WithQuantized(Mapping[str, Any]):
    """A map from names in a module's state dict to values, in which its quantized parameters are whole."""

    def __init__(self, entries: Mapping[str, Any], module: nn.Module) -> None:
        self.entries = entries
        parameters: dict[str, Any] = module._parameters
        self.quantized = {name: p for name, p in parameters.items() if isinstance(p, QuantTensor)}

    def __getitem__(self, name: str) -> Any:
        value = self.entries[name]
        like = self.quantized.get(name)
        if like is None or isinstance(value, QuantTensor):
            return value
        keys = part_keys(name, like.spec)
        tensors = {role: self.entries[key] for role, key in keys.items()}
        group = Group(name, like.spec.format, keys)
        found = decode(group, tensors, like.dtype, label=like.label, threshold=like.spec.threshold)
        found.spec = replace(found.spec, compute_dtype=like.spec.compute_dtype)
        return found.t() if like.transposed else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
