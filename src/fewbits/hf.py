"""transformers' models: building one empty, and the ``quantization_config`` of its config.json."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import CheckpointNotFoundError, ConfigError, MissingDependencyError
from fewbits.formats import FORMATS, QuantSpec
from fewbits.meta import init_empty_weights
from fewbits.modules import is_linear
from fewbits.statedict import dtype_name
from fewbits.tensor import QuantTensor

OWN_METHOD = "fewbits"  # the quant_method of a model that bitsandbytes' configuration cannot describe
_OWN_COMPUTE_DTYPE = "fewbits_compute_dtype"  # beside bitsandbytes' key, which has no way to say "the input's"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "from_pretrained needs transformers", hint='pip install "fewbits[transformers]", or use fewbits.load'
        ) from error
    return transformers


def read_config(folder: Path) -> Any:
    """The transformers configuration of a checkpoint folder (or of the folder that a checkpoint file lies in).

    Raises:
        CheckpointNotFoundError: there is no config.json.
        ConfigError: it is not one that transformers knows, or it wants code of its own to be run.
    """
    transformers = _transformers()
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / "config.json").exists():
        raise CheckpointNotFoundError(
            "there is no config.json", file=folder, hint="use fewbits.load with a model that you build yourself"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ConfigError(f"transformers cannot read the config: {error}", file=folder / "config.json") from error


def transformers_config(settings: dict[str, Any]) -> Any:
    """The configuration that a ``config.json`` of these contents is.

    Raises:
        ConfigError: transformers knows no such model.
    """
    transformers = _transformers()
    kind = settings.pop("model_type", None)
    try:
        return transformers.AutoConfig.for_model(kind, **settings)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"transformers cannot read the config: {error}", expected='a "model_type" it has') from error


def build_empty(config: Any, folder: Path) -> nn.Module:
    """The model that a configuration names, on the meta device, its generation settings read if there are any.

    Raises:
        ConfigError: it names no class that transformers has.
    """
    transformers = _transformers()
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ConfigError(
            f"transformers has no class {names[0]!r}" if names else "the config names no architecture",
            file=folder / "config.json",
            expected='"architectures": [a class of transformers]',
            hint="use fewbits.load with a model that you build yourself",
        )
    with init_empty_weights(), _initializing_values_only():
        model: nn.Module = kind._from_config(config)
    if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


@contextlib.contextmanager
def _initializing_values_only() -> Iterator[None]:
    """transformers passes over modules that have no values yet, in which it would change nothing.

    The others, with buffers that they have computed, it initializes as ever.
    """
    kind = _transformers().PreTrainedModel
    init_weights = kind.init_weights
    marked: set[Any] = set()

    def mark(module: Any) -> bool:
        if module in marked:  # with the part of the model that it belongs to
            return True
        below = [mark(child) for child in module._modules.values() if child is not None]
        own = [p for p in module._parameters.values() if p is not None]
        empty = all(below) and not module._buffers and all(p.is_meta for p in own)
        if empty:
            module._is_hf_initialized = True  # transformers' own mark of a module that it is done with
            marked.add(module)
        return empty

    def init_what_has_values(model: Any) -> None:
        mark(model)
        init_weights(model)

    kind.init_weights = init_what_has_values
    try:
        yield
    finally:
        kind.init_weights = init_weights


CONVERTED = (
    "transformers joins or splits tensors of this checkpoint as it loads them, which fewbits does not do by itself: "
    "AutoModel….from_pretrained(path, quantization_config=FewbitsConfig(…)) does, with FewbitsConfig from "
    "fewbits.integrations.transformers"
)


def converters(model: nn.Module) -> list[Any]:
    """transformers' conversions of several tensors of a checkpoint into one of the model, or the other way round."""
    if not is_transformers_model(model):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4
        return []
    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]


