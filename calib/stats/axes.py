"""Extremes of a tensor for every combination of indices of several axes, such as head and channel of a KV cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats.minmax import MinMaxStats, as_numbers
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["AxesStats"]


class AxesStats:
    """lo, hi over finite x for every index of the axes kept; the others are reduced over, their size may change.

    Options of the probe: ``reduce0``, ``reduce1``, … the axes reduced over, counted from the front. Any real dtype.
    State: ``axes`` int64 [reduced]; once something was seen ``lo``, ``hi`` float64 with 1 for reduced axes; and the
    state of ``extent`` (a `MinMaxStats`) prefixed by ``extent.``. Minima and maxima: merging is exact in any order.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        given = {} if probe is None else options_of(probe, {f"reduce{i}": -1.0 for i in range(8)})
        self.axes = tuple(sorted(int(axis) for axis in given.values() if axis >= 0))
        self.extent = MinMaxStats()
        self.lo: NDArray[np.float64] | None = None
        self.hi: NDArray[np.float64] | None = None

    @property
    def absmax(self) -> NDArray[np.float64] | None:
        """max |x|, float64 with 1 for reduced axes, 0 where nothing finite was seen; None before the first value."""
        if self.lo is None or self.hi is None:
            return None
        return np.where(self.lo <= self.hi, np.maximum(np.abs(self.lo), np.abs(self.hi)), 0.0)

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample; CalibrationError when it lacks an axis or a kept axis changed its size."""
        x = as_numbers(x)
        self.extent.update(x, sample)
        if x.size == 0:
            return
        if any(axis >= x.ndim for axis in self.axes):
            raise CalibrationError(f"there is no axis {max(self.axes)} in shape {list(x.shape)} ({sample})")
        finite = np.isfinite(x)
        lo = x.min(axis=self.axes, keepdims=True, where=finite, initial=np.inf)
        hi = x.max(axis=self.axes, keepdims=True, where=finite, initial=-np.inf)
        self._add(lo.astype(np.float64) + 0.0, hi.astype(np.float64) + 0.0, str(sample))

    def _add(self, lo: NDArray[np.float64], hi: NDArray[np.float64], where: str) -> None:
        if self.lo is None or self.hi is None:
            self.lo, self.hi = lo, hi
            return
        if lo.shape != self.lo.shape:
            raise CalibrationError(
                f"the axes kept were {list(self.lo.shape)} before {where}, which has {list(lo.shape)}"
            )
        self.lo, self.hi = np.minimum(self.lo, lo), np.maximum(self.hi, hi)

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for other axes."""
        if not isinstance(other, AxesStats):
            raise TypeError(f"cannot merge {type(other).__name__} into AxesStats")
        if other.axes != self.axes:
            raise CalibrationError(f"cannot merge extremes over axes {self.axes} and over {other.axes}")
        self.extent.merge(other.extent)
        if other.lo is not None and other.hi is not None:
            self._add(other.lo, other.hi, "the other part")

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        own: dict[str, Array] = {"axes": np.array(self.axes, np.int64)}
        if self.lo is not None and self.hi is not None:
            own |= {"lo": self.lo.copy(), "hi": self.hi.copy()}
        return {**own, **self.extent.state("extent.")}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> AxesStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.axes = tuple(int(axis) for axis in state["axes"])
        new.extent = MinMaxStats.from_state(state, "extent.")
        if "lo" in state:
            new.lo, new.hi = state["lo"].astype(np.float64), state["hi"].astype(np.float64)
        return new
