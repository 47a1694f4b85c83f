"""The grid a range will be quantized on, and the rules every range obeys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.types import Range

__all__ = ["Grid", "range_from", "require_between"]

Ends = NDArray[np.float64] | float


@dataclass(frozen=True)
class Grid:
    """``levels`` steps between the lowest and the highest code: 255 for 8 bits, 254 for symmetric -127..127.

    ``symmetric`` ties lo to -hi. ValueError unless levels >= 1 (and even when symmetric: zero is in the middle).
    """

    levels: int = 255
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels: expected a whole number >= 1, got {self.levels}")
        if self.symmetric and self.levels % 2:
            raise ValueError(f"levels: a symmetric grid needs an even number of steps, got {self.levels}")


def range_from(lo: Ends, hi: Ends, grid: Grid) -> Range:
    """Return [min(lo, 0), max(hi, 0)], widened to [-a, a] with a = max(-lo, hi) when symmetric; shape as given."""
    # Adding zero turns -0.0 into 0.0, so equal ranges have equal bytes.
    low = np.asarray(np.minimum(lo, 0.0) + 0.0, np.float64)
    high = np.asarray(np.maximum(hi, 0.0) + 0.0, np.float64)
    if grid.symmetric:
        high = np.asarray(np.maximum(-low, high), np.float64)
        low = np.asarray(-high + 0.0, np.float64)
    return Range(low, high)


def require_between(field: str, value: float, low: float, high: float) -> None:
    """Raise ValueError naming ``field`` unless low <= value <= high (NaN is refused)."""
    if isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{field}: expected a number from {low:g} to {high:g}, got {value!r}")
