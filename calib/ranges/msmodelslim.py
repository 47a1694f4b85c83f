"""The ranges of msModelSlim's squant_ptq, with and without data, and its search around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, sqrt
from typing import ClassVar, Literal

import numpy as np

from calib.errors import CalibrationError
from calib.ranges.cost import cost_of
from calib.ranges.ema import Ema
from calib.ranges.evidence import histogram_of, series_of
from calib.ranges.grid import Grid, range_from, require_between
from calib.ranges.histogram import Histogram
from calib.stats.series import SeriesStats
from calib.types import Range, Stats

__all__ = ["MsModelSlim"]

_SIGMA = 25.0
_SPREAD = 1.25
_LOWEST, _STEP = 0.75, 0.0005
_KINDS = {
    "sigma": ("series", "positive"),
    "minmax": ("series",),
    "ema": ("series",),
    "histogram": ("histogram",),
}


@dataclass(frozen=True)
class MsModelSlim:
    """``start`` "sigma": [-20 std x, 20 std x] where min x < 0, else [0, 25 std of x > 0]; "minmax": [min x, max x];
    both of the first sample. "ema": `Ema` with momentum 0.95; "histogram": `Histogram`.

    ``easy_quant`` > 0 then multiplies both ends with the r = 0.75 + 0.0005 k, k < easy_quant, of the smallest squared
    error. Standard deviations are the population's. The sigma rule may exceed the extremes: data-free, they are those
    of random inputs. ValueError unless 0 <= easy_quant <= 100000; CalibrationError as `Ema`.
    Source: msModelSlim 26.1.0, squant_ptq, observed: sigma 25 and 0, act_method 1 and 2, keep_acc "easy_quant".
    """

    start: Literal["sigma", "minmax", "ema", "histogram"] = "sigma"
    easy_quant: int = 0

    kinds: ClassVar[tuple[str, ...]] = ("series", "positive")

    def __post_init__(self) -> None:
        if self.start not in _KINDS:
            raise ValueError(f"start: {self.start!r} is unknown; use one of {', '.join(_KINDS)}")
        require_between("easy_quant", self.easy_quant, 0, 100_000)
        needed = (*_KINDS[self.start], *(("histogram",) if self.easy_quant else ()))
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(needed)))

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        lo, hi = self._start(stats, grid)
        if self.easy_quant:
            ratios = _LOWEST + _STEP * np.arange(self.easy_quant, dtype=np.float64)
            costs = cost_of(histogram_of(stats), grid)(lo * ratios, hi * ratios)
            best = float(ratios[np.argmin(costs)])
            lo, hi = lo * best, hi * best
        return range_from(lo, hi, grid)

    def _start(self, stats: Mapping[str, Stats], grid: Grid) -> tuple[float, float]:
        if self.start == "histogram":
            found = Histogram().range_of(stats, grid)
            return float(found.lo), float(found.hi)
        if self.start == "ema":
            found = Ema().range_of(stats, grid)
            return float(found.lo), float(found.hi)
        series = series_of(stats)
        low, high = float(series.lo[0]), float(series.hi[0])
        if self.start == "minmax":
            return min(low, 0.0), max(high, 0.0)
        if low < 0:
            reach = _SIGMA / _SPREAD * _deviation(series)
            return -reach, reach
        positive = stats.get("positive")
        if not isinstance(positive, SeriesStats):
            raise CalibrationError("this range needs the statistic 'positive'")
        return 0.0, _SIGMA * _deviation(positive) if len(positive) else 0.0


def _deviation(series: SeriesStats) -> float:
    """The population's standard deviation in the first sample."""
    count = int(series.n[0])
    mean = fsum(series.sum[:1]) / count
    return sqrt(max(fsum(series.square[:1]) / count - mean * mean, 0.0))
