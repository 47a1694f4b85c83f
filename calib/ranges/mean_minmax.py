"""The average of the samples' own extremes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from typing import ClassVar

from calib.ranges.evidence import series_of
from calib.ranges.grid import Grid, range_from
from calib.types import Range, Stats

__all__ = ["MeanMinMax"]


@dataclass(frozen=True)
class MeanMinMax:
    """lo = mean over samples of min x, hi = mean over samples of max x.

    Samples without a finite value do not count. 0-d range. CalibrationError when no ``series`` was gathered or no
    finite value was seen. Source: msModelSlim's observer ``minmax``.
    """

    kinds: ClassVar[tuple[str, ...]] = ("series",)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        series = series_of(stats)
        return range_from(fsum(series.lo) / len(series), fsum(series.hi) / len(series), grid)
