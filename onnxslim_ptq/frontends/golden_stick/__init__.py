"""MindSpore Golden Stick's post-training quantization, on ONNX graphs (docs/golden-stick.md)."""

from __future__ import annotations

from onnxslim_ptq.frontends.golden_stick.algorithms import AWQConfig, GPTQQuantConfig, SmoothQuantConfig
from onnxslim_ptq.frontends.golden_stick.config import PTQConfig
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

__all__ = [
    "AWQConfig",
    "BackendTarget",
    "DType",
    "GPTQQuantConfig",
    "OutliersSuppressionType",
    "PTQConfig",
    "PTQMode",
    "PrecisionRecovery",
    "QuantGranularity",
    "SmoothQuantConfig",
    "int4",
    "int8",
]
