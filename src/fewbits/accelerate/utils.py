"""``BnbQuantizationConfig`` and ``load_and_quantize_model`` as Accelerate has them, over :func:`fewbits.load`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from fewbits.config import QuantizationConfig, parse_dtype
from fewbits.devices import MaxMemory
from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.inplace import quantize
from fewbits.load import load
from fewbits.plan import DeviceMap

__all__ = ["BnbQuantizationConfig", "load_and_quantize_model"]


class MissingWeightsError(ConfigError, RuntimeError):
    """A model without values and nowhere to load them from: a ``RuntimeError`` too, as in Accelerate."""


@dataclass
class BnbQuantizationConfig:
    """Accelerate's configuration of bitsandbytes quantization, with its defaults.

    Attributes:
        load_in_8bit: LLM.int8().
        llm_int8_threshold: its outlier threshold.
        load_in_4bit: fp4 or nf4. One of the two must be set, and not both.
        bnb_4bit_quant_type: ``"fp4"`` or ``"nf4"``.
        bnb_4bit_use_double_quant: whether scales are quantized in turn.
        bnb_4bit_compute_dtype: what 4-bit modules compute in: ``"fp32"``, ``"fp16"``, ``"bf16"`` or a dtype.
        torch_dtype: of what is not quantized; by default float16 with 8 bits, the compute dtype with 4.
        skip_modules: modules not to quantize, by whole dotted name or glob; ``None`` for the output heads.
        keep_in_fp32_modules: modules not to quantize and to keep in float32.

    Raises:
        ConfigError: (a ``ValueError``) a value that cannot be meant.
    """

    load_in_8bit: bool = False
    llm_int8_threshold: float = 6.0
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: str | torch.dtype | None = "fp16"
    torch_dtype: str | torch.dtype | None = None
    skip_modules: list[str] | None = None
    keep_in_fp32_modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}", expected="True or False")
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit can't be both True", expected="one of them")
        if not self.load_in_4bit and not self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit can't be both False", expected="one of them")
        if isinstance(self.llm_int8_threshold, bool) or not isinstance(self.llm_int8_threshold, (int, float)):
            raise ConfigError(f"llm_int8_threshold is {self.llm_int8_threshold!r}", expected="a number")
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise ConfigError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}", expected='"fp4" or "nf4"')
        for name in ("skip_modules", "keep_in_fp32_modules"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise ConfigError(f"{name} is {value!r}", expected="a list of strings")
        self.bnb_4bit_compute_dtype = parse_dtype(self.bnb_4bit_compute_dtype, "bnb_4bit_compute_dtype")
        if self.bnb_4bit_compute_dtype is None:
            raise ConfigError("bnb_4bit_compute_dtype is None", expected="'fp32', 'fp16', 'bf16' or a torch.dtype")
        self.torch_dtype = parse_dtype(self.torch_dtype, "torch_dtype")
        if self.torch_dtype is None:
            self.torch_dtype = torch.float16 if self.load_in_8bit else self.bnb_4bit_compute_dtype
        if self.load_in_4bit and self.llm_int8_threshold != 6.0:
            warnings.warn("llm_int8_threshold has no meaning with load_in_4bit", FewbitsWarning, stacklevel=3)

    def to_fewbits(self) -> QuantizationConfig:
        """The same in fewbits' terms."""
        four: dict[str, Any] = {}
        if self.load_in_4bit:
            four = {"double_quant": self.bnb_4bit_use_double_quant, "compute_dtype": self.bnb_4bit_compute_dtype}
        return QuantizationConfig(
            self.bnb_4bit_quant_type if self.load_in_4bit else "int8",
            llm_int8_threshold=float(self.llm_int8_threshold),
            dtype=self.torch_dtype,  # type: ignore[arg-type]  # a dtype since __post_init__
            skip_modules=None if self.skip_modules is None else tuple(self.skip_modules),
            keep_in_fp32_modules=tuple(self.keep_in_fp32_modules or ()),
            **four,
        )


def load_and_quantize_model(
    model: nn.Module,
    bnb_quantization_config: BnbQuantizationConfig,
    weights_location: str | PathLike[str] | None = None,
    device_map: DeviceMap = None,
    no_split_module_classes: list[str] | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | PathLike[str] | None = None,
    offload_state_dict: bool = False,
) -> nn.Module:
    """Load a model quantized from a checkpoint, or quantize one that is loaded.

    Args:
        model: on the meta device it gives the structure, stays as it is, and a new model is returned. With values and
            no ``weights_location`` it is quantized in place.
        bnb_quantization_config: not changed.
        weights_location: a state-dict file, an index, a folder, or a hub id.
        device_map, no_split_module_classes, max_memory, offload_folder: see :func:`fewbits.load`; ``None`` for the
            first means "auto".
        offload_state_dict: accepted; nothing needs it, since tensors stream one by one.

    Raises:
        ConfigError, CheckpointError: see :func:`fewbits.load`.
    """
    config = bnb_quantization_config.to_fewbits()
    if weights_location is None:
        if any(p.is_meta for p in model.parameters()):
            raise MissingWeightsError(
                "the model is on the meta device and no weights_location is given",
                expected="a file, a folder or a hub id to load its weights from",
            )
        result = quantize(
            model, config, device_map=device_map or "auto", max_memory=max_memory, offload_folder=offload_folder,
            no_split_module_classes=no_split_module_classes,
        )  # fmt: skip
    else:
        result = load(
            model, weights_location, config, device_map=device_map, max_memory=max_memory,
            offload_folder=offload_folder, no_split_module_classes=no_split_module_classes,
        )  # fmt: skip
    # what PEFT and Trainer ask a model for
    result.is_loaded_in_4bit = bnb_quantization_config.load_in_4bit  # type: ignore[assignment]
    result.is_loaded_in_8bit = bnb_quantization_config.load_in_8bit  # type: ignore[assignment]
    return result
