"""Saving: a model's state dict to shards and an index, streamed and put in place as one step."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.atomic import replacing
from fewbits.devices import parse_bytes
from fewbits.errors import FewbitsWarning, SaveError
from fewbits.files import SAFETENSORS_DTYPES
from fewbits.hf import is_transformers_model, mixes_formats, quantization_config
from fewbits.memory import writable_view
from fewbits.place import bar

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_BLOB = re.compile(r"\.quant_state\.bitsandbytes__\w+$")


def save(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    max_shard_size: str | int = "10GB",
    safe_serialization: bool = True,
    progress: bool | None = None,
) -> None:
    """Save a model, quantized or not, as a checkpoint that bitsandbytes' users read too.

    The folder afterwards holds this checkpoint and whatever else was there that is no checkpoint. If the process is
    killed or the disk is full, it holds the one that was there before, whole.

    Args:
        model: with all its values (``torch.compile``d and ``DataParallel`` wrappers are looked through).
        folder: made if it does not exist.
        max_shard_size: bytes of a file, such as ``"5GB"``; a tensor that is larger has a file of its own.
        safe_serialization: safetensors; ``False`` for ``torch.save`` files.
        progress: show a progress bar; by default where stderr is a terminal.

    Raises:
        SaveError: it could not be written, or a parameter has no values.
    """
    limit = parse_bytes(max_shard_size, "max_shard_size")
    model = _unwrap(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SaveError("the tensor has no values", parameter=name, hint="load the model before saving it")
    state, aliases = _without_aliases(model.state_dict())
    stem, suffix = ("model", ".safetensors") if safe_serialization else ("pytorch_model", ".bin")
    shards = plan_shards(state, limit)
    total = sum(t.nbytes for t in state.values())
    with (
        replacing(folder) as (staging, tag),
        bar(total, progress, "saving") as shown,
    ):
        names = [f"{stem}{tag}-{i:05}-of-{len(shards):05}{suffix}" for i in range(1, len(shards) + 1)]
        if len(shards) == 1 and not tag:
            names = [stem + suffix]
        weight_map: dict[str, str] = {}
        for name, keys in zip(names, shards, strict=True):
            own_aliases = {alias: kept for alias, kept in aliases.items() if kept in keys}
            if safe_serialization:
                write_safetensors(staging / name, {k: state[k] for k in keys}, own_aliases, shown)
            else:
                values = {k: _compact(state[k]) for k in keys}
                _write_pickle(staging / name, {**values, **{a: values[kept] for a, kept in own_aliases.items()}})
                shown.update(sum(t.nbytes for t in values.values()))
            weight_map |= dict.fromkeys(keys if safe_serialization else [*keys, *own_aliases], name)
        if names != [stem + suffix]:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (staging / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")
        _write_configs(model, staging)


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _without_aliases(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by key, each once, and for every further key of the same tensor the key it is kept under."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise SaveError(f"the state dict holds a {type(tensor).__name__}", parameter=key, expected="tensors only")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
            kept[key] = tensor
    # parts that are made anew for each name of a tied weight (tables, JSON, SCB): follow the weight
    for alias, original in list(aliases.items()):
        for key in [k for k in kept if k.startswith(f"{alias}.")]:
            if f"{original}{key[len(alias) :]}" in kept:
                aliases[key] = f"{original}{key[len(alias) :]}"
                del kept[key]
        stem, original_stem = alias.removesuffix("weight"), original.removesuffix("weight")
        for part in ("SCB", "weight_format"):
            if stem != alias and stem + part in kept and original_stem + part in kept:
                aliases[stem + part] = original_stem + part
                del kept[stem + part]
    return kept, aliases


def plan_shards(state: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Keys of each shard: in order, a new one whenever the next tensor would go over ``limit`` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], shown: Any = None) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    Wide dtypes come first, and the odd-sized JSON blobs last, so that every tensor is aligned to its dtype.
    """
    order = sorted(tensors, key=lambda k: (-tensors[k].element_size(), _BLOB.search(k) is not None, k))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **aliases}}
    position = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _DTYPE_NAMES:
            raise SaveError(f"safetensors has no {tensor.dtype}", parameter=key)
        end = position + tensor.nbytes
        header[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as handle:
        handle.write(len(raw).to_bytes(8, "little"))
        handle.write(raw)
        for key in order:
            data = tensors[key].detach().cpu().contiguous()
            if data.nbytes:
                handle.write(writable_view(data))
            if shown is not None:
                shown.update(data.nbytes)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, without the rest of a larger storage it is a view of, which would be written with it."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with open(path, "wb") as handle:
        try:
            torch.save(dict(tensors), handle)
        except RuntimeError as error:  # after a write that failed torch finds its position wrong, and says that instead
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise


def _write_configs(model: nn.Module, staging: Path) -> None:
    if not is_transformers_model(model):
        return
    config: Any = copy.deepcopy(model.config)
    if mixes_formats(model):
        warnings.warn(
            "the model mixes formats or quantizes more than linear layers: fewbits loads it again, "
            "transformers with bitsandbytes cannot",
            FewbitsWarning,
            stacklevel=3,
        )
    recorded = quantization_config(model)
    if recorded is not None:
        config.quantization_config = recorded
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    # what is not quantized may have been cast; transformers builds the model in the dtype that is recorded
    if isinstance(getattr(model, "dtype", None), torch.dtype):
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", model.dtype)
    config.save_pretrained(staging)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(staging)
