"""Parts of a data set: the first n samples, and samples held out to measure the result on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calib.errors import CalibrationError
from calib.readers.access import Selectable, read_at
from calib.types import Dataset, Sample

__all__ = ["JUDGED", "MeasuredOn", "split_held_out", "spread", "subset", "take"]

MeasuredOn = Literal["held-out", "calibration"]

_EVERY = 8
_MOST_HELD_OUT = 16
JUDGED = 16  # samples that anything but a statistic may look at


@dataclass(frozen=True)
class _Subset(Selectable):
    """The samples of ``base`` at ascending ``positions``; they keep the ids they have in ``base``."""

    base: Dataset
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ascending ``positions``."""
        yield from read_at(self.base, [self.positions[position] for position in positions])


def take(data: Dataset, n: int) -> Dataset:
    """The first ``n`` samples of ``data``, or all of them when there are fewer.

    Raises:
        CalibrationError: ``n`` is below 1.
    """
    if n < 1:
        raise CalibrationError(f"--samples {n}: must be at least 1")
    return data if n >= len(data) else _Subset(data, range(n))


def subset(data: Dataset, positions: Sequence[int]) -> Dataset:
    """The samples of ``data`` at ascending ``positions``; they keep the ids they have in ``data``."""
    return _Subset(data, positions)


def spread(data: Dataset, count: int) -> Dataset:
    """At most ``count`` samples, chosen from at most `JUDGED` that are spread over all of ``data``.

    The choice among those is the same whether ``data`` is everything or only those: they can be kept in its place.
    """
    total = len(data)
    pool = np.linspace(0, total - 1, JUDGED).astype(int) if total > JUDGED else np.arange(total)
    if count < len(pool):
        pool = pool[np.linspace(0, len(pool) - 1, count).astype(int)]
    return _Subset(data, pool.tolist())


def split_held_out(data: Dataset, tag: str | None = None) -> tuple[Dataset, Dataset, MeasuredOn]:
    """Split into (calibration samples, evaluation samples, what a measurement on the latter may claim).

    Every 8th sample is held out (positions 7, 15, ...); above 128 samples the 16 held out are spread evenly:
    position floor((k + 1) * n / 16) - 1. With fewer than 8 samples both parts are all of ``data``.

    ``tag``: no sample is held out whose value of that tag no other sample keeps (reads the data once).
    """
    count = len(data)
    if count < _EVERY:
        return data, data, "calibration"
    if count > _EVERY * _MOST_HELD_OUT:
        held = [(k + 1) * count // _MOST_HELD_OUT - 1 for k in range(_MOST_HELD_OUT)]
    else:
        held = list(range(_EVERY - 1, count, _EVERY))
    if tag is not None:
        held = _replaceable(data, held, tag)
        if not held:
            return data, data, "calibration"
    chosen = set(held)
    kept = [position for position in range(count) if position not in chosen]
    return _Subset(data, kept), _Subset(data, held), "held-out"


def _replaceable(data: Dataset, held: Sequence[int], tag: str) -> list[int]:
    """Those of the positions ``held`` whose tag a sample outside them has."""
    tags = [sample.tags.get(tag) for sample, _ in data]
    chosen = set(held)
    left = {value for position, value in enumerate(tags) if position not in chosen}
    return [position for position in held if tags[position] in left]
