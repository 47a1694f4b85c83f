"""What a step works with: the float graph, the data, and the two things that run a model: collect and evaluate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from calib.blocks.blockwise import Blockwise, run_blockwise
from calib.blocks.memory import release_memory
from calib.blocks.spool import Spool
from calib.gathering import Gathering, gather
from calib.model import Model
from calib.progress import Listener
from calib.provider import SessionOptions, create_session
from calib.readers import spread
from calib.runner import run_session, tap
from calib.saved.kept import require_kept
from calib.saved.store import Statistics
from calib.sweep.lanes import in_lanes, lanes_for
from calib.types import Array, Dataset, Feed, Probe, Sample, Stats
from onnxslim_ptq.core.qmath import sqnr_db
from onnxslim_ptq.core.spec import QParams, QuantPlan, WeightCodes
from onnxslim_ptq.core.spooled import SpooledCodes
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.export.simulation import Simulation, simulate
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Judge", "Workspace", "judged_tensors"]

# Functions that saturate: an output behind one hides errors, so the value before it is judged as well.
_SATURATING = frozenset({"Softmax", "Sigmoid", "LogSoftmax", "HardSigmoid", "Tanh"})
_TRANSPARENT = frozenset({"Identity", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Transpose"})
_AT_ONCE = 1 << 20  # elements compared in float64 at a time


@dataclass
class Workspace:
    """The state a recipe's steps share.

    ``gathering`` is how statistics are gathered; ``recorded`` are those of an earlier run, used instead; ``record``
    takes down what is gathered. With a ``spool`` memory is short: codes lie in files, and the model runs in blocks.
    ``synthetic``: the samples are random, so statistics of them say little about real inputs.
    """

    graph: Graph
    target: Target
    calibration: Dataset
    device: str = "cpu"
    threads: int = 0
    reduce_range: bool = False
    listener: Listener | None = None
    memo: dict[tuple[Probe, int], Stats] = field(default_factory=dict)
    version: int = 0
    gathering: Gathering = field(default_factory=Gathering)
    recorded: Statistics | None = None
    record: Statistics | None = None
    spool: Spool | None = None
    synthetic: bool = False

    def codes(self) -> dict[str, WeightCodes]:
        """An empty table for a plan's weight codes."""
        return {} if self.spool is None else SpooledCodes(self.spool.keep)

    @property
    def samples(self) -> int:
        """How many samples the statistics are of: all of ``calibration``, or more when only some of them were kept."""
        return self.recorded.samples if self.recorded is not None else len(self.calibration)

    def model(self) -> Model:
        """The float graph as it is now."""
        return self.graph.to_model()

    def changed(self) -> None:
        """To be called after the float graph was edited: statistics gathered before no longer count."""
        self.version += 1
        self.memo.clear()

    def collect(self, probes: Iterable[Probe]) -> dict[Probe, Stats]:
        """The statistics of every probe, from one sweep over what is not known yet."""
        wanted = list(dict.fromkeys(probes))
        missing = [p for p in wanted if (p, self.version) not in self.memo]
        if missing:
            self.memo.update({(p, self.version): s for p, s in self._found(missing).items()})
        return {p: self.memo[p, self.version] for p in wanted}

    def _found(self, probes: Sequence[Probe]) -> Mapping[Probe, Stats]:
        model = self.model()
        if self.recorded is not None:
            return self.recorded.find(model.sha256, probes)
        found = gather(
            model,
            probes,
            self.calibration,
            device=self.device,
            # More lanes would be faster and take more memory.
            options=SessionOptions(threads=self.threads, lanes=1),
            listener=self.listener,
            how=self.gathering,
        )
        release_memory()
        if self.record is not None:
            self.record.add(model.sha256, found)
        return found

    def forget(self, probes: Iterable[Probe]) -> None:
        """Free statistics that nobody needs again."""
        for probe in probes:
            self.memo.pop((probe, self.version), None)

    def part(self, samples: int) -> Workspace:
        """The same graph with only some of the samples (at most 16), spread over all of them, held in memory."""
        few = self._few(samples)
        return replace(
            self, calibration=few, memo={}, listener=None, gathering=Gathering(), recorded=None, record=None
        )

    def values(self, tensors: Iterable[str], samples: int) -> list[dict[str, Array]]:
        """What the float graph computes for ``tensors`` on some calibration samples (at most 16), inputs too."""
        model, names = self.model(), list(tensors)
        given = {i.name for i in model.proto.graph.input}
        made = [name for name in names if name not in given]
        session = create_session(
            tap(model, made).SerializeToString(), model.weights, options=SessionOptions(threads=self.threads)
        )
        runs = [(feed, run_session(session, made, feed, sample)) for sample, feed in self._few(samples)]
        return [
            {**dict(zip(made, found, strict=True)), **{name: feed[name] for name in names if name in given}}
            for feed, found in runs
        ]

    def judge(self, plan: QuantPlan, samples: int, exact: Model) -> Judge:
        """A judge of activation numbers for ``plan`` against the outputs of the float model ``exact``."""
        few = self._few(samples)
        if self.spool is None:
            return Judge(exact, simulate(self.model(), plan), few, self.threads)
        simulation = simulate(self.model(), plan, self.spool.keep)
        blocks = self.gathering.blockwise or Blockwise()
        return BlockwiseJudge(exact, simulation, few, self.threads, self.spool, blocks.memory)

    def _few(self, samples: int) -> list[Sample]:
        if self.recorded is not None and not len(self.calibration):
            require_kept(self.recorded.kept, self.recorded.origin)
        return list(spread(self.calibration, samples))


