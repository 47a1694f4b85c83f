"""The series of the values above zero: what is left of a Relu's output without its zeros."""

from __future__ import annotations

import numpy as np

from calib.stats.minmax import as_numbers
from calib.stats.series import SeriesStats
from calib.types import Array, SampleId

__all__ = ["PositiveStats"]


class PositiveStats(SeriesStats):
    """As `SeriesStats`, over the elements x > 0 only; a sample without one leaves no row."""

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample."""
        numbers = np.asarray(as_numbers(x))
        super().update(numbers[np.greater(numbers, 0)], sample)
