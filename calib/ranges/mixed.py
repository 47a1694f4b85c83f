"""Clip only the tensors whose outliers are few deviations away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from calib.ranges.evidence import histogram_of
from calib.ranges.grid import Grid, require_between
from calib.ranges.histogram import Histogram
from calib.ranges.minmax import MinMax
from calib.types import Range, Stats

__all__ = ["Mixed"]


@dataclass(frozen=True)
class Mixed:
    """`Histogram` where max|x| / std(x) <= ``threshold``, else (and for a constant) `MinMax`.

    Outliers far beyond the bulk usually carry the signal, so they are kept. std is the population deviation over
    all samples. 0-d range. ValueError unless 1 <= threshold <= 1e6; CalibrationError when no ``histogram`` was
    gathered or no finite value was seen. Source: msModelSlim's observer ``mix`` (threshold 50).
    """

    threshold: float = 50.0

    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    def __post_init__(self) -> None:
        require_between("threshold", self.threshold, 1, 1e6)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        bins = histogram_of(stats).bins()
        # A product, not a quotient: the deviation of a constant is zero.
        if bins.std > 0 and max(-bins.lo, bins.hi) <= self.threshold * bins.std:
            return Histogram().range_of(stats, grid)
        return MinMax().range_of({"histogram": histogram_of(stats)}, grid)
