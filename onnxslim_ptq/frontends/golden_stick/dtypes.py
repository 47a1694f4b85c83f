"""The integer types and enumerations that a `PTQConfig` is written with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

__all__ = [
    "BackendTarget",
    "DType",
    "OutliersSuppressionType",
    "PTQMode",
    "PrecisionRecovery",
    "QuantGranularity",
    "int4",
    "int8",
]

_E = TypeVar("_E", bound="_Named")


@dataclass(frozen=True)
class DType:
    """An integer type of weights, activations or caches, as text ``name``."""

    name: str
    bits: int

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        """Copies of a config hold these very objects, as configs are compared with them."""
        return self.name


int8 = DType("int8", 8)
int4 = DType("int4", 4)  # MindSpore's qint4x2


class _Named(Enum):
    @classmethod
    def from_str(cls: type[_E], text: object) -> _E:
        """The member whose value is ``text``, in any case; ValueError listing the values when there is none."""
        found = next((m for m in cls if isinstance(text, str) and m.value == text.lower()), None)
        if found is None:
            raise ValueError(
                f"{cls.__name__}: {text!r} is unknown; use one of {', '.join(m.value for m in cls)}"
            )
        return found

    def __str__(self) -> str:
        return str(self.value)


class PTQMode(_Named):
    """QUANTIZE calibrates and computes; DEPLOY builds the quantized graph that a checkpoint fills."""

    QUANTIZE = "quantize"
    DEPLOY = "deploy"


class BackendTarget(_Named):
    """NONE: plain ONNX; ASCEND: AscendQuant and AscendDequant."""

    NONE = "none"
    ASCEND = "ascend"


class OutliersSuppressionType(_Named):
    """How outlier channels of activations are evened out before quantization."""

    SMOOTH = "smooth"
    AWQ = "awq"
    OUTLIER_SUPPRESSION_PLUS = "outlier-suppression+"
    OUTLIER_SUPPRESSION_LITE = "outlier-suppression-lite"
    NONE = "none"


class PrecisionRecovery(_Named):
    """How weights are rounded: GPTQ, or to nearest."""

    GPTQ = "gptq"
    NONE = "none"


class QuantGranularity(_Named):
    """What shares a scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_TOKEN = "per_token"
    PER_GROUP = "per_group"
