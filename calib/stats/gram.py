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
from calib.stats.patch import PATCH_OPTIONS, Patch
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["GramStats", "gram_bytes"]

_FOLDS, _SUM_FOLDS = 2, 3
_SEED = 0x6AA3
_DEFAULTS = {"groups": 1.0, "most": 0.0, **PATCH_OPTIONS}
Rows = NDArray[np.float32] | NDArray[np.float64]


def gram_bytes(size: int, groups: int = 1) -> int:
    """What the statistic holds for rows of ``groups`` parts of ``size`` values: 17 bytes per entry of a triangle."""
    return groups * (size * (size + 1) // 2) * 17


class GramStats:
    """G = XᵀX, X = every vector along ``probe.axis`` (default: the last) of every sample; also the number of rows.

    Options: a window (see `Patch`) makes rows of a convolution's input, C-order [C, *window], zero padding included,
    instead; ``most`` > 0 takes at most that many rows of a sample, spread over it at places drawn from (seed, sample
    index); ``groups`` cuts a row into that many parts and gives one matrix per part (grouped convolutions).

    Any shape whose channel axis keeps its size, any real dtype. One GEMM per sample, in float32 (float64 for float64
    input, or when float32 overflows), of which the upper triangle is added with `ExactSum`: the state does not depend
    on the order of the samples, and what it drops (2^-33 of an entry at worst) is below the rounding of the GEMM
    itself. That rounding may differ between machines and numbers of BLAS threads. A row with a NaN or an Inf is left
    out. Memory: `gram_bytes`. State: ``axis``, ``rows`` int64 0-d, the options; once something was seen the digits of
    ``gram`` (triangles, row by row) and of ``sum``; and the state of ``extent`` (a `MinMaxStats`) prefixed by
    ``extent.``.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        self.options = dict(_DEFAULTS) if probe is None else options_of(probe, _DEFAULTS)
        self.axis = -1 if probe is None or probe.axis is None else probe.axis
        self.extent = MinMaxStats()
        self.rows = 0
        self._patch = Patch.from_options(self.options)
        self._sum: tuple[ExactSum, ExactSum] | None = None

    @property
    def gram(self) -> NDArray[np.float64]:
        """XᵀX, float64 [d, d] (or [groups, d, d]), symmetric; CalibrationError when no row was seen."""
        full = _unpacked(self._seen()[0].value)
        return full[0] if self.groups == 1 else full

    @property
    def centred(self) -> NDArray[np.float64]:
        """(X - μ)ᵀ(X - μ) = XᵀX - n μμᵀ, μ the mean row; shaped like `gram`; CalibrationError when no row was seen."""
        total = self._seen()[1].value.reshape(self.groups, -1)
        moments = self.gram.reshape(self.groups, total.shape[1], total.shape[1])
        for matrix, sums in zip(moments, total, strict=True):
            matrix -= np.outer(sums, sums / self.rows)
        return moments[0] if self.groups == 1 else moments

    @property
    def groups(self) -> int:
        return int(self.options["groups"])

    def _seen(self) -> tuple[ExactSum, ExactSum]:
        if self._sum is None:
            raise CalibrationError("no finite row was seen, so there is no Gram matrix")
        return self._sum

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample; CalibrationError when the channel axis is missing or changed its size."""
        x = as_numbers(x)
        good_before = self.extent.count
        self.extent.update(x, sample)
        if x.size == 0:
            return
        axis = 1 if self._patch.kernel else self.axis
        if not -x.ndim <= axis < x.ndim:
            raise CalibrationError(f"there is no axis {axis} in shape {list(x.shape)}")
        rows = self._rows_of(x, sample)
        if self.extent.count - good_before != x.size:
            rows = rows[np.isfinite(rows).all(axis=1)]
        if len(rows) == 0:
            return
        size = rows.shape[1] // self.groups
        if self._sum is None:
            if rows.shape[1] % self.groups:
                raise CalibrationError(
                    f"rows of {rows.shape[1]} values cannot be cut into {self.groups} parts"
                )
            self._sum = _empty(self.groups, size)
        if self._sum[1].top.size != rows.shape[1]:
            channels = self._sum[1].top.size // int(np.prod(self._patch.kernel, dtype=np.int64))
            require_channels(axis, channels, x, sample)
        self._sum[0].add(_packed(_product(rows.reshape(len(rows), self.groups, size))))
        self._sum[1].add(rows.sum(axis=0, dtype=np.float64))
        self.rows += len(rows)

    def _rows_of(self, x: Array, sample: SampleId) -> Rows:
        wide = x.dtype == np.float64 or (x.dtype.kind in "iu" and x.dtype.itemsize > 2)
        kind = np.float64 if wide else np.float32
        moved = x if self._patch.kernel else np.moveaxis(x, self.axis, -1)
        places = moved.shape[:-1]
        if self._patch.kernel:
            if x.ndim - 2 != len(self._patch.kernel):
                raise CalibrationError(
                    f"a window of {len(self._patch.kernel)} axes does not fit shape {list(x.shape)}"
                )
            places = (len(x), *self._patch.places(x.shape[2:]))
        count, most = int(np.prod(places, dtype=np.int64)), int(self.options["most"])
        chosen = np.arange(count)
        if 0 < most < count:  # one place in each of `most` equal stretches
            draw = np.random.default_rng((_SEED, sample.index)).random(most)
            chosen = ((np.arange(most) + draw) * (count / most)).astype(np.int64)
        if self._patch.kernel:
            image, *where = np.unravel_index(chosen, places)
            return np.asarray(self._patch.take(x, image, np.stack(where, axis=1)), kind)
        if len(chosen) < count:
            return np.ascontiguousarray(moved[np.unravel_index(chosen, places)], kind)
        return np.ascontiguousarray(moved, kind).reshape(-1, moved.shape[-1])

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for other channels."""
        if not isinstance(other, GramStats):
            raise TypeError(f"cannot merge {type(other).__name__} into GramStats")
        if other.axis != self.axis:
            raise CalibrationError(f"cannot merge channels of axis {self.axis} and axis {other.axis}")
        if other.options != self.options:
            raise CalibrationError("cannot merge Gram matrices with different windows, groups or bounds")
        self.extent.merge(other.extent)
        if other._sum is None:
            return
        size = other._sum[1].top.size
        if self._sum is None:
            self._sum = _empty(self.groups, size // self.groups)
        if self._sum[1].top.size != size:
            raise CalibrationError(f"cannot merge {self._sum[1].top.size} and {size} channels")
        for mine, theirs in zip(self._sum, other._sum, strict=True):
            mine.merge(theirs)
        self.rows += other.rows

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        own: dict[str, Array] = {"axis": np.array(self.axis, np.int64), "rows": np.array(self.rows, np.int64)}
        own |= {f"option.{k}": np.array(v) for k, v in sorted(self.options.items())}
        own |= self.extent.state("extent.")
        return own if self._sum is None else own | self._sum[0].state("gram") | self._sum[1].state("sum")

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> GramStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.axis, new.rows = int(state["axis"]), int(state["rows"])
        new.options = {k: float(state[f"option.{k}"]) for k in _DEFAULTS}
        new._patch = Patch.from_options(new.options)
        new.extent = MinMaxStats.from_state(state, "extent.")
        if "gram.digits" in state:
            new._sum = ExactSum.from_state(state, "gram"), ExactSum.from_state(state, "sum")
        return new


def _empty(groups: int, size: int) -> tuple[ExactSum, ExactSum]:
    return ExactSum((groups, size * (size + 1) // 2), _FOLDS), ExactSum((groups * size,), _SUM_FOLDS)


def _packed(full: Rows) -> Rows:
    """The upper triangles of [groups, d, d], row by row, [groups, d (d + 1) / 2]."""
    size = full.shape[1]
    packed = np.empty((len(full), size * (size + 1) // 2), full.dtype)
    start = 0
    for row in range(size):
        packed[:, start : start + size - row] = full[:, row, row:]
        start += size - row
    return packed


def _unpacked(packed: NDArray[np.float64]) -> NDArray[np.float64]:
    size = int((2 * packed.shape[1]) ** 0.5)
    full = np.empty((len(packed), size, size))
    start = 0
    for row in range(size):
        full[:, row, row:] = full[:, row:, row] = packed[:, start : start + size - row]
        start += size - row
    return full


def _product(rows: Rows) -> Rows:
    """XᵀX per part of rows [n, groups, size]."""
    parts = rows.transpose(1, 2, 0)
    if len(parts) > 1:
        parts = np.ascontiguousarray(parts)
    # A product of a matrix with its own transpose: numpy computes one triangle and mirrors it.
    with np.errstate(over="ignore", invalid="ignore"):
        gram: Rows = np.matmul(parts, parts.transpose(0, 2, 1))
    if not np.isfinite(gram).all():
        wide = parts.astype(np.float64)
        gram = np.matmul(wide, wide.transpose(0, 2, 1))
    return gram
