"""A calibration engine for ONNX models: data in, mergeable statistics and ranges out, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Gathering", "Probe", "Progress", "Statistics", "collect", "create_session", "gather"]

if TYPE_CHECKING:
    from calib.gathering import Gathering, gather
    from calib.progress import Progress
    from calib.provider import create_session
    from calib.runner import collect
    from calib.saved.store import Statistics
    from calib.types import Probe

_HOMES = {
    "Gathering": "calib.gathering",
    "Probe": "calib.types",
    "Progress": "calib.progress",
    "Statistics": "calib.saved.store",
    "collect": "calib.runner",
    "create_session": "calib.provider",
    "gather": "calib.gathering",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'calib' has no attribute '{name}'")
