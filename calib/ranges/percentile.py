"""An interval that leaves out a given share of the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from calib.ranges.evidence import bins_for
from calib.ranges.grid import Grid, range_from, require_between
from calib.types import Range, Stats

__all__ = ["Percentile"]


@dataclass(frozen=True)
class Percentile:
    """Keep ``percentile`` % of the values: (100 - percentile)/2 % are cut from each tail of x.

    On a symmetric grid the cut is made once, in the upper tail of |x|: hi = the ``percentile`` % quantile of |x|.
    Quantiles spread the values of a histogram bin evenly, so they are exact to the bin's relative width of 2^-7;
    100 gives the exact extremes. 0-d range. ValueError unless 50 <= percentile <= 100; CalibrationError when no
    ``histogram`` was gathered or no finite value was seen. Source: ONNX Runtime's PercentileCalibrater.
    """

    percentile: float = 99.99

    needs_tails: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    def __post_init__(self) -> None:
        require_between("percentile", self.percentile, 50, 100)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        bins = bins_for(stats, grid)
        if self.percentile == 100:
            return range_from(bins.lo, bins.hi, grid)
        cut = (100 - self.percentile) / 100
        if grid.symmetric:
            return range_from(0.0, float(bins.quantile(1 - cut)), grid)
        return range_from(float(bins.quantile(cut / 2)), float(bins.quantile(1 - cut / 2)), grid)
