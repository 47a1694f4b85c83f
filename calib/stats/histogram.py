"""A histogram that needs no range: one counter per upper half of a float32."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import gcd, isqrt, prod

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats.bins import KEYS, Bins, bins_of, fold
from calib.stats.minmax import MinMaxStats, as_numbers
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["HistogramStats", "grid_step", "sampled"]

_CHUNK = 1 << 18  # bincount widens its input to 8 bytes per element; this keeps that copy in the L2 cache
_UPPER_HALF = 1 if sys.byteorder == "little" else 0
_SPARE = 3
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class HistogramStats:
    """n[k] = number of finite x whose float32 has the upper 16 bits k (sign, exponent, 7 mantissa bits).

    Any shape, any real dtype (a float64 is rounded to float32 for its key only). ``extent`` is a `MinMaxStats`:
    exact lo and hi, counts of NaN and Inf, the first bad sample. State: ``counts`` int64 [65536], ``every`` and
    ``most`` int64 0-d, and the state of ``extent``. Integer counters make merging exact in any order; mean and
    deviation are computed from the counters (`Bins.mean`, `Bins.std`) so that they share this property.

    Option ``every`` = k: count each k-th element only (lo, hi, NaN and Inf still see all of them). k is raised
    until coprime with the tensor's size, else a k dividing the row length would look at a few channels only.
    Option ``most`` = n: count about n elements of a tensor (0: all), the same ones of a sample whatever came before
    it, so merging stays exact: of rank 4, `grid_step` of both last axes, then as with ``every``.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        defaults: dict[str, float] = {"every": 1, "most": 0}
        options = options_of(probe, defaults) if probe is not None else defaults
        self.every = int(options["every"])
        self.most = int(options["most"])
        if self.every < 1 or self.every != options["every"]:
            raise CalibrationError(
                f"histogram option every: expected a whole number >= 1, got {options['every']}"
            )
        self.extent = MinMaxStats()
        self._counts: NDArray[np.int64] = np.zeros(KEYS, np.int64)
        self._pending: list[NDArray[np.uint16]] = []
        self._waiting = 0

    @property
    def counts(self) -> NDArray[np.int64]:
        """The counters, int64 [65536]."""
        self._flush()
        return self._counts

    @property
    def lo(self) -> float:
        """Exact smallest finite value, +inf before the first one."""
        return self.extent.lo

    @property
    def hi(self) -> float:
        """Exact largest finite value, -inf before the first one."""
        return self.extent.hi

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample."""
        x = as_numbers(x)
        bad_before = self.extent.nan + self.extent.inf
        self.extent.update(x, sample)
        clean = self.extent.nan + self.extent.inf == bad_before
        part = sampled(x, self.most) if self.most else x
        self._take(part, clean, part.size < x.size)

    def note(self, lo: float, hi: float, size: int, part: Array, zeros: int = 0) -> None:
        """Take in a finite tensor of ``size`` elements by its extremes and ``part`` (what `sampled` gives of it).

        ``zeros`` of the elements are 0 and not in ``part``; they are counted in proportion.
        """
        self.extent.note(lo, hi, size)
        counted = self._take(part, True, part.size < size - zeros)
        self._counts[0] += round(counted * zeros / max(size - zeros, 1))

    def _take(self, x: Array, clean: bool, thinned: bool) -> int:
        """Count; returns how many. A grid, whose steps are coarse, may hold up to three times ``most``."""
        most = self.most * (_SPARE if thinned else 1)
        every = _coprime(max(self.every, x.size // most if most else 1), x.size)
        flat = x.reshape(-1)
        for start in range(0, x.size, _CHUNK * every):
            self._count(flat[start : start + _CHUNK * every : every], clean)
        return -(-x.size // every)

    def _count(self, part: Array, clean: bool) -> None:
        if not clean:
            part = part[np.isfinite(part)]
        if part.dtype != np.float32:
            if part.dtype == np.float64 and (self.hi > _FLOAT32_MAX or self.lo < -_FLOAT32_MAX):
                part = np.clip(part, -_FLOAT32_MAX, _FLOAT32_MAX)
            part = part.astype(np.float32)
        keys = part.view(np.uint16)[_UPPER_HALF::2] if part.flags.c_contiguous else _strided_keys(part)
        # Producing 65536 counters costs more than counting a few thousand keys: those wait for company.
        self._pending.append(keys.copy())
        self._waiting += keys.size
        if self._waiting >= KEYS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            found = np.bincount(np.concatenate(self._pending))
            self._counts[: len(found)] += found
            self._pending.clear()
            self._waiting = 0

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for another ``every``."""
        if not isinstance(other, HistogramStats):
            raise TypeError(f"cannot merge {type(other).__name__} into HistogramStats")
        if (other.every, other.most) != (self.every, self.most):
            raise CalibrationError(
                f"cannot merge histograms counting every {self.every} (most {self.most}) "
                f"and every {other.every} (most {other.most})"
            )
        self.extent.merge(other.extent)
        self._counts += other.counts

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        options: dict[str, Array] = {
            "every": np.array(self.every, np.int64),
            "most": np.array(self.most, np.int64),
        }
        return {**self.extent.state(), "counts": self.counts.copy(), **options}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> HistogramStats:
        """Rebuild from what `state` returned; KeyError when an array is missing, ValueError for other counters."""
        new = cls()
        if state["counts"].shape != (KEYS,):
            raise ValueError(f"counts have shape {state['counts'].shape}, not ({KEYS},)")
        new.extent = MinMaxStats.from_state(state)
        new.every, new.most = int(state["every"]), int(state["most"])
        new._counts = state["counts"].astype(np.int64)
        return new

    def bins(self) -> Bins:
        """Return the non-empty bins of x; CalibrationError when no finite value was seen."""
        self._require_values()
        return bins_of(self.counts, self.lo, self.hi)

    def magnitudes(self) -> Bins:
        """Return the non-empty bins of |x|; CalibrationError when no finite value was seen."""
        self._require_values()
        nearest = max(self.lo, -self.hi, 0.0)
        return bins_of(fold(self.counts), nearest, max(-self.lo, self.hi))

    def values_and_counts(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return bin centres (float64 [n], ascending, outer bins clipped to lo and hi) and counts (int64 [n])."""
        bins = self.bins()
        return bins.values, bins.counts

    def _require_values(self) -> None:
        if self.extent.count == 0:
            raise CalibrationError("no finite value was seen, so there is no distribution")


def grid_step(shape: tuple[int, ...], most: int) -> int:
    """Every how many places of both last axes are looked at to see about ``most`` elements of an item of a batch.

    Only of a rank-4 tensor, and 1 where the grid would have fewer than 4 x 4 places: an image's edge is not like its
    inside. Odd, because patterns of period 2 are common (strides, upsampling).
    """
    step = isqrt(prod(shape[1:]) // most) if len(shape) == 4 else 1
    step = max(1, step - 1 + step % 2)
    return step if 4 * step <= min(shape[-2:], default=0) else 1


def sampled(x: Array, most: int) -> Array:
    """The elements of ``x`` on the grid that `grid_step` gives; a view."""
    step = grid_step(x.shape, most)
    return x[:, :, ::step, ::step] if step > 1 else x


def _coprime(every: int, size: int) -> int:
    while size > 0 and every > 1 and gcd(every, size) > 1:
        every += 1
    return every


def _strided_keys(part: Array) -> NDArray[np.uint16]:
    return np.right_shift(part.view(np.uint32), 16).astype(np.uint16)
