"""The range with the smallest expected squared quantization error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from calib.ranges.cost import QuantizationCost, cost_of
from calib.ranges.evidence import histogram_of
from calib.ranges.grid import Grid, range_from
from calib.types import Range, Stats

__all__ = ["Mse"]

_SHRINK = 0.93  # ratio between neighbouring coarse candidates
_COARSE = 96  # 0.93^95: down to a thousandth of the extreme
_FINE = 9
_ROUNDS = 3  # each round narrows the bracket by 4


@dataclass(frozen=True)
class Mse:
    """The (lo, hi) that minimise `QuantizationCost`, lo and hi searched independently (|x| <= hi when symmetric).

    A coarse grid of geometric candidates from the extremes down to a thousandth of them, then three rounds of a
    9 x 9 grid around the best. 0-d range. CalibrationError when no ``histogram`` was gathered or no finite value
    was seen. This is the tensor's own error: outliers that carry the signal of a transformer are clipped by it,
    so judge the result by the layer's output.
    """

    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        cost = cost_of(histogram_of(stats), grid)
        # A constant is the end of its range, which every grid represents: nothing to trade.
        best = (cost.lo, cost.hi) if cost.constant else _search(cost)
        return range_from(*best, grid)


def _search(cost: QuantizationCost) -> tuple[float, float]:
    ladder = (_SHRINK ** np.arange(_COARSE)).astype(np.float64)
    lo, hi = _best(cost, np.unique(cost.lo * ladder), np.unique(cost.hi * ladder))
    width = 1 / _SHRINK
    for _ in range(_ROUNDS):
        around = (width ** np.linspace(-1, 1, _FINE)).astype(np.float64)
        lows = np.unique(np.maximum(lo * around, cost.lo))
        highs = np.unique(np.minimum(hi * around, cost.hi))
        lo, hi = _best(cost, lows, highs)
        width = float(width ** (2 / (_FINE - 1)))
    return lo, hi


def _best(cost: QuantizationCost, lo: NDArray[np.float64], hi: NDArray[np.float64]) -> tuple[float, float]:
    table = cost(lo[:, None], hi[None, :])
    # Of equal costs take the widest range: the last minimum along hi, the first along lo.
    row, column = np.argwhere(table == table.min())[0]
    column = int(np.flatnonzero(table[row] == table[row, column])[-1])
    return float(lo[row]), float(hi[column])
