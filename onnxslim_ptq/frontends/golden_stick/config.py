"""`PTQConfig`: Golden Stick's description of a quantization, validated rule by rule in its order.

Source: MindSpore Golden Stick 1.2, ``mindspore_gs.ptq.PTQConfig``. Each rule raises the exception type of the original.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from onnxslim_ptq.frontends.golden_stick.algorithms import GPTQQuantConfig
from onnxslim_ptq.frontends.golden_stick.dtypes import (
    BackendTarget,
    DType,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQMode,
    QuantGranularity,
    int4,
    int8,
)

__all__ = ["PTQConfig"]

_GROUP_SIZES = (64, 128)
_LARGEST_FILE = 1 << 20


@dataclass
class PTQConfig:
    """How a network is quantized; positional order and defaults as in Golden Stick.

    ``act_quant_granularity`` PER_TOKEN is dynamic quantization, PER_TENSOR static; ``kvcache_quant_granularity``
    PER_TOKEN likewise. Raises ValueError and TypeError, in the order of the rules below.
    """

    mode: PTQMode = PTQMode.QUANTIZE
    backend: BackendTarget = BackendTarget.ASCEND
    opname_blacklist: list[str] | tuple[str, ...] = field(default_factory=list)
    algo_args: Any = field(default_factory=dict)
    weight_quant_dtype: DType | None = int8
    kvcache_quant_dtype: DType | None = None
    act_quant_dtype: DType | None = None
    precision_recovery: PrecisionRecovery = PrecisionRecovery.NONE
    outliers_suppression: OutliersSuppressionType = OutliersSuppressionType.NONE
    weight_quant_granularity: QuantGranularity = QuantGranularity.PER_CHANNEL
    kvcache_quant_granularity: QuantGranularity = QuantGranularity.PER_CHANNEL
    act_quant_granularity: QuantGranularity = QuantGranularity.PER_TENSOR
    group_size: int = 0

    def __post_init__(self) -> None:
        for rule in _RULES:
            rule(self)

    def dump(self, path: str | Path) -> None:
        """Write as YAML: members by name, types as text."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        Path(path).write_text(yaml.safe_dump(plain, sort_keys=False), "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PTQConfig:
        """Read what `dump` wrote; ValueError for a file that is too large, no mapping, or has an unknown name in it,
        TypeError for an unknown field."""
        if Path(path).stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{path}: larger than 1 MiB, which is no PTQConfig")
        try:
            data = yaml.safe_load(Path(path).read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(data, dict):
            raise ValueError(f"{path}: expected a mapping of PTQConfig's fields")
        return cls(**{name: _read(name, value) for name, value in data.items()})


_ENUMS: dict[str, type[Enum]] = {
    "mode": PTQMode,
    "backend": BackendTarget,
    "precision_recovery": PrecisionRecovery,
    "outliers_suppression": OutliersSuppressionType,
    "weight_quant_granularity": QuantGranularity,
    "kvcache_quant_granularity": QuantGranularity,
    "act_quant_granularity": QuantGranularity,
}
_DTYPES = {"int8": int8, "int4": int4}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    return value.name if isinstance(value, DType) else list(value) if isinstance(value, tuple) else value


def _read(name: str, value: Any) -> Any:
    if name in _ENUMS:
        if not isinstance(value, str) or value not in _ENUMS[name].__members__:
            raise ValueError(
                f"{name}: {value!r} is unknown; use one of {', '.join(_ENUMS[name].__members__)}"
            )
        return _ENUMS[name][value]
    if str(name).endswith("_dtype") and value is not None:
        if not isinstance(value, str) or value not in _DTYPES:
            raise ValueError(f"{name}: {value!r} is unknown; use one of {', '.join(_DTYPES)} or null")
        return _DTYPES[value]
    return value


def _shown(values: tuple[Any, ...]) -> str:
    return ", ".join(f"{type(v).__name__}.{v.name}" if isinstance(v, Enum) else str(v) for v in values)


def _among(name: str, accepted: tuple[Any, ...]) -> Callable[[PTQConfig], None]:
    """ValueError unless the field is one of ``accepted``, by identity: 'quantize' is not PTQMode.QUANTIZE."""

    def rule(config: PTQConfig) -> None:
        value = getattr(config, name)
        if not any(value is one for one in accepted):
            raise ValueError(f"PTQConfig.{name}: got {value!r}; use one of {_shown(accepted)}")

    return rule


def _of_type(name: str, kind: type) -> Callable[[PTQConfig], None]:
    def rule(config: PTQConfig) -> None:
        value = getattr(config, name)
        if not isinstance(value, kind):
            raise TypeError(f"PTQConfig.{name}: expected {kind.__name__}, got {value!r}")

    return rule


def _blacklist(config: PTQConfig) -> None:
    names: object = config.opname_blacklist
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"PTQConfig.opname_blacklist: expected a list of str, got {names!r}")


