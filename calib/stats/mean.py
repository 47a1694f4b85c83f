"""The mean of each channel: cheap enough to gather for every layer in every sweep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats.channel_axis import as_block, require_channels
from calib.stats.exact_sum import ExactSum
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["MeanStats"]

_FOLDS = 3


class MeanStats:
    """mean_c = Σ x[.., c, ..] / n over all samples, float64 [C], c along ``probe.axis`` (default: the last).

    A sample's own sum is numpy's pairwise float32 sum; the sums of samples are added with `ExactSum`, so merging is
    exact in any order. NaN and Inf are the business of the statistic that watches the tensor's range: here a sample
    whose sum is not finite is left out. State: ``axis``, ``n`` int64 0-d, the digits of ``sum``.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        if probe is not None:
            options_of(probe, {})
        self.axis = -1 if probe is None or probe.axis is None else probe.axis
        self.count = 0
        self._sum: ExactSum | None = None

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean per channel; CalibrationError when nothing was seen."""
        if self._sum is None or self.count == 0:
            raise CalibrationError("no finite value was seen, so there is no mean")
        return np.asarray(self._sum.value / self.count, np.float64)

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample; CalibrationError when the channel axis is missing or changed its size."""
        if x.size == 0:
            return
        block = as_block(x, self.axis)
        work = block.astype(np.float32) if block.dtype == np.float16 else block
        sums = work.sum(axis=2).sum(axis=0, dtype=np.float64) if work.shape[2] > 1 else work.sum(axis=(0, 2))
        if self._sum is None:
            self._sum = ExactSum((block.shape[1],), _FOLDS)
        require_channels(self.axis, len(self._sum.top), x, sample)
        if np.isfinite(sums).all():
            self._sum.add(np.asarray(sums, np.float64))
            self.count += x.size // block.shape[1]

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for another axis."""
        if not isinstance(other, MeanStats):
            raise TypeError(f"cannot merge {type(other).__name__} into MeanStats")
        if other.axis != self.axis:
            raise CalibrationError(f"cannot merge means along axis {self.axis} and axis {other.axis}")
        if other._sum is None:
            return
        if self._sum is None:
            self._sum = ExactSum(other._sum.top.shape, _FOLDS)
        self._sum.merge(other._sum)
        self.count += other.count

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        own: dict[str, Array] = {"axis": np.array(self.axis, np.int64), "n": np.array(self.count, np.int64)}
        return own if self._sum is None else {**own, **self._sum.state("sum")}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> MeanStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.axis, new.count = int(state["axis"]), int(state["n"])
        if "sum.digits" in state:
            new._sum = ExactSum.from_state(state, "sum")
        return new
