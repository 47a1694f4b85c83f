"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxslim_ptq.core.qmath import quantize
from onnxslim_ptq.core.rounding import Rounded, Rounder, Task

__all__ = ["Rtn"]


@dataclass(frozen=True)
class Rtn(Rounder):
    """q = clip(round(w / s) + z), ties to even, with the scale that covers the extremes: max|w| / 127 and the like."""

    name: ClassVar[str] = "rtn"
    needs_gram: ClassVar[bool] = False

    def round(self, task: Task) -> Rounded:
        codes = np.clip(quantize(task.weight, task.start), *task.limits)
        return Rounded(codes.astype(task.start.spec.dtype.dtype), task.start)
