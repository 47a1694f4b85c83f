"""SSZ: the scale (and zero point) that fit the codes best, by alternating least squares; needs no data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from onnxslim_ptq.core.rounding import Rounded, Rounder, Task
from onnxslim_ptq.core.spec import QParams
from onnxslim_ptq.rounders.numbers import blocks, codes_of, require_whole, spread, stored

__all__ = ["Ssz", "refit"]

_SETTLED = 1e-10


@dataclass(frozen=True)
class Ssz(Rounder):
    """Repeat q = round(w/s) + z, then s = <w, q - z> / <q - z, q - z>, while Σ (w - ŵ)² falls; per scale.

    Asymmetric: s = cov(w, q) / var(q) and z = round(mean(q) - mean(w) / s). Starts at the extremes, keeps the best of
    at most ``steps`` rounds, stops when no error changed by 1e-10 of itself. ValueError unless 1 <= steps <= 1000.
    Source: msModelSlim, linear_quant weight method "ssz".
    """

    steps: int = 20

    name: ClassVar[str] = "ssz"
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_whole("steps", self.steps, 1, 1000)

    def round(self, task: Task) -> Rounded:
        weight = task.weight.astype(np.float64)
        best = params = task.start
        least, before = None, None
        for _ in range(self.steps + 1):
            codes = codes_of(weight, params, task.limits)
            scale, zero = spread(params, weight.shape)
            error = np.nansum(blocks((weight - (codes - zero) * scale) ** 2, params), axis=1)
            if least is None or before is None:
                least = error
            else:
                better = (error < least).reshape(params.scale.shape)
                best = replace(
                    best,
                    scale=np.where(better, params.scale, best.scale),
                    zero_point=np.where(better, params.zero_point, best.zero_point),
                )
                least = np.minimum(least, error)
                if (np.abs(before - error) <= _SETTLED * before).all():
                    break
            before = error
            params = refit(task, codes.astype(np.float64), params)
        codes = codes_of(weight, best, task.limits)
        return Rounded(codes.astype(task.start.spec.dtype.dtype), best)


def refit(task: Task, codes: np.ndarray, params: QParams) -> QParams:
    """The least-squares scale, and zero point when asymmetric, of given codes; unchanged where it would not be > 0."""
    zero = spread(params, codes.shape)[1]
    w, q = blocks(task.weight.astype(np.float64), params), blocks(codes - zero, params)
    shape = params.scale.shape
    middle_w = middle_q = np.zeros((len(w), 1))
    if not params.spec.symmetric:
        middle_w, middle_q = np.nanmean(w, axis=1, keepdims=True), np.nanmean(q, axis=1, keepdims=True)
    power = np.nansum((q - middle_q) ** 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = np.nansum((w - middle_w) * (q - middle_q), axis=1) / power
    good = np.isfinite(fitted) & (fitted > 0)
    scale = np.where(good, stored(np.where(good, fitted, 1.0)), params.scale.reshape(-1))
    if params.spec.symmetric:
        return replace(params, scale=scale.reshape(shape))
    moved = params.zero_point.reshape(-1) + np.rint(middle_q[:, 0] - middle_w[:, 0] / scale)
    found = np.where(good, np.clip(moved, params.spec.dtype.lowest, params.spec.dtype.highest), 0)
    zero_point = np.where(good, found, params.zero_point.reshape(-1)).astype(np.int64)
    return replace(params, scale=scale.reshape(shape), zero_point=zero_point.reshape(shape))
