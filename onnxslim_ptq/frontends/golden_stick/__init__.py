"""MindSpore Golden Stick's post-training quantization, on ONNX graphs (docs/golden-stick.md)."""

from __future__ import annotations

from onnxslim_ptq.frontends.golden_stick.algorithms import AWQConfig, GPTQQuantConfig, SmoothQuantConfig
from onnxslim_ptq.frontends.golden_stick.checkpoint import export_checkpoint, load_checkpoint, save_checkpoint
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
from onnxslim_ptq.frontends.golden_stick.entry_points import RoundToNearest, SmoothQuant
from onnxslim_ptq.frontends.golden_stick.network import Network
from onnxslim_ptq.frontends.golden_stick.ptq import PTQ

__all__ = [
    "PTQ",
    "AWQConfig",
    "BackendTarget",
    "DType",
    "GPTQQuantConfig",
    "Network",
    "OutliersSuppressionType",
    "PTQConfig",
    "PTQMode",
    "PrecisionRecovery",
    "QuantGranularity",
    "RoundToNearest",
    "SmoothQuant",
    "SmoothQuantConfig",
    "export_checkpoint",
    "int4",
    "int8",
    "load_checkpoint",
    "save_checkpoint",
]
