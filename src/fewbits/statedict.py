"""bitsandbytes' keys and bytes: quantized tensors to plain state-dict entries and back.

4-bit, for a parameter ``w`` with n elements:
    w                                       uint8 [(n+1)//2, 1]
    w.absmax                                fp32 [blocks], or uint8 with double quantization
    w.quant_map                             fp32 [16], the values by code
    w.nested_absmax, w.nested_quant_map     fp32 [ceil(blocks/256)] and [256], with double quantization
    w.quant_state.bitsandbytes__nf4         uint8: JSON with quant_type, blocksize, dtype, shape [, nested_…]
LLM.int8(), for a module with the parameter ``weight``:
    weight int8 [N, K],  SCB fp32 [N] (the rows' absmax),  weight_format uint8 [] = 0 (row-major)
    and for a parameter w of any other name: w, w.SCB, w.weight_format
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import CheckpointError, FewbitsError
from fewbits.formats import FORMATS, QuantSpec, inner_shapes
from fewbits.kernels.codebooks import codebook
from fewbits.kernels.reference import NESTED_BLOCK
from fewbits.tensor import QuantTensor

_QUANT_STATE = ".quant_state.bitsandbytes__"
_PLAIN_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class Group:
    """The state-dict keys that together are one parameter.

    Attributes:
        name: the parameter's dotted name.
        format: what it is stored as, or ``None`` for a plain tensor.
        keys: key by role: "weight" (the tensor itself), and for quantized ones "absmax", "quant_state", ….
    """

    name: str
    format: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)


def _int8_companions(name: str) -> dict[str, str]:
    prefix = name.removesuffix("weight") if name == "weight" or name.endswith(".weight") else name + "."
    return {"absmax": prefix + "SCB", "weight_format": prefix + "weight_format"}


def part_keys(name: str, spec: QuantSpec) -> dict[str, str]:
    """The keys by role of a parameter of this name that is quantized so."""
    if not FORMATS[spec.format].blocked:
        return {"weight": name, **_int8_companions(name)}
    parts = [part for part in _PLAIN_PARTS if spec.double_quant or not part.startswith("nested_")]
    return {"weight": name, "quant_state": f"{name}{_QUANT_STATE}{spec.format}", **{p: f"{name}.{p}" for p in parts}}


def group_keys(keys: Iterable[str]) -> dict[str, Group]:
    """Sort state-dict keys into parameters, by name.

    Raises:
        CheckpointError: a quantized parameter lacks one of its parts.
    """
    remaining = dict.fromkeys(keys)
    groups: dict[str, Group] = {}
    _drop_orphans(remaining)
    for key in [k for k in remaining if _QUANT_STATE in k]:
        name, _, format = key.partition(_QUANT_STATE)
        if format not in FORMATS or not FORMATS[format].blocked:
            raise CheckpointError(f"unknown quantization type {format!r}", parameter=name, expected="nf4 or fp4")
        found = {"weight": name, "quant_state": key}
        found |= {part: f"{name}.{part}" for part in _PLAIN_PARTS if f"{name}.{part}" in remaining}
        for part in ("weight", "absmax", "quant_map"):
            if found.get(part) not in remaining:
                raise CheckpointError(f"a {format} weight lacks its {part}", parameter=name)
        groups[name] = Group(name, format, found)
    for key in [k for k in remaining if k == "SCB" or k.endswith(".SCB")]:
        stem = key.removesuffix("SCB")
        bare = stem.removesuffix(".")
        name = bare if bare in remaining and stem + "weight" not in remaining else stem + "weight"
        if name not in remaining:
            raise CheckpointError("of an int8 weight there is only the SCB", parameter=name)
        companions = {role: k for role, k in _int8_companions(name).items() if k in remaining}
        groups[name] = Group(name, "int8", {"weight": name, **companions})
    for group in groups.values():
        for key in group.keys.values():
            remaining.pop(key, None)
    groups.update((key, Group(key, None, {"weight": key})) for key in remaining)
    return groups


def _drop_orphans(keys: dict[str, None]) -> None:
    """Remove what is left of the further names of a tied weight when a writer kept only one name of shared tensors.

    Accelerate and transformers do so. They drop ``lm_head.weight`` as a copy of ``wte.weight``, but not the parts that
    share no memory: tables, JSON, ``SCB``, ``weight_format``.
    """
    for key in [k for k in keys if _QUANT_STATE in k]:
        name = key.partition(_QUANT_STATE)[0]
        if name not in keys and f"{name}.absmax" not in keys:
            for orphan in (key, f"{name}.quant_map", f"{name}.nested_quant_map"):
                keys.pop(orphan, None)
    for key in [k for k in keys if k.endswith("weight_format")]:
        stem = key.removesuffix("weight_format")
        if f"{stem}weight" not in keys and stem.removesuffix(".") not in keys:
            for orphan in (key, f"{stem}SCB"):
                keys.pop(orphan, None)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``: how the JSON writes it."""
    return str(dtype).removeprefix("torch.")