def is_converted(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether transformers converts any tensor of these names for this model."""
    rules = converters(model)
    return any(rule.rename_source_key(name)[1] is not None for name in names for rule in rules)


def renaming(model: nn.Module) -> Callable[[str], str]:
    """From a tensor's name in a checkpoint to its name in this model, as transformers renames what it loads.

    transformers 5 keeps the names that checkpoints have always had on disk and gives modules new ones. What it also
    converts while loading (experts that are fused, say) is not done here: those names find no match and are reported.
    """
    if not is_transformers_model(model):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4, whose modules have the names of their checkpoints
        return lambda name: name
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def rename(name: str) -> str:
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        return name

    return rename


def recorded_settings(recorded: Any) -> dict[str, Any]:
    """The settings of :class:`~fewbits.QuantizationConfig` that a ``quantization_config`` records.

    Args:
        recorded: the dictionary of a config.json, or transformers' object made from it.

    Raises:
        ConfigError: it records another method than bitsandbytes' formats.
    """
    recorded = recorded if isinstance(recorded, dict) else recorded.to_dict()
    if recorded.get("quant_method") == OWN_METHOD:
        return {name: value for name, value in recorded.items() if name != "quant_method"}
    if recorded.get("quant_method") != "bitsandbytes":
        raise ConfigError(
            f"the checkpoint is quantized with {recorded.get('quant_method')!r}",
            expected="bitsandbytes' 4-bit or 8-bit format",
            hint="load it with the tool that made it",
        )
    if recorded.get("load_in_8bit"):
        return {"format": "int8", "llm_int8_threshold": float(recorded.get("llm_int8_threshold", 6.0))}
    return {
        "format": recorded.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": bool(recorded.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": recorded.get(_OWN_COMPUTE_DTYPE, recorded.get("bnb_4bit_compute_dtype")),
    }


def recorded_config(config: Any) -> dict[str, Any] | None:
    """:func:`recorded_settings` of a transformers configuration, ``None`` if it records nothing."""
    recorded = getattr(config, "quantization_config", None)
    return None if recorded is None else recorded_settings(recorded)


def made_by_fewbits(recorded: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` was written by fewbits."""
    return recorded.get("quant_method") == OWN_METHOD or _OWN_COMPUTE_DTYPE in recorded


def is_transformers_model(model: nn.Module) -> bool:
    """Whether the model has a transformers configuration."""
    return hasattr(getattr(model, "config", None), "to_diff_dict")


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """The ``quantization_config`` that describes this model's checkpoint, ``None`` if nothing is quantized.

    It is bitsandbytes', under which transformers with bitsandbytes loads it, unless that cannot describe the model
    (see :func:`mixes_formats`): then it is of a method of our own, which nobody takes for theirs.
    """
    specs: dict[QuantSpec, int] = {}
    formats: dict[str, str] = {}
    skipped = []
    for name, module in model.named_modules():
        parameters: dict[str, Any] = module._parameters
        for key, p in parameters.items():
            if isinstance(p, QuantTensor):
                specs[p.spec] = specs.get(p.spec, 0) + p.numel()
                formats[f"{name}.{key}" if name else key] = p.spec.format
        if is_linear(module) and not isinstance(module.weight, QuantTensor):
            skipped.append(name)
    if not specs:
        return None
    spec = max(specs, key=lambda s: specs[s])
    if mixes_formats(model):
        return {
            "quant_method": OWN_METHOD,
            "format": spec.format,
            "block_size": spec.block_size,
            "double_quant": spec.double_quant,
            "llm_int8_threshold": next((s.threshold for s in specs if s.format == "int8"), spec.threshold),
            "compute_dtype": spec.compute_dtype and dtype_name(spec.compute_dtype),
            "skip_modules": skipped,
            "overrides": {path: format for path, format in formats.items() if not _as_usual(model, path, spec)},
        }
    four = FORMATS[spec.format].blocked
    # bitsandbytes needs a compute dtype; where a layer computes in its input's, that of the model's other tensors is it
    plain = (p.dtype for p in model.parameters() if not isinstance(p, QuantTensor) and p.is_floating_point())
    compute = spec.compute_dtype or next(plain, torch.float32)
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": spec.format if four else "fp4",
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": dtype_name(compute),
        "bnb_4bit_quant_storage": "uint8",
        _OWN_COMPUTE_DTYPE: spec.compute_dtype and dtype_name(spec.compute_dtype),
        "llm_int8_threshold": spec.threshold,
        "llm_int8_skip_modules": skipped or None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def _as_usual(model: nn.Module, path: str, spec: QuantSpec) -> bool:
    """Whether a quantized parameter is what this format makes of every linear layer's weight."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    parameter: Any = module._parameters[name]
    return name == "weight" and is_linear(module) and parameter.spec.format == spec.format


def mixes_formats(model: nn.Module) -> bool:
    """Whether the model is more than transformers with bitsandbytes can load: one format, on linear layers."""
    found = {
        (p.spec.format, p.spec.double_quant, name == "weight" and is_linear(module))
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(p, QuantTensor)
    }
    return len(found) > 1 or any(not linear for _, _, linear in found)


def record_config(model: nn.Module) -> None:
    """Write into a transformers model what it is, or remove what is stale.

    That is the ``quantization_config`` of its configuration, and the attributes by which transformers, Accelerate and
    PEFT tell a model whose weights are in 4 or 8 bits.
    """
    if not is_transformers_model(model):
        return
    config: Any = model.config
    recorded = quantization_config(model)
    if recorded is not None:
        config.quantization_config = recorded
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    mark_quantized(model)


def mark_quantized(model: Any) -> None:
    """Set ``is_loaded_in_4bit`` and ``is_loaded_in_8bit``, of which one is true for a quantized model.

    A quantized model also gets methods of its own where transformers' would not count right: what it takes of memory,
    and, since transformers imports bitsandbytes for that, its parameters where bitsandbytes is not installed.
    """
    sizes = dict.fromkeys((4, 8), 0)
    for p in model.parameters():
        if isinstance(p, QuantTensor):
            sizes[FORMATS[p.spec.format].bits] += p.numel()
    model.is_loaded_in_4bit = sizes[4] > 0 and sizes[4] >= sizes[8]
    model.is_loaded_in_8bit = sizes[8] > sizes[4]
    methods: dict[str, tuple[Callable[..., int], bool]] = {
        "get_memory_footprint": (get_memory_footprint, any(sizes.values())),
        "num_parameters": (num_parameters, model.is_loaded_in_4bit and find_spec("bitsandbytes") is None),
    }
    for name, (method, needed) in methods.items():
        model.__dict__.pop(name, None)
        if needed and hasattr(model, name):
            setattr(model, name, partial(method, model))  # no bound method: a copy or a pickle would be of the class's


def get_memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes of the parameters as they are stored, scales included, and of buffers."""
    tensors: list[Tensor] = [*model.buffers()] if return_buffers else []
    for p in model.parameters():
        tensors += p.inner_tensors.values() if isinstance(p, QuantTensor) else [p]
    return sum(t.nbytes for t in tensors)


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """transformers' method, for a model whose parameters all have their logical size."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
    counted = (p for p in model.parameters() if (p.requires_grad or not only_trainable) and id(p) not in embeddings)
    return sum(p.numel() for p in counted)
