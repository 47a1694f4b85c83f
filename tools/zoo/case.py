"""What a zoo entry is, and the one way in which it can be missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")
Feed = dict[str, np.ndarray]
Outputs = Sequence[np.ndarray]
Score = Callable[[Iterable[Outputs]], dict[str, float]]
Losses = Callable[[int, Outputs], np.ndarray]


class ZooUnavailable(Exception):
    """A model or data set cannot be had here; tests skip with this one-line text."""

    def __init__(self, what: str, why: str, cure: str) -> None:
        super().__init__(" ".join(f"{what}: {why}; {cure}".split()))


@dataclass(frozen=True)
class Case:
    """One float model with the data to calibrate it and the labels to judge it.

    ``losses``: of an evaluation sample, by its number, one for each prediction; for models whose metric is their mean.
    """

    name: str
    model: Path
    calibration: Sequence[Feed]
    evaluation: Sequence[Feed]
    score: Score
    latency_feed: Feed
    losses: Losses | None = None


class Lazy(Sequence[T], Generic[T]):
    """A sequence that makes each item when asked, so that large data sets never sit in memory whole."""

    def __init__(self, indices: Iterable[int], make: Callable[[int], T]) -> None:
        self._indices = list(indices)
        self._make = make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy[T]: ...
    def __getitem__(self, index: int | slice) -> T | Lazy[T]:
        if isinstance(index, slice):
            return Lazy(self._indices[index], self._make)
        return self._make(self._indices[index])

    def __iter__(self) -> Iterator[T]:
        return (self._make(index) for index in self._indices)
