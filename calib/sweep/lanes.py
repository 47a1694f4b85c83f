"""Runs samples side by side: two runs of one thread each keep two cores busier than one run of two threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from calib.provider import SessionOptions, runtime
from calib.types import Array, Feed

__all__ = ["in_lanes", "lanes_for", "values_of"]

_MOST = 4  # each lane holds a sample's values
_NUMPY = {"tensor(float)": "<f4", "tensor(double)": "<f8", "tensor(float16)": "<f2"}
T = TypeVar("T")
R = TypeVar("R")


def lanes_for(options: SessionOptions, device: str) -> tuple[int, SessionOptions]:
    """How many samples run at once, and the options of the session they share.

    ``options.threads`` (0: one per core) is the number for all lanes together. A device other than the CPU runs one.
    """
    if device != "cpu":
        return 1, options
    threads = options.threads or _cores()
    lanes = min(options.lanes or threads, threads, _MOST)
    return lanes, replace(options, threads=threads // lanes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_lanes(items: Iterable[T], work: Callable[[T], R], lanes: int) -> Iterator[R]:
    """Yield ``work(item)`` in order; at most ``lanes`` items are in hand at any time.

    The first failure, in the order of the items, is raised; what was not begun by then is not begun.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=lanes, thread_name_prefix="calib") as pool:
        try:
            running: deque[Future[R]] = deque(pool.submit(work, item) for item in islice(source, lanes))
            while running:
                yield running.popleft().result()
                running.extend(pool.submit(work, item) for item in islice(source, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def values_of(session: Any, names: Sequence[str], feed: Feed) -> list[Array]:
    """The outputs ``names``, floating-point ones as read-only views of ONNX Runtime's memory instead of copies.

    A view keeps its memory until it is dropped. Raises what ONNX Runtime raises.
    """
    run = getattr(session, "run_with_ort_values", None)
    if run is None or not all(value.dtype.kind in "fiub" for value in feed.values()):
        copied: list[Array] = session.run(list(names), dict(feed))
        return copied
    make = runtime().OrtValue.ortvalue_from_numpy
    fed = {name: make(np.ascontiguousarray(value)) for name, value in feed.items()}
    return [_view(value) for value in run(list(names), fed)]


def _view(value: Any) -> Array:
    kind = _NUMPY.get(value.data_type()) if value.is_tensor() else None
    shape = tuple(value.shape()) if kind is not None else ()
    if kind is None or 0 in shape or value.device_name() != "cpu":
        copied: Array = value.numpy() if value.is_tensor() else value
        return copied
    return np.asarray(_Shared(value, {"data": (value.data_ptr(), True), "shape": shape, "typestr": kind}))


class _Shared:
    """Owns the value for as long as an array refers to it."""

    def __init__(self, value: Any, described: Mapping[str, object]) -> None:
        self._value = value
        self.__array_interface__ = {"version": 3, **described}
