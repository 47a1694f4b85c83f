"""The whole observed interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calib.errors import CalibrationError
from calib.ranges.evidence import extent_of
from calib.ranges.grid import Grid, range_from
from calib.stats.channel import ChannelStats
from calib.types import Range, Stats

__all__ = ["MinMax"]


@dataclass(frozen=True)
class MinMax:
    """lo = min x, hi = max x over all samples; nothing is clipped.

    0-d range, or one entry per channel when ``channel`` was gathered instead (a channel without a finite value gets
    [0, 0]). CalibrationError when none of ``minmax``, ``histogram`` and ``channel`` was gathered, or no finite value
    was seen.
    """

    kinds: ClassVar[tuple[str, ...]] = ("minmax",)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        channel = stats.get("channel")
        if isinstance(channel, ChannelStats) and not {"minmax", "histogram"} & set(stats):
            if not channel.seen:
                raise CalibrationError("no finite value was seen, so there is no range")
            empty = channel.count == 0
            return range_from(np.where(empty, 0.0, channel.lo), np.where(empty, 0.0, channel.hi), grid)
        extent = extent_of(stats)
        return range_from(extent.lo, extent.hi, grid)
