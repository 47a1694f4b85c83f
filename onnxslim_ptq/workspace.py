"""What a step works with: the float graph, the data, and the two things that run a model: collect and evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calib.model import Model
from calib.provider import SessionOptions, create_session
from calib.readers import take
from calib.runner import Listener, collect, run_session, tap
from calib.types import Array, Dataset, Probe, Sample, Stats
from onnxslim_ptq.core.qmath import sqnr_db
from onnxslim_ptq.core.spec import QParams, QuantPlan
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.export.simulation import Simulation, simulate
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Workspace", "judged_tensors"]

# Functions that saturate: an output behind one hides errors, so the value before it is judged as well.
_SATURATING = frozenset({"Softmax", "Sigmoid", "LogSoftmax", "HardSigmoid", "Tanh"})
_TRANSPARENT = frozenset({"Identity", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Transpose"})


@dataclass
class Workspace:
    """The state a recipe's steps share."""

    graph: Graph
    target: Target
    calibration: Dataset
    device: str = "cpu"
    threads: int = 0
    reduce_range: bool = False
    listener: Listener | None = None
    memo: dict[tuple[Probe, int], Stats] = field(default_factory=dict)
    version: int = 0

    def model(self) -> Model:
        """The float graph as it is now."""
        return self.graph.to_model()

    def changed(self) -> None:
        """To be called after the float graph was edited: statistics gathered before no longer count."""
        self.version += 1

    def collect(self, probes: Iterable[Probe]) -> dict[Probe, Stats]:
        """The statistics of every probe, from one sweep over what is not known yet."""
        wanted = list(dict.fromkeys(probes))
        missing = [p for p in wanted if (p, self.version) not in self.memo]
        if missing:
            options = SessionOptions(threads=self.threads)
            found = collect(
                self.model(),
                missing,
                self.calibration,
                device=self.device,
                options=options,
                listener=self.listener,
            )
            self.memo.update({(p, self.version): s for p, s in found.items()})
        return {p: self.memo[p, self.version] for p in wanted}

    def judge(self, plan: QuantPlan, samples: int, exact: Model) -> Judge:
        """A judge of activation numbers for ``plan`` against the outputs of the float model ``exact``."""
        return Judge(exact, simulate(self.model(), plan), _spread(self.calibration, samples), self.threads)


class Judge:
    """Scores candidate numbers by the error of the model's outputs, all in one simulating session."""

    def __init__(self, model: Model, simulation: Simulation, samples: Sequence[Sample], threads: int) -> None:
        self._simulation, self._samples = simulation, samples
        self._judged = judged_tensors(model)
        names = list(self._judged)
        options = SessionOptions(threads=threads, simulate=True)
        plain = create_session(tap(model, names).SerializeToString(), model.weights, options=options)
        self._reference = [self._centred(run_session(plain, names, feed, sample)) for sample, feed in samples]
        del plain  # its memory serves the simulating session
        simulated = simulation.model
        self._session = create_session(
            tap(simulated, names).SerializeToString(), simulated.weights, options=options
        )

    def score(self, params: Mapping[str, QParams]) -> float:
        """Mean over the judged tensors of their SQNR in dB (each capped at 100 dB), pooled over the samples."""
        signal, noise = np.zeros(len(self._judged)), np.zeros(len(self._judged))
        extra = self._simulation.feed(params)
        for (sample, feed), exact in zip(self._samples, self._reference, strict=True):
            seen = self._centred(run_session(self._session, list(self._judged), {**feed, **extra}, sample))
            for i, (y, z) in enumerate(zip(exact, seen, strict=True)):
                finite = np.isfinite(y)  # elsewhere the float model itself has no answer
                y, z = y[finite], z[finite]
                signal[i] += y @ y
                noise[i] += (y - z) @ (y - z)
        scores = [sqnr_db(float(s), float(n)) for s, n in zip(signal, noise, strict=True)]
        known = [-100.0 if np.isnan(s) else min(s, 100.0) for s in scores if s is not None]
        return float(np.mean(known)) if known else 0.0

    def _centred(self, values: list[Array]) -> list[NDArray[np.float64]]:
        """Float values in float64, those behind a Softmax without their mean, which Softmax does not see."""
        found = []
        for value, axis in zip(values, self._judged.values(), strict=True):
            exact = value.astype(np.float64) if _is_float(value) else np.zeros(0)
            with np.errstate(invalid="ignore"):  # a mean of infinities is NaN, which is passed over
                found.append(
                    exact if axis is None or not exact.size else exact - exact.mean(axis=axis, keepdims=True)
                )
        return found


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"  # an output may be a sequence or a map


def judged_tensors(model: Model) -> dict[str, int | None]:
    """The model's outputs, each one behind a saturating function replaced by what that function reads.

    A saturated output hides errors: two classes at 0.999 and 0.001 look right until the logits have moved far. The
    value is the axis a Softmax normalizes over, None for all others.
    """
    producers = {o: n for n in model.proto.graph.node for o in n.output}
    judged: dict[str, int | None] = {}
    for output in model.proto.graph.output:
        node = producers.get(output.name)
        while node is not None and node.op_type in _TRANSPARENT:
            node = producers.get(node.input[0])
        if node is not None and node.op_type in _SATURATING and node.input[0] in producers:
            axis = next((int(a.i) for a in node.attribute if a.name == "axis"), -1)
            judged[node.input[0]] = axis if node.op_type in ("Softmax", "LogSoftmax") else None
        else:
            judged[output.name] = None
    return judged


def _spread(data: Dataset, count: int) -> list[Sample]:
    total = len(data)
    if count >= total:
        return list(take(data, total))
    positions = {int(i) for i in np.linspace(0, total - 1, count)}
    return [item for i, item in enumerate(data) if i in positions]
