"""SQuant: flips rounding directions until the errors of each kernel and each channel cancel; needs no data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim_ptq.core.rounding import Floats, Rounded, Rounder, Task, row_errors
from onnxslim_ptq.rounders.numbers import blocks, codes_of, spread
from onnxslim_ptq.rounders.ssz import Ssz

__all__ = ["SQuant"]


@dataclass(frozen=True)
class SQuant(Rounder):
    """Starting from the nearest codes with errors e = w/s - (q - z), flip codes by one so that sums of errors vanish.

    First per kernel (the ``window`` columns of one input channel): the round(|Σe|) largest errors of the sum's sign,
    after which |Σe| <= 1/2. Then per channel (per group for PerGroup): in the round(|Σe|) kernels whose sum is
    largest in its direction the largest error is flipped, after which the channel's |Σe| <= 1/2, a kernel's < 1 and
    an element's < 1. Codes never leave the limits; where too few can be flipped, the sum stays larger.
    ``fit_scale``: the scales are those of ``ssz`` instead of the extremes'.
    Source: C. Guo et al., SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation, ICLR 2022.
    """

    fit_scale: bool = False

    name: ClassVar[str] = "squant"
    needs_gram: ClassVar[bool] = False

    def round(self, task: Task) -> Rounded:
        if self.fit_scale:
            task = replace(task, start=Ssz().round(task).params)
        scale, zero = spread(task.start, task.weight.shape)
        exact = task.weight.astype(np.float64) / scale + zero
        codes = codes_of(task.weight.astype(np.float64), task.start, task.limits).astype(np.float64)
        whole = blocks(codes, task.start) if task.start.block is not None else codes
        error = blocks(exact, task.start) - whole if task.start.block is not None else exact - codes
        window = task.window if whole.shape[1] % task.window == 0 else 1
        kernels = error.reshape(len(whole), -1, window)
        steps = _flips(kernels, whole.reshape(kernels.shape), task.limits)
        kernels = kernels - steps
        steps = steps + _across(kernels, whole.reshape(kernels.shape) + steps, task.limits)
        found = (whole + steps.reshape(whole.shape)).reshape(len(codes), -1)[:, : codes.shape[1]]
        return Rounded(found.astype(task.start.spec.dtype.dtype), task.start)

    def errors(self, task: Task, change: Floats) -> Floats:
        """Σ e² + Σ over kernels of (Σ e)² + (Σ e)²: the three parts of the Hessian assumed in the paper."""
        if task.gram is not None:
            return row_errors(change, task.gram)
        window = task.window if change.shape[1] % task.window == 0 else 1
        kernels = change.reshape(len(change), -1, window).sum(axis=2)
        return np.asarray((change**2).sum(axis=1) + (kernels**2).sum(axis=1) + kernels.sum(axis=1) ** 2)


def _flips(error: Floats, codes: Floats, limits: tuple[int, int]) -> Floats:
    """Steps in {-1, 0, 1} that bring the sum over the last axis near zero, the largest errors first.

    Few kernels need more than one flip, so taking the largest error again and again beats sorting all of them.
    """
    total = np.nansum(error, axis=-1)
    steps = np.zeros(error.shape)
    active = np.nonzero(np.rint(np.abs(total)) > 0)
    sign, left = np.sign(total[active]), np.rint(np.abs(total[active]))
    signed = error[active] * sign[:, None]
    free = _free(codes[active], sign[:, None], limits) & (signed > 0)
    gain = np.where(free, signed, 0.0)
    found = np.zeros(gain.shape)
    rows = np.arange(len(gain))
    while rows.size:
        best = gain[rows].argmax(axis=1)
        able = gain[rows, best] > 0
        rows, best = rows[able], best[able]
        found[rows, best] = sign[rows]
        gain[rows, best] = 0.0
        left[rows] -= 1
        rows = rows[left[rows] > 0]
    steps[active] = found
    return steps


def _across(error: Floats, codes: Floats, limits: tuple[int, int]) -> Floats:
    """One step in each of those kernels [rows, kernels, window] that bring the sum of a row near zero."""
    sums = np.nansum(error, axis=2)
    total = sums.sum(axis=1, keepdims=True)
    sign = np.sign(total)
    gain = np.where(_free(codes, sign[..., None], limits), error * sign[..., None], -np.inf)
    best = gain.argmax(axis=2)[..., None]
    able = np.take_along_axis(gain, best, axis=2)[..., 0] > 0
    worth = np.where(able & (sums * sign > 0), sums * sign, -np.inf)
    rank = np.argsort(np.argsort(-worth, axis=1, kind="stable"), axis=1, kind="stable")
    chosen = (rank < np.rint(np.abs(total))) & np.isfinite(worth)
    steps = np.zeros(error.shape)
    np.put_along_axis(steps, best, np.where(chosen, sign, 0.0)[..., None], axis=2)
    return steps


def _free(codes: Floats, sign: Floats, limits: tuple[int, int]) -> NDArray[np.bool_]:
    moved = codes + sign
    return np.asarray((moved >= limits[0]) & (moved <= limits[1]))
