"""Samples from text: a line of a .txt or .jsonl file each, made into token arrays by a tokenizer file."""

from __future__ import annotations

import stat
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from calib.errors import CalibrationError
from calib.readers.access import Selectable
from calib.readers.check import check_feed
from calib.readers.jsonl import JSONL, parse_row
from calib.readers.limits import ReadLimits, label, place_of
from calib.readers.tags import split_tags
from calib.readers.tokens import Encoder, TextSettings, complete
from calib.types import Dataset, Feed, InputInfo, Sample, SampleId

__all__ = ["TEXT_SUFFIXES", "TextSettings", "open_text"]

TEXT_SUFFIXES = (".txt", JSONL)
_NO_TOKENIZER = (
    "text needs the model's tokenizer; give --tokenizer tokenizer.json, or data.text.tokenizer in the recipe"
)


def open_text(
    files: Sequence[Path],
    inputs: Sequence[InputInfo],
    settings: TextSettings | None,
    limit: int | None,
    limits: ReadLimits,
    said: list[str],
) -> Dataset:
    """One sample per line that is not blank; ``said`` gets a line that tells how text became tokens.

    Only where the lines start is kept in memory, 16 bytes each.

    Raises:
        CalibrationError: a file cannot be read, a line is too long, or the tokenizer is missing or damaged.
    """
    encoder = None if settings is None else Encoder(settings, inputs)
    sources: list[_Source] = []
    total = 0
    for path in files:
        if encoder is None and path.suffix.lower() != JSONL:
            raise CalibrationError(f"{label(path)}: {_NO_TOKENIZER}")
        left = None if limit is None else limit - total
        if left == 0:
            break
        starts, numbers = _lines(path, left, limits)
        sources.append(_Source(path, total, starts, numbers))
        total += len(starts)
        limits.check_count(total, label(path))
    if encoder is not None:
        said.append(f"{total} texts from {place_of(files)}: {encoder}")
    return _TextDataset(tuple(sources), tuple(inputs), encoder, total, limits)


@dataclass(frozen=True)
class _Source:
    """A file, the position of its first sample, and offset and number (from 1) of each line that is a sample."""

    path: Path
    first: int
    starts: array[int]
    numbers: array[int]


def _lines(path: Path, limit: int | None, limits: ReadLimits) -> tuple[array[int], array[int]]:
    starts, numbers = array("q"), array("q")
    with _opened(path) as file:
        number = offset = 0
        while line := file.readline(limits.max_line_bytes + 1):
            number += 1
            if len(line) > limits.max_line_bytes:
                raise CalibrationError(
                    f"{label(path)}:{number}: longer than {limits.max_line_bytes:,} bytes; break the line up"
                )
            if line.strip():
                starts.append(offset)
                numbers.append(number)
                limits.check_count(len(starts), label(path))
            offset += len(line)
            if len(starts) == limit:
                break
    return starts, numbers


def _opened(path: Path) -> IO[bytes]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block
            raise CalibrationError(f"{label(path)}: not a regular file; pass .txt or .jsonl files")
        return path.open("rb")
    except OSError as error:
        raise CalibrationError(
            f"{label(path)}: cannot be read ({error.strerror}); check its permissions"
        ) from None


@dataclass(frozen=True)
class _TextDataset(Selectable):
    sources: tuple[_Source, ...]
    inputs: tuple[InputInfo, ...]
    encoder: Encoder | None
    count: int
    limits: ReadLimits

    def __len__(self) -> int:
        return self.count

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ascending ``positions``; other lines are not read."""
        for source in self.sources:
            first = bisect_left(positions, source.first)
            chosen = positions[first : bisect_left(positions, source.first + len(source.starts))]
            if not chosen:
                continue
            with _opened(source.path) as file:
                for position in chosen:
                    yield self._sample(file, source, position)

    def _sample(self, file: IO[bytes], source: _Source, position: int) -> Sample:
        line = position - source.first
        number = source.numbers[line]
        where = f"{label(source.path)}:{number}"
        file.seek(source.starts[line])
        raw = file.readline(self.limits.max_line_bytes + 1)
        try:
            text = raw.decode("utf-8-sig" if source.starts[line] == 0 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        ident = SampleId(position, f"{source.path.name}:{number}")
        row: str | Feed = text
        if source.path.suffix.lower() == JSONL:
            row = parse_row(text, self.inputs, where)
        if isinstance(row, str):
            if self.encoder is None:
                raise CalibrationError(f"{where}: {_NO_TOKENIZER}")
            feed: Feed = self.encoder.encode(row, where)
        else:
            feed, tags = split_tags(row, self.inputs, where)
            ident = replace(ident, tags=tags)
            feed = complete(feed, self.inputs)
        return ident, check_feed(feed, self.inputs, where, "give rows of one sample each")
