"""Runs a model larger than memory: block after block over all samples, what crosses between them waiting on the disk.

Peak memory is one block (its weights, one sample's values) plus the statistics, whatever the size of the model and
the number of samples; each weight is read from the disk once per sweep. Kernels, optimization level and threads are
those of the whole model, so values differ at most where a cut keeps ONNX Runtime from fusing two nodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from calib.blocks.cut import Block, Layout, extract, find_cuts
from calib.blocks.memory import available_memory, release_memory
from calib.blocks.spool import Spool
from calib.errors import CalibrationError
from calib.model import Model, to_array
from calib.progress import Listener, Meter
from calib.provider import SessionOptions, create_session
from calib.runner import run_session
from calib.stats import COLLECTORS
from calib.types import Dataset, Feed, Probe, SampleId, Stats

__all__ = ["Blockwise", "collect_blockwise", "needs_blocks", "run_blockwise"]

_UNKNOWN = 1 << 31  # what to plan with where the system does not tell how much memory there is
_SHARE = 2  # a block may take 1/2 of the memory, the rest is for statistics and for what the estimate misses
_LEAST_SHARE = 8  # and 1/8 of it when statistics take more: cuts in many places break ONNX Runtime's fusions
_STATE = {
    "histogram": 650_000
}  # bytes of a statistic; the others are small or bounded by whoever asks for them
_WHOLE = 4  # times the model's bytes that working on it whole takes (docs/calibration-data.md)
_LOOKED_AT = 4  # samples from whose largest the sizes of values are estimated
Taken = Callable[[str, Any, int, SampleId], None]  # name, values, number of the sample, sample


@dataclass(frozen=True)
class Blockwise:
    """``memory``: bytes that may be taken, None for what is available; ``folder``: where to spool, None for a temporary
    one."""

    memory: int | None = None
    folder: Path | None = None


def needs_blocks(model: Model) -> bool:
    """Whether working on the whole model would take more memory than there is; False where that is unknown."""
    available = available_memory()
    return available is not None and _WHOLE * model.nbytes > available


def collect_blockwise(
    model: Model,
    probes: Sequence[Probe],
    data: Dataset,
    *,
    device: str = "cpu",
    options: SessionOptions = SessionOptions(),
    listener: Listener | None = None,
    memory: int | None = None,
    folder: Path | None = None,
) -> dict[Probe, Stats]:
    """`calib.runner.collect` for a model larger than memory: the same statistics, gathered block after block.

    ``memory``: bytes that may be taken, default what is available; ``folder``: where the spool is made. Raises what
    `collect` raises, and CalibrationError when the disk refuses or the data changes between two blocks.
    """
    stats = {probe: COLLECTORS[probe.kind](probe) for probe in probes}
    by_tensor: dict[str, list[Stats]] = {}
    for probe, stat in stats.items():
        by_tensor.setdefault(probe.tensor, []).append(stat)

    def update(name: str, values: Any, number: int, sample: SampleId) -> None:
        for stat in by_tensor[name]:
            stat.update(values, sample)

    budget = _budget(memory, sum(_STATE.get(p.kind, 0) for p in probes))
    with Spool(folder) as spool:
        sweep = _Sweep(
            model, list(by_tensor), data, spool, update, budget, device, options, listener, "calibrating"
        )
        sweep.run()
    return stats


def run_blockwise(
    model: Model,
    data: Dataset,
    outputs: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    options: SessionOptions = SessionOptions(),
    listener: Listener | None = None,
    memory: int | None = None,
    folder: Path | None = None,
) -> Iterator[tuple[SampleId, Mapping[str, Any]]]:
    """Yield the named values (default: the model's outputs) sample by sample, computed block after block.

    All samples are computed before the first is handed out; values wait on the disk and are views of it.
    """
    wanted = list(outputs) if outputs is not None else [o.name for o in model.proto.graph.output]
    with Spool(folder) as spool:

        def keep(name: str, values: Any, number: int, sample: SampleId) -> None:
            spool.put(("out", name, number), values)

        sweep = _Sweep(
            model, wanted, data, spool, keep, _budget(memory, 0), device, options, listener, "running"
        )
        for number, sample in enumerate(sweep.run()):
            keys = {name: ("out", name, number) for name in wanted}
            yield sample, {name: spool.get(key) for name, key in keys.items()}
            for key in keys.values():
                spool.drop(key)


def _budget(memory: int | None, state: int) -> int:
    """Bytes for one block, rounded down to a power of two: a little more or less memory gives the same cuts."""
    found = memory if memory is not None else available_memory()
    found = _UNKNOWN if found is None else found
    left = max((found - state) // _SHARE, found // _LEAST_SHARE, 1)
    return 1 << (left.bit_length() - 1)


@dataclass
class _Sweep:
    """One pass of the data through the model; every wanted value of every sample is handed to ``take``."""

    model: Model
    wanted: Sequence[str]
    data: Dataset
    spool: Spool
    take: Taken
    budget: int
    device: str
    options: SessionOptions
    listener: Listener | None
    what: str

    def run(self) -> list[SampleId]:
        """Run every block over every sample; returns the samples."""
        layout = Layout(self.model, self.wanted, _shapes(self.data))
        known = layout.inputs | layout.constants | layout.made.keys()
        if lost := [n for n in self.wanted if n not in known]:
            raise CalibrationError(f"the model has no value '{lost[0]}'; name one that its nodes make")
        blocks = layout.blocks(find_cuts(layout, self.budget))
        last = {name: place for place, block in enumerate(blocks) for name in block.reads}
        samples: list[SampleId] = []
        meter = Meter(self.what, len(blocks) * len(self.data), self.listener)
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for place, block in enumerate(blocks):
                ends = {n for n in block.reads if last[n] == place and n not in layout.inputs}
                part = _Part(layout, block, self, pool, ends)
                fed = place == 0 or not layout.inputs.isdisjoint(block.reads)
                found = []
                for number, (sample, feed) in enumerate(self.data if fed else [(s, {}) for s in samples]):
                    if place == 0:
                        self._take_constant(layout, number, sample, feed)
                    part.run(number, sample, feed)
                    found.append(sample)
                    meter.at(place * len(self.data) + number + 1)
                del part  # before the next one is made
                release_memory()
                samples = samples or found
                if len(found) != len(samples):
                    raise CalibrationError(
                        f"the data gave {len(samples)} samples, then {len(found)}; give data that is the same each time"
                    )
        if not samples:
            raise CalibrationError("the calibration data holds no samples; give at least one")
        return samples

    def _take_constant(self, layout: Layout, number: int, sample: SampleId, feed: Feed) -> None:
        """Wanted values that no node makes: graph inputs and, in odd models, initializers."""
        tensors = {t.name: t for t in self.model.proto.graph.initializer}
        for name in self.wanted:
            if name in layout.inputs:
                self.take(name, feed[name], number, sample)
            elif name in layout.constants:
                self.take(name, to_array(tensors[name], self.model.weights), number, sample)


class _Part:
    """A block with its session, which is gone when the block is."""

    def __init__(
        self, layout: Layout, block: Block, sweep: _Sweep, pool: ThreadPoolExecutor, ends: set[str]
    ) -> None:
        made = {o for at in block.nodes for o in layout.model.proto.graph.node[at].output}
        self._watched = [n for n in dict.fromkeys(sweep.wanted) if n in made]
        self._outputs = list(dict.fromkeys([*self._watched, *block.leaves]))
        self._inputs, self._block, self._sweep, self._pool, self._ends = (
            layout.inputs,
            block,
            sweep,
            pool,
            ends,
        )
        model = extract(layout, block, self._outputs)
        self._session = (
            create_session(
                model.proto.SerializeToString(),
                model.weights,
                device=sweep.device,
                options=replace(sweep.options, frugal=True),
            )
            if self._outputs
            else None
        )

    def run(self, number: int, sample: SampleId, feed: Feed) -> None:
        """Run one sample: what was asked for is handed on, what later blocks read is spooled."""
        spool, take = self._sweep.spool, self._sweep.take
        if self._session is not None:
            inputs = {n: feed[n] if n in self._inputs else spool.get((n, number)) for n in self._block.reads}
            found = run_session(self._session, self._outputs, inputs, sample)
            values = dict(zip(self._outputs, found, strict=True))
            for name in self._block.leaves:
                spool.put((name, number), values[name])
            jobs = [self._pool.submit(take, n, values[n], number, sample) for n in self._watched]
            for job in jobs:
                job.result()
        for name in self._ends:
            spool.drop((name, number))


def _shapes(data: Dataset) -> dict[str, tuple[int, ...]]:
    """The input shapes of the largest of the first samples."""
    feeds = [feed for _, feed in islice(data, _LOOKED_AT)]
    largest = max(feeds, key=lambda feed: sum(v.nbytes for v in feed.values()), default={})
    return {name: tuple(values.shape) for name, values in largest.items()}
