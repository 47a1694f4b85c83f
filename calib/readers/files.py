"""Samples from folders, .npz and .npy files, one in memory at a time."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.errors import CalibrationError
from calib.readers.archive import is_npz, open_members
from calib.readers.check import check_feed
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits, check_limit, label
from calib.readers.npy import read_array, read_end
from calib.readers.stacked import count_rows, read_rows
from calib.types import Array, Dataset, Feed, InputInfo, Sample, SampleId

__all__ = ["open_data"]

_SUFFIXES = (".npy", ".npz")
_STACK_CURE = "if the first axis runs over samples, pass --stacked"


def open_data(
    paths: Sequence[Path],
    inputs: Sequence[InputInfo],
    *,
    stacked: bool = False,
    limit: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> Dataset:
    """Open calibration files as one data set; samples are read and checked when iterated.

    A folder gives one sample per .npz or .npy file, sorted by name; hidden files are ignored. An .npz is one
    sample, its arrays named like the model's inputs; one array serves a one-input model whatever its name.
    ``stacked``: the first axis of each array runs over samples, and each sample keeps a leading axis of 1.
    ``limit`` keeps the first samples only.

    Raises:
        CalibrationError: a path is missing or no sample file, there are no or too many samples, or (on
            iteration) a file is damaged, too large, or does not fit the model's inputs.
    """
    check_limit(limit)
    sources: list[_Source] = []
    total = 0
    for path in (file for given in paths for file in _sample_files(Path(given), limits)):
        source = _Source(path, total, count_rows(path, limits) if stacked else None)
        sources.append(source)
        total += source.count
        if limit is not None and total >= limit:
            total = limit
            break
    where = ", ".join(label(Path(path)) for path in paths) or "--calib"
    limits.check_count(total, where)
    if total == 0:
        raise CalibrationError(f"{where}: no samples; give a folder of .npz or .npy files, or such a file")
    return _FileDataset(tuple(sources), tuple(inputs), total, limits)


def _sample_files(path: Path, limits: ReadLimits) -> list[Path]:
    if not path.exists():
        raise CalibrationError(
            f"{label(path)}: no such file or folder; check the path given to --calib or --eval"
        )
    if not path.is_dir():
        return [_checked_suffix(path)]
    names: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    names.append(entry.name)
                    limits.check_count(len(names), label(path))
    except OSError as error:
        raise CalibrationError(
            f"{label(path)}: cannot be listed ({error.strerror}); check its permissions"
        ) from None
    return [_checked_suffix(path / name) for name in sorted(names)]


def _checked_suffix(path: Path) -> Path:
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise CalibrationError(f"{label(path)}: not a sample file (.npz or .npy); remove or convert it")
    return path


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
class _FileDataset:
    sources: tuple[_Source, ...]
    inputs: tuple[InputInfo, ...]
    count: int
    limits: ReadLimits

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return self.read(range(self.count))

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
