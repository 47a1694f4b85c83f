"""The Gram matrix of a layer's input rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats.channel_axis import require_channels
from calib.stats.exact_sum import ExactSum
from calib.stats.minmax import MinMaxStats, as_numbers
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["GramStats"]

_FOLDS = 2
Rows = NDArray[np.float32] | NDArray[np.float64]


class GramStats:
    """G = XᵀX, X = every vector along ``probe.axis`` (default: the last) of every sample; also the number of rows.

    Any shape whose channel axis keeps its size, any real dtype. One GEMM per sample, in float32 (float64 for float64
    input, or when float32 overflows), then added with `ExactSum`: the state does not depend on the order of the
    samples, and what it drops (2^-33 of an entry at worst) is below the rounding of the GEMM itself. That rounding
    may differ between machines and numbers of BLAS threads. A row with a NaN or an Inf is left out. Memory: 17 bytes
    per entry. State: ``axis``, ``rows`` int64 0-d; once something was seen the digits of ``gram``; and the state of
    ``extent`` (a `MinMaxStats`) prefixed by ``extent.``.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        if probe is not None:
            options_of(probe, {})
        self.axis = -1 if probe is None or probe.axis is None else probe.axis
        self.extent = MinMaxStats()
        self.rows = 0
        self._sum: ExactSum | None = None

    @property
    def gram(self) -> NDArray[np.float64]:
        """XᵀX, float64 [d, d], symmetric; CalibrationError when no row was seen."""
        if self._sum is None:
            raise CalibrationError("no finite row was seen, so there is no Gram matrix")
        return self._sum.value

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample; CalibrationError when the channel axis is missing or changed its size."""
        x = as_numbers(x)
        good_before = self.extent.count
        self.extent.update(x, sample)
        if x.size == 0:
            return
        if not -x.ndim <= self.axis < x.ndim:
            raise CalibrationError(f"there is no axis {self.axis} in shape {list(x.shape)}")
        moved = np.moveaxis(x, self.axis, -1)
        wide = moved.dtype == np.float64 or (moved.dtype.kind in "iu" and moved.dtype.itemsize > 2)
        rows = np.ascontiguousarray(moved, np.float64 if wide else np.float32).reshape(-1, moved.shape[-1])
        if self.extent.count - good_before != x.size:
            rows = rows[np.isfinite(rows).all(axis=1)]
        if len(rows) == 0:
            return
        if self._sum is None:
            self._sum = ExactSum((rows.shape[1], rows.shape[1]), _FOLDS)
        require_channels(self.axis, len(self._sum.top), x, sample)
        self._sum.add(_product(rows))
        self.rows += len(rows)

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for other channels."""
        if not isinstance(other, GramStats):
            raise TypeError(f"cannot merge {type(other).__name__} into GramStats")
        if other.axis != self.axis:
            raise CalibrationError(f"cannot merge channels of axis {self.axis} and axis {other.axis}")
        self.extent.merge(other.extent)
        if other._sum is None:
            return
        if self._sum is None:
            self._sum = ExactSum(other._sum.top.shape, _FOLDS)
        if self._sum.top.shape != other._sum.top.shape:
            raise CalibrationError(f"cannot merge {len(self._sum.top)} and {len(other._sum.top)} channels")
        self._sum.merge(other._sum)
        self.rows += other.rows

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        own: dict[str, Array] = {"axis": np.array(self.axis, np.int64), "rows": np.array(self.rows, np.int64)}
        extent = self.extent.state("extent.")
        return {**own, **extent, **(self._sum.state("gram") if self._sum is not None else {})}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> GramStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.axis, new.rows = int(state["axis"]), int(state["rows"])
        new.extent = MinMaxStats.from_state(state, "extent.")
        if "gram.digits" in state:
            new._sum = ExactSum.from_state(state, "gram")
        return new


def _product(rows: Rows) -> Rows:
    # A product of a matrix with its own transpose: numpy computes one triangle and mirrors it.
    with np.errstate(over="ignore", invalid="ignore"):
        gram: Rows = np.matmul(rows.T, rows)
    if not np.isfinite(gram).all():
        wide = rows.astype(np.float64)
        gram = np.matmul(wide.T, wide)
    return gram
