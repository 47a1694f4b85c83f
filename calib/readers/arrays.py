"""Samples in .npz and .npy files, one in memory at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calib.errors import CalibrationError
from calib.readers.access import Selectable
from calib.readers.archive import is_npz, open_members
from calib.readers.check import check_feed
from calib.readers.limits import ReadLimits, label
from calib.readers.npy import read_array, read_end
from calib.readers.stacked import count_rows, read_rows
from calib.readers.tags import split_tags
from calib.types import Array, Dataset, Feed, InputInfo, Sample, SampleId

__all__ = ["open_arrays"]

_STACK_CURE = "if the first axis runs over samples, pass --stacked"


def open_arrays(
    files: Sequence[Path], inputs: Sequence[InputInfo], stacked: bool, limit: int | None, limits: ReadLimits
) -> Dataset:
    """The samples of the files in order: one of each file, or ``stacked`` along the first axis of its arrays.

    Raises:
        CalibrationError: stacked arrays disagree, or (on iteration) a file is damaged, too large, or does not fit.
    """
    sources: list[_Source] = []
    total = 0
    for path in files:
        sources.append(_Source(path, total, count_rows(path, limits) if stacked else None))
        total += sources[-1].count
        if limit is not None and total >= limit:
            total = limit
            break
    return _FileDataset(tuple(sources), tuple(inputs), total, limits)


@dataclass(frozen=True)
class _Source:
    """A file, the position of its first sample, and how many are stacked in it (None: it is one sample)."""

    path: Path
    start: int
    rows: int | None

    @property
    def count(self) -> int:
        return 1 if self.rows is None else self.rows


@dataclass(frozen=True)
class _FileDataset(Selectable):
    sources: tuple[_Source, ...]
    inputs: tuple[InputInfo, ...]
    count: int
    limits: ReadLimits

    def __len__(self) -> int:
        return self.count

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ascending ``positions``; files without one are not opened."""
        for source in self.sources:
            first = bisect_left(positions, source.start)
            last = bisect_left(positions, source.start + source.count)
            chosen = positions[first:last]
            if not chosen:
                continue
            if source.rows is None:
                yield self._sample(SampleId(source.start, source.path.name), source, self._whole(source.path))
                continue
            rows = [position - source.start for position in chosen]
            for row, arrays in zip(rows, read_rows(source.path, rows, self.limits), strict=True):
                yield self._sample(SampleId(source.start + row, f"{source.path.name}[{row}]"), source, arrays)

    def _whole(self, path: Path) -> dict[str, Array]:
        with open_members(path, self.limits) as members:
            nbytes = sum(member.header.nbytes for member in members.values())
            self.limits.check_bytes(nbytes, label(path), _STACK_CURE + ", else make it smaller")
            arrays: dict[str, Array] = {}
            for name, member in members.items():
                header = member.header
                shape = header.shape[::-1] if header.fortran else header.shape
                array = read_array(member.stream, header.dtype, shape, member.where)
                read_end(member.stream, member.where)
                arrays[name] = array.T if header.fortran else array
            return arrays

    def _sample(self, ident: SampleId, source: _Source, arrays: Feed) -> Sample:
        row = "" if source.rows is None else f"[{ident.index - source.start}]"
        where = label(source.path) + row
        arrays, tags = split_tags(arrays, self.inputs, where)
        if tags:
            ident = replace(ident, tags=tags)
        if len(self.inputs) == 1 and len(arrays) == 1:
            arrays = {self.inputs[0].name: next(iter(arrays.values()))}
        elif not is_npz(source.path):
            names = ", ".join(repr(info.name) for info in self.inputs) or "none"
            raise CalibrationError(
                f"{where}: an .npy holds one array, but the model's inputs are {names}; "
                "save an .npz with an array of each name"
            )
        cure = (
            _STACK_CURE
            if source.rows is None
            else "the model's first dimension is fixed, stack whole inputs as files"
        )
        return ident, check_feed(arrays, self.inputs, where, cure)
