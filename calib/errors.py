"""Errors every layer raises: one line saying what, where and how to cure it."""

from __future__ import annotations

__all__ = ["CalibrationError", "DeviceError", "GraphError", "QuantizationError"]


class QuantizationError(Exception):
    """Base of every error this project raises on purpose; its text is one line for a person."""


class GraphError(QuantizationError):
    """The model cannot be opened, is malformed, or points outside its own folder."""


class CalibrationError(QuantizationError):
    """Samples are missing, malformed, or produce unusable statistics."""


class DeviceError(QuantizationError):
    """The requested device is not really there; the text names the reason and the cure."""
