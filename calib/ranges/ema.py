"""A moving average of the samples' own extremes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from calib.ranges.evidence import series_of
from calib.ranges.grid import Grid, range_from, require_between
from calib.types import Range, Stats

__all__ = ["Ema"]


@dataclass(frozen=True)
class Ema:
    """m ← momentum·m + (1 - momentum)·new for min x and max x, over samples by index; the first sample starts it.

    0-d range. ValueError unless 0 <= momentum <= 1; CalibrationError when no ``series`` was gathered or no finite
    value was seen. Source: msModelSlim's squant_ptq, label-free min-max (0.95 old, 0.05 new).
    """

    momentum: float = 0.95

    kinds: ClassVar[tuple[str, ...]] = ("series",)

    def __post_init__(self) -> None:
        require_between("momentum", self.momentum, 0, 1)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        series = series_of(stats)
        lows, highs = series.lo.tolist(), series.hi.tolist()
        lo, hi = lows[0], highs[0]
        for low, high in zip(lows[1:], highs[1:], strict=True):
            lo = self.momentum * lo + (1 - self.momentum) * low
            hi = self.momentum * hi + (1 - self.momentum) * high
        return range_from(lo, hi, grid)
