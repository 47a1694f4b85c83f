"""Smooths wherever the scale folds, as strongly as the model's outputs want it; not at all is always a candidate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from calib.stats import MinMaxStats
from calib.types import Array, Probe, Range, Sample, Stats
from onnxslim_ptq.core.config import number
from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.qmath import dequantize, params_from_range
from onnxslim_ptq.core.spec import PerChannel, PerTensor, QParams, QuantPlan, QuantSpec, Use
from onnxslim_ptq.export.smoothing_simulation import SmoothingSimulation, simulate_smoothing
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup
from onnxslim_ptq.steps import quantize, smoothing
from onnxslim_ptq.steps.group_strengths import (
    LOCAL,
    NONE,
    GroupStrengths,
    mean_of,
    strength_probes,
    strengths_of,
)
from onnxslim_ptq.steps.layer_error import takes_rows
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.steps.weights import add_weight_codes, correctable, float_weight, mean_probe, output_shift
from onnxslim_ptq.workspace import Judge, Workspace

__all__ = ["AutoSmooth", "run"]

Floats = NDArray[np.float64]
_ENOUGH = 32  # samples of which a few may judge what was made from all of them
_SAMPLES = 12  # of fewer, these are all that the search works with: some for statistics, others that judge
_JUDGED = 4
_FEWEST = 6  # candidates that are judged in any case
_PROMISE_DB = 1.0  # what the layers of some group have to gain, lest the search is not worth its time
_GAIN_DB = 0.5  # what smoothing has to gain over none
_EXPLICIT_GAIN_DB = 0.1  # what a Mul that runs with the model has to gain
_BLOCKS = 4
_LARGEST = {False: 127, True: 64}


class AutoSmooth(GroupsConfig):
    """``alphas``: the strengths tried, beside "none" and the strength that is best for each group's own layers.

    ``passes``: how often the search may run the calibration samples, all candidates together.
    """

    type: Literal["auto_smooth"]
    alphas: tuple[Annotated[float, number(0, 1)], ...] = Field((0.8, 0.65, 0.5), min_length=1)
    passes: Annotated[float, number(0, 100)] = 0.5


def run(
    workspace: Workspace, groups: Sequence[SmoothGroup], config: AutoSmooth, placement: Placement
) -> list[Smoothed]:
    """Scale groups by s_j = A_j^alpha / W_j^(1-alpha), normalized; alpha with the best SQNR of the model's outputs.

    A candidate is judged by simulating the quantized model with smallest-to-largest ranges on some calibration
    samples (`Judge.score`): first one alpha for all groups, then whatever betters that per kind of group and per
    block of the graph. "local" takes for each group the alpha of its smallest `GroupError`; where that promises no
    group a gain, nothing is judged. Source of the scale: Xiao et al., SmoothQuant, ICML 2023, eq. 4; the choice by
    output error is this project's own.
    """
    fitting = [group for group in groups if _fits(workspace.graph, group, placement)]
    if not fitting:
        return []
    seen, judged = _split(workspace)
    graph = workspace.graph
    corrected = _corrected(graph, placement)
    needed = [*strength_probes(graph, fitting, placement), *map(mean_probe, corrected)]
    needed += [Probe(p.tensor, "minmax") for p in placement.tensors.values()]
    if seen is workspace:  # one sweep serves the ranges too, unless the graph changes
        needed += quantize.probes(workspace, placement)
    stats = seen.collect(needed)
    strengths = {g.tensor: strengths_of(graph, g, config.alphas, stats, placement) for g in fitting}
    if max(found.gain_db for found in strengths.values()) < _PROMISE_DB:
        return []
    search = _Search(workspace, strengths, config, placement, stats, corrected, judged)
    chosen = search.best()
    done = [
        smoothing.scale_group(config.type, workspace, group, Found(scale))
        for group in fitting
        if (scale := strengths[group.tensor].scales[chosen[group.tensor]]) is not None
    ]
    if done:
        workspace.changed()
    return done


def _corrected(graph: Graph, placement: Placement) -> list[Linear]:
    """The layers whose bias will take out the mean error of their weight; a Conv reads no group's tensor."""
    return [
        layer
        for layer, choice in placement.layers.values()
        if choice.bias_correction and layer.op != "Conv" and correctable(graph, layer)
    ]


