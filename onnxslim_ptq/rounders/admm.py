"""ADMM: a float matrix that fits the outputs and a quantized one that fits the grid are pulled together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calib.ranges.grid import require_between
from onnxslim_ptq.core.rounding import Rounded, Rounder, Task, row_errors, times
from onnxslim_ptq.core.spec import PerTensor
from onnxslim_ptq.rounders.numbers import codes_of, damped, require_whole, values_of
from onnxslim_ptq.rounders.ssz import Ssz

__all__ = ["Admm"]


@dataclass(frozen=True)
class Admm(Rounder):
    """min tr((W - X) G (W - X)ᵀ) + indicator(Z on the grid), X = Z, with multiplier U, G scaled to mean diagonal 1:

    X = (W G + rho (Z - U)) (G + rho I)⁻¹;  Z = s (round((X + U) / s) within the limits);  U += X - Z.

    The scales are those of the rounder ``ssz`` (alternating least squares); the best codes of each row are kept.
    rho grows by ``growth`` a round. ValueError unless 1 <= steps <= 1000, 1e-4 <= rho <= 1e4, 1 <= growth <= 2,
    0 <= damping <= 1. Time: steps · in² · out.
    Source: C. Leng et al., Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM, AAAI 2018; scales by
    least squares: msModelSlim, keep_acc "admm".
    """

    steps: int = 30
    rho: float = 0.1
    growth: float = 1.15
    damping: float = 0.01

    name: ClassVar[str] = "admm"
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_whole("steps", self.steps, 1, 1000)
        require_between("rho", self.rho, 1e-4, 1e4)
        require_between("growth", self.growth, 1, 2)
        require_between("damping", self.damping, 0, 1)

    def round(self, task: Task) -> Rounded:
        weight, gram = task.weight.astype(np.float64), damped(task, self.damping)
        best = Ssz().round(task)
        params = best.params
        codes, least = best.codes.astype(np.int64), row_errors(weight - values_of(best), gram)
        values, vectors = np.linalg.eigh(gram)
        fitted = times(times(weight, gram), vectors)
        back = np.swapaxes(vectors, -1, -2)
        near, multiplier, rho = values_of(best), np.zeros(weight.shape), self.rho
        for _ in range(self.steps):
            exact = times((fitted + rho * times(near - multiplier, vectors)) / (values + rho), back)
            found = codes_of(exact + multiplier, params, task.limits)
            near = values_of(Rounded(found, params))
            multiplier += exact - near
            errors = row_errors(weight - near, gram)
            if isinstance(params.spec.grain, PerTensor):
                errors = np.broadcast_to(errors, least.shape)
            better = errors < least
            codes[better], least = found[better], np.minimum(errors, least)
            multiplier /= self.growth
            rho *= self.growth
        return Rounded(codes.astype(params.spec.dtype.dtype), params)
