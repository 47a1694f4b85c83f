"""A few numbers per sample, kept apart so that averages over samples can be taken in sample order."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.stats.minmax import MinMaxStats, as_numbers
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["SeriesStats"]

_CHUNK = 1 << 16  # float64 copies of this many elements stay in the cache
_FIELDS = 5


class SeriesStats:
    """Per sample: lo, hi, Σ x, Σ x² and the count, over finite x.

    Any shape, any real dtype; the only statistic that grows, by 48 bytes per sample. Sums are float64, taken within
    one sample and never added across samples, so merging is exact in any order. A sample without a finite value
    leaves no row; a sample updated twice is pooled. State, sorted by sample: ``index`` int64 [S]; ``lo``, ``hi``,
    ``sum``, ``square`` float64 [S]; ``n`` int64 [S]; and the state of ``extent`` (a `MinMaxStats`) prefixed by
    ``extent.``.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        if probe is not None:
            options_of(probe, {})
        self.extent = MinMaxStats()
        self._index = array("q")
        self._rows = array("d")

    def __len__(self) -> int:
        """How many samples left a row."""
        return len(self.index)

    @property
    def index(self) -> NDArray[np.int64]:
        """Sample indices, int64 [S], ascending."""
        return self._table()[0]

    @property
    def lo(self) -> NDArray[np.float64]:
        """Smallest value of each sample, float64 [S]."""
        return self._table()[1][:, 0]

    @property
    def hi(self) -> NDArray[np.float64]:
        """Largest value of each sample, float64 [S]."""
        return self._table()[1][:, 1]

    @property
    def sum(self) -> NDArray[np.float64]:
        """Σ x of each sample, float64 [S]."""
        return self._table()[1][:, 2]

    @property
    def square(self) -> NDArray[np.float64]:
        """Σ x² of each sample, float64 [S]."""
        return self._table()[1][:, 3]

    @property
    def n(self) -> NDArray[np.int64]:
        """How many finite values each sample had, int64 [S]."""
        return self._table()[1][:, 4].astype(np.int64)

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample."""
        x = as_numbers(x)
        one = MinMaxStats()
        one.update(x, sample)
        self.extent.merge(one)
        if one.count == 0:
            return
        clean = one.count == x.size
        total = square = 0.0
        flat = np.ascontiguousarray(x).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK].astype(np.float64)
            if not clean:
                part = part[np.isfinite(part)]
            total += float(part.sum())
            square += float(
                np.square(part, out=part).sum()
            )  # not a BLAS dot: its result depends on the threads
        self._append(sample, one.lo, one.hi, total, square, one.count)

    def note(self, sample: SampleId, lo: float, hi: float, total: float, square: float, count: int) -> None:
        """Take in ``count`` finite values of one sample of which only these numbers are known."""
        self.extent.note(lo, hi, count)
        self._append(sample, lo + 0.0, hi + 0.0, total, square, count)

    def _append(
        self, sample: SampleId, lo: float, hi: float, total: float, square: float, count: int
    ) -> None:
        self._index.append(sample.index)
        self._rows.extend((lo, hi, total, square, float(count)))

    def merge(self, other: Stats) -> None:
        """Add what ``other`` (also a SeriesStats, else TypeError) has seen."""
        if not isinstance(other, SeriesStats):
            raise TypeError(f"cannot merge {type(other).__name__} into SeriesStats")
        self.extent.merge(other.extent)
        self._index.extend(other._index)
        self._rows.extend(other._rows)

    def _table(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        index = np.array(self._index, np.int64)
        rows = np.array(self._rows, np.float64).reshape(-1, _FIELDS)
        # Rows of one sample are added in an order given by their content, not by their arrival.
        order = np.lexsort((*rows.T, index))
        index, rows = index[order], rows[order]
        first = np.flatnonzero(np.diff(index, prepend=-1)) if len(index) else np.zeros(0, np.intp)
        if len(first) < len(index):
            pooled = np.add.reduceat(rows, first, axis=0)
            pooled[:, 0] = np.minimum.reduceat(rows[:, 0], first)
            pooled[:, 1] = np.maximum.reduceat(rows[:, 1], first)
            index, rows = index[first], pooled
        return index, rows

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        index, rows = self._table()
        columns = np.ascontiguousarray(rows.T)
        own: dict[str, Array] = dict(zip(("lo", "hi", "sum", "square"), columns, strict=False))
        extent = self.extent.state("extent.")
        return {"index": index, **own, "n": columns[4].astype(np.int64), **extent}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> SeriesStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.extent = MinMaxStats.from_state(state, "extent.")
        rows = np.stack(
            [state[name].astype(np.float64) for name in ("lo", "hi", "sum", "square", "n")], axis=1
        )
        new._index.extend(state["index"].tolist())
        new._rows.extend(rows.reshape(-1).tolist())
        return new
