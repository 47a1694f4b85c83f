"""The observed range times the factor, out of a thousand, with the smallest squared error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calib.ranges.cost import cost_of
from calib.ranges.evidence import histogram_of
from calib.ranges.grid import Grid, range_from, require_between
from calib.types import Range, Stats

__all__ = ["EasyQuant"]


@dataclass(frozen=True)
class EasyQuant:
    """[r min x, r max x] with r = lowest + k step, k = 0 .. factors - 1, that minimises `QuantizationCost` (the first
    of equals). Both ends share r: unlike ``mse`` it never trades one end for the other. CalibrationError when no
    ``histogram`` was gathered or no finite value was seen. ValueError unless 0 < lowest <= 1, 0 < step <= 0.1 and
    1 <= factors <= 100000.
    Source: msModelSlim, keep_acc "easy_quant": r = 0.75 + 0.0005 k, k = 0 .. 999.
    """

    factors: int = 1000
    lowest: float = 0.75
    step: float = 0.0005

    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    def __post_init__(self) -> None:
        require_between("factors", self.factors, 1, 100_000)
        require_between("lowest", self.lowest, 1e-3, 1)
        require_between("step", self.step, 1e-6, 0.1)

    def range_of(self, stats: Mapping[str, Stats], grid: Grid) -> Range:
        """Return the range; see the class."""
        cost = cost_of(histogram_of(stats), grid)
        ratios = self.lowest + self.step * np.arange(self.factors, dtype=np.float64)
        costs = cost(cost.lo * ratios, cost.hi * ratios)
        best = 1.0 if cost.constant else float(ratios[np.argmin(costs)])
        return range_from(cost.lo * best, cost.hi * best, grid)
