"""AdaRound's choice, up or down for every element, made per layer from the Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calib.ranges.grid import require_between
from onnxslim_ptq.core.rounding import Rounded, Rounder, Task
from onnxslim_ptq.rounders.clip import RATIOS, clipped
from onnxslim_ptq.rounders.descent import descend, inverse_factor, order_of, ordered, successive
from onnxslim_ptq.rounders.numbers import damped, require_whole, spread

__all__ = ["AdaRound"]


@dataclass(frozen=True)
class AdaRound(Rounder):
    """min tr((W - Ŵ) G (W - Ŵ)ᵀ) over codes that are floor or ceil of w/s + z (``reach`` 0), scales fixed.

    ``reach`` widens the choice by that many codes on either side. AdaRound relaxes the choice to a sigmoid and trains
    it; with the Gram matrix at hand coordinate descent needs neither: it starts from `successive` codes (columns in
    order of falling diag(G)) and repeats `descend` at most ``sweeps`` times, each of which costs in² · out. Scales:
    those of the extremes, or with ``clip`` those of the rounder ``clip``. G + damping * mean(diag G) I in place of G.
    ValueError unless 0 <= reach <= 255, 0 <= sweeps <= 1000, 0 <= damping <= 1.
    Source: M. Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020 (the problem,
    equation 21); K. Behdin et al., QuantEase, 2023 (coordinate descent).
    """

    sweeps: int = 20
    damping: float = 0.01
    reach: int = 0
    clip: bool = False

    name: ClassVar[str] = "adaround"
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_whole("sweeps", self.sweeps, 0, 1000)
        require_whole("reach", self.reach, 0, 255)
        require_between("damping", self.damping, 0, 1)

    def round(self, task: Task) -> Rounded:
        gram = damped(task, self.damping)
        order = order_of(gram)
        gram = ordered(gram, order)
        start = clipped(task, RATIOS) if self.clip else task.start
        scale, zero = (np.ascontiguousarray(v.T[order]) for v in spread(start, task.weight.shape))
        columns = np.ascontiguousarray(task.weight.T[order], np.float64)
        steps = columns / scale + zero
        low = np.clip(np.floor(steps) - self.reach, *task.limits)
        high = np.clip(np.ceil(steps) + self.reach, *task.limits)
        del steps
        codes = successive(
            columns.copy(), inverse_factor(gram), lambda j, _: (scale[j], zero[j]), low, high, 128
        )
        descend(codes, columns, scale, zero, gram, low, high, self.sweeps)
        found = np.empty(codes.shape)
        found[order] = codes
        return Rounded(np.ascontiguousarray(found.T).astype(start.spec.dtype.dtype), start)
