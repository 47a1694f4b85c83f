"""Per-channel extremes and averages of a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats.channel_axis import as_block, require_channels
from calib.stats.exact_sum import ExactSum
from calib.stats.minmax import MinMaxStats, as_numbers
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["ChannelStats"]

_FOLDS = 3
Floats = NDArray[np.float64]


class ChannelStats:
    """For each index c of ``probe.axis`` (default: the last), over finite x: lo, hi, Σ x, Σ|x|, the count, and the sum
    over samples of a sample's max |x|.

    Any shape whose channel axis keeps its size, any real dtype. A sample's sums are float64 and are added with
    `ExactSum`, everything else is a minimum, a maximum or an integer, so merging is exact in any order. State:
    ``axis`` int64 0-d; once something was seen ``lo``, ``hi`` float64 [C], ``n`` int64 [C], ``samples`` int64 0-d, the
    digits of ``sum``, ``size`` and ``peak``; and the state of ``extent`` (a `MinMaxStats`) prefixed by ``extent.``.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        if probe is not None:
            options_of(probe, {})
        self.axis = -1 if probe is None or probe.axis is None else probe.axis
        self.extent = MinMaxStats()
        self.seen = False
        self._start(0)

    def _start(self, channels: int) -> None:
        self.lo: Floats = np.full(channels, np.inf)
        self.hi: Floats = np.full(channels, -np.inf)
        self.count: NDArray[np.int64] = np.zeros(channels, np.int64)
        self._sum = ExactSum((channels,), _FOLDS)
        self._size = ExactSum((channels,), _FOLDS)
        self._peak = ExactSum((channels,), _FOLDS)
        self.samples = 0

    @property
    def absmax(self) -> Floats:
        """max |x| per channel, float64 [C]; 0 where nothing finite was seen."""
        return np.where(self.count > 0, np.maximum(np.abs(self.lo), np.abs(self.hi)), 0.0)

    @property
    def sum(self) -> Floats:
        """Σ x per channel, float64 [C]."""
        return self._sum.value

    @property
    def abs_sum(self) -> Floats:
        """Σ|x| per channel, float64 [C]."""
        return self._size.value

    @property
    def mean_peak(self) -> Floats:
        """The mean over samples of a sample's max |x| per channel, float64 [C]; 0 before the first sample."""
        return self._peak.value / max(self.samples, 1)

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample; CalibrationError when the channel axis is missing or changed its size."""
        x = as_numbers(x)
        good_before = self.extent.count
        self.extent.update(x, sample)
        if x.size == 0:
            return
        block = as_block(x, self.axis)
        if not self.seen:
            self._start(block.shape[1])
            self.seen = True
        require_channels(self.axis, len(self.lo), x, sample)
        if self.extent.count - good_before == x.size:
            self._add(block.min(axis=(0, 2)), block.max(axis=(0, 2)), block)
            self.count += x.size // block.shape[1]
            return
        finite = np.isfinite(block)
        lows = np.where(finite, block, np.inf).min(axis=(0, 2))
        highs = np.where(finite, block, -np.inf).max(axis=(0, 2))
        self._add(lows, highs, np.where(finite, block, 0))
        self.count += np.count_nonzero(finite, axis=(0, 2))

    def note(self, sample: SampleId, seen: tuple[Array, Array, Array, Array], count: int) -> None:
        """Take in one sample's finite values, ``count`` per channel, of which lo, hi, Σ x and Σ|x|, [C], are known."""
        lows, highs, sums, sizes = seen
        if not self.seen:
            self._start(len(lows))
            self.seen = True
        require_channels(0, len(self.lo), lows, sample)
        self.extent.note(float(lows.min()), float(highs.max()), count * len(lows))
        self._reach(lows, highs)
        self._sum.add(sums.astype(np.float64))
        self._size.add(sizes.astype(np.float64))
        self.count += count

    def _add(self, lows: Array, highs: Array, block: Array) -> None:
        self._reach(lows, highs)
        self._sum.add(_sums(block))
        # The size of -128 does not fit int8.
        signed = block.astype(np.float64) if block.dtype.kind == "i" else block
        self._size.add(_sums(np.abs(signed)))

    def _reach(self, lows: Array, highs: Array) -> None:
        """Take in the extremes of one sample; a channel of which it has no finite value has lo > hi."""
        # No -0.0: it depends on the order.
        lo, hi = (np.asarray(ends, np.float64) + 0.0 for ends in (lows, highs))
        self.lo, self.hi = np.minimum(self.lo, lo), np.maximum(self.hi, hi)
        self._peak.add(np.where(lo <= hi, np.maximum(-lo, hi), 0.0))
        self.samples += 1

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for other channels."""
        if not isinstance(other, ChannelStats):
            raise TypeError(f"cannot merge {type(other).__name__} into ChannelStats")
        if other.axis != self.axis:
            raise CalibrationError(f"cannot merge channels of axis {self.axis} and axis {other.axis}")
        self.extent.merge(other.extent)
        if not other.seen:
            return
        if not self.seen:
            self._start(len(other.lo))
            self.seen = True
        if len(other.lo) != len(self.lo):
            raise CalibrationError(f"cannot merge {len(self.lo)} and {len(other.lo)} channels")
        self.lo, self.hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        self.count += other.count
        self._sum.merge(other._sum)
        self._size.merge(other._size)
        self._peak.merge(other._peak)
        self.samples += other.samples

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        extent = self.extent.state("extent.")
        axis: dict[str, Array] = {"axis": np.array(self.axis, np.int64)}
        if not self.seen:
            return {**axis, **extent}
        own: dict[str, Array] = {"lo": self.lo.copy(), "hi": self.hi.copy(), "n": self.count.copy()}
        samples: dict[str, Array] = {"samples": np.array(self.samples, np.int64)}
        sums = {**self._sum.state("sum"), **self._size.state("size"), **self._peak.state("peak")}
        return {**axis, **extent, **own, **samples, **sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> ChannelStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.axis = int(state["axis"])
        new.extent = MinMaxStats.from_state(state, "extent.")
        if "lo" in state:
            new.seen = True
            new.lo, new.hi = state["lo"].astype(np.float64), state["hi"].astype(np.float64)
            new.count = state["n"].astype(np.int64)
            new._sum = ExactSum.from_state(state, "sum")
            new._size = ExactSum.from_state(state, "size")
            new._peak = ExactSum.from_state(state, "peak")
            new.samples = int(state["samples"])
        return new


def _sums(block: Array) -> Floats:
    return np.asarray(np.sum(block, axis=(0, 2), dtype=np.float64))
