"""Latencies side by side: on a busy machine only figures taken in turns can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_BLOCK_S = 0.03


def medians_ms(sessions: Sequence[Any], feed: Mapping[str, np.ndarray], rounds: int) -> list[float]:
    """Median milliseconds per call of every session.

    In every round each session has a block of calls of about 30 ms (one call at least), after calls that do not
    count while the threads of the session before it still spin; every round starts with another session.
    """
    calls = [_calls(session, feed) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(rounds):
        for step in range(len(sessions)):
            index = (turn + step) % len(sessions)
            run = sessions[index].run
            for _ in range(max(1, calls[index] // 4)):
                run(None, feed)
            start = time.perf_counter()
            for _ in range(calls[index]):
                run(None, feed)
            times[index].append((time.perf_counter() - start) / calls[index] * 1e3)
    return [statistics.median(found) for found in times]


def _calls(session: Any, feed: Mapping[str, np.ndarray]) -> int:
    for _ in range(2):
        session.run(None, feed)
    start = time.perf_counter()
    session.run(None, feed)
    return max(1, round(_BLOCK_S / (time.perf_counter() - start)))
