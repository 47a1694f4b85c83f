"""Sums of float64 arrays that do not depend on the order of the additions, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.types import Array

__all__ = ["ExactSum"]

_BITS = 32
_CHUNK = 1 << 16
_BASE = 2.0**_BITS
_EMPTY = -128  # below the digit of the smallest float64, 2^-1074


class ExactSum:
    """Σ v per element, each v split into balanced digits of base 2^32 and the digits summed as integers.

    v = Σ_k d_k · 2^(32k) with |d_k| <= 2^31. Per element only the ``folds`` highest digits below the largest value
    met are kept; a digit of a given weight is the same however the values arrive, and integer sums commute, so the
    state is the same for every order and grouping. The part of a value that is dropped is at most 2^-(32·folds - 31)
    of the largest one added to that element: 33 bits are kept at worst with two folds, 65 with three. Up to 2^32
    additions. State: ``digits`` int64 [folds, *shape], ``top`` int8 [*shape] (the weight of digits[0] in base 2^32).
    Source: Demmel and Nguyen, Parallel Reproducible Summation, 2015 (binned sums).
    """

    def __init__(self, shape: tuple[int, ...], folds: int) -> None:
        self.digits: NDArray[np.int64] = np.zeros((folds, *shape), np.int64)
        self.top: NDArray[np.int8] = np.full(shape, _EMPTY, np.int8)

    def add(self, values: NDArray[np.float32] | NDArray[np.float64]) -> None:
        """Add one float array of the sum's shape; CalibrationError when a value is not finite."""
        if not np.isfinite(values).all():
            raise CalibrationError("a sum over one sample overflows float64")
        # In pieces, so that a large matrix needs no second and third copy of itself.
        flat, digits, top = (
            values.reshape(-1),
            self.digits.reshape(len(self.digits), -1),
            self.top.reshape(-1),
        )
        for start in range(0, flat.size, _CHUNK):
            piece = slice(start, start + _CHUNK)
            _add(digits[:, piece], top[piece], flat[piece].astype(np.float64))

    def add_all(self, values: NDArray[np.float64]) -> None:
        """Add several arrays at once, [n, *shape], as fast as one; the same state as adding one after another."""
        if not np.isfinite(values).all():
            raise CalibrationError("a sum over one sample overflows float64")
        _add(self.digits, self.top, values)

    def merge(self, other: ExactSum) -> None:
        """Add another sum; ValueError unless shape and folds are equal."""
        if other.digits.shape != self.digits.shape:
            raise ValueError(f"cannot add sums of shapes {self.digits.shape} and {other.digits.shape}")
        _raise_tops(self.digits, self.top, other.top)
        self.digits += _shifted(other.digits, self.top.astype(np.int16) - other.top)

    @property
    def value(self) -> NDArray[np.float64]:
        """The sum, float64 [*shape]."""
        total = np.zeros(self.top.shape)
        for digit in self.digits[::-1]:
            total = total / _BASE + digit
        return np.asarray(np.ldexp(total, _BITS * self.top.astype(np.int32)), np.float64)

    def state(self, prefix: str) -> dict[str, Array]:
        """Return the arrays described in the class docstring, their names starting with ``prefix.``."""
        return {f"{prefix}.digits": self.digits.copy(), f"{prefix}.top": self.top.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, Array], prefix: str) -> ExactSum:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        digits = state[f"{prefix}.digits"].astype(np.int64)
        new = cls(digits.shape[1:], len(digits))
        new.digits, new.top = digits, state[f"{prefix}.top"].astype(np.int8)
        return new


def _add(digits: NDArray[np.int64], top: NDArray[np.int8], values: NDArray[np.float64]) -> None:
    """Add ``values``, of the shape of ``top`` or with one axis more before it."""
    exponent = np.frexp(values)[1].astype(np.int32)
    # |v| < 2^e is at most half a unit of weight k + 1 when e <= 32k + 31, so nothing rounds into that digit.
    needed = np.where(values == 0, _EMPTY, -((_BITS - 1 - exponent) // _BITS)).astype(np.int8)
    several = values.ndim > top.ndim
    _raise_tops(digits, top, needed.max(axis=0) if several else needed)
    rest = np.ldexp(values, -_BITS * top.astype(np.int32))
    for fold in range(len(digits)):
        digit = np.rint(rest)
        whole = digit.astype(np.int64)
        digits[fold] += whole.sum(axis=0) if several else whole
        rest = (rest - digit) * _BASE  # exact: what is left of a float after rounding it


def _raise_tops(digits: NDArray[np.int64], top: NDArray[np.int8], wanted: NDArray[np.int8]) -> None:
    """Make every top at least the wanted one, in place."""
    shift = np.maximum(wanted.astype(np.int16) - top, 0).astype(np.int16)
    if shift.any():
        digits[...] = _shifted(digits, shift)
        np.maximum(top, wanted, out=top)


def _shifted(digits: NDArray[np.int64], shift: NDArray[np.int16]) -> NDArray[np.int64]:
    """Return the digits below tops that are ``shift`` higher; the lowest fall out."""
    moved = np.zeros_like(digits)
    for fold in range(len(digits)):
        for by in range(fold + 1):
            moved[fold] += np.where(shift == by, digits[fold - by], 0)
    return moved
