"""fewbits as a quantization method of transformers (5.17 or newer).

>>> from fewbits.integrations.transformers import FewbitsConfig
>>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=FewbitsConfig("nf4", double_quant=True))

transformers reads the checkpoint, joins and renames its tensors as the model's class says, and hands each one here to
be quantized, so that every architecture it can load can be loaded quantized. :func:`fewbits.from_pretrained` reads the
files itself: faster, and with parts of the model streamed from host memory or disk.

Importing this module registers the method ``"fewbits"``. It also decides who loads a checkpoint that is quantized
already in bitsandbytes' format, which transformers' registration has no place for
(:func:`_merge_quantization_configs`): fewbits, where a :class:`FewbitsConfig` is given or the checkpoint was saved from
a fewbits model; bitsandbytes otherwise, as without this module. Nothing is quantized twice.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fewbits.checkpoint import Checkpoint
from fewbits.config import QuantizationConfig, as_config
from fewbits.errors import CheckpointError, ConfigError, FewbitsError, FewbitsWarning, UnsupportedError
from fewbits.files import open_file
from fewbits.formats import FORMATS, quantized_bytes
from fewbits.hf import OWN_METHOD, is_converted, made_by_fewbits, record_config, recorded_settings, renaming
from fewbits.match import Source, sources_of
from fewbits.modules import install, quantize_parameter, stores_transposed
from fewbits.place import check_values
from fewbits.statedict import Group, decode
from fewbits.storage import Storage, choose_storage
from fewbits.tensor import QuantTensor, not_finite, scales_finite

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter, build_glob_alternation
    from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"fewbits.integrations.transformers needs transformers 5.17 or newer, this is {transformers.__version__}; "
        "fewbits.from_pretrained works with either"
    ) from error

# the parts of a quantized tensor besides the tensor itself, as keys end in a state dict (see fewbits.statedict)
_FOUR_BIT_PARTS = (
    *(f"quant_state.bitsandbytes__{row.name}" for row in FORMATS.values() if row.blocked),
    "nested_quant_map",
    "nested_absmax",
    "quant_map",
    "absmax",
)
_INT8_PARTS = ("weight_format", "SCB")


@register_quantization_config(OWN_METHOD)
class FewbitsConfig(QuantizationConfigMixin):  # type: ignore[misc]  # mypy does not follow transformers
    """What to quantize to what, for transformers' ``from_pretrained(…, quantization_config=…)``.

    Args:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``; ``None`` for a checkpoint that is quantized already, or where
            ``overrides`` says everything.
        settings: the other fields of :class:`fewbits.QuantizationConfig` but ``dtype``, which is ``from_pretrained``'s.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    def __init__(self, format: str | QuantizationConfig | None = None, **settings: Any) -> None:
        settings.pop("quant_method", None)  # of a config.json
        try:
            config = as_config(format, **settings)
        except TypeError as error:
            raise ConfigError(f"FewbitsConfig: {error}", expected="fields of fewbits.QuantizationConfig") from error
        if config.dtype is not None:
            raise ConfigError("FewbitsConfig takes no dtype", hint="give it to from_pretrained(…, dtype=…)")
        self.quant_method = OWN_METHOD
        self.config = config

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not defaults, as JSON has them."""
        default = asdict(QuantizationConfig())
        settings = {name: value for name, value in asdict(self.config).items() if value != default[name]}
        if "compute_dtype" in settings:
            settings["compute_dtype"] = str(settings["compute_dtype"]).removeprefix("torch.")
        return {"quant_method": OWN_METHOD, **json.loads(json.dumps(settings))}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def _merge_quantization_configs(original: Any) -> Any:
    """transformers' function of that name, and before it who is to load a checkpoint that is quantized already."""

    @functools.wraps(original)
    def merge(quantization_config: Any, quantization_config_from_args: Any = None) -> Any:
        recorded = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        asked = quantization_config_from_args
        if not isinstance(asked, FewbitsConfig) and not (asked is None and made_by_fewbits(recorded)):
            return original(quantization_config, asked)
        settings = recorded_settings(recorded)
        found = settings.pop("format", None)
        if asked is not None and asked.config.format not in (None, found) and not settings.get("overrides"):
            warnings.warn(
                f"the checkpoint is already quantized to {found}: it is loaded as it is, not as {asked.config.format}",
                FewbitsWarning,
                stacklevel=2,
            )
        if asked is not None and asked.config.compute_dtype is not None:
            settings["compute_dtype"] = asked.config.compute_dtype
        settings.pop("overrides", None)  # the tensors say themselves what they are
        return FewbitsConfig(None, **{**settings, "double_quant": False})

    return merge


