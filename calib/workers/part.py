"""A part of a sweep: some samples, for some time, in whichever process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from calib.model import Model
from calib.progress import Listener, Progress
from calib.provider import SessionOptions
from calib.readers import subset
from calib.runner import collect
from calib.types import Dataset, Probe, Sample, Stats

__all__ = ["Collect", "Crew", "Here", "Part", "Slice", "Stopped", "merged"]


class Collect(Protocol):
    """Serves all probes in one process; `calib.runner.collect` and its block-wise form."""

    def __call__(
        self,
        model: Model,
        probes: Sequence[Probe],
        data: Dataset,
        *,
        device: str,
        options: SessionOptions,
        listener: Listener | None,
    ) -> dict[Probe, Stats]: ...


@dataclass(frozen=True)
class Part:
    """The statistics of the samples at ``positions``."""

    positions: list[int]
    stats: dict[Probe, Stats]


def merged(parts: Sequence[Part]) -> Part:
    """All samples of ``parts``, at least one, in one; the statistics of the first take in those of the others."""
    first, *others = parts
    for part in others:
        for probe, stat in first.stats.items():
            stat.merge(part.stats[probe])
    return Part(sorted(p for part in parts for p in part.positions), first.stats)


class Stopped(Exception):
    """The sweep was called off between two samples."""


@dataclass
class Slice:
    """The samples of ``data`` at ``positions``, as many as are begun within ``seconds``, at least one.

    The first pass decides how many that are (``done``); later ones give the same samples.
    """

    data: Dataset
    positions: Sequence[int]
    seconds: float = float("inf")
    stopped: Callable[[], bool] = lambda: False
    done: list[int] | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.positions if self.done is None else self.done)

    def __iter__(self) -> Iterator[Sample]:
        if self.done is not None:
            yield from subset(self.data, self.done)
            return
        end, done = time.monotonic() + self.seconds, []
        for position, sample in zip(self.positions, subset(self.data, self.positions), strict=True):
            if self.stopped():
                raise Stopped
            yield sample
            done.append(position)
            if time.monotonic() >= end:
                break
        self.done = done

    def part(self, stats: dict[Probe, Stats]) -> Part:
        """What one sweep over this slice gave."""
        return Part(list(self.positions) if self.done is None else self.done, stats)


class Crew(Protocol):
    """Who does the work: `round` serves the probes on some of the remaining samples."""

    def round(self, probes: Sequence[Probe], positions: Sequence[int], seconds: float) -> list[Part]:
        """Statistics of samples at ``positions``, of all or of those begun within ``seconds``."""


@dataclass(frozen=True)
class Here:
    """This process does it."""

    model: Model
    data: Dataset
    device: str
    options: SessionOptions
    listener: Listener | None
    collect: Collect = collect

    def round(self, probes: Sequence[Probe], positions: Sequence[int], seconds: float) -> list[Part]:
        """As `Crew.round`, one part."""
        part = Slice(self.data, positions, seconds)
        before, total = len(self.data) - len(positions), len(self.data)

        def report(event: Progress) -> None:
            times = event.total // len(positions)  # a sample is run once for each sweep or block
            done = before * times
            if self.listener is not None:
                self.listener(replace(event, done=done + event.done, total=total * times, before=done))

        return [
            part.part(
                self.collect(
                    self.model, probes, part, device=self.device, options=self.options, listener=report
                )
            )
        ]
