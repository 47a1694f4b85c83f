"""Compares the speed of two models on the CPU of this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from calib.model import Model
from calib.provider import SessionOptions, create_session
from calib.types import Array, Feed
from onnxslim_ptq.export.exchange import Exchange

__all__ = ["Latency", "measure_latency"]

_ROUNDS, _SECONDS = 31, 4.0  # how many, and when to stop earlier
_SHORTEST = 0.01  # seconds of one round: shorter runs are repeated


@dataclass(frozen=True)
class Latency:
    """Median milliseconds per run of one sample, both sessions taking turns."""

    exact_ms: float
    quantized_ms: float
    rounds: int

    @property
    def speedup(self) -> float:
        return self.exact_ms / self.quantized_ms

    def as_json(self) -> dict[str, float]:
        return {
            "float_ms": self.exact_ms,
            "quantized_ms": self.quantized_ms,
            "speedup": self.speedup,
            "rounds": self.rounds,
        }


def measure_latency(exact: Model, quantized: Model, feed: Feed, threads: int = 0) -> Latency:
    """Median time of both models on one sample; they take turns, so that a busy machine slows both alike."""
    options = SessionOptions(threads=threads)
    sessions = [
        create_session(m.proto.SerializeToString(), m.weights, options=options) for m in (exact, quantized)
    ]
    feeds = [dict(feed), dict(Exchange.of(quantized).feed(feed))]
    pairs = list(zip(sessions, feeds, strict=True))
    slowest = max(_seconds(session, arrays, 3) for session, arrays in pairs)  # warms up, too
    runs = max(1, min(100, int(_SHORTEST / slowest)))
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) < _ROUNDS and (len(times[0]) < 3 or time.perf_counter() - begin < _SECONDS):
        for (session, arrays), spent in zip(pairs, times, strict=True):
            spent.append(_seconds(session, arrays, runs) * 1e3)
    return Latency(statistics.median(times[0]), statistics.median(times[1]), len(times[0]))


def _seconds(session: Any, feed: dict[str, Array], runs: int) -> float:
    """Mean seconds per run."""
    start = time.perf_counter()
    for _ in range(runs):
        session.run(None, feed)
    return (time.perf_counter() - start) / runs
