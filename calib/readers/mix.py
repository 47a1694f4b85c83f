"""Several data sets as one: one after another, or shuffled by a seed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from calib.readers.access import Selectable, read_at
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits
from calib.readers.split import take
from calib.types import Dataset, Sample

__all__ = ["chain", "mix"]


def mix(sets: Sequence[tuple[Dataset, int | None]], shuffle: int | None = None) -> Dataset:
    """``(data, count)`` pairs as one data set: ``count`` samples of each, or all.

    Without ``shuffle`` the first ones, one set after another. With it, ones chosen at random, in random order,
    both from ``numpy.random.default_rng`` of the seed; each sample is then read on its own.
    """
    if shuffle is None:
        return chain([data if count is None else take(data, count) for data, count in sets])
    order: list[int] = []
    start = 0
    for number, (data, count) in enumerate(sets):
        chosen = np.random.default_rng((shuffle, number)).permutation(len(data))[:count]
        order += [start + int(position) for position in chosen]
        start += len(data)
    mixed = np.random.default_rng(shuffle).permutation(len(order))
    return _Shuffled(chain([data for data, _ in sets]), tuple(order[int(place)] for place in mixed))


def chain(parts: Sequence[Dataset], limits: ReadLimits = DEFAULT_LIMITS) -> Dataset:
    """The parts one after another, numbered through.

    Raises:
        CalibrationError: together they hold too many samples.
    """
    if len(parts) == 1:
        return parts[0]
    ends = tuple(accumulate(len(part) for part in parts))
    limits.check_count(ends[-1] if ends else 0, "calibration data")
    return _Chain(tuple(parts), ends)


@dataclass(frozen=True)
class _Chain(Selectable):
    parts: tuple[Dataset, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ascending ``positions``; parts without one are not read."""
        start = 0
        for part, end in zip(self.parts, self.ends, strict=True):
            chosen = positions[bisect_left(positions, start) : bisect_left(positions, end)]
            local = [position - start for position in chosen]
            if local:
                for position, (ident, feed) in zip(chosen, read_at(part, local), strict=True):
                    yield replace(ident, index=position), feed
            start = end


@dataclass(frozen=True)
class _Shuffled(Selectable):
    """Sample i is the sample ``order[i]`` of ``base``."""

    base: Dataset
    order: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.order)

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ``positions``, each read on its own."""
        for position in positions:
            for ident, feed in read_at(self.base, [self.order[position]]):
                yield replace(ident, index=position), feed
