"""One histogram per channel, for scales per head or per channel that clip."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calib.errors import CalibrationError
from calib.stats.channel_axis import as_block, require_channels
from calib.stats.histogram import HistogramStats
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["ChannelHistogramStats"]


class ChannelHistogramStats:
    """A `HistogramStats` for each index of ``probe.axis`` (default: the last), in ``channels``.

    Any shape whose channel axis keeps its size, any real dtype; 512 KiB per channel, so meant for heads rather than
    for thousands of channels. Option ``channels``: how many there are, where a sweep cannot tell beforehand. Bad
    samples are remembered by index, not by name. State: ``axis`` int64 0-d and, once something was seen, the fields of
    `HistogramStats` stacked along a new first axis.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        if probe is not None:
            options_of(probe, {"channels": 0.0})
        self.axis = -1 if probe is None or probe.axis is None else probe.axis
        self.channels: list[HistogramStats] = []

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample; CalibrationError when the channel axis is missing or changed its size."""
        if x.size == 0:
            return
        block = as_block(x, self.axis)
        if not self.channels:
            self.channels = [HistogramStats() for _ in range(block.shape[1])]
        require_channels(self.axis, len(self.channels), x, sample)
        nameless = SampleId(sample.index)
        for channel, histogram in enumerate(self.channels):
            histogram.update(block[:, channel], nameless)

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for other channels."""
        if not isinstance(other, ChannelHistogramStats):
            raise TypeError(f"cannot merge {type(other).__name__} into ChannelHistogramStats")
        if other.axis != self.axis:
            raise CalibrationError(f"cannot merge channels of axis {self.axis} and axis {other.axis}")
        if not other.channels:
            return
        if not self.channels:
            self.channels = [HistogramStats() for _ in other.channels]
        if len(self.channels) != len(other.channels):
            raise CalibrationError(f"cannot merge {len(self.channels)} and {len(other.channels)} channels")
        for mine, theirs in zip(self.channels, other.channels, strict=True):
            mine.merge(theirs)

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        axis: dict[str, Array] = {"axis": np.array(self.axis, np.int64)}
        states = [histogram.state() for histogram in self.channels]
        return {
            **axis,
            **{name: np.stack([state[name] for state in states]) for name in (states[0] if states else ())},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> ChannelHistogramStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.axis = int(state["axis"])
        stacked = {name: value for name, value in state.items() if name != "axis"}
        count = len(stacked["counts"]) if stacked else 0
        new.channels = [
            HistogramStats.from_state({name: value[channel] for name, value in stacked.items()})
            for channel in range(count)
        ]
        return new
