"""Samples from Python: lists, data sets, functions that start afresh, ONNX Runtime calibration readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from calib.errors import CalibrationError
from calib.readers.check import check_feed
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits, check_limit, quoted
from calib.readers.tags import split_tags
from calib.types import Array, Dataset, InputInfo, Sample, SampleId

__all__ = ["from_iterable"]

_RE_ITERABLE = "pass a list, or a function that returns a fresh iterator each time"
_ONE_PER_SAMPLE = "pass one feed per sample, e.g. list(x[:, None])"


@runtime_checkable
class _CalibrationReader(Protocol):
    """What ONNX Runtime calls a CalibrationDataReader, plus the ``rewind`` its examples define."""

    def get_next(self) -> Mapping[str, Array] | None: ...
    def rewind(self) -> None: ...


def from_iterable(
    feeds: Iterable[object] | Callable[[], Iterable[object]] | object,
    inputs: Sequence[InputInfo],
    *,
    limit: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> Dataset:
    """Wrap Python samples as a data set, checked when iterated.

    ``feeds`` is a re-iterable of ``{input: array}`` or ``(SampleId, {input: array})`` (a bare array serves a
    one-input model), a function that returns a fresh iterable, or an object with ``get_next`` and ``rewind``.
    A single mapping or array is one sample. ``limit`` keeps the first samples, so the source may be endless.

    Raises:
        CalibrationError: ``feeds`` can be read only once or is no collection, or (on iteration) it is empty,
            changes its length, is above ``limits``, or a sample does not fit the model's inputs.
    """
    check_limit(limit)
    count = len(feeds) if isinstance(feeds, (list, tuple)) and feeds else None
    if count is not None and limit is not None:
        count = min(count, limit)
    return _FeedDataset(_opener(feeds), tuple(inputs), limit, limits, count)


def _opener(feeds: object) -> Callable[[], Iterator[object]]:
    if isinstance(feeds, type):  # it has the methods of its instances
        return lambda: _fresh(feeds)
    if hasattr(feeds, "get_next"):
        if not isinstance(feeds, _CalibrationReader):
            raise CalibrationError(
                f"calibration data: {_kind(feeds)} has get_next but no rewind; add it, or {_RE_ITERABLE}"
            )
        return lambda: _reader_pass(feeds)
    if isinstance(feeds, (Mapping, np.ndarray)):
        return lambda: iter((feeds,))
    if isinstance(feeds, Iterator):
        raise CalibrationError(f"calibration data: {_kind(feeds)} can be read only once; {_RE_ITERABLE}")
    if isinstance(feeds, (str, bytes)):
        raise CalibrationError(
            f"calibration data: got a {_kind(feeds)}; open files with calib.readers.open_data"
        )
    if isinstance(feeds, Iterable) or hasattr(feeds, "__getitem__"):
        return lambda: iter(cast("Iterable[object]", feeds))
    if callable(feeds):
        return lambda: _fresh(feeds)
    raise CalibrationError(f"calibration data: {_kind(feeds)} is not a collection of samples; {_RE_ITERABLE}")


def _reader_pass(reader: _CalibrationReader) -> Iterator[object]:
    reader.rewind()
    while (feed := reader.get_next()) is not None:
        yield feed


def _fresh(make: Callable[[], Any]) -> Iterator[object]:
    made = make()
    if isinstance(made, _CalibrationReader):
        return _reader_pass(made)
    if isinstance(made, (Mapping, np.ndarray)) or not isinstance(made, Iterable):
        raise CalibrationError(
            f"calibration data: the function returned {_kind(made)}, not an iterable; {_RE_ITERABLE}"
        )
    return iter(made)


def _kind(value: object) -> str:
    return type(value).__name__


class _FeedDataset:
    """Counts its samples on the first full pass, unless told, and holds later passes to that count."""

    def __init__(
        self,
        start: Callable[[], Iterator[object]],
        inputs: tuple[InputInfo, ...],
        limit: int | None,
        limits: ReadLimits,
        count: int | None,
    ) -> None:
        self._start = start
        self._inputs = inputs
        self._limit = limit
        self._limits = limits
        self._count = count

    def __len__(self) -> int:
        if self._count is None:
            for _ in self._items():
                pass
        return self._count or 0

    def __iter__(self) -> Iterator[Sample]:
        for position, item in self._items():
            yield self._sample(position, item)

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ascending ``positions``; the others are neither converted nor checked."""
        if not positions:
            return
        chosen = set(positions)
        for position, item in self._items():
            if position in chosen:
                yield self._sample(position, item)
            if position >= positions[-1]:
                return

    def _items(self) -> Iterator[tuple[int, object]]:
        count = 0
        for item in self._start():
            self._limits.check_count(count + 1, "calibration data")
            yield count, item
            count += 1
            if count == self._limit:
                break
        if count == 0 and self._count is None:
            raise CalibrationError(
                "calibration data: no samples; give at least one feed, or quantize data-free"
            )
        if self._count is not None and self._count != count:
            raise CalibrationError(
                f"calibration data: gave {self._count} samples at first and {count} now; {_RE_ITERABLE}"
            )
        self._count = count

    def _sample(self, position: int, item: object) -> Sample:
        ident, feed = SampleId(position), item
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], SampleId):
            ident, feed = item
        if not isinstance(feed, Mapping):
            if len(self._inputs) != 1:
                names = quoted(info.name for info in self._inputs)
                raise CalibrationError(
                    f"{ident}: got {_kind(feed)}, expected {{input: array}} with inputs {names}"
                )
            feed = {self._inputs[0].name: feed}
        arrays = {str(name): self._array(value, f"{ident}: {name!r}") for name, value in feed.items()}
        nbytes = sum(array.nbytes for array in arrays.values())
        self._limits.check_bytes(nbytes, str(ident), _ONE_PER_SAMPLE)
        fed, tags = split_tags(arrays, self._inputs, str(ident))
        if tags:
            ident = replace(ident, tags={**ident.tags, **tags})
        return ident, check_feed(fed, self._inputs, str(ident), _ONE_PER_SAMPLE)

    @staticmethod
    def _array(value: object, place: str) -> Array:
        # Lists and numbers carry no dtype of their own; guessing one is how int64 reaches a float32 model.
        if not isinstance(value, (np.ndarray, np.generic)) and not hasattr(value, "__array__"):
            raise CalibrationError(
                f"{place} is {_kind(value)}, not an array; wrap it in numpy.asarray(x, dtype=...)"
            )
        return np.asarray(value)
