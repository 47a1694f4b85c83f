"""Parts of a data set: the first n samples, and samples held out to measure the result on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from calib.errors import CalibrationError
from calib.types import Dataset, Sample

__all__ = ["MeasuredOn", "Selectable", "split_held_out", "take"]

MeasuredOn = Literal["held-out", "calibration"]

_EVERY = 8
_MOST_HELD_OUT = 16


@runtime_checkable
class Selectable(Protocol):
    """A data set that can skip samples without decoding them."""

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at the ascending ``positions``."""


@dataclass(frozen=True)
class _Subset:
    """The samples of ``base`` at ascending ``positions``; they keep the ids they have in ``base``."""

    base: Dataset
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Sample]:
        return self.read(range(len(self.positions)))

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        wanted = [self.positions[position] for position in positions]
        if isinstance(self.base, Selectable):
            yield from self.base.read(wanted)
            return
        if not wanted:
            return
        chosen = set(wanted)
        for position, sample in enumerate(self.base):
            if position in chosen:
                yield sample
            if position >= wanted[-1]:
                return


def take(data: Dataset, n: int) -> Dataset:
    """The first ``n`` samples of ``data``, or all of them when there are fewer.

    Raises:
        CalibrationError: ``n`` is below 1.
    """
    if n < 1:
        raise CalibrationError(f"--samples {n}: must be at least 1")
    return data if n >= len(data) else _Subset(data, range(n))


def split_held_out(data: Dataset) -> tuple[Dataset, Dataset, MeasuredOn]:
    """Split into (calibration samples, evaluation samples, what a measurement on the latter may claim).

    Every 8th sample is held out (positions 7, 15, ...); above 128 samples the 16 held out are spread evenly:
    position floor((k + 1) * n / 16) - 1. With fewer than 8 samples both parts are all of ``data``.
    """
    count = len(data)
    if count < _EVERY:
        return data, data, "calibration"
    if count > _EVERY * _MOST_HELD_OUT:
        held = [(k + 1) * count // _MOST_HELD_OUT - 1 for k in range(_MOST_HELD_OUT)]
    else:
        held = list(range(_EVERY - 1, count, _EVERY))
    chosen = set(held)
    kept = [position for position in range(count) if position not in chosen]
    return _Subset(data, kept), _Subset(data, held), "held-out"
