"""What a range costs: the expected squared error of rounding inside it and of clipping outside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.ranges.grid import Grid
from calib.stats.bins import Bins
from calib.stats.histogram import HistogramStats

__all__ = ["QuantizationCost", "cost_of"]

Floats = NDArray[np.float64]


class QuantizationCost:
    """E(lo, hi) = Σ_{x<lo} (lo-x)² + Σ_{x>hi} (x-hi)² + Σ_{|x|<step/2} x² + step²/12 · #{the rest inside}.

    step = (hi - lo)/levels. A value within half a step of zero is rounded to zero, which every grid represents, so
    its error is x² itself: counting step²/12 for it would make outliers look far too costly on long-tailed data.
    Prefix sums over the bins make one evaluation O(log bins); a bin counts as a whole, by its centre. E is given in
    units of the squared extreme, so that nothing overflows.
    """

    def __init__(self, bins: Bins, magnitudes: Bins, levels: int) -> None:
        self.lo, self.hi, self.levels = min(bins.lo, 0.0), max(bins.hi, 0.0), levels
        self.constant = bins.lo == bins.hi
        self._unit = max(-self.lo, self.hi) or 1.0
        self._x = _Moments(bins, self._unit)
        self._size = _Moments(magnitudes, self._unit)
        self._first, self._last = _at_end(bins, 0, bins.lo), _at_end(bins, -1, bins.hi)

    def __call__(self, lo: Floats, hi: Floats) -> Floats:
        """Return E for arrays of candidates (lo <= 0 <= hi, broadcast together)."""
        return self.clipping(lo, hi) + self.rounding(lo, hi)

    def clipping(self, lo: Floats, hi: Floats) -> Floats:
        """Return the first two terms of E."""
        lo, hi = lo / self._unit, hi / self._unit
        return self._x.squares_below(lo, lo) + self._x.squares_above(hi)

    def rounding(self, lo: Floats, hi: Floats) -> Floats:
        """Return the last two terms of E."""
        whole_left, whole_right = lo == self.lo, hi == self.hi
        lo, hi = lo / self._unit, hi / self._unit
        step = (hi - lo) / self.levels
        inside = self._x.count_to(hi) - self._x.count_below(lo)
        far = np.maximum(inside - self._size.count_below(step / 2), 0.0)
        cost = self._size.squares_below(step / 2, 0.0) + step * step / 12 * far
        # An uncut extreme is a point of the grid: values piled up there (ReLU6, masks) lose less than a step's worth.
        left = np.where(whole_left & (-lo > step / 2), _saved(self._first, self._unit, step), 0.0)
        right = np.where(whole_right & (hi > step / 2), _saved(self._last, self._unit, step), 0.0)
        return np.asarray(np.maximum(cost - left - right, 0.0), np.float64)


def cost_of(histogram: HistogramStats, grid: Grid) -> QuantizationCost:
    """Return the cost of ranges for x, or of [0, hi] for |x| when the grid is symmetric.

    CalibrationError when no finite value was seen.
    """
    magnitudes = histogram.magnitudes()
    if grid.symmetric:
        # On |x| a symmetric grid is the upper half of itself: half the steps, the same step.
        return QuantizationCost(magnitudes, magnitudes, grid.levels // 2)
    return QuantizationCost(histogram.bins(), magnitudes, grid.levels)


def _at_end(bins: Bins, index: int, end: float) -> tuple[int, float]:
    """Return the count of an outer bin and the greatest distance of its values from ``end``."""
    return int(bins.counts[index]), float(max(abs(end - bins.left[index]), abs(end - bins.right[index])))


def _saved(outer: tuple[int, float], unit: float, step: Floats) -> Floats:
    count, width = outer
    return np.asarray(count * np.maximum(step * step / 12 - (width / unit) ** 2 / 3, 0.0), np.float64)


class _Moments:
    """Count, Σ x and Σ x² of everything below or above a point, in units of ``unit``."""

    def __init__(self, bins: Bins, unit: float) -> None:
        self.values = bins.values / unit
        counts = bins.counts.astype(np.float64)
        variance = ((bins.right - bins.left) / unit) ** 2 / 12
        terms = np.stack([counts, counts * self.values, counts * (self.values**2 + variance)])
        self.sums = np.zeros((3, len(counts) + 1))
        np.cumsum(terms, axis=1, out=self.sums[:, 1:])
        # Upper tails are summed from above: a difference of prefix sums would drown them in the bulk.
        self.tails = np.zeros((3, len(counts) + 1))
        np.cumsum(terms[:, ::-1], axis=1, out=self.tails[:, 1:])
        self.tails = self.tails[:, ::-1]

    def count_below(self, point: Floats) -> Floats:
        return np.asarray(self.sums[0][np.searchsorted(self.values, point, side="left")], np.float64)

    def count_to(self, point: Floats) -> Floats:
        return np.asarray(self.sums[0][np.searchsorted(self.values, point, side="right")], np.float64)

    def squares_below(self, point: Floats, centre: Floats | float) -> Floats:
        """Return Σ (x - centre)² over x < point."""
        return _squares(self.sums[:, np.searchsorted(self.values, point, side="left")], centre)

    def squares_above(self, point: Floats) -> Floats:
        """Return Σ (x - point)² over x > point."""
        return _squares(self.tails[:, np.searchsorted(self.values, point, side="right")], point)


def _squares(sums: Floats, centre: Floats | float) -> Floats:
    n, first, second = sums
    return np.asarray(np.maximum(second - 2 * centre * first + n * centre * centre, 0.0), np.float64)