def _per_token(config: PTQConfig) -> None:
    if config.act_quant_granularity is not QuantGranularity.PER_TOKEN:
        return
    if config.act_quant_dtype is not int8 or config.weight_quant_dtype not in (int8, int4):
        raise ValueError(
            "PTQConfig.act_quant_granularity: PER_TOKEN needs act_quant_dtype=int8 and weight_quant_dtype int8 or int4"
        )


def _w8a8_per_channel(config: PTQConfig) -> None:
    both = config.weight_quant_dtype is int8 and config.act_quant_dtype is int8
    if both and config.weight_quant_granularity is not QuantGranularity.PER_CHANNEL:
        raise ValueError("PTQConfig.weight_quant_granularity: W8A8 takes PER_CHANNEL only")


def _cache_per_token(config: PTQConfig) -> None:
    if config.kvcache_quant_granularity is not QuantGranularity.PER_TOKEN:
        return
    if config.kvcache_quant_dtype is not int8:
        raise ValueError("PTQConfig.kvcache_quant_granularity: PER_TOKEN needs kvcache_quant_dtype=int8")
    if config.mode is PTQMode.QUANTIZE:
        warnings.warn("a KV cache quantized per token needs no QUANTIZE run: DEPLOY is enough", stacklevel=5)


def _groups(config: PTQConfig) -> None:
    grouped = config.weight_quant_granularity is QuantGranularity.PER_GROUP
    if not grouped and config.group_size != 0:
        raise ValueError(f"PTQConfig.group_size: {config.group_size} goes with PER_GROUP only; leave it at 0")
    if grouped and config.group_size not in _GROUP_SIZES:
        raise ValueError(
            f"PTQConfig.group_size: PER_GROUP takes {' or '.join(map(str, _GROUP_SIZES))}, got {config.group_size}"
        )


def _gptq_arguments(config: PTQConfig) -> None:
    if config.precision_recovery is PrecisionRecovery.GPTQ and config.algo_args == {}:
        config.algo_args = GPTQQuantConfig()
        warnings.warn("algo_args is empty: GPTQ uses GPTQQuantConfig()", stacklevel=5)
    elif config.precision_recovery is not PrecisionRecovery.GPTQ and isinstance(
        config.algo_args, GPTQQuantConfig
    ):
        warnings.warn("algo_args is a GPTQQuantConfig, but precision_recovery is not GPTQ", stacklevel=5)


def _a8w4(config: PTQConfig) -> None:
    if config.weight_quant_dtype is not int4 or config.act_quant_dtype is not int8:
        return
    per_token = config.act_quant_granularity is QuantGranularity.PER_TOKEN
    if not per_token or config.precision_recovery is not PrecisionRecovery.GPTQ:
        raise ValueError(
            "PTQConfig: int4 weights with int8 activations need act_quant_granularity=PER_TOKEN and "
            "precision_recovery=GPTQ"
        )


def _arguments(config: PTQConfig) -> None:
    given = config.algo_args
    if not isinstance(given, dict) and not dataclasses.is_dataclass(given):
        raise ValueError(f"PTQConfig.algo_args: expected a dict or a dataclass, got {given!r}")
    if not isinstance(given, dict):
        if isinstance(given, type):
            raise TypeError(f"PTQConfig.algo_args: {given.__name__} is a class; give an instance")
        config.algo_args = dataclasses.asdict(given)


_RULES: tuple[Callable[[PTQConfig], None], ...] = (
    _among("mode", tuple(PTQMode)),
    _among("backend", tuple(BackendTarget)),
    _among("weight_quant_dtype", (int8, int4, None)),
    _among("kvcache_quant_dtype", (int8, None)),
    _among("act_quant_dtype", (int8, None)),
    _blacklist,
    _of_type("outliers_suppression", OutliersSuppressionType),
    _of_type("group_size", int),
    _among("act_quant_granularity", (QuantGranularity.PER_TENSOR, QuantGranularity.PER_TOKEN)),
    _among("weight_quant_granularity", (QuantGranularity.PER_CHANNEL, QuantGranularity.PER_GROUP)),
    _among("kvcache_quant_granularity", (QuantGranularity.PER_CHANNEL, QuantGranularity.PER_TOKEN)),
    _per_token,
    _w8a8_per_channel,
    _cache_per_token,
    _groups,
    _gptq_arguments,
    _a8w4,
    _of_type("precision_recovery", PrecisionRecovery),
    _arguments,
)