AutoHfQuantizer.merge_quantization_configs = staticmethod(
    _merge_quantization_configs(AutoHfQuantizer.merge_quantization_configs)
)


@register_quantizer(OWN_METHOD)
class FewbitsHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads a model quantized by fewbits.

    Attributes:
        storage: how each parameter is to be stored, by name.
        stored: what the checkpoint holds quantized, by the parameter's name in the model.
        error: the first error of a tensor; transformers would make a report of it that hides its text.
        dtype: what the model is loaded in.
    """

    requires_calibration = False

    def __init__(self, quantization_config: FewbitsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.storage: dict[str, Storage] = {}
        self.stored: dict[str, Source] = {}
        self.error: FewbitsError | None = None
        self.dtype: torch.dtype | None = None

    # --------------------------------------------------------------------------------------- before reading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise for what cannot be loaded so.

        Raises:
            ConfigError: nothing says what to quantize to.
            UnsupportedError: a device map with "disk" in it.
        """
        config = self.quantization_config.config
        if not self.pre_quantized and config.format is None and not config.overrides:
            raise ConfigError(
                "the checkpoint is not quantized, and no format is given", expected='FewbitsConfig("nf4"), for one'
            )
        device_map = kwargs.get("device_map")
        if device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values()):
            raise UnsupportedError(
                "transformers writes what lies on disk in full precision",
                hint="fewbits.from_pretrained(path, format, device_map=…) streams quantized weights from disk",
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Where none is given: the current GPU if there is one, as with transformers' other methods."""
        if device_map is None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype asked for stays; it is the logical one of quantized parameters."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config.config
        if self.pre_quantized:
            self.stored = _stored_in(model, checkpoint_files or [])
            settings = {"threshold": config.llm_int8_threshold, "compute_dtype": config.compute_dtype}
            for path, source in self.stored.items():
                assert source.spec is not None
                self.storage[path] = Storage(replace(source.spec, **settings), self.dtype)
            return model
        kept = _kept_in_fp32(model, self.dtype)
        storage = choose_storage(model, config)
        self.storage = {path: storage[path] for path in storage if path not in kept}
        if not any(place.spec for place in self.storage.values()):
            raise ConfigError(
                f"{type(model).__name__} has no layer to quantize",
                expected="a linear layer besides its output heads",
                hint="name parameters with overrides, or load it without quantization_config",
            )
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this parameter becomes a quantized one, from plain or from stored bytes."""
        place = self.storage.get(param_name)
        return place is not None and place.spec is not None

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element: transformers plans device maps by it."""
        place = self.storage.get(param_name)
        if place is None or place.spec is None:
            return float(param.element_size())
        source = self.stored.get(param_name)
        shape = tuple(param.shape) if source is None else source.shape
        return quantized_bytes(place.spec, shape) / max(param.numel(), 1)

    # --------------------------------------------------------------------------------------- while reading

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes one parameter."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What collects the parts of a quantized parameter; one for each plain name that such parameters have."""
        conversions = []
        for name in sorted({path.rpartition(".")[2] for path in self.stored}):
            int8 = _INT8_PARTS if name == "weight" else tuple(f"{name}.{part}" for part in _INT8_PARTS)
            parts = sorted((*(f"{name}.{part}" for part in _FOUR_BIT_PARTS), *int8), key=len, reverse=True)
            conversions.append(WeightConverter([*parts, name], name, [_Deserialize(self)]))
        return conversions

    def failed(self, error: FewbitsError) -> None:
        """Keep an error for the end of the reading."""
        self.error = self.error or error

    # --------------------------------------------------------------------------------------- after reading

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        for module in model.modules():
            for name, parameter in [*module.named_parameters(recurse=False)]:
                if isinstance(parameter, QuantTensor):
                    install(module, name, parameter)  # type: ignore[arg-type]  # an instance, by its mark
        # what is stored quantized is saved under the names it has here: bytes cannot be split or joined like values
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [c for c in conversions if not _touches_quantized(c, model)]
        record_config(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from fewbits.inplace import dequantize

        return dequantize(model, dtype=dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` writes bitsandbytes' keys."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: gradients flow through quantized weights to their inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Operators have fakes and no data-dependent shapes."""
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """A plain value to a quantized parameter, on the device that it was read to."""

    def __init__(self, hf_quantizer: FewbitsHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for path, value in input_dict.items():
            w = value[0] if isinstance(value, list) else value
            place = self.hf_quantizer.storage.get(path)
            if place is None or place.spec is None:  # a converter may give several, not all of them to be quantized
                result[path] = w
                continue
            module, name = _owner(model, path)
            try:
                if not w.is_meta:
                    check_values(w, place, path, CheckpointError)
                result[path] = _as_parameter(quantize_parameter(module, name, w, place.spec, path, known_finite=True))
            except FewbitsError as error:
                self.hf_quantizer.failed(error)
                result[path] = w
        return result


class _Deserialize(ConversionOps):  # type: ignore[misc]
    """The stored parts of a quantized parameter to that parameter; a plain one passes."""

    def __init__(self, hf_quantizer: FewbitsHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Deserialize:
        return self  # transformers copies its converters for every parameter, and the quantizer would be with them

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        name = full_layer_name.rpartition(".")[2]
        source = self.hf_quantizer.stored.get(full_layer_name)
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if source is None:  # the pattern of quantized names fits plain ones too, whose dtype is then left alone
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype
            return {key: v.to(dtype) if v.is_floating_point() else v for key, v in parts.items()}
        module, _ = _owner(model, full_layer_name)
        place = self.hf_quantizer.storage[full_layer_name]
        tensors = {_role(key, name): value for key, value in parts.items()}
        group = Group(full_layer_name, source.group.format, {role: role for role in tensors})
        try:
            assert place.spec is not None
            dtype = place.dtype or model.dtype
            value = decode(group, tensors, dtype, label=full_layer_name, threshold=place.spec.threshold)
            value.spec = replace(value.spec, compute_dtype=place.spec.compute_dtype)
            if not bool(scales_finite(value)):
                raise not_finite(full_layer_name, value.spec)
            value = value.relabelled(dtype)
            return {name: _as_parameter(value.t() if stores_transposed(module, name) else value)}
        except FewbitsError as error:
            error.locate(source.file)
            self.hf_quantizer.failed(error)
            return {name: parts[name]}


def _role(key: str, name: str) -> str:
    """The role in :class:`fewbits.statedict.Group` of a part that was found under this pattern."""
    if key == name:
        return "weight"
    part = key.removeprefix(f"{name}.")
    return {"SCB": "absmax"}.get(part, "quant_state" if part.startswith("quant_state") else part)


def _as_parameter(value: Tensor) -> Tensor:
    value._is_param = True  # nn.Parameter's own mark
    return value


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _kept_in_fp32(model: Any, dtype: torch.dtype | None) -> set[str]:
    """Parameters that the model's class wants in float32 when it is loaded in this dtype, by transformers' own rule."""
    patterns = list(model._get_dtype_plan(dtype))
    if not patterns:
        return set()
    wanted = build_glob_alternation(patterns)[0]
    return {path for path, _ in model.named_parameters(remove_duplicate=False) if wanted.search(path)}


def _stored_in(model: nn.Module, files: Iterable[str]) -> dict[str, Source]:
    """What checkpoint files hold quantized, by the names that parameters have in the model.

    Raises:
        CheckpointError: damaged files, or a quantized tensor that transformers would join with others or split.
    """
    paths = [Path(file) for file in files]
    tensors = {name: stored for path in paths for name, stored in open_file(path)[0].items()}
    sources = sources_of(Checkpoint(paths[0].parent if paths else Path(), tensors))
    rename, prefix = renaming(model), f"{getattr(model, 'base_model_prefix', '')}."
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Source] = {}
    for name, source in sources.items():
        if source.spec is None:
            continue
        renamed = rename(name)
        path = next((p for p in (renamed, prefix + renamed, renamed.removeprefix(prefix)) if p in parameters), None)
        if path is not None:
            found[path] = source
            _store_meta_as(model, path, tensors[source.group.keys["weight"]].dtype)
        elif is_converted(model, [name]):
            raise CheckpointError(
                f"the checkpoint holds a quantized tensor that {type(model).__name__} keeps as part of another one",
                file=source.file,
                parameter=name,
                expected="a checkpoint whose tensors are those of the model",
                hint="quantize the original checkpoint with FewbitsConfig",
            )
    return found


def _touches_quantized(conversion: Any, model: nn.Module) -> bool:
    """Whether a conversion of transformers' made one of the model's quantized parameters, or took its stored parts."""
    operations = getattr(conversion, "operations", ())
    if any(isinstance(operation, (_Quantize, _Deserialize)) for operation in operations):
        return True
    if not isinstance(conversion, WeightConverter):
        return False
    quantized = [name for name, p in model.named_parameters() if isinstance(p, QuantTensor)]
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in quantized)


def _store_meta_as(model: nn.Module, path: str, stored: torch.dtype) -> None:
    """Give the empty parameter the dtype that its bytes are stored in, so that transformers does not cast them."""
    module, name = _owner(model, path)
    old = module._parameters[name]
    if old is not None and stored.is_floating_point and stored != old.dtype:  # quant_storage: bytes under another dtype
        module._parameters[name] = nn.Parameter(torch.empty(old.shape, dtype=stored, device="meta"), False)