class Judge:
    """Scores candidate numbers by the error of the model's outputs, all in one simulating session."""

    def __init__(self, model: Model, simulation: Simulation, samples: Sequence[Sample], threads: int) -> None:
        self._simulation, self._samples = simulation, samples
        self._judged = judged_tensors(model)
        names = list(self._judged)
        release_memory()
        self._lanes, options = lanes_for(SessionOptions(threads=threads, simulate=True), "cpu")
        plain = create_session(tap(model, names).SerializeToString(), model.weights, options=options)
        run = partial(_run, plain, names)
        self._reference = list(in_lanes(samples, run, self._lanes))
        del plain, run  # their memory serves the simulating session
        release_memory()
        simulated = simulation.model
        self._session = create_session(
            tap(simulated, names).SerializeToString(), simulated.weights, options=options
        )

    def score(self, params: Mapping[str, QParams], more: Feed | None = None) -> float:
        """-10 log10 of the mean noise-to-signal ratio of the judged tensors (SQNR capped at 100 dB), over all samples.

        Outputs of one family (`Judged`) count as one: a language model's logits must not be outvoted by sixty caches.
        ``more`` feeds the other inputs that the simulation was given, where it has some.
        """
        extra = {**self._simulation.feed(params), **(more or {})}
        signal, noise = np.sum(list(self._energies(extra)), axis=0)
        families: dict[str, list[float]] = {}
        for judged, s, n in zip(self._judged.values(), signal, noise, strict=True):
            sqnr = sqnr_db(float(s), float(n))
            if sqnr is not None:
                known = -100.0 if np.isnan(sqnr) else min(sqnr, 100.0)
                families.setdefault(judged.family, []).append(10 ** (-known / 10))
        # The mean of the noise, not of the dB: the worst count most.
        ratios = [float(np.mean(family)) for family in families.values()]
        return float(-10 * np.log10(np.mean(ratios))) if ratios else 0.0

    def _energies(self, extra: Feed) -> Iterator[NDArray[np.float64]]:
        """For every sample, in order: signal and noise of each judged tensor, [2, tensors]."""

        def of(index: int) -> NDArray[np.float64]:
            sample, feed = self._samples[index]
            seen = run_session(self._session, list(self._judged), {**feed, **extra}, sample)
            return self._energy(index, seen)

        return in_lanes(range(len(self._samples)), of, self._lanes)

    def _energy(self, index: int, seen: Sequence[Array]) -> NDArray[np.float64]:
        total = np.zeros((2, len(self._judged)))
        triples = zip(self._reference[index], seen, self._judged.values(), strict=True)
        for i, (y, z, judged) in enumerate(triples):
            for a, b in _parts(y, z, judged.axis):
                finite = np.isfinite(a)  # elsewhere the float model itself has no answer
                a, b = a[finite], b[finite]
                total[:, i] += a @ a, (a - b) @ (a - b)
        return total


