"""A calibration engine for ONNX models: data in, mergeable statistics and ranges out, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Probe", "collect", "create_session"]

if TYPE_CHECKING:
    from calib.provider import create_session
    from calib.runner import collect
    from calib.types import Probe

_HOMES = {"Probe": "calib.types", "collect": "calib.runner", "create_session": "calib.provider"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'calib' has no attribute '{name}'")
