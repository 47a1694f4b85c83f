"""The clip threshold that loses the least information, after TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from calib.ranges.evidence import histogram_of
from calib.ranges.grid import Grid, range_from, require_between
from calib.stats.bins import Bins
from calib.types import Range, Stats

__all__ = ["Entropy"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Entropy:
    """[max(min x, -T), min(max x, T)] where T minimises KL(P ‖ Q) over the distribution of |x|.

    The logarithmic bins of |x| are re-binned to ``bins`` equal ones over [0, max|x|], each spreading its values
    evenly; exact zeros are left out, because every grid represents them. For a threshold at bin i, P = the first i
    bins with everything beyond added to the last; Q = the same bins without that, merged into n groups (n = the
    number of codes that |x| gets on the grid) and spread over the non-empty bins of each group. 0-d range.
    ValueError unless 256 <= bins <= 65536; CalibrationError when no ``histogram`` was gathered or no finite value
    was seen. Source: Migacz, 8-bit Inference with TensorRT, GTC 2017.
    """

    bins: int = 2048

    needs_tails: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    def __post_init__(self) -> None:
        require_between("bins", self.bins, 256, 65536)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        magnitudes = histogram_of(stats).magnitudes()
        whole = histogram_of(stats).bins()
        lo, hi = min(whole.lo, 0.0), max(whole.hi, 0.0)
        if whole.lo == whole.hi:
            return range_from(lo, hi, grid)
        share = 0.5 if grid.symmetric else magnitudes.hi / (hi - lo)
        codes = round(grid.levels * share) + 1
        threshold = _threshold(_equal_bins(magnitudes, self.bins), codes) / self.bins * magnitudes.hi
        return range_from(max(lo, -threshold), min(hi, threshold), grid)


def _equal_bins(magnitudes: Bins, bins: int) -> Floats:
    """Return expected counts float64 [bins] over [0, max|x|], without the exact zeros."""
    rank = magnitudes.rank(np.linspace(0.0, magnitudes.hi, bins + 1))
    return np.diff(rank)


def _threshold(counts: Floats, codes: int) -> int:
    """Return the number of bins kept, the largest of equally good ones."""
    bins = len(counts)
    if codes >= bins:
        return bins
    kept = np.arange(codes, bins + 1)
    total = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    beyond = total[-1] - total[kept]
    last = counts[kept - 1] + beyond
    # Σ p·log p over the bins before the last, then with the last.
    own = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])[kept - 1] + _xlogx(last)
    ends = kept[:, None] * np.arange(codes + 1) // codes
    reference = np.diff(total[ends], axis=1)
    candidates = np.diff(filled[ends], axis=1) + 0.0
    candidates[:, -1] += (counts[kept - 1] == 0) & (beyond > 0)
    target = reference.copy()
    target[:, -1] += beyond
    # Q is constant inside a group, so Σ p·log q needs one logarithm per group, not one per bin.
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.log(reference / candidates / total[kept][:, None])
        cross = np.where(target > 0, target * log_q, 0.0).sum(axis=1)
    divergence = own - cross  # times the total, plus a constant
    divergence[~np.isfinite(divergence)] = np.inf
    return int(kept[np.flatnonzero(divergence == divergence.min())[-1]])


def _xlogx(p: Floats) -> Floats:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)
