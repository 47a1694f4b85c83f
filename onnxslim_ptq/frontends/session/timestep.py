"""The time step that a diffusion pipeline is at, for models with the input ``timestep_idx``."""

from __future__ import annotations

from contextvars import ContextVar

import numpy as np

from calib.types import Array, Feed
from onnxslim_ptq.core.spec import TIMESTEP

__all__ = ["TimestepManager"]

_STEP: ContextVar[int | None] = ContextVar("timestep_idx", default=None)


class TimestepManager:
    """Keeps the step of the current context (thread or task), as msModelSlim's class of that name."""

    @staticmethod
    def set_timestep_idx(timestep_idx: object) -> None:
        """ValueError unless it is a whole number of at least 0."""
        whole = isinstance(timestep_idx, int | np.integer) and not isinstance(timestep_idx, bool)
        step = int(str(timestep_idx)) if whole else -1
        if step < 0:
            raise ValueError(f"timestep_idx: expected a whole number of at least 0, got {timestep_idx!r}")
        _STEP.set(step)

    @staticmethod
    def get_timestep_idx() -> int | None:
        """The step, or None before the first one was set."""
        return _STEP.get()

    @staticmethod
    def feed(feed: Feed) -> dict[str, Array]:
        """``feed`` with the step in the model's input; ValueError before the first one was set."""
        step = _STEP.get()
        if step is None:
            raise ValueError("timestep_idx: is not set; call TimestepManager.set_timestep_idx before")
        return {**feed, TIMESTEP: np.asarray(step, np.int64)}
