"""Streaming statistics of tensors: bounded in memory, merged exactly in any grouping of the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from calib.stats.axes import AxesStats
from calib.stats.channel import ChannelStats
from calib.stats.channel_histogram import ChannelHistogramStats
from calib.stats.gram import GramStats
from calib.stats.histogram import HistogramStats
from calib.stats.mean import MeanStats
from calib.stats.minmax import MinMaxStats
from calib.stats.positive import PositiveStats
from calib.stats.rows import RowStats
from calib.stats.series import SeriesStats
from calib.stats.spread import SpreadStats
from calib.types import Array, Probe, Stats

__all__ = [
    "COLLECTORS",
    "AxesStats",
    "ChannelHistogramStats",
    "ChannelStats",
    "Collector",
    "GramStats",
    "HistogramStats",
    "MeanStats",
    "MinMaxStats",
    "PositiveStats",
    "RowStats",
    "SeriesStats",
    "SpreadStats",
]


class Collector(Protocol):
    """A statistic's class: makes an empty one for a probe, or a filled one from a saved state."""

    def __call__(self, probe: Probe) -> Stats: ...
    def from_state(self, state: Mapping[str, Array]) -> Stats: ...


COLLECTORS: dict[str, Collector] = {
    "axes": AxesStats,
    "channel": ChannelStats,
    "channel_histogram": ChannelHistogramStats,
    "gram": GramStats,
    "histogram": HistogramStats,
    "mean": MeanStats,
    "minmax": MinMaxStats,
    "positive": PositiveStats,
    "rows": RowStats,
    "series": SeriesStats,
    "spread": SpreadStats,
}
