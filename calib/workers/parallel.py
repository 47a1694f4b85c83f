"""Several processes share the samples of a sweep; their statistics are merged."""

from __future__ import annotations

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
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from calib.blocks.spool import Spool
from calib.errors import CalibrationError
from calib.model import Model, open_model
from calib.progress import Listener, Meter, Progress
from calib.provider import SessionOptions
from calib.readers import subset
from calib.runner import collect, sweeps_of
from calib.types import Dataset, Probe, Sample, Stats
from calib.workers.luggage import is_portable, write_for_workers
from calib.workers.part import Part, Slice, Stopped, merged

__all__ = ["Processes", "shards"]

_AHEAD = 2  # samples that wait for each worker when this process reads them
_TICK = 0.1  # seconds between two looks at the workers
_DIED = (
    "a worker process died (out of memory, or killed); use fewer --workers. In a Python script the call must stand "
    'under `if __name__ == "__main__":`'
)


def shards(positions: Sequence[int], count: int) -> list[list[int]]:
    """Cut ``positions`` into at most ``count`` consecutive parts of nearly equal length."""
    parts = np.array_split(np.asarray(positions, np.int64), max(1, min(count, len(positions))))
    return [part.tolist() for part in parts]


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
        self._count, self._model, self._data, self._listener = count, model, data, listener
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
        sweeps = sweeps_of(self._model, probes)
        before = (len(self._data) - len(positions)) * len(sweeps)
        meter = Meter("calibrating", len(self._data) * len(sweeps), self._listener, before)
        try:
            if not self._portable:
                return [self._handed_out(sweeps, positions, seconds, meter, before)]
            parts = shards(positions, self._count)
            futures = [self._pool.submit(_own_samples, list(probes), part, seconds) for part in parts]
            self._watch(futures, meter, before)
            return _seen(futures)
        except BrokenProcessPool:
            raise CalibrationError(_DIED) from None

    def _handed_out(
        self,
        sweeps: Sequence[list[Probe]],
        positions: Sequence[int],
        seconds: float,
        meter: Meter,
        done: int,
    ) -> Part:
        """Hand the samples out once for every sweep; the first one decides how many ``seconds`` allow."""
        stats: dict[Probe, Stats] = {}
        for group in sweeps:
            futures = [self._pool.submit(_fed_samples, group) for _ in range(self._count)]
            done = self._feed(futures, positions, seconds, meter, done)
            part = merged(_seen(futures))
            stats |= part.stats
            positions, seconds = part.positions, float("inf")
        return Part(list(positions), stats)

    def _watch(self, futures: Sequence[Future[Part]], meter: Meter, done: int) -> int:
        """Report progress until all are done; the first error ends the wait. Returns how many are done."""
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=_TICK, return_when="FIRST_EXCEPTION")
            for future in finished:
                future.result()
            done = self._report(meter, done)
        return self._report(meter, done)

    def _report(self, meter: Meter, done: int) -> int:
        ticks = self._drain()
        if ticks:
            meter.at(done + ticks)
        return done + ticks

    def _drain(self) -> int:
        ticks = 0
        while True:
            try:
                ticks += self._ticks.get_nowait()
            except queue.Empty:
                return ticks

    def _feed(
        self,
        futures: Sequence[Future[Part]],
        positions: Sequence[int],
        seconds: float,
        meter: Meter,
        done: int,
    ) -> int:
        end = time.monotonic() + seconds
        for position, sample in zip(positions, subset(self._data, positions), strict=True):
            self._hand((position, sample), futures)
            done = self._report(meter, done)
            if time.monotonic() >= end:
                break
        for _ in futures:
            self._hand(None, futures)
        return self._watch(futures, meter, done)

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


def _seen(futures: Sequence[Future[Part]]) -> list[Part]:
    """The parts of those that had samples."""
    return [part for part in (future.result() for future in futures) if part.positions]


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

    def serve(self, probes: Sequence[Probe], data: Dataset, *, once: bool = False) -> dict[Probe, Stats]:
        return collect(
            self.model,
            probes,
            data,
            device=self.device,
            options=self.options,
            listener=self._tick,
            once=once,
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
    return Part(data.positions, _worker.serve(probes, data, once=True) if len(data) else {})


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
