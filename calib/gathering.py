"""Statistics of a model over data: in this process or in many, block-wise or whole, from the start or from where a
killed run stopped. None of that changes the values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from calib.blocks.blockwise import Blockwise, collect_blockwise, needs_blocks
from calib.errors import CalibrationError
from calib.model import Model
from calib.progress import Listener
from calib.provider import SessionOptions, require_device
from calib.readers import fingerprint
from calib.runner import collect
from calib.saved.identity import conditions
from calib.saved.progress import Resume, SweepKey, SweepProgress
from calib.types import Dataset, Probe, Stats
from calib.workers.cluster import RayActors
from calib.workers.parallel import Processes
from calib.workers.part import Crew, Here, merged

__all__ = ["WORKER_THREADS", "Gathering", "gather"]

WORKER_THREADS = (
    1  # of a worker's session when nobody says otherwise: whatever the number of workers, the same values
)
_SHARE = 20  # at most 1/20 of the time goes into starting anew and writing progress


@dataclass(frozen=True)
class Gathering:
    """How the work is done.

    ``workers``: processes of this machine, or Ray actors with ``ray`` (an address, or ``local``); None: this process.
    ``blockwise``: block after block; None: when the model is too large for the memory there is. ``resume``: where
    progress is kept.
    """

    workers: int | None = None
    ray: str | None = None
    blockwise: Blockwise | None = None
    resume: Resume | None = None

    @property
    def shared(self) -> bool:
        """Whether other processes do the work."""
        return self.workers is not None or self.ray is not None

    def options(self, given: SessionOptions) -> SessionOptions:
        """The session options of a sweep: a fixed number of threads where workers share it."""
        return replace(given, threads=WORKER_THREADS) if self.shared and given.threads == 0 else given


def gather(
    model: Model,
    probes: Sequence[Probe],
    data: Dataset,
    *,
    device: str = "cpu",
    options: SessionOptions = SessionOptions(),
    listener: Listener | None = None,
    how: Gathering = Gathering(),
) -> dict[Probe, Stats]:
    """The statistic of each probe over all samples of ``data``; see `calib.runner.collect`.

    Statistics merge exactly, so neither the number of workers nor an interruption shows in them; what workers run
    uses `WORKER_THREADS` threads unless ``options`` says otherwise.

    Raises:
        CalibrationError: what `collect` raises; or a worker died, Ray is not there, or the progress to resume is of
            another run.
        DeviceError: the device is not there.
    """
    require_device(device)
    options = how.options(options)
    if len(data) == 0:
        raise CalibrationError("the calibration data holds no samples; give at least one")
    if how.resume is None:
        progress, rest = None, list(range(len(data)))
    else:
        progress = _progress(how.resume, model, probes, data, device, options)
        rest = [p for p in range(len(data)) if p not in progress.done]
    if progress is not None and not rest:
        return progress.stats
    with _crew(how, model, data, device, options, listener) as crew:
        if progress is None:
            return merged(crew.round(probes, rest, float("inf"))).stats
        assert how.resume is not None
        _in_blocks(crew, probes, rest, progress, how.resume.every)
    return progress.stats


def _progress(
    resume: Resume,
    model: Model,
    probes: Sequence[Probe],
    data: Dataset,
    device: str,
    options: SessionOptions,
) -> SweepProgress:
    key = SweepKey(
        model=resume.model,
        graph=model.sha256,
        data=resume.data or fingerprint(data),
        conditions=conditions(device, options),
    )
    return SweepProgress(resume, key, probes)


def _in_blocks(
    crew: Crew, probes: Sequence[Probe], rest: list[int], progress: SweepProgress, every: float
) -> None:
    """Rounds of ``every`` seconds, each one written down; longer ones where that costs more than 1/20 of the time."""
    seconds = every
    while rest:
        start = time.monotonic()
        for part in crew.round(probes, rest, seconds):
            progress.add(part.positions, part.stats)
        rest = [p for p in rest if p not in progress.done]
        progress.save()
        overhead = time.monotonic() - start - seconds
        if every > 0:
            seconds = max(every, _SHARE * overhead)


@contextmanager
def _crew(
    how: Gathering,
    model: Model,
    data: Dataset,
    device: str,
    options: SessionOptions,
    listener: Listener | None,
) -> Iterator[Crew]:
    if how.blockwise is not None and how.shared:
        raise CalibrationError(
            "block-wise calibration runs in one process; leave out --workers and --ray, or --blockwise"
        )
    if how.ray is not None:
        with RayActors(how.ray, how.workers or 0, model, data, device, options, listener) as actors:
            yield actors
    elif how.workers is not None and how.workers > 1:
        with Processes(how.workers, model, data, device, options, listener) as processes:
            yield processes
    elif how.blockwise is not None or (not how.shared and needs_blocks(model)):
        blocks = how.blockwise or Blockwise()
        one = partial(collect_blockwise, memory=blocks.memory, folder=blocks.folder)
        yield Here(model, data, device, options, listener, one)
    else:
        yield Here(model, data, device, options, listener, collect)
