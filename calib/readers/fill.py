"""Inputs that samples need not hold: constants, and the empty or zero state a sequence starts with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.errors import CalibrationError
from calib.readers.access import read_at
from calib.readers.check import numbers_of
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits, quoted
from calib.types import Array, Dataset, Feed, InputInfo, Sample

__all__ = ["Filled", "constant_feed", "initial_state", "is_past"]

_GROWS = re.compile(r"past|seq|len|total|cache|ctx|context", re.IGNORECASE)
_PAST_AXIS = 2  # of [batch, heads, past, width], the layout of exported KV caches
_PAST_RANK = 4


def is_past(name: str) -> bool:
    """Whether an input is a KV cache by the name that exporters give it."""
    return name.startswith(("past_key_values", "past.", "past_"))


def initial_state(info: InputInfo, shape: Sequence[int] | None = None) -> Array:
    """Zeros of the input's declared shape: an axis that grows with the sequence is empty, any other dynamic one is 1.

    An axis grows when its name says so (past, seq, len, …) or when it is axis 2 of a 4-d input without named
    axes, which is where exported KV caches grow. ``shape`` overrides all of it.

    Raises:
        CalibrationError: the input declares no shape, or ``shape`` contradicts the declared one.
    """
    if shape is None and info.shape is None:
        raise CalibrationError(
            f"input '{info.name}' declares no shape, so its first state is unknown; "
            f"give it: data: {{initial: {{{info.name}: [2, 1, 128]}}}}"
        )
    if shape is None:
        shape = [_first_size(info, axis) for axis in range(len(info.shape or ()))]
    declared = info.shape or shape
    fits = len(shape) == len(declared) and all(
        size == wanted for size, wanted in zip(shape, declared, strict=True) if isinstance(wanted, int)
    )
    if not fits:
        raise CalibrationError(
            f"data.initial.{info.name}: {list(shape)} does not fit the declared shape {list(declared)}; "
            "keep its rank and fixed sizes"
        )
    DEFAULT_LIMITS.check_bytes(
        int(np.prod(shape, dtype=object)) * info.dtype.itemsize, f"input '{info.name}'", "give data.initial"
    )
    return np.zeros(tuple(shape), info.dtype)


def _first_size(info: InputInfo, axis: int) -> int:
    size = (info.shape or ())[axis]
    if isinstance(size, int):
        return size
    if size is not None:
        return 0 if _GROWS.search(size) else 1
    return 0 if axis == _PAST_AXIS and len(info.shape or ()) == _PAST_RANK else 1


def constant_feed(
    values: Mapping[str, Any], inputs: Sequence[InputInfo], limits: ReadLimits = DEFAULT_LIMITS
) -> dict[str, Array]:
    """Arrays for inputs that are the same in every sample; one number fills a fixed shape.

    Raises:
        CalibrationError: there is no such input, or a value does not fit its dtype and shape.
    """
    known = {info.name: info for info in inputs}
    feed: dict[str, Array] = {}
    for name, value in values.items():
        if name not in known:
            raise CalibrationError(f"data.constants.{name}: no such input; the inputs are {quoted(known)}")
        feed[name] = _constant(value, known[name], limits)
    return feed


def _constant(value: Any, info: InputInfo, limits: ReadLimits) -> Array:
    place = f"data.constants.{info.name}"
    try:
        exact, array = numbers_of(value, info.dtype)
    except (ValueError, TypeError, OverflowError):
        raise CalibrationError(
            f"{place}: not values of {info.dtype}; give a number or nested lists"
        ) from None
    lost = info.dtype.kind in "iub" and not np.array_equal(array, exact)
    if exact.dtype.kind not in "biuf" or lost or (info.dtype.kind == "f" and not np.isfinite(array).all()):
        raise CalibrationError(f"{place}: not values of {info.dtype}; give a number or nested lists")
    shape = info.shape
    if array.ndim == 0 and shape:
        sizes = [size if isinstance(size, int) else 1 for size in shape]
        limits.check_bytes(
            int(np.prod(sizes, dtype=object)) * info.dtype.itemsize, place, "give fewer values"
        )
        return np.full(sizes, array, info.dtype)
    if shape is not None and (
        array.ndim != len(shape)
        or any(isinstance(w, int) and w != s for s, w in zip(array.shape, shape, strict=True))
    ):
        raise CalibrationError(f"{place}: has shape {list(array.shape)}, the input wants {list(shape)}")
    return array


@dataclass(frozen=True)
class Filled:
    """Samples of ``base`` with the arrays of ``extra`` added to each."""

    base: Dataset
    extra: Feed

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[Sample]:
        for ident, feed in self.base:
            yield ident, {**feed, **self.extra}

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ascending ``positions``."""
        for ident, feed in read_at(self.base, positions):
            yield ident, {**feed, **self.extra}
