"""Some samples of a data set, without decoding the others where the data set can skip them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from calib.types import Dataset, Sample

__all__ = ["Selectable", "read_at"]


@runtime_checkable
class Selectable(Protocol):
    """A data set that can skip samples without decoding them; those that derive from it are read whole by `read`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]:
        return self.read(range(len(self)))

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at the ascending ``positions``."""
        ...


def read_at(data: Dataset, positions: Sequence[int]) -> Iterator[Sample]:
    """Yield the samples at the ascending ``positions`` of ``data``."""
    if isinstance(data, Selectable):
        yield from data.read(positions)
        return
    if not positions:
        return
    chosen = set(positions)
    for position, sample in enumerate(data):
        if position in chosen:
            yield sample
        if position >= positions[-1]:
            return
