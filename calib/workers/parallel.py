"""Several processes share the samples of a sweep; their statistics are merged."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from calib.blocks.spool import Spool
from calib.errors import CalibrationError
from calib.model import Model, open_model
from calib.provider import SessionOptions
from calib.readers import subset
from calib.runner import Listener, Progress, collect
from calib.types import Dataset, Probe, Sample, Stats
from calib.workers.part import Part, Slice, Stopped

__all__ = ["Processes", "is_portable", "shards", "write_for_workers"]

_AHEAD = 2  # samples that wait for each worker when this process reads them
_TICK = 0.1  # seconds between two looks at the workers
_PORTABLE_BYTES = 1 << 20  # a data set that takes more is its samples, not the way to them
_DIED = (
    "a worker process died (out of memory, or killed); use fewer --workers. In a Python script the call must stand "
    'under `if __name__ == "__main__":`'
)


def is_portable(data: Dataset) -> bool:
    """Whether another process can open the data by itself (files, synthetic samples), or must be fed."""
    try:
        ForkingPickler(_Little(), 5).dump(data)
    except Exception:  # whatever a user's object raises when it cannot travel
        return False
    return True


class _Little(io.RawIOBase):
    """Takes what a small object needs and refuses more."""

    def __init__(self) -> None:
        self._room = _PORTABLE_BYTES

    def write(self, piece: Any) -> int:
        size = memoryview(piece).nbytes
        self._room -= size
        if self._room < 0:
            raise OverflowError
        return size


def shards(positions: Sequence[int], count: int) -> list[list[int]]:
    """Cut ``positions`` into at most ``count`` consecutive parts of nearly equal length."""
    parts = np.array_split(np.asarray(positions, np.int64), max(1, min(count, len(positions))))
    return [part.tolist() for part in parts]


def write_for_workers(model: Model, folder: Path) -> Path:
    """Write the model with its weights beside it, where every worker maps the same pages; returns its path."""
    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    path = folder / "model.onnx"
    try:
        with (folder / "weights.bin").open("wb") as file:
            for tensor in proto.graph.initializer:
                values = model.weights.get(tensor.name)
                if values is None:
                    continue
                file.write(bytes(-file.tell() % 64))
                del tensor.external_data[:]
                place = {"location": "weights.bin", "offset": file.tell(), "length": values.nbytes}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                little = np.asarray(values, values.dtype.newbyteorder("<"), order="C")
                file.write(little.reshape(-1).view(np.uint8).data)
        path.write_bytes(proto.SerializeToString())
    except OSError as error:
        raise CalibrationError(
            f"the model cannot be written for workers to '{folder}' ({error.strerror}); free the disk there, or "
            "point TMPDIR to another"
        ) from None
    return path


class Processes:
    """``count`` worker processes, started afresh (spawn); each opens the model by its path and a shard of the data.

    Data that lives in this process is read here and handed to whichever worker is free. Use it in a ``with`` block.
    """

    def __init__(
        self,
        count: int,
        model: Model,
        data: Dataset,
        device: str,
        options: SessionOptions,
        listener: Listener | None,
    ) -> None:
        self._count, self._data, self._listener = count, data, listener
        self._portable = is_portable(data)
        context = mp.get_context("spawn")
        self._stop, self._ticks = context.Event(), context.Queue()
        self._fed = context.Queue(maxsize=_AHEAD * count)
        self._spool = Spool().__enter__()
        try:
            path = write_for_workers(model, self._spool.folder)
        except BaseException:
            self._spool.close()
            raise
        given = data if self._portable else None
        setup = (str(path), given, device, options, self._stop, self._ticks, self._fed)
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=setup)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        self._drain()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for channel in (self._ticks, self._fed):
            channel.cancel_join_thread()
            channel.close()
        self._spool.close()

    def round(self, probes: Sequence[Probe], positions: Sequence[int], seconds: float) -> list[Part]:
        """As `Crew.round`, one part per worker; CalibrationError when one dies."""
        before = len(self._data) - len(positions)
        try:
            if self._portable:
                parts = shards(positions, self._count)
                futures = [self._pool.submit(_own_samples, list(probes), part, seconds) for part in parts]
                self._watch(futures, before)
            else:
                futures = [self._pool.submit(_fed_samples, list(probes)) for _ in range(self._count)]
                self._feed(futures, positions, seconds, before)
            return [part for part in (future.result() for future in futures) if part.positions]
        except BrokenProcessPool:
            raise CalibrationError(_DIED) from None

    def _watch(self, futures: Sequence[Future[Part]], before: int) -> None:
        """Report progress until all are done; the first error ends the wait."""
        done = before
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=_TICK, return_when="FIRST_EXCEPTION")
            for future in finished:
                future.result()
            done = self._report(done)
        self._report(done)

    def _report(self, done: int) -> int:
        ticks = self._drain()
        if ticks and self._listener is not None:
            self._listener(Progress("calibrating", done + ticks, len(self._data)))
        return done + ticks

    def _drain(self) -> int:
        ticks = 0
        while True:
            try:
                ticks += self._ticks.get_nowait()
            except queue.Empty:
                return ticks

    def _feed(
        self, futures: Sequence[Future[Part]], positions: Sequence[int], seconds: float, before: int
    ) -> None:
        end, done = time.monotonic() + seconds, before
        for position, sample in zip(positions, subset(self._data, positions), strict=True):
            self._hand((position, sample), futures)
            done = self._report(done)
            if time.monotonic() >= end:
                break
        for _ in futures:
            self._hand(None, futures)
        self._watch(futures, done)

    def _hand(self, item: tuple[int, Sample] | None, futures: Sequence[Future[Part]]) -> None:
        """Put one item before the workers, unless one of them has failed."""
        while True:
            for future in futures:
                if future.done():
                    future.result()
            try:
                self._fed.put(item, timeout=_TICK)
                return
            except queue.Full:
                continue


@dataclass(frozen=True)
class _Worker:
    """What a worker process holds between two tasks."""

    model: Model
    data: Dataset | None
    device: str
    options: SessionOptions
    stop: Any
    ticks: Any
    fed: Any

    def serve(self, probes: Sequence[Probe], data: Dataset) -> dict[Probe, Stats]:
        return collect(
            self.model, probes, data, device=self.device, options=self.options, listener=self._tick
        )

    def _tick(self, event: Progress) -> None:
        self.ticks.put(1)


_worker: _Worker | None = None  # of this process, made by `_start`


def _start(
    path: str, data: Dataset | None, device: str, options: SessionOptions, stop: Any, ticks: Any, fed: Any
) -> None:
    """Runs first in a worker process."""
    global _worker  # the one way a process pool hands state to its tasks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which says stop
    threading.Thread(target=_end_with_parent, args=(Path(path).parent,), daemon=True).start()
    _worker = _Worker(open_model(Path(path)), data, device, options, stop, ticks, fed)


def _end_with_parent(folder: Path) -> None:
    """A killed parent must leave neither workers nor the model's copy behind."""
    parent = mp.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _own_samples(probes: list[Probe], positions: list[int], seconds: float) -> Part:
    assert _worker is not None
    assert _worker.data is not None
    part = Slice(_worker.data, positions, seconds, _worker.stop.is_set)
    return part.part(_worker.serve(probes, part))


def _fed_samples(probes: list[Probe]) -> Part:
    assert _worker is not None
    data = _Fed(_worker)
    # Without a sample there is nothing to serve: there are fewer of them than workers.
    return Part(data.positions, _worker.serve(probes, data) if len(data) else {})


class _Fed:
    """The samples that the parent hands to this worker, until it says that there are no more; read once."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker
        self.positions: list[int] = []
        self._next = self._take()

    def __len__(self) -> int:
        return len(self.positions) + int(self._next is not None)

    def __iter__(self) -> Iterator[Sample]:
        while self._next is not None:
            position, sample = self._next
            yield sample
            self.positions.append(position)
            self._next = self._take()

    def _take(self) -> tuple[int, Sample] | None:
        while not self._worker.stop.is_set():
            try:
                item: tuple[int, Sample] | None = self._worker.fed.get(timeout=_TICK)
                return item
            except queue.Empty:
                continue
        raise Stopped
