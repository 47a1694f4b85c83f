"""What was decided for one layer, free of where the decision came from."""

from __future__ import annotations

from dataclasses import dataclass

from calib.ranges import RangeMethod
from onnxslim_ptq.core.dtypes import IntType

__all__ = ["AUTO", "OUTPUT_MSE", "LayerChoice"]

AUTO = "auto"
OUTPUT_MSE = "output_mse"


@dataclass(frozen=True)
class LayerChoice:
    """How one layer is quantized; ``range`` is a method of `calib.ranges`, or AUTO or OUTPUT_MSE."""

    activation: IntType
    symmetric: bool
    range: RangeMethod | str
    range_name: str
    per_channel: bool
    bias_correction: bool
