"""Clip both ends step by step and keep the interval with the smallest squared error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from calib.ranges.cost import QuantizationCost, cost_of
from calib.ranges.evidence import bins_for, histogram_of
from calib.ranges.grid import Grid, range_from, require_between
from calib.stats.bins import Bins
from calib.types import Range, Stats

__all__ = ["Histogram"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """The best interval on the path that cuts ``step`` of the values at a time, at the end where it shortens more.

    With q the quantile function: from (a, b) = (0, 0) go to a + step if q(a + step) - q(a) > q(1-b) - q(1-b-step),
    else to b + step; of all [q(a), q(1-b)] met, keep the one with the smallest `QuantizationCost`. An end that is
    zero because all values lie on one side stays zero. Caffe2's and torch.ao's HistogramObserver follow the same
    path over 2048 equal bins and stop at the first rise; here the whole path counts (it ends for certain where
    clipping alone costs more than no clipping at all). 0-d range. ValueError unless 1e-6 <= step <= 0.01;
    CalibrationError when no ``histogram`` was gathered or no finite value was seen.
    """

    step: float = 1e-5

    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    def __post_init__(self) -> None:
        require_between("step", self.step, 1e-6, 1e-2)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        bins, cost = bins_for(stats, grid), cost_of(histogram_of(stats), grid)
        if cost.constant:
            return range_from(cost.lo, cost.hi, grid)
        lows, highs = _path(bins, cost, self.step)
        best = int(np.argmin(cost(lows, highs)))
        return range_from(float(lows[best]), float(highs[best]), grid)


def _path(bins: Bins, cost: QuantizationCost, step: float) -> tuple[Floats, Floats]:
    """Return the lower and upper ends met, float64 [m], the uncut interval first."""
    low, high = np.array([cost.lo]), np.array([cost.hi])
    limit = float(cost(low, high)[0])
    ups, downs = low, high
    if cost.lo < 0:
        ups = _cut(
            lambda cut: np.minimum(bins.quantile(cut), 0.0), lambda x: cost.clipping(x, high), step, limit
        )
        ups = np.append(low, ups)
    if cost.hi > 0:
        downs = _cut(
            lambda cut: np.maximum(bins.quantile(1 - cut), 0.0), lambda x: cost.clipping(low, x), step, limit
        )
        downs = np.append(high, downs)
    return _walk(ups, downs)


def _cut(
    end: Callable[[Floats], Floats], clipping: Callable[[Floats], Floats], step: float, limit: float
) -> Floats:
    """Return the ends after 1, 2, … cuts, as far as clipping alone stays within ``limit``."""
    most = round(1 / step)
    count = min(most, 64)
    while True:
        ends = end(np.arange(1, count + 1) * np.float64(step))
        kept = int(np.count_nonzero(clipping(ends) <= limit))  # clipping grows with every cut
        if kept < count or count == most:
            return ends[:kept]
        count = min(most, 8 * count)


def _walk(ups: Floats, downs: Floats) -> tuple[Floats, Floats]:
    """Return the pairs met when the end that moves further is cut, until both lists are used up."""
    gain_up = np.append(np.diff(ups), -1.0).tolist()
    gain_down = np.append(-np.diff(downs), -1.0).tolist()
    at_up, at_down = [0], [0]
    a = b = 0
    while gain_up[a] >= 0 or gain_down[b] >= 0:
        if gain_up[a] > gain_down[b]:
            a += 1
        else:
            b += 1
        at_up.append(a)
        at_down.append(b)
    return ups[at_up], downs[at_down]