def encode(name: str, tensor: QuantTensor) -> dict[str, Tensor]:
    """The state-dict entries of one quantized parameter; the weight's bytes are shared with it, not copied."""
    spec, inner = tensor.spec, tensor.inner_tensors
    if not FORMATS[spec.format].blocked:
        companions = _int8_companions(name)
        zero = torch.zeros((), dtype=torch.uint8)
        # copied: for a tied weight transformers refuses to save shared tensors that it does not know to be tied
        scales = inner["absmax"].clone()
        return {name: inner["packed"], companions["absmax"]: scales, companions["weight_format"]: zero}
    state: dict[str, Any] = {
        "quant_type": spec.format,
        "blocksize": spec.block_size,
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.stored_shape),
    }
    # the tables are copied for every weight: tensors that share storage would be written once, for one of them
    entries = {
        name: inner["packed"].reshape(-1, 1),
        f"{name}.absmax": inner["absmax"].reshape(-1),
        f"{name}.quant_map": codebook(spec.format, tensor.device).clone(),
    }
    if spec.double_quant:
        entries[f"{name}.nested_absmax"] = inner["nested_absmax"]
        entries[f"{name}.nested_quant_map"] = codebook("dynamic", tensor.device).clone()
        offset = 0.0 if tensor.is_meta else inner["nested_offset"].item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    blob = json.dumps(state).encode()
    entries[f"{name}{_QUANT_STATE}{spec.format}"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return entries


def stored_spec(group: Group, quant_state: Tensor | None) -> tuple[QuantSpec, list[int], torch.dtype]:
    """What a quantized 4-bit group's JSON says: spec, stored shape, logical dtype.

    Raises:
        CheckpointError: the JSON is not what the format writes.
    """
    return _parsed(group, quant_state)[:3]


def _parsed(group: Group, quant_state: Tensor | None) -> tuple[QuantSpec, list[int], torch.dtype, float]:
    try:
        if quant_state is None or quant_state.dtype != torch.uint8 or quant_state.dim() != 1:
            raise ValueError("it is no row of bytes")
        text = bytes(quant_state.cpu().tolist())
        spec, shape, dtype, offset = _parsed_text(text, "nested_absmax" in group.keys)
        if spec.format != group.format:
            raise ValueError(f"{spec.format} under the name of {group.format}")
        if spec.double_quant and "nested_quant_map" not in group.keys:
            raise ValueError("double quantization without its table")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, FewbitsError) as error:
        raise CheckpointError(
            f"the quantization state cannot be understood ({type(error).__name__}: {error})".splitlines()[0],
            parameter=group.name,
            expected="JSON with quant_type, blocksize, dtype, shape [, nested_blocksize, nested_dtype, nested_offset]",
        ) from error
    return spec, list(shape), dtype, offset


@functools.lru_cache(maxsize=4096)  # each is asked for twice: to match it, and to decode it
def _parsed_text(text: bytes, double_quant: bool) -> tuple[QuantSpec, tuple[int, ...], torch.dtype, float]:
    state = json.loads(text)
    spec = QuantSpec(state["quant_type"], state["blocksize"], double_quant)
    shape, dtype = tuple(int(d) for d in state["shape"]), getattr(torch, state["dtype"])
    if not dtype.is_floating_point or any(d < 0 for d in shape):
        raise ValueError(f"{spec.format} of {dtype} and shape {list(shape)}")
    if double_quant and state["nested_blocksize"] != NESTED_BLOCK:
        raise ValueError(f"double quantization in blocks of {state['nested_blocksize']}")
    if double_quant and not math.isfinite(state["nested_offset"]):
        raise ValueError(f"offset {state['nested_offset']}")
    return spec, shape, dtype, state["nested_offset"] if double_quant else 0.0