def _fits(graph: Graph, group: SmoothGroup, placement: Placement) -> bool:
    """Whether the group's planned layers are static int8 ones in float32 whose input is quantized for them alone."""
    planned = [c for c in group.consumers if c.node in placement.layers]
    placed = [p for p in placement.tensors.values() if p.tensor == group.tensor]
    forms = [placement.layers[c.node][1].weight for c in planned]
    return (
        takes_rows(group)
        and bool(placed)
        and not any(p.at_result for p in placed)
        and all(form.dtype is INT8 and form.symmetric and form.group is None for form in forms)
        and all(graph.value(graph.node(c.node).inputs[c.weight]).dtype == np.float32 for c in planned)  # type: ignore[union-attr]
    )


class _Search:
    """All candidates of one run: a label for each group, which goes by the name of its tensor."""

    def __init__(
        self,
        workspace: Workspace,
        groups: Mapping[str, GroupStrengths],
        config: AutoSmooth,
        placement: Placement,
        stats: Mapping[Probe, Stats],
        corrected: Sequence[Linear],
        judged: Sequence[Sample],
    ) -> None:
        self.workspace, self.placement, self.groups = workspace, placement, groups
        self.labels = list(next(iter(groups.values())).scales)
        graph = workspace.graph
        self.means = {layer.node: mean_of(stats, layer) for layer in corrected}
        self.ranges = {key: _extremes(stats, placed.tensor) for key, placed in placement.tensors.items()}
        self.plan = self._plan()
        model = workspace.model()
        self.simulated: SmoothingSimulation = simulate_smoothing(
            model, self.plan, [g.group for g in groups.values()], corrected
        )
        self.left = max(_FEWEST, round(config.passes * workspace.samples / len(judged)))
        self.judge = Judge(model, self.simulated.simulation, judged, workspace.threads)
        self.rounded = dict.fromkeys(self.groups, "")
        # One buffer per weight for all candidates: what worker threads allocate and free, they keep.
        self.feed: dict[str, Array] = {
            name: np.empty_like(float_weight(workspace.graph, layers[use.node]))
            for layers in [{c.node: c for g in self.groups.values() for c in g.layers}]
            for use, name in self.simulated.weights.items()
        }
        self.float_outputs = {
            layer.node: _matched(graph, layer, float_weight(graph, layer), self.means[layer.node])
            for layer in corrected
        }
        for layer in corrected:
            codes = self.plan.weight_codes.get(self.plan.weights[Use(layer.node, layer.weight)].params)
            rounded = float_weight(graph, layer) if codes is None else dequantize(codes.codes, codes.params)
            self._shift(layer, rounded, self.means[layer.node])
        self.scores: dict[tuple[str, ...], float] = {}

    def _shift(self, layer: Linear, rounded: Array, mean: Floats) -> None:
        """Feed what bias correction will add to the layer's output: E[x W] - E[x'] W'."""
        off = self.float_outputs[layer.node] - _matched(self.workspace.graph, layer, rounded, mean)
        self.feed[self.simulated.shifts[layer.node]] = off.astype(np.float32)

    def _plan(self) -> QuantPlan:
        """The placement's plan with codes for the weights that no group touches."""
        plan = self.placement.plan(self.workspace.target)
        touched = {Use(c.node, c.weight) for g in self.groups.values() for c in g.layers}
        rest = {use: slot for use, slot in plan.weights.items() if use not in touched}
        everything, plan.weights = plan.weights, rest
        layers = {name: layer for name, (layer, _) in self.placement.layers.items()}
        add_weight_codes(self.workspace.graph, plan, layers, self.workspace.reduce_range)
        plan.weights = everything
        return plan

    def best(self) -> dict[str, str]:
        """A label for every group: one for all, then what betters that for one kind, or in one block of the graph.

        None when the strengths that are best for the layers do not help the outputs.
        """
        names = list(self.groups)
        nothing = dict.fromkeys(names, NONE)
        if self.score(dict.fromkeys(names, LOCAL)) < self.score(nothing) + _GAIN_DB:
            return nothing
        best = self._better(nothing, names)
        for part in self._parts(names):
            best = self._better(best, part)
        for part in self._parts([n for n in names if self.groups[n].group.kind is GroupKind.UNFUSED]):
            without = best | dict.fromkeys(part, NONE)
            if without != best and self.score(best) < self.score(without) + _EXPLICIT_GAIN_DB:
                best = without
        return best

    def _parts(self, names: Sequence[str]) -> list[list[str]]:
        """What is changed together: the groups of one kind, then blocks of the graph."""
        kinds = [[n for n in names if self.groups[n].group.kind is kind] for kind in GroupKind]
        kinds = [part for part in kinds if part]
        blocks = [part.tolist() for part in np.array_split(list(names), _BLOCKS) if len(part)]
        return (kinds if len(kinds) > 1 else []) + (blocks if len(blocks) > 1 else [])

    def _better(self, best: dict[str, str], part: Sequence[str]) -> dict[str, str]:
        """``best``, or with the label for ``part`` that gains most, while candidates may still be judged."""
        before = best
        for label in self.labels:
            other = before | dict.fromkeys(part, label)
            if self.left > 0 and self.score(other) > self.score(best):
                best = other
        return best

    def score(self, chosen: Mapping[str, str]) -> float:
        key = tuple(chosen.values())
        if key not in self.scores:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(pool.map(self._round, chosen, chosen.values()))
            self.scores[key] = self.judge.score(self._numbers(chosen), self.feed)
            self.left -= 1
        return self.scores[key]

    def _round(self, name: str, label: str) -> None:
        """Fill the group's feeds for ``label``, unless that is what they hold."""
        if self.rounded[name] == label:
            return
        scale = self.groups[name].full(label).astype(np.float32)
        self.feed[self.simulated.inverse[name]] = 1 / scale
        for layer in self.groups[name].layers:
            use = Use(layer.node, layer.weight)
            buffer = self.feed[self.simulated.weights[use]]
            largest = _LARGEST[self.workspace.reduce_range]
            _round_into(buffer, self.workspace.graph, layer, scale, self.plan.weights[use].spec, largest)
            if layer.node in self.means:
                self._shift(layer, buffer, self.means[layer.node] / scale)
        self.rounded[name] = label

    def _numbers(self, chosen: Mapping[str, str]) -> dict[str, QParams]:
        numbers = {}
        for key, placed in self.placement.tensors.items():
            found, known = self.ranges[key], self.groups.get(placed.tensor)
            if known is not None:
                scale = known.full(chosen[placed.tensor])
                found = Range(np.asarray((known.lo / scale).min()), np.asarray((known.hi / scale).max()))
            numbers[key] = params_from_range(found, placed.spec)
        return numbers


