"""Bins of floating-point shape: the upper 16 bits of a float32 (sign, exponent, 7 mantissa bits) name a bin.

The bins need no known range, are the same for every tensor and have a relative width of 2^-7, so histograms
made anywhere add up exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEYS", "Bins", "bins_of", "fold"]

KEYS = 1 << 16
_NEGATIVE = 1 << 15
_FIRST_NOT_FINITE = 0x7F80

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Bins:
    """The non-empty bins of one distribution, in ascending order of value.

    ``left``, ``right``, ``values`` (the centre) float64 [n]; ``counts`` int64 [n]; ``lo`` and ``hi`` are the exact
    smallest and largest values, and the outer edges are clipped to them. Zero has a bin of its own of width 0.
    """

    left: Floats
    right: Floats
    values: Floats
    counts: Counts
    lo: float
    hi: float

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Σ n·v / Σ n over bin centres v; within 2^-8 of the mean of |x|, usually far closer."""
        return float(self.counts @ self.values / self.total)

    @property
    def std(self) -> float:
        """sqrt(Σ n·((v - mean)² + width²/12) / Σ n): population deviation, values spread evenly inside a bin."""
        spread = (self.values - self.mean) ** 2 + (self.right - self.left) ** 2 / 12
        return float(np.sqrt(self.counts @ spread / self.total))

    def quantile(self, fraction: Floats | float) -> Floats:
        """Return x with P(X <= x) = fraction, values spread evenly inside a bin; same shape as ``fraction``."""
        target = np.asarray(fraction, np.float64) * self.total
        after = np.cumsum(self.counts)
        at = np.minimum(np.searchsorted(after, target, side="left"), len(after) - 1)
        inside = np.clip((target - (after[at] - self.counts[at])) / self.counts[at], 0.0, 1.0)
        return np.asarray(self.left[at] + inside * (self.right[at] - self.left[at]), np.float64)

    def rank(self, point: Floats | float) -> Floats:
        """Return the expected number of values <= ``point``, spread evenly inside a bin: `quantile` inverted."""
        x = np.asarray(point, np.float64)
        before = np.concatenate([[0.0], np.cumsum(self.counts)])
        at = np.searchsorted(self.right, x, side="right")
        inner = np.minimum(at, len(self.counts) - 1)
        width = self.right[inner] - self.left[inner]
        inside = np.clip((x - self.left[inner]) / np.where(width > 0, width, 1.0), 0.0, 1.0)
        return np.asarray(
            before[at] + np.where(at < len(self.counts), inside * self.counts[inner], 0.0), np.float64
        )


@lru_cache(maxsize=1)
def _edges() -> tuple[NDArray[np.intp], Floats, Floats]:
    """Return the keys of all finite bins by ascending value, and the left and right edge of each."""
    key = np.arange(_FIRST_NOT_FINITE, dtype=np.uint32)
    near = (key << 16).view(np.float32).astype(np.float64)
    far = np.append(near[1:], 2.0**128)  # the next key after the largest finite one is Inf
    # Key 0 holds zero and the deepest denormals (below 2^-133), which no scale can tell from zero.
    far[0] = 0.0
    keys = np.concatenate([key[::-1] + _NEGATIVE, key]).astype(np.intp)
    left = np.concatenate([-far[::-1], near])
    right = np.concatenate([-near[::-1], far])
    return keys, left + 0.0, right + 0.0


def bins_of(counts: Counts, lo: float, hi: float) -> Bins:
    """Turn counters by key (int64 [65536]) and the exact extremes into `Bins`."""
    keys, left, right = _edges()
    ordered = counts[keys]
    middle = len(keys) // 2
    ordered[middle] += ordered[middle - 1]  # -0 and +0 are one bin
    ordered[middle - 1] = 0
    used = np.flatnonzero(ordered)
    left, right = np.clip(left[used], lo, hi), np.clip(right[used], lo, hi)
    return Bins(left, right, (left + right) / 2, ordered[used], lo, hi)


def fold(counts: Counts) -> Counts:
    """Return counters of |x| from counters of x, both int64 [65536]."""
    folded = np.zeros_like(counts)
    folded[:_NEGATIVE] = counts[:_NEGATIVE] + counts[_NEGATIVE:]
    return folded
