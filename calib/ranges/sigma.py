"""A number of standard deviations around the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, sqrt
from typing import ClassVar

from calib.ranges.evidence import series_of
from calib.ranges.grid import Grid, range_from, require_between
from calib.types import Range, Stats

__all__ = ["Sigma"]


@dataclass(frozen=True)
class Sigma:
    """lo = max(min x, mean - factor·std), hi = min(max x, mean + factor·std), over all values of all samples.

    std is the population deviation. 0-d range. ValueError unless 0.1 <= factor <= 1000; CalibrationError when no
    ``series`` was gathered or no finite value was seen. Source: msModelSlim's ``sigma_factor`` (3 to 4).
    """

    factor: float = 3.0

    kinds: ClassVar[tuple[str, ...]] = ("series",)

    def __post_init__(self) -> None:
        require_between("factor", self.factor, 0.1, 1000)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        series = series_of(stats)
        count = int(series.n.sum())
        mean = fsum(series.sum) / count
        std = sqrt(max(fsum(series.square) / count - mean * mean, 0.0))
        lo = max(float(series.lo.min()), mean - self.factor * std)
        hi = min(float(series.hi.max()), mean + self.factor * std)
        return range_from(lo, hi, grid)
