"""The few values that travel through calibration: samples, probes, statistics and ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Dataset", "Feed", "InputInfo", "Probe", "Range", "Sample", "SampleId", "Stats"]

Array = NDArray[np.generic]
Feed = Mapping[str, Array]


@dataclass(frozen=True)
class InputInfo:
    """A model input: its name, numpy dtype and declared shape (int = fixed, str or None = dynamic)."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class SampleId:
    """Which sample a feed is: its position in the data, a name for messages, and tags such as ``timestep_idx``."""

    index: int
    name: str = ""
    tags: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name or f"sample {self.index}"


Sample = tuple[SampleId, Feed]


class Dataset(Protocol):
    """A re-iterable collection of samples that never holds more than one of them in memory."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class Probe:
    """One statistic of one tensor: ``kind`` is a key of ``calib.stats.COLLECTORS``."""

    tensor: str
    kind: str
    axis: int | None = None
    options: tuple[tuple[str, float], ...] = ()


class Stats(Protocol):
    """A streaming statistic: bounded in memory, exact to merge in any grouping of the same samples."""

    def update(self, x: Array, sample: SampleId) -> None: ...
    def merge(self, other: Stats) -> None: ...
    def state(self) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Range:
    """A closed interval of real values, float64, 0-d or one entry per channel; ``lo <= hi``."""

    lo: NDArray[np.float64]
    hi: NDArray[np.float64]