class BlockwiseJudge(Judge):
    """The same scores for a model larger than memory: float and simulated model run block after block."""

    def __init__(
        self,
        model: Model,
        simulation: Simulation,
        samples: Sequence[Sample],
        threads: int,
        spool: Spool,
        memory: int | None,
    ) -> None:
        self._simulation, self._samples = simulation, samples
        self._judged = judged_tensors(model)
        self._options, self._spool, self._memory = (
            SessionOptions(threads=threads, simulate=True),
            spool,
            memory,
        )
        self._reference = [[spool.keep(v) for v in values] for values in self._run(model, samples)]

    def _energies(self, extra: Feed) -> Iterator[NDArray[np.float64]]:
        answers = self._run(self._simulation.model, [(s, {**feed, **extra}) for s, feed in self._samples])
        for index, seen in enumerate(answers):
            yield self._energy(index, seen)

    def _run(self, model: Model, samples: Sequence[Sample]) -> Iterator[list[Array]]:
        names = list(self._judged)
        answers = run_blockwise(
            model, samples, names, options=self._options, memory=self._memory, folder=self._spool.folder
        )
        for _, values in answers:
            yield [values[n] for n in names]


def _run(session: object, names: Sequence[str], item: Sample) -> list[Array]:
    sample, feed = item
    return run_session(session, names, feed, sample)


def _parts(
    exact: object, seen: object, axis: int | None
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Float values in float64, a part at a time; along ``axis``, of a Softmax, without their mean, which it ignores."""
    if not (isinstance(exact, np.ndarray) and exact.dtype.kind == "f" and exact.size):
        return  # an output may be of integers, a sequence or a map
    assert isinstance(seen, np.ndarray)
    last = exact.ndim - 1 if axis is None else axis
    width = 1 if axis is None else exact.shape[axis]
    ys, zs = (
        np.moveaxis(v, last, -1).reshape(-1, width) if v.ndim else v.reshape(1, 1) for v in (exact, seen)
    )
    rows = max(_AT_ONCE // width, 1)
    for start in range(0, len(ys), rows):
        pair = [v[start : start + rows].astype(np.float64) for v in (ys, zs)]
        if axis is not None:
            with np.errstate(invalid="ignore"):  # a mean of infinities is NaN, which is passed over
                pair = [v - v.mean(axis=1, keepdims=True) for v in pair]
        yield pair[0].reshape(-1), pair[1].reshape(-1)


@dataclass(frozen=True)
class Judged:
    """How a tensor is judged: without its mean along ``axis`` where a Softmax reads it, together with its family.

    Outputs whose names differ in numbers alone are one family, such as ``present.0.key`` and ``present.29.key``.
    """

    axis: int | None
    family: str


def judged_tensors(model: Model) -> dict[str, Judged]:
    """The model's outputs, each one behind a saturating function replaced by what that function reads.

    A saturated output hides errors: two classes at 0.999 and 0.001 look right until the logits have moved far.
    """
    producers = {o: n for n in model.proto.graph.node for o in n.output}
    judged: dict[str, Judged] = {}
    for output in model.proto.graph.output:
        family = re.sub(r"\d+", "#", output.name)
        node = producers.get(output.name)
        while node is not None and node.op_type in _TRANSPARENT:
            node = producers.get(node.input[0])
        if node is not None and node.op_type in _SATURATING and node.input[0] in producers:
            axis = next((int(a.i) for a in node.attribute if a.name == "axis"), -1)
            normalized = node.op_type in ("Softmax", "LogSoftmax")
            judged[node.input[0]] = Judged(axis if normalized else None, family)
        else:
            judged[output.name] = Judged(None, family)
    return judged
