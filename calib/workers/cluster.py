"""Ray actors share the samples of a sweep, on this machine or on many; their statistics are merged."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any

import onnx

from calib.errors import CalibrationError, QuantizationError
from calib.model import Model
from calib.progress import Listener, Meter, Progress
from calib.provider import SessionOptions
from calib.runner import collect, sweeps_of
from calib.saved.store import State, revived
from calib.types import Array, Dataset, Probe
from calib.workers.luggage import is_portable
from calib.workers.parallel import shards
from calib.workers.part import Part, Slice

__all__ = ["LOCAL", "RayActors"]

LOCAL = "local"
_SECONDS = 10.0  # to wait for a cluster to answer
_TICK = 0.5  # seconds between two looks at the actors


class RayActors:
    """``count`` Ray actors (default: one per CPU of the cluster, divided by the threads of a session).

    ``address``: as ``ray.init`` takes it; ``local`` starts a cluster on this machine that ends with the ``with``
    block. The model travels through Ray's object store, the data by its path, which every node must see. A Ray that
    is initialized already is used as it is.

    Raises:
        CalibrationError: Ray is not installed, the cluster cannot be reached, or the data lives in this process.
    """

    def __init__(
        self,
        address: str,
        count: int,
        model: Model,
        data: Dataset,
        device: str,
        options: SessionOptions,
        listener: Listener | None,
    ) -> None:
        self._ray = _ray()
        if not is_portable(data):
            raise CalibrationError(
                "Ray workers read the samples themselves, and these live in this process; give paths of files that "
                "every node sees, or use --workers without --ray"
            )
        self._model, self._data, self._listener = model, data, listener
        self._started = _connect(self._ray, address, count)
        try:
            threads = max(1, options.threads)
            count = count or max(1, int(self._ray.cluster_resources().get("CPU", 1)) // threads)
            # Two at a time: to work, and to tell how far it is.
            actor = self._ray.remote(_Actor).options(num_cpus=threads, max_concurrency=2)
            proto = self._ray.put(model.proto.SerializeToString())
            weights = self._ray.put(dict(model.weights))
            self._actors = [actor.remote(proto, weights, data, device, options) for _ in range(count)]
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> RayActors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in getattr(self, "_actors", ()):
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def round(self, probes: Sequence[Probe], positions: Sequence[int], seconds: float) -> list[Part]:
        """As `Crew.round`, one part per actor; CalibrationError when an actor or its node is lost."""
        parts = shards(positions, len(self._actors))
        waiting = [
            actor.serve.remote(list(probes), part, seconds)
            for actor, part in zip(self._actors, parts, strict=False)
        ]
        found: list[Part] = []
        times = len(sweeps_of(self._model, probes))
        before = (len(self._data) - len(positions)) * times
        meter, done = Meter("calibrating", len(self._data) * times, self._listener, before), before
        while waiting:
            ready, waiting = self._ray.wait(waiting, timeout=_TICK)
            found += [self._result(reference) for reference in ready]
            told = before + sum(self._asked(actor.done.remote()) for actor in self._actors[: len(parts)])
            if told > done:
                done = told
                meter.at(done)
        return found

    def _asked(self, reference: Any) -> int:
        """How many samples an actor has run; 0 while it does not answer, its errors being those of its work."""
        try:
            return int(self._ray.get(reference, timeout=_TICK))
        except self._ray.exceptions.RayError:
            return 0

    def _result(self, reference: Any) -> Part:
        try:
            positions, states = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, QuantizationError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise CalibrationError(
                f"a Ray worker was lost ({' '.join(str(error).split())[:200]}); see its log, then run again "
                "(--resume keeps what was done)"
            ) from None
        # As states: what Ray hands out lies in its store and is read-only.
        return Part(positions, {probe: revived(probe, state) for probe, state in states.items()})


class _Actor:
    """Runs in a Ray worker: a session's model and the way to the data."""

    def __init__(
        self,
        proto: bytes,
        weights: Mapping[str, Array],
        data: Dataset,
        device: str,
        options: SessionOptions,
    ) -> None:
        self._model = Model(onnx.ModelProto.FromString(proto), dict(weights), None, len(proto))
        self._data, self._device, self._options = data, device, options
        self._done = 0

    def done(self) -> int:
        """How many samples of the present part were run, once for each sweep."""
        return self._done

    def _tick(self, event: Progress) -> None:
        self._done = event.done

    def serve(
        self, probes: list[Probe], positions: list[int], seconds: float
    ) -> tuple[list[int], dict[Probe, State]]:
        part = Slice(self._data, positions, seconds)
        self._done = 0
        found = part.part(
            collect(
                self._model,
                probes,
                part,
                device=self._device,
                options=self._options,
                listener=self._tick,
            )
        )
        return found.positions, {probe: stat.state() for probe, stat in found.stats.items()}


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise CalibrationError(
            f"Ray is not installed ({error}); pip install 'onnxslim_ptq[ray]', or use --workers without --ray"
        ) from None


def _knock(address: str) -> None:
    """OSError when nobody listens at ``host:port``; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()


def _connect(ray: ModuleType, address: str, count: int) -> bool:
    """Connect unless that was done; returns whether a connection is ours to close."""
    if ray.is_initialized():
        return False
    try:
        _knock(address)
        if address == LOCAL:
            ray.init(
                num_cpus=count or None, include_dashboard=False, log_to_driver=False, logging_level="error"
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray raises many classes here; their text is what the user needs
        text = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"--ray {address}: no connection ({text}); give the address of a running cluster, or 'local'"
        ) from None
    return True