def decode(
    group: Group, tensors: Mapping[str, Tensor], dtype: torch.dtype, *, label: str | None = None, threshold: float = 6.0
) -> QuantTensor:
    """One quantized parameter from its entries.

    Args:
        group: its keys.
        tensors: its tensors by role, as in ``group.keys``.
        dtype: the logical dtype for int8, whose bytes do not say; 4-bit weights bring their own.
        label: the parameter's name in the model, for messages.
        threshold: int8's outlier threshold, which the bytes do not say either.

    Raises:
        CheckpointError: parts that do not fit together.
    """
    packed, absmax = tensors["weight"], tensors.get("absmax")
    assert absmax is not None
    if group.format == "int8":
        layout = tensors["weight_format"].flatten().tolist() if "weight_format" in tensors else [0]
        if packed.dtype != torch.int8 or layout != [0]:
            raise CheckpointError(
                f"an int8 weight of {packed.dtype} in layout {layout[:4]}",
                parameter=group.name,
                expected="torch.int8 in layout 0 (row-major)",
                hint="save it again with a current bitsandbytes, which writes row-major",
            )
        spec, shape = QuantSpec("int8", threshold=threshold), list(packed.shape)
    else:
        spec, shape, dtype, offset = _parsed(group, tensors.get("quant_state"))
        packed = packed.contiguous()
        if packed.dtype != torch.uint8:  # quant_storage: the same bytes under another dtype
            packed = packed.view(-1).view(torch.uint8)
    inner: dict[str, Tensor | None] = {"packed": packed, "absmax": absmax}
    if spec.double_quant:
        inner["nested_absmax"] = tensors["nested_absmax"]
        inner["nested_offset"] = torch.full((), offset, dtype=torch.float32, device=packed.device)
    for table, values in (("quant_map", group.format), ("nested_quant_map", "dynamic")):
        if table in tensors and not torch.equal(tensors[table].cpu(), codebook(str(values), torch.device("cpu"))):
            raise CheckpointError(
                f"the weight brings a {table} of its own", parameter=group.name, expected=f"the table of {values}"
            )
    for part, (want_dtype, want_shape) in inner_shapes(spec, tuple(shape)).items():
        have = inner[part]
        assert have is not None
        if have.dtype != want_dtype or have.numel() != math.prod(want_shape):
            raise CheckpointError(
                f"{part} of a {spec} weight of shape {shape} is {have.dtype} with {have.numel()} elements",
                parameter=group.name,
                expected=f"{want_dtype} with {math.prod(want_shape)}",
            )
        if list(have.shape) != want_shape:  # views take longer than all that is checked here
            inner[part] = have.reshape(want_shape)
    return QuantTensor.from_inner(inner, spec, shape, dtype, label=label)


# ------------------------------------------------------------------------------------------------- module hooks


def _quantized(module: nn.Module) -> list[tuple[str, QuantTensor]]:
    parameters: dict[str, Any] = module._parameters
    return [(name, p) for name, p in parameters.items() if isinstance(p, QuantTensor)]


def _save_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Replace each quantized parameter of this module by its plain entries."""
    for name, parameter in _quantized(module):
        key = prefix + name
        if isinstance(state_dict.pop(key, None), QuantTensor):
            # of the parameter itself: the version counters of an alias's inner tensors would be others
            state_dict.update(encode(key, parameter))


def _load_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace plain entries by the quantized parameter they are, so that ``load_state_dict`` copies it."""
    for name, parameter in _quantized(module):
        key = prefix + name
        group = group_keys(k for k in state_dict if k.startswith(prefix)).get(key)
        if group is None or group.format is None:
            continue  # missing, or plain: copying it will quantize it
        tensors = {role: state_dict.pop(k) for role, k in group.keys.items()}
        threshold = parameter.spec.threshold
        decoded = decode(group, tensors, parameter.dtype, label=key, threshold=threshold)
        if decoded.spec.format != parameter.spec.format:
            raise CheckpointError(
                f"the state dict holds {decoded.spec}, the model {parameter.spec}: it would be quantized twice",
                parameter=key,
                hint="load it with fewbits.load, which takes it as it is, or load a state dict in floating point",
            )
        state_dict[key] = decoded.t() if parameter.transposed else decoded


def attach_state_dict_hooks(module: nn.Module) -> None:
    """Make ``state_dict`` and ``load_state_dict`` of this module speak bitsandbytes' keys. Idempotent."""
    if _save_hook not in module._state_dict_hooks.values():
        module._register_state_dict_hook(_save_hook)
        module.register_load_state_dict_pre_hook(_load_hook)
