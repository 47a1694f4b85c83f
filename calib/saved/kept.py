"""The few samples that a statistics file keeps, so that ranges can be judged and a result measured without the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from pydantic import Field

from calib.errors import CalibrationError
from calib.readers.limits import size_text
from calib.readers.split import JUDGED, spread
from calib.saved.container import Header
from calib.types import Array, Dataset, Sample, SampleId

__all__ = ["KEPT_BYTES", "Kept", "KeptRows", "keep", "require_kept"]

KEPT_BYTES = 64 << 20
_PLAIN = "biuf"  # what numpy itself can store


@dataclass(frozen=True)
class _Samples:
    """Samples in memory."""

    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


@dataclass(frozen=True)
class Kept:
    """At most 16 calibration samples, at most 16 held-out ones (none: nothing was held out), or why there are none."""

    judged: Dataset = field(default_factory=lambda: _Samples(()))
    held_out: Dataset = field(default_factory=lambda: _Samples(()))
    reason: str = ""

    def merged(self, other: Kept, offset: int) -> Kept:
        """Those of both, again at most 16 of each kind; ``offset`` is added to the sample numbers of ``other``."""
        if self.reason or other.reason:
            return Kept(reason=self.reason or other.reason)
        return Kept(
            _chosen([*self.judged, *_renumbered(other.judged, offset)]),
            _chosen([*self.held_out, *_renumbered(other.held_out, offset)]),
        )

    def rows(self) -> tuple[KeptRows, dict[str, Array]]:
        """The header and the arrays of a statistics file."""
        arrays: dict[str, Array] = {}
        lists: dict[str, tuple[KeptRow, ...]] = {}
        for kind, data in (("judged", self.judged), ("held_out", self.held_out)):
            rows: list[KeptRow] = []
            for sample, feed in data:
                arrays.update({f"{kind}.{len(rows)}.{i}": array for i, array in enumerate(feed.values())})
                rows.append(
                    KeptRow(index=sample.index, name=sample.name, tags=dict(sample.tags), inputs=tuple(feed))
                )
            lists[kind] = tuple(rows)
        return KeptRows(**lists, reason=self.reason), arrays


class KeptRow(Header):
    """One sample: its identity and the names of its inputs, in order."""

    index: int = Field(ge=0)
    name: str
    tags: dict[str, int]
    inputs: tuple[str, ...]


class KeptRows(Header):
    """The kept samples of a statistics file."""

    judged: tuple[KeptRow, ...] = Field(max_length=JUDGED)
    held_out: tuple[KeptRow, ...] = Field(max_length=JUDGED)
    reason: str = ""

    def samples(self, arrays: Mapping[str, Array]) -> Kept:
        """The inverse of `Kept.rows`; KeyError when an array is missing."""
        found = {
            kind: _Samples(
                tuple(
                    (
                        SampleId(row.index, row.name, row.tags),
                        {name: arrays[f"{kind}.{k}.{i}"] for i, name in enumerate(row.inputs)},
                    )
                    for k, row in enumerate(rows)
                )
            )
            for kind, rows in (("judged", self.judged), ("held_out", self.held_out))
        }
        return Kept(**found, reason=self.reason)


def keep(calibration: Dataset, held_out: Dataset | None, limit: int = KEPT_BYTES) -> Kept:
    """Copy what judging and measuring need, unless it takes more than ``limit`` bytes: then none, and the reason."""
    judged: list[Sample] = []
    measured: list[Sample] = []
    parts = [(judged, spread(calibration, JUDGED))]
    if held_out is not None:
        parts.append((measured, spread(held_out, JUDGED)))
    total = 0
    for kept, data in parts:
        for sample, feed in data:
            odd = next((name for name, array in feed.items() if array.dtype.kind not in _PLAIN), None)
            if odd is not None:
                return Kept(reason=f"input '{odd}' is of type {feed[odd].dtype.name}, which is not kept")
            total += sum(array.nbytes for array in feed.values())
            if total > limit:
                return Kept(reason=f"they take more than the {size_text(limit)} allowed")
            kept.append((sample, {name: np.array(array) for name, array in feed.items()}))
    return Kept(_Samples(tuple(judged)), _Samples(tuple(measured)))


def _renumbered(data: Dataset, offset: int) -> Iterator[Sample]:
    for sample, feed in data:
        yield replace(sample, index=sample.index + offset), feed


def _chosen(samples: Sequence[Sample]) -> Dataset:
    return _Samples(tuple(spread(_Samples(tuple(samples)), JUDGED)))


def require_kept(kept: Kept, origin: str) -> None:
    """CalibrationError with the reason when no samples were kept."""
    if len(kept.judged) == 0:
        raise CalibrationError(
            f"{origin} keep no samples, which judging ranges and measuring need "
            f"({kept.reason or 'none were asked for'}); give the samples they were gathered from with --calib"
        )
