"""How far a phase has come: events for whoever shows progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Listener", "Meter", "Progress"]


@dataclass(frozen=True)
class Progress:
    """An event: ``done`` of ``total`` samples of phase ``what``, all but the first ``before`` of them in ``seconds``.

    ``rate`` is in samples per second, ``eta`` in seconds; both None as long as nothing can be said.
    """

    what: str
    done: int
    total: int
    seconds: float = field(default=0.0, compare=False)
    before: int = field(default=0, compare=False)

    @property
    def rate(self) -> float | None:
        mine = self.done - self.before
        return mine / self.seconds if mine > 0 and self.seconds > 0 else None

    @property
    def eta(self) -> float | None:
        return max(self.total - self.done, 0) / self.rate if self.rate else None


Listener = Callable[[Progress], None]


class Meter:
    """Tells a listener, if there is one, how many of ``total`` are done; the clock starts now, with ``before`` done."""

    def __init__(self, what: str, total: int, listener: Listener | None, before: int = 0) -> None:
        self._what, self._total, self._listener = what, total, listener
        self._before, self._started = before, time.monotonic()

    def at(self, done: int) -> None:
        if self._listener is not None:
            seconds = time.monotonic() - self._started
            self._listener(Progress(self._what, done, self._total, seconds, self._before))