def _split(workspace: Workspace) -> tuple[Workspace, list[Sample]]:
    """What gives statistics, and the samples that judge.

    All samples and some of them; where there are few of them, disjoint parts: else every judge would be an extreme.
    """
    few = workspace.part(_SAMPLES)
    samples = list(few.calibration)
    if workspace.samples >= _ENOUGH or len(samples) < 4:
        return workspace, list(few.part(_JUDGED).calibration)
    judges = min(_JUDGED, len(samples) // 2)
    every = {int(i) for i in np.linspace(0, len(samples) - 1, judges)}
    rest = [s for i, s in enumerate(samples) if i not in every]
    return replace(few, calibration=rest, memo={}), [s for i, s in enumerate(samples) if i in every]


def _matched(graph: Graph, layer: Linear, weight: Array, mean: Floats) -> Floats:
    """The mean output of a layer with that weight, without its bias, [outputs]."""
    if mean.size == 1:
        return np.zeros(layer.channels)
    found = output_shift(layer, graph, np.asarray(weight), mean.astype(np.float32))
    return np.zeros(layer.channels) if found is None else np.asarray(found, np.float64)


def _extremes(stats: Mapping[Probe, Stats], tensor: str) -> Range:
    found = stats.get(Probe(tensor, "minmax"))
    if not isinstance(found, MinMaxStats) or found.count == 0:
        return Range(np.zeros(()), np.zeros(()))
    return Range(np.asarray(found.lo), np.asarray(found.hi))


def _round_into(
    buffer: Array, graph: Graph, layer: Linear, scale: NDArray[np.float32], spec: QuantSpec, largest: int
) -> None:
    """Q(diag(s) W) in float32 and in the weight's own layout, symmetric, to nearest."""
    transposed = layer.op == "Gemm" and bool(graph.node(layer.node).attrs.get("transB", 0))
    made: NDArray[np.float32] = buffer  # type: ignore[assignment]
    np.multiply(float_weight(graph, layer), scale if transposed else scale[:, None], out=made)
    others = None
    if isinstance(spec.grain, PerChannel):
        others = tuple(i for i in range(made.ndim) if i != spec.grain.axis)
    else:
        assert isinstance(spec.grain, PerTensor)
    step = np.maximum(made.max(axis=others, keepdims=True), -made.min(axis=others, keepdims=True)) / largest
    step = np.where(step == 0, 1, step).astype(np.float32)
    made /= step
    np.rint(made, out=made)
    made *= step
