"""How far a tensor's largest values lie from its bulk: three scores of what int8 makes of it, largest over samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from calib.stats.channel_axis import as_block
from calib.stats.minmax import as_numbers
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["SPREADS", "SpreadStats"]

SPREADS = ("std", "quantile", "kurtosis")
_LOOKED_AT = 1 << 14  # elements of one sample that the quartiles are of; the rest is of all
_AT_ONCE = 1 << 16  # elements whose float64 copies stay in the cache
_TINY = 1e-10
Floats = NDArray[np.float64]


class SpreadStats:
    """Three scores of one sample's finite values x, each the maximum over samples; higher is harder to quantize.

    ``std`` = max|x| / std(x - m), m = (max + min) / 2 of the channel along the probe's axis (of all x without one);
    ``quantile`` = (2 max|x| / 254) / (Q3 - Q1 + 1e-10); ``kurtosis`` = E[z⁴] - 3, z = (x - mean) / (std + 1e-10).
    The quartiles Q1 and Q3 are of about 16384 elements at regular distances. A channel with a NaN or an Inf is passed
    over; a sample without a finite value, or one that is constant, gives nothing. State: ``scores`` float64 [3], -inf
    before the first sample. Merging is exact. Source: sensitive layer analysis of msModelSlim.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        self._axis = probe.axis if probe is not None else None
        if probe is not None:
            options_of(probe, {})
        self.scores: NDArray[np.float64] = np.full(len(SPREADS), -np.inf)

    def of(self, kind: str) -> float | None:
        """The score of that name of `SPREADS`, or None when nothing was seen."""
        score = float(self.scores[SPREADS.index(kind)])
        return None if score == -np.inf else score

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample."""
        x = as_numbers(x)
        if x.size == 0:
            return
        block = as_block(x, self._axis) if self._axis is not None and x.ndim else x.reshape(1, 1, -1)
        low, high = (f(axis=(0, 2)).astype(np.float64) for f in (block.min, block.max))
        good = np.isfinite(low) & np.isfinite(high)
        if not good.any():
            return
        if not good.all():
            block, low, high = block[:, good], low[good], high[good]
        if low.min() == high.max():
            return
        largest = float(np.maximum(np.abs(low), np.abs(high)).max())
        # A step that shares no factor with the last axis, so that every channel has its turn.
        step = max(block.size // _LOOKED_AT, 1)
        while step > 1 and np.gcd(step, x.shape[-1]) > 1:
            step += 1
        quartiles = np.percentile(block.reshape(-1)[::step].astype(np.float64), (25, 75))
        self.scores = np.maximum(self.scores, _scores(block, (low + high) / 2, largest, quartiles))

    def merge(self, other: Stats) -> None:
        """Add what ``other`` (also a SpreadStats, else TypeError) has seen."""
        if not isinstance(other, SpreadStats):
            raise TypeError(f"cannot merge {type(other).__name__} into SpreadStats")
        self.scores = np.maximum(self.scores, other.scores)

    def state(self) -> dict[str, Array]:
        """Return the array described in the class docstring."""
        return {"scores": self.scores.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> SpreadStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.scores = np.asarray(state["scores"], np.float64).copy()
        return new


def _scores(block: Array, middle: Floats, largest: float, quartiles: Floats) -> Floats:
    """Of finite values [before, C, after], the middle [C] of each channel, max |x| and the quartiles."""
    mean = float(block.sum(dtype=np.float64)) / block.size
    shifted = np.zeros(2)  # sums of x - m and of its square
    centred = np.zeros(2)  # of the second and the fourth power of x - mean
    for values, m in _pieces(block, middle):
        d = values - m
        shifted += d.sum(), np.einsum("bca,bca->", d, d)
        z2 = np.square(values - mean)
        centred += z2.sum(), np.einsum("bca,bca->", z2, z2)
    first, second = shifted / block.size
    variance, fourth = centred / block.size
    return np.array(
        [
            largest / (np.sqrt(max(second - first**2, 0.0)) + _TINY),
            2 * largest / 254 / (quartiles[1] - quartiles[0] + _TINY),
            fourth / (np.sqrt(variance) + _TINY) ** 4 - 3,
        ]
    )


def _pieces(block: Array, middle: Floats) -> Iterator[tuple[Floats, Floats]]:
    """``block`` in float64, a little of it at a time, each with the middle of its channels."""
    before, channels, after = block.shape
    rows = max(_AT_ONCE // (channels * after), 1)
    width = channels if rows > 1 else max(_AT_ONCE // after, 1)
    for start in range(0, before, rows):
        for c in range(0, channels, width):
            piece = block[start : start + rows, c : c + width].astype(np.float64)
            yield piece, middle[None, c : c + width, None]
