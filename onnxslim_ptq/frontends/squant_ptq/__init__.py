"""msModelSlim's ``squant_ptq``: QuantConfig and OnnxCalibrator (docs/msmodelslim-onnx.md)."""

from __future__ import annotations

from onnxslim_ptq.frontends.squant_ptq.calibrator import OnnxCalibrator
from onnxslim_ptq.frontends.squant_ptq.config import QuantConfig

__all__ = ["OnnxCalibrator", "QuantConfig"]
