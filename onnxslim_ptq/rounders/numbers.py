"""Scales and zero points per element of a weight matrix, and the error that codes make."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxslim_ptq.core.qmath import SMALLEST_SCALE
from onnxslim_ptq.core.rounding import Floats, Rounded, Task
from onnxslim_ptq.core.spec import PerGroup, PerTensor, QParams

__all__ = [
    "blocks",
    "codes_of",
    "damped",
    "require_whole",
    "spread",
    "stored",
    "values_of",
]


def spread(params: QParams, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Scale and zero point of each element of a matrix [out, in], float64, as views where one serves many."""
    grain = params.spec.grain
    found = []
    for values in (params.scale, params.zero_point):
        exact = np.asarray(values, np.float64)
        if isinstance(grain, PerGroup):
            exact = exact.repeat(grain.size, axis=1)[:, : shape[1]]
        elif exact.ndim:
            exact = exact[:, None]
        found.append(np.broadcast_to(exact, shape))
    return found[0], found[1]


def codes_of(values: Floats, params: QParams, limits: tuple[int, int]) -> NDArray[np.int64]:
    """The nearest codes of a matrix [out, in] within the limits."""
    scale, zero = spread(params, values.shape)
    return np.asarray(np.clip(np.rint(values / scale) + zero, *limits), np.int64)


def values_of(rounded: Rounded) -> Floats:
    """What the codes stand for, float64 [out, in]."""
    scale, zero = spread(rounded.params, rounded.codes.shape)
    return np.asarray((rounded.codes.astype(np.float64) - zero) * scale)


def damped(task: Task, share: float) -> Floats:
    """G + share * mean(diag G) I, so that inputs seen too seldom do not decide; I where G is missing or zero."""
    size = task.weight.shape[1]
    if task.gram is None:
        return np.eye(size)
    diagonal = np.diagonal(task.gram, axis1=-2, axis2=-1)
    level = diagonal.mean(axis=-1)[..., None, None]
    gram = np.where(level > 0, task.gram / np.where(level > 0, level, 1.0), np.eye(size))
    gram[..., np.arange(size), np.arange(size)] += share
    return np.asarray(gram)


def blocks(matrix: Floats, params: QParams) -> Floats:
    """The matrix cut into what shares a scale, [scales, elements]; a short last group is filled with NaN."""
    grain = params.spec.grain
    if isinstance(grain, PerTensor):
        return matrix.reshape(1, -1)
    if not isinstance(grain, PerGroup):
        return matrix
    short = -matrix.shape[1] % grain.size
    padded = np.pad(matrix, ((0, 0), (0, short)), constant_values=np.nan) if short else matrix
    return padded.reshape(-1, grain.size)


def stored(scale: Floats) -> Floats:
    """The scale as a file holds it (float32), at least the smallest one that runtimes keep."""
    return np.maximum(np.asarray(scale, np.float32).astype(np.float64), SMALLEST_SCALE)


def require_whole(field: str, value: int, low: int, high: int) -> None:
    """Raise ValueError naming ``field`` unless it is a whole number from low to high."""
    if isinstance(value, bool) or int(value) != value or not low <= value <= high:
        raise ValueError(f"{field}: expected a whole number from {low} to {high}, got {value!r}")
