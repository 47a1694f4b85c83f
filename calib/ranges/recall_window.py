"""The shortest interval that holds a given share of the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calib.ranges.evidence import histogram_of
from calib.ranges.grid import Grid, range_from, require_between
from calib.stats.bins import Bins
from calib.types import Range, Stats

__all__ = ["RecallWindow"]


@dataclass(frozen=True)
class RecallWindow:
    """The shortest [a, b] with P(a <= X <= b) >= ``ratio``; 1 gives the exact extremes.

    Values are spread evenly inside a histogram bin, so the window is exact to the bin's relative width of 2^-7.
    All samples are pooled (msModelSlim's FA3 takes the window of each sample and their union). 0-d range.
    ValueError unless 0.5 <= ratio <= 1; CalibrationError when no ``histogram`` was gathered or no finite value was
    seen. Source: msModelSlim FA3 (0.9999 for q and k, 1 for v).
    """

    ratio: float = 0.9999

    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    def __post_init__(self) -> None:
        require_between("ratio", self.ratio, 0.5, 1)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        bins = histogram_of(stats).bins()
        if self.ratio == 1:
            return range_from(bins.lo, bins.hi, grid)
        return range_from(*_shortest(bins, self.ratio), grid)


def _shortest(bins: Bins, ratio: float) -> tuple[float, float]:
    # The distribution function is piecewise linear, so a shortest window has an end on an edge of a bin.
    before = (np.cumsum(bins.counts) - bins.counts) / bins.total
    after = np.cumsum(bins.counts) / bins.total
    starts, ends = before[before + ratio <= 1], after[after - ratio >= 0]
    lows = np.concatenate([bins.left[: len(starts)], bins.quantile(ends - ratio)])
    highs = np.concatenate([bins.quantile(starts + ratio), bins.right[len(after) - len(ends) :]])
    best = int(np.argmin(highs - lows))
    return float(lows[best]), float(highs[best])
