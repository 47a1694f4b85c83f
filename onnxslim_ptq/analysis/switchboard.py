"""Measures any set of quantized layers against none, all in one session."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from calib.provider import SessionOptions, create_session
from calib.runner import run_session, tap
from calib.sweep.lanes import in_lanes, lanes_for
from calib.types import Array, Sample
from onnxslim_ptq.analysis.metrics import OutputError
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.export.simulation import Simulation
from onnxslim_ptq.export.switches import Makers, Switched, switch_layers
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.workspace import Judge, Workspace, judged_tensors

__all__ = ["Switchboard", "makers_of"]


def makers_of(graph: Graph, placement: Placement) -> dict[str, Makers]:
    """For each value quantized at its result, groups of layers of which some must be quantized for it to be.

    The layers that make it; for a sum, which no layer makes, its readers and the makers of what it adds.
    """
    placed = {p.tensor: p for p in placement.tensors.values() if p.at_result}
    found: dict[str, Makers] = {}

    def of(name: str) -> Makers:
        if name not in found:
            found[name] = ()  # a loop cannot be, but would end here
            producers = tuple(layer.node for layer in placed[name].producers)
            if producers:
                found[name] = (producers,)
            else:
                readers = tuple(layer.node for layer in placed[name].readers)
                parts = [
                    group for source in _summands(graph, name) if source in placed for group in of(source)
                ]
                found[name] = tuple(dict.fromkeys([*([readers] if readers else []), *parts]))
        return found[name]

    for name in placed:
        of(name)
    return found


def _summands(graph: Graph, name: str) -> list[str]:
    """What the Add adds that makes ``name``, perhaps through an activation function."""
    node = graph.producer(graph.tensor(name))
    while node is not None and node.op != "Add":
        node = graph.producer(node.inputs[0]) if node.inputs else None
    return [] if node is None else [tensor.name for tensor in node.inputs]


class Switchboard(Judge):
    """Errors of the model's outputs, and of ``watched`` values, when a set of layers is quantized.

    The float answers come from the same session with every switch off, so an empty set has no error at all.
    """

    def __init__(
        self,
        workspace: Workspace,
        placement: Placement,
        plan: QuantPlan,
        samples: Sequence[Sample],
        watched: Sequence[str] = (),
    ) -> None:
        model = workspace.model()
        self.switched: Switched = switch_layers(model, plan, makers_of(workspace.graph, placement))
        self.layers = list(self.switched.layers)
        self.watched = list(watched)
        self.runs = 0
        self._simulation, self._samples = Simulation(self.switched.model, {}), list(samples)
        self._judged = judged_tensors(model)
        self._lanes, options = lanes_for(SessionOptions(threads=workspace.threads, simulate=True), "cpu")
        outputs = [o.name for o in model.proto.graph.output]
        taps = tap(self.switched.model, list(dict.fromkeys([*self._judged, *outputs, *self.watched])))
        self._session = create_session(taps.SerializeToString(), self.switched.model.weights, options=options)
        self._outputs = outputs
        self._floats: dict[tuple[str, ...], list[list[Array]]] = {}
        self._reference = list(in_lanes(self._samples, self._float, self._lanes))

    def _float(self, item: Sample) -> list[Array]:
        return self._values(item, list(self._judged), ())

    def _values(self, item: Sample, names: Sequence[str], on: Collection[str]) -> list[Array]:
        sample, feed = item
        self.runs += 1
        return run_session(self._session, names, {**feed, **self.switched.feed(on)}, sample)

    def decibels(self, on: Collection[str]) -> float:
        """`Judge.score` with only the layers ``on`` quantized."""
        self.runs += len(self._samples)
        return self.score({}, self.switched.feed(on))

    def outputs(self, on: Collection[str]) -> list[OutputError]:
        """Errors of the model's own outputs, as verification measures them."""
        return self._compared(self._outputs, on)

    def values(self, on: Collection[str], names: Sequence[str]) -> Mapping[str, OutputError]:
        """Errors of ``watched`` values."""
        return dict(zip(names, self._compared(names, on), strict=True))

    def _compared(self, names: Sequence[str], on: Collection[str]) -> list[OutputError]:
        errors = [OutputError(name) for name in names]
        known = tuple(names)
        if known not in self._floats:
            self._floats[known] = list(
                in_lanes(self._samples, partial(self._values, names=names, on=()), self._lanes)
            )

        answers = in_lanes(self._samples, partial(self._values, names=names, on=on), self._lanes)
        for (sample, _), exact, seen in zip(self._samples, self._floats[known], answers, strict=True):
            for error, y, z in zip(errors, exact, seen, strict=True):
                error.add(y, z, str(sample))
        return errors
