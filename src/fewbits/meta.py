"""Models without memory: building on the meta device, and copying a model's structure without its weights."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fewbits.errors import ConfigError


def _include_buffers(value: bool | None) -> bool:
    if value is not None:
        return value
    return os.environ.get("ACCELERATE_INIT_INCLUDE_BUFFERS", "0").lower() in ("1", "true", "yes", "on", "y", "t")


@contextlib.contextmanager
def init_on_device(device: torch.device, include_buffers: bool | None = None) -> Iterator[None]:
    """Put every parameter on ``device`` as modules register it within this block.

    Parameters that are shared stay shared. Each is first made where the module makes it; ``torch.empty`` takes no
    memory until it is written, and what writes it comes after the registration in torch's own modules.

    Args:
        device: where to.
        include_buffers: buffers too, by making ``device`` the default for new tensors; ``None`` reads
            ``ACCELERATE_INIT_INCLUDE_BUFFERS`` (default: no, so that computed buffers keep their values).
    """
    device = torch.device(device)
    if _include_buffers(include_buffers):
        with device:
            yield
        return
    moved = WeakIdKeyDictionary()  # the parameter a module made → its twin on the device
    register = nn.Module.register_parameter

    def register_on_device(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or param.device == device:
            return
        if param not in moved:
            kind: Any = type(param)
            twin = kind(param.detach().to(device), requires_grad=param.requires_grad)
            twin.__dict__.update(param.__dict__)
            moved[param] = twin
        module._parameters[name] = moved[param]

    nn.Module.register_parameter = register_on_device  # type: ignore[method-assign,assignment]  # undone below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


_INITIALIZERS = ("torch.nn.init", "transformers.initialization")  # the second wraps the first


class _SkipInitialization(TorchFunctionMode):
    """Leaves out the initialization of tensors on the meta device, which has no values to set.

    Besides doing nothing, ``normal_`` on such a tensor imports torch's compiler: a second for every process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, module = getattr(func, "__name__", ""), getattr(func, "__module__", None)
        if func is torch.Tensor.normal_ or (module in _INITIALIZERS and name.endswith("_")):
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Build a model of any size without memory for its parameters: they go to the meta device.

    Args:
        include_buffers: see :func:`init_on_device`.
    """
    with init_on_device(torch.device("meta"), include_buffers=include_buffers), _SkipInitialization():
        yield


def empty_copy(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A copy of a model's structure with every parameter on the meta device, shared ones still shared.

    Buffers keep their values. The model itself is not touched; a factory is called under :func:`init_empty_weights`.
    A parameter that is quantized comes back as a plain one, so that the copy can be loaded anew.

    Raises:
        ConfigError: neither a module nor a factory of one.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise ConfigError(f"the model is a {type(model).__name__}", expected="an nn.Module or a function of none")
        with init_empty_weights():
            model = model()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"the model factory returned a {type(model).__name__}", expected="an nn.Module")
    memo: dict[int, Any] = {}
    for p in model.parameters():
        empty = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device="meta")
        memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    # what made a spread model run where its parts lie does not belong to its structure
    placed = [(m, k, v) for m in model.modules() for k, v in vars(m).items() if getattr(v, "of_placement", False)]
    memo.update((id(value), None) for _, _, value in placed)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name in [k for k, v in vars(module).items() if v is None and k in {key for _, key, _ in placed}]:
            del module.__dict__[name]
    return copied
