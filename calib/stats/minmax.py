"""Smallest and largest finite value of a tensor, and the health (NaN, Inf) of what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np

from calib.errors import CalibrationError
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["MinMaxStats", "as_numbers"]


def as_numbers(x: Array) -> Array:
    """Return ``x``, float16 widened to float32; CalibrationError unless boolean, integer or real floating-point."""
    if x.dtype.kind not in "buif":
        raise CalibrationError(f"statistics need numbers, got an array of dtype {x.dtype}")
    # Exact, and numpy's float16 loops are ten times slower than the conversion.
    return x.astype(np.float32) if x.dtype == np.float16 else x


class MinMaxStats:
    """lo = min x, hi = max x over finite x; counts of finite, NaN and Inf values; the first bad sample.

    Any shape, any real dtype; state: ``lo``, ``hi`` float64 0-d (+inf, -inf before the first finite value),
    ``count``, ``nan``, ``inf``, ``bad_index`` int64 0-d (-1: none), ``bad_name`` uint8 [n] (UTF-8).
    Every field is a minimum, a maximum or an integer sum, so merging is exact in any order.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        if probe is not None:
            options_of(probe, {})
        self.lo = float("inf")
        self.hi = float("-inf")
        self.count = 0
        self.nan = 0
        self.inf = 0
        self.first_bad: tuple[int, str] | None = None

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample."""
        x = as_numbers(x)
        if x.size == 0:
            return
        # One pass each for min and max; NaN and Inf both surface in them, so a clean tensor needs no other look.
        lo, hi = float(x.min()), float(x.max())
        if isfinite(lo) and isfinite(hi):
            self.note(lo, hi, x.size)
        else:
            self.note(*self._look_closer(x, sample), 0)

    def note(self, lo: float, hi: float, count: int) -> None:
        """Take in ``count`` finite values of which only the smallest and the largest are known."""
        self.count += count
        # Which zero a minimum returns depends on the order; adding zero turns -0.0 into 0.0.
        self.lo, self.hi = min(self.lo, lo + 0.0), max(self.hi, hi + 0.0)

    def _look_closer(self, x: Array, sample: SampleId) -> tuple[float, float]:
        finite = np.isfinite(x)
        good = int(np.count_nonzero(finite))
        nan = int(np.count_nonzero(np.isnan(x)))
        self.count += good
        self.nan += nan
        self.inf += x.size - good - nan
        self._note_bad((sample.index, sample.name))
        if good == 0:
            return float("inf"), float("-inf")
        return (
            float(np.min(x, where=finite, initial=np.inf)),
            float(np.max(x, where=finite, initial=-np.inf)),
        )

    def _note_bad(self, bad: tuple[int, str]) -> None:
        self.first_bad = bad if self.first_bad is None else min(self.first_bad, bad)

    def merge(self, other: Stats) -> None:
        """Add what ``other`` (also a MinMaxStats, else TypeError) has seen."""
        if not isinstance(other, MinMaxStats):
            raise TypeError(f"cannot merge {type(other).__name__} into MinMaxStats")
        self.lo, self.hi = min(self.lo, other.lo), max(self.hi, other.hi)
        self.count += other.count
        self.nan += other.nan
        self.inf += other.inf
        if other.first_bad is not None:
            self._note_bad(other.first_bad)

    def state(self, prefix: str = "") -> dict[str, Array]:
        """Return the arrays described in the class docstring, their names preceded by ``prefix``."""
        index, name = self.first_bad if self.first_bad is not None else (-1, "")
        return {
            f"{prefix}lo": np.array(self.lo, np.float64),
            f"{prefix}hi": np.array(self.hi, np.float64),
            f"{prefix}count": np.array(self.count, np.int64),
            f"{prefix}nan": np.array(self.nan, np.int64),
            f"{prefix}inf": np.array(self.inf, np.int64),
            f"{prefix}bad_index": np.array(index, np.int64),
            f"{prefix}bad_name": np.frombuffer(name.encode(), np.uint8).copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array], prefix: str = "") -> MinMaxStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.lo, new.hi = float(state[f"{prefix}lo"]), float(state[f"{prefix}hi"])
        new.count, new.nan, new.inf = (int(state[f"{prefix}{name}"]) for name in ("count", "nan", "inf"))
        index = int(state[f"{prefix}bad_index"])
        if index >= 0:
            new.first_bad = index, state[f"{prefix}bad_name"].tobytes().decode()
        return new
