"""A range for every channel, by any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np

from calib.ranges.grid import Grid
from calib.stats.histogram import HistogramStats
from calib.types import Range, Stats

__all__ = ["RangeMethod", "per_channel"]


class RangeMethod(Protocol):
    """What every entry of ``RANGES`` offers: the statistics it needs and the range it finds in them."""

    kinds: ClassVar[tuple[str, ...]]

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range: ...


def per_channel(method: RangeMethod, channels: Sequence[HistogramStats], grid: Grid) -> Range:
    """Return lo and hi float64 [C], ``method`` applied to each channel's histogram (`ChannelHistogramStats.channels`).

    A channel without a finite value gets [0, 0]. CalibrationError when the method needs more than a histogram.
    """
    nothing = Range(np.zeros(()), np.zeros(()))
    ranges = [method.range_of({"histogram": h}, grid) if h.extent.count else nothing for h in channels]
    return Range(
        np.array([r.lo for r in ranges], np.float64),
        np.array([r.hi for r in ranges], np.float64),
    )
