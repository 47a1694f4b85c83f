"""The errors this project raises on purpose; every text is one line that names what, where and the cure."""

from __future__ import annotations

from calib.errors import CalibrationError, DeviceError, GraphError, QuantizationError

__all__ = [
    "CalibrationError",
    "DeviceError",
    "GraphError",
    "QuantizationError",
    "RecipeError",
    "VerificationError",
]


class RecipeError(QuantizationError, ValueError):
    """The recipe is malformed, asks for something not available, or names layers the model does not have."""


class VerificationError(QuantizationError):
    """The written model fails its check: NaN or Inf, a missing output, or too far from the float model."""
