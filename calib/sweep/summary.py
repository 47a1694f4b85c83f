"""What some statistics need to know of a tensor instead of the tensor: so little can be computed inside the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.stats import HistogramStats, MeanStats, MinMaxStats
from calib.stats.channel_axis import as_block
from calib.stats.histogram import sampled
from calib.stats.mean import channel_sums
from calib.stats.options import options_of
from calib.sweep.bounds import Padded
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["COUNTED", "Summary", "Wanted", "counted", "summarizes"]

COUNTED = 8192  # elements of a sample looked at where no histogram says how many
_CHANNELS = 1


@dataclass(frozen=True)
class Summary:
    """A finite tensor: extremes, shape, the elements that `sampled` gives, sums of channels (axis 1) or None."""

    lo: float
    hi: float
    shape: tuple[int, ...]
    part: Array
    sums: Array | None


@dataclass
class Wanted:
    """A statistic that one probe asked for; ``pad`` when the probe's tensor is this one with zeros around it."""

    probe: Probe
    stat: Stats
    pad: Padded | None = None

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in the whole tensor."""
        if self.pad is None:
            self.stat.update(x, sample)
            return
        lo, hi = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
        if x.size == 0 or x.dtype != np.float32 or not np.isfinite([lo, hi]).all():
            self.stat.update(np.pad(x, self.pad.pads), sample)
            return
        most = counted(self.probe)
        sums = channel_sums(as_block(x, _CHANNELS)) if self.probe.kind == "mean" else None
        self.note(Summary(lo, hi, x.shape, sampled(x, most) if most else x, sums))

    def note(self, seen: Summary) -> None:
        """Take in a summary; the zeros around it are added here."""
        inside = int(np.prod(seen.shape, dtype=np.int64))
        size = inside if self.pad is None else self.pad.size(seen.shape)
        lo, hi = (min(seen.lo, 0.0), max(seen.hi, 0.0)) if size > inside else (seen.lo, seen.hi)
        if isinstance(self.stat, MinMaxStats):
            self.stat.note(lo, hi, size)
        elif isinstance(self.stat, HistogramStats):
            self.stat.note(lo, hi, size, seen.part, size - inside)
        else:
            assert isinstance(self.stat, MeanStats)
            assert seen.sums is not None
            self.stat.note(seen.sums, size // len(seen.sums))

    def reach(self, lo: float, hi: float) -> None:
        """Take in extremes alone, of values that were counted before."""
        if isinstance(self.stat, MinMaxStats):
            self.stat.note(lo, hi, 0)
        elif isinstance(self.stat, HistogramStats):
            self.stat.extent.note(lo, hi, 0)

    @property
    def nan(self) -> int:
        """How many NaN were seen; 0 for a statistic that does not count them."""
        if isinstance(self.stat, HistogramStats):
            return self.stat.extent.nan
        return self.stat.nan if isinstance(self.stat, MinMaxStats) else 0

    @property
    def extremes(self) -> tuple[float, float] | None:
        """The smallest and largest value so far; None for a statistic that has none."""
        if isinstance(self.stat, MinMaxStats | HistogramStats):
            return self.stat.lo, self.stat.hi
        return None


def counted(probe: Probe) -> int:
    """How many elements of a sample a histogram probe counts; 0: all of them, or no histogram."""
    return int(options_of(probe, {"every": 1, "most": 0})["most"]) if probe.kind == "histogram" else 0


def summarizes(probe: Probe) -> bool:
    """Whether a `Summary` says all that the probe's statistic needs of a rank-4 tensor."""
    if probe.kind == "histogram":
        return counted(probe) > 0 and options_of(probe, {"every": 1, "most": 0})["every"] == 1
    return probe.kind == "minmax" or (probe.kind == "mean" and probe.axis in (_CHANNELS, _CHANNELS - 4))
