"""AWQ-style clip search: extremes are clipped where that lowers the error of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from calib.ranges.grid import require_between
from onnxslim_ptq.core.rounding import Floats, Rounded, Rounder, Task, row_errors
from onnxslim_ptq.core.spec import PerGroup, PerTensor, QParams
from onnxslim_ptq.rounders.numbers import codes_of, require_whole, spread, stored

__all__ = ["RATIOS", "Clip", "clipped"]

RATIOS = tuple(1 - i / 20 for i in range(10))


@dataclass(frozen=True)
class Clip(Rounder):
    """Scale s = r max|w| / 127 with r of ``steps`` equal steps from 1 down to (not including) ``lowest``; then rtn.

    Per output channel and group of columns g the r with the smallest e_g G_gg e_gᵀ (the squared change of the group's
    part of the output, summed over the inputs); one r for all of a PerTensor weight. Asymmetric: lo and hi shrink
    alike. ValueError unless 0.05 <= lowest < 1 and 1 <= steps <= 1000.
    Source: AWQ (J. Lin et al., MLSys 2024), its clip search; MindSpore Golden Stick's weight_clip_ratio.
    """

    lowest: float = 0.5
    steps: int = 10

    name: ClassVar[str] = "clip"
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_between("lowest", self.lowest, 0.05, 0.999)
        require_whole("steps", self.steps, 1, 1000)

    def round(self, task: Task) -> Rounded:
        ratios = tuple(1 - i * (1 - self.lowest) / self.steps for i in range(self.steps))
        params = clipped(task, ratios)
        codes = codes_of(task.weight.astype(np.float64), params, task.limits)
        return Rounded(codes.astype(params.spec.dtype.dtype), params)


def clipped(task: Task, ratios: tuple[float, ...]) -> QParams:
    """The task's numbers with every scale times the best of ``ratios`` (the first of equals)."""
    weight = task.weight.astype(np.float64)
    best = task.start
    least = None
    for ratio in ratios:
        params = replace(task.start, scale=stored(task.start.scale * ratio))
        scale, zero = spread(params, weight.shape)
        codes = codes_of(weight, params, task.limits)
        errors = _part_errors(task, weight - (codes - zero) * scale)
        if least is None:
            best, least = params, errors
            continue
        best = replace(best, scale=np.where(errors < least, params.scale, best.scale))
        least = np.minimum(least, errors)
    return best


def _part_errors(task: Task, change: Floats) -> Floats:
    """e_g G_gg e_gᵀ in the shape of the scales."""
    grain = task.start.spec.grain
    if isinstance(grain, PerTensor):
        return np.asarray(row_errors(change, task.gram).sum())
    if not isinstance(grain, PerGroup):
        return row_errors(change, task.gram)
    parts = [slice(i, i + grain.size) for i in range(0, change.shape[1], grain.size)]
    grams = [None if task.gram is None else task.gram[..., p, p] for p in parts]
    return np.stack([row_errors(change[:, p], g) for p, g in zip(parts, grams, strict=True)], axis=1)
