"""Files whose first axis runs over samples, read one row at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from calib.errors import CalibrationError
from calib.readers.archive import UNNAMED, Member, is_npz, open_members
from calib.readers.limits import ReadLimits, label
from calib.readers.npy import Header, read_array, read_end
from calib.types import Array

__all__ = ["count_rows", "read_rows"]

_CHUNK = 1 << 20


def count_rows(path: Path, limits: ReadLimits) -> int:
    """The number of samples stacked in a file, from its headers alone.

    Raises:
        CalibrationError: an array has no first axis, or the arrays disagree about its length.
    """
    with open_members(path, limits) as members:
        return _agreed_rows(members, path, limits)


def read_rows(path: Path, rows: Sequence[int], limits: ReadLimits) -> Iterator[dict[str, Array]]:
    """Yield ``{array name: row}`` for ascending ``rows``; each row keeps a leading axis of 1.

    An .npy is memory-mapped; an .npz is decompressed as a stream. Neither holds more than one row.

    Raises:
        CalibrationError: the file is damaged, changed since it was opened, or a row is too large.
    """
    with open_members(path, limits) as members:
        count = _agreed_rows(members, path, limits)
        if rows and rows[-1] >= count:
            raise CalibrationError(
                f"{label(path)}: now holds {count} samples, fewer than when opened; do not change it"
            )
        if not is_npz(path):
            yield from _mapped_rows(path, members[UNNAMED].header, rows)
            return
        position = 0
        for row in rows:
            yield {name: _stream_row(member, row - position) for name, member in members.items()}
            position = row + 1
        if position == count:
            for member in members.values():
                read_end(member.stream, member.where)


def _agreed_rows(members: dict[str, Member], path: Path, limits: ReadLimits) -> int:
    counts: dict[str, int] = {}
    for name, member in members.items():
        header = member.header
        if not header.shape:
            raise CalibrationError(
                f"{member.where} is a scalar; with --stacked its first axis must run over samples"
            )
        if header.fortran and is_npz(path) and len(header.shape) > 1:
            raise CalibrationError(
                f"{member.where} is in Fortran order, which cannot be read row by row; "
                "save numpy.ascontiguousarray(x)"
            )
        counts[name] = header.shape[0]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise CalibrationError(
            f"{label(path)}: arrays disagree about the number of samples ({listed}); make them equal"
        )
    row_bytes = sum(_row_bytes(member.header) for member in members.values())
    limits.check_bytes(row_bytes, label(path), "make the samples smaller")
    return next(iter(counts.values()))


def _row_bytes(header: Header) -> int:
    return math.prod(header.shape[1:]) * header.dtype.itemsize


def _mapped_rows(path: Path, header: Header, rows: Sequence[int]) -> Iterator[dict[str, Array]]:
    if header.nbytes == 0:
        stack: Array = np.empty(header.shape, header.dtype)
    else:
        order = "F" if header.fortran else "C"
        stack = np.memmap(path, header.dtype, "r", header.offset, header.shape, order)  # type: ignore[call-overload]
    for row in rows:
        # A copy, so that a kept sample does not keep the whole mapping alive.
        yield {UNNAMED: np.array(stack[row : row + 1], order="C", subok=False)}


def _stream_row(member: Member, skipped: int) -> Array:
    header = member.header
    _discard(member.stream, skipped * _row_bytes(header))
    return read_array(member.stream, header.dtype, (1, *header.shape[1:]), member.where)


def _discard(stream: IO[bytes], nbytes: int) -> None:
    while nbytes > 0:
        chunk = stream.read(min(_CHUNK, nbytes))
        if not chunk:
            return  # the read that follows reports the early end
        nbytes -= len(chunk)
