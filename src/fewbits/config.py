"""``QuantizationConfig``: what to quantize to what, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewbits.errors import ConfigError
from fewbits.formats import FORMATS, QuantSpec, get_format

_DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "fp16": torch.float16, "float16": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
}  # fmt: skip


def parse_dtype(value: object, argument: str) -> torch.dtype | None:
    """A floating-point dtype from a dtype, its name, or ``None``.

    Raises:
        ConfigError: anything else; ``argument`` names what was wrong.
    """
    dtype: Any = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype is None and value is None:
        return None
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConfigError(f"{argument} is {value!r}", expected="torch.float32, torch.float16 or torch.bfloat16")
    result: torch.dtype = dtype
    return result


def _patterns(value: object, argument: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{argument} is {value!r}", expected="a list of module names or globs")
    names = tuple(value)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{argument} is {value!r}", expected="a list of strings")
    return names


@dataclass(frozen=True)
class QuantizationConfig:
    """What to quantize to what.

    Names of modules are whole dotted names, which stand for the module and all below it, or globs
    (``"h.*.mlp.c_proj"``). Nothing matches by substring.

    Attributes:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"`` for every quantizable module but the output heads; ``None``
            quantizes only what ``overrides`` names, and takes a checkpoint that is already quantized as it is.
        block_size: elements that share a scale in the 4-bit formats: 32, 64, … 4096.
        double_quant: whether those scales are quantized to 8 bits in turn (saves 0.37 bits a parameter at block 64).
        llm_int8_threshold: int8's outlier threshold: input columns with any |x| from here on are multiplied in full
            precision; 0 for none.
        compute_dtype: what 4-bit modules cast their input to; ``None`` for the input's own dtype.
        dtype: of all floating-point tensors that are not quantized; ``None`` for the checkpoint's own.
        skip_modules: modules not to quantize, *instead of* the output heads found from the structure.
        keep_in_fp32_modules: modules not to quantize and to keep in float32.
        overrides: ``{name: format or None}`` for modules (embeddings too) or single parameters; goes before all else.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    format: str | None = None
    block_size: int = 64
    double_quant: bool = False
    llm_int8_threshold: float = 6.0
    compute_dtype: torch.dtype | None = None
    dtype: torch.dtype | None = None
    skip_modules: tuple[str, ...] | None = None
    keep_in_fp32_modules: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.format is not None:
            get_format(self.format)
        put("compute_dtype", parse_dtype(self.compute_dtype, "compute_dtype"))
        put("dtype", parse_dtype(self.dtype, "dtype"))
        if self.skip_modules is not None:
            put("skip_modules", _patterns(self.skip_modules, "skip_modules"))
        put("keep_in_fp32_modules", _patterns(self.keep_in_fp32_modules, "keep_in_fp32_modules"))
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        try:
            put("overrides", tuple((name, format) for name, format in pairs))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"overrides is {self.overrides!r}", expected="{module name or glob: format or None}"
            ) from error
        if not all(isinstance(name, str) for name, _ in self.overrides):
            raise ConfigError(f"overrides is {self.overrides!r}", expected="names of modules as its keys")
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"double_quant is {self.double_quant!r}", expected="True or False")
        for format in {self.format, *(format for _, format in self.overrides)} - {None}:
            self.spec(str(format))  # validates block size and threshold with it
        if self.double_quant and self.format is not None and not FORMATS[self.format].blocked:
            raise ConfigError(f"double_quant has no meaning for {self.format}", expected="nf4 or fp4 with it")

    def spec(self, format: str) -> QuantSpec:
        """How one tensor becomes ``format`` under these settings."""
        if not get_format(format).blocked:
            return QuantSpec(format, threshold=self.llm_int8_threshold)
        return QuantSpec(format, self.block_size, self.double_quant, compute_dtype=self.compute_dtype)


def as_config(config: QuantizationConfig | str | None, **settings: Any) -> QuantizationConfig:
    """A config from a format's name and settings, or a config as it is.

    Raises:
        ConfigError: both a config and settings, or an unknown setting.
    """
    if isinstance(config, QuantizationConfig):
        if settings:
            raise ConfigError(
                f"settings given beside a QuantizationConfig: {', '.join(settings)}",
                hint="put them into the config, or give the format's name instead of a config",
            )
        return config
    unknown = set(settings) - set(QuantizationConfig.__dataclass_fields__)
    if unknown:
        raise ConfigError(
            f"unknown setting: {', '.join(sorted(unknown))}",
            expected=f"one of {', '.join(QuantizationConfig.__dataclass_fields__)}",
        )
    return QuantizationConfig(config, **settings)
