"""What was decided for one layer, free of where the decision came from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from calib.ranges import RangeMethod
from onnxslim_ptq.core.dtypes import INT8, IntType
from onnxslim_ptq.core.rounding import Rounder
from onnxslim_ptq.core.spec import BelowTimestep, ManyTokens

__all__ = [
    "AUTO",
    "OUTPUT_MSE",
    "AddedBias",
    "LayerChoice",
    "PerTokenActivation",
    "StaticActivation",
    "SwitchedActivation",
    "WeightForm",
]

AUTO = "auto"
OUTPUT_MSE = "output_mse"


@dataclass(frozen=True)
class StaticActivation:
    """One scale, known before the model runs; ``range`` is a method of `calib.ranges`, or AUTO or OUTPUT_MSE."""

    dtype: IntType
    symmetric: bool
    range: RangeMethod | str
    range_name: str


@dataclass(frozen=True)
class PerTokenActivation:
    """One scale for every row along the last axis, found while the model runs: max|x| / 127 when ``symmetric``, else
    (max x - min x) / 254 around the middle of the row."""

    dtype: IntType
    symmetric: bool = True


@dataclass(frozen=True)
class SwitchedActivation:
    """Per token under the condition ``while_``, else ``static``; both have the type and symmetry of ``static``."""

    static: StaticActivation
    while_: BelowTimestep | ManyTokens


@dataclass(frozen=True)
class WeightForm:
    """The integer form of a weight: one scale per output channel, per tensor, or per ``group`` input channels.

    ``full_range``: see `QuantSpec`.
    """

    dtype: IntType = INT8
    symmetric: bool = True
    per_channel: bool = True
    group: int | None = None
    full_range: bool = False


class AddedBias(str, Enum):
    """What becomes of the bias in the Add behind a MatMul whose activation has a known scale s_x.

    INT32: it stays a float constant, rounded to a whole multiple of s_x * s_w, as an integer accumulator holds it.
    """

    FLOAT = "float"
    INT32 = "int32"


@dataclass(frozen=True)
class LayerChoice:
    """How one layer is quantized; without ``activation`` only its weight is, without ``rounder`` to nearest."""

    activation: StaticActivation | PerTokenActivation | SwitchedActivation | None
    weight: WeightForm = WeightForm()
    bias_correction: bool = False
    rounder: Rounder | None = None
    added_bias: AddedBias = AddedBias.FLOAT
