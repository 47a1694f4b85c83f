"""What a rounder is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from calib.types import Array
from onnxslim_ptq.core.spec import QParams

__all__ = ["Floats", "Rounded", "Rounder", "Task", "row_errors", "times"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """A weight matrix to be rounded: ``weight`` float32 [out, in], y = W x.

    ``start``: the numbers that cover its extremes; their grain is PerTensor, PerChannel(0) or PerGroup(1, size).
    ``limits``: the lowest and highest code allowed. ``gram``: Σ x xᵀ over the inputs, float64 [in, in], or one per
    row, [out, in, in] (depthwise convolutions), or None.
    ``window``: how many neighbouring columns belong to one input channel (the kernel size of a convolution).
    """

    weight: NDArray[np.float32]
    start: QParams
    limits: tuple[int, int]
    gram: NDArray[np.float64] | None = None
    window: int = 1


@dataclass(frozen=True)
class Rounded:
    """Codes [out, in] of the type in ``params.spec``, within the task's limits, and the numbers they refer to."""

    codes: Array
    params: QParams


class Rounder(Protocol):
    """A way to choose codes: a frozen dataclass whose fields are the options of the recipe's ``rounder``.

    Each subclasses this class. Bad options raise ValueError as "field: ...". ``needs_gram``: it does nothing better
    than rtn without a Gram matrix.
    """

    name: ClassVar[str]
    needs_gram: ClassVar[bool]

    def round(self, task: Task) -> Rounded:
        """The codes it chooses; deterministic."""
        ...

    def errors(self, task: Task, change: Floats) -> Floats:
        """The squared output error [out] that it means to lower; ``change`` = W - Ŵ, float64 [out, in]."""
        return row_errors(change, task.gram)


def times(rows: Floats, gram: Floats) -> Floats:
    """``rows`` [out, in] times ``gram``, which may be another one for each row."""
    return np.asarray(rows @ gram if gram.ndim == 2 else np.einsum("ri,rij->rj", rows, gram))


def row_errors(change: Floats, gram: Floats | None) -> Floats:
    """e G eᵀ for each row e of ``change`` (e eᵀ without a Gram matrix), float64 [out]."""
    seen = change if gram is None else times(change, gram)
    return np.asarray(np.maximum(np.einsum("ij,ij->i", seen, change), 0.0))
