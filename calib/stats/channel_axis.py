"""Seeing a tensor of any rank as channels."""

from __future__ import annotations

import numpy as np

from calib.errors import CalibrationError
from calib.types import Array, SampleId

__all__ = ["as_block", "require_channels"]


def as_block(x: Array, axis: int) -> Array:
    """Return ``x`` as [before, C, after], no copy for a contiguous array; CalibrationError when it has no such axis."""
    if not -x.ndim <= axis < x.ndim:
        raise CalibrationError(f"there is no axis {axis} in shape {list(x.shape)}")
    axis %= x.ndim
    before = int(np.prod(x.shape[:axis], dtype=np.int64))
    after = int(np.prod(x.shape[axis + 1 :], dtype=np.int64))
    return x.reshape(before, x.shape[axis], after)


def require_channels(axis: int, expected: int, x: Array, sample: SampleId) -> None:
    """Raise CalibrationError, naming the sample, unless ``x`` has ``expected`` channels."""
    if x.shape[axis] != expected:
        raise CalibrationError(
            f"axis {axis} had {expected} channels before {sample}, whose shape is {list(x.shape)}"
        )
