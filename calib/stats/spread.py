"""How far a tensor's largest values lie from its bulk: three scores of what int8 makes of it, largest over samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.stats.channel_axis import as_block
from calib.stats.minmax import as_numbers
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["SPREADS", "SpreadStats"]

SPREADS = ("std", "quantile", "kurtosis")
_LOOKED_AT = 1 << 14  # elements of one sample, at regular distances; extremes are of all
_TINY = 1e-10


class SpreadStats:
    """Three scores of one sample's finite values x, each the maximum over samples; higher is harder to quantize.

    ``std`` = max|x| / std(x - m), m = (max + min) / 2 of the channel along the probe's axis (of all x without one);
    ``quantile`` = (2 max|x| / 254) / (Q3 - Q1 + 1e-10); ``kurtosis`` = E[z⁴] - 3, z = (x - mean) / (std + 1e-10).
    Extremes are of all elements, the rest of about 16384 at regular distances. A sample without a finite value, or one
    that is constant, gives nothing. State: ``scores`` float64 [3], -inf before the first sample. Merging is exact.
    Source: sensitive layer analysis of msModelSlim.
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
        largest = float(np.maximum(np.abs(low), np.abs(high))[good].max())
        # A step that shares no factor with the last axis, so that every channel has its turn.
        step = max(x.size // _LOOKED_AT, 1)
        while step > 1 and np.gcd(step, x.shape[-1]) > 1:
            step += 1
        index = np.arange(0, x.size, step)
        values = block.reshape(-1)[index].astype(np.float64)
        channel = index // block.shape[2] % block.shape[1]
        kept = good[channel] & np.isfinite(values)
        values, channel = values[kept], channel[kept]
        if values.size == 0 or values.min() == values.max():
            return
        self.scores = np.maximum(self.scores, _scores(values, ((low + high) / 2)[channel], largest))

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


def _scores(values: NDArray[np.float64], middle: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    first, third = np.percentile(values, (25, 75))
    spread = values.std()
    shifted = (values - middle).std()
    return np.array(
        [
            largest / (shifted + _TINY),
            2 * largest / 254 / (third - first + _TINY),
            np.mean(((values - values.mean()) / (spread + _TINY)) ** 4) - 3,
        ]
    )
