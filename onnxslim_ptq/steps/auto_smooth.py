"""Smooths wherever the scale folds, as strongly as the model's outputs want it; not at all is always a candidate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from calib.stats import ChannelStats, MeanStats, MinMaxStats, RowStats
from calib.types import Array, Probe, Range, Stats
from onnxslim_ptq.core.config import number
from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.qmath import dequantize, params_from_range
from onnxslim_ptq.core.spec import PerChannel, PerTensor, QParams, QuantPlan, QuantSpec, Use
from onnxslim_ptq.export.smoothing_simulation import SmoothingSimulation, simulate_smoothing
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.flex_smooth import row_probe
from onnxslim_ptq.steps.layer_error import GroupError, takes_rows
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.steps.weights import add_weight_codes, correctable, float_weight, mean_probe, output_shift
from onnxslim_ptq.workspace import Judge, Workspace

__all__ = ["AutoSmooth", "run"]

Floats = NDArray[np.float64]
NONE, LOCAL = "none", "local"
_SAMPLES = 16  # that the search works with
_JUDGED, _MOST_JUDGED = (
    4,
    8,
)  # of them judge candidates; the others give scales and ranges, or clipping would not show
_JUDGED_ELEMENTS = 1e7  # elements of the smoothed tensors that judging one candidate may touch
_FEWEST = 6  # candidates that are judged in any case
_ROWS, _OUTPUTS = 64, 1024  # of a group that find its own best strength
_GAIN_DB = 0.1  # what smoothing has to gain over none, and an alternative over the best so far
_EXPLICIT_GAIN_DB = 0.3  # what a Mul that runs with the model has to gain
_LOCAL = tuple(i / 10 for i in range(2, 10))
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
    block of the graph. "local" takes for each group the alpha of its smallest `GroupError`. Source of the scale: Xiao
    et al., SmoothQuant, ICML 2023, eq. 4; the choice by output error is this project's own.
    """
    fitting = [group for group in groups if _fits(workspace.graph, group, placement)]
    if not fitting:
        return []
    search = _Search(workspace, fitting, config, placement)
    chosen = search.best()
    done = [
        smoothing.scale_group(config.type, workspace, group, Found(scale))
        for group in fitting
        if (scale := search.scales[group.name][chosen[group.name]]) is not None
    ]
    if done:
        workspace.changed()
    return done


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


@dataclass
class _Group:
    """One group with what is known of its tensor."""

    group: SmoothGroup
    layers: list[Linear]
    lo: Floats
    hi: Floats


class _Search:
    """All candidates of one run; ``scales``: group -> label -> [scales], None for no smoothing."""

    def __init__(
        self, workspace: Workspace, groups: Sequence[SmoothGroup], config: AutoSmooth, placement: Placement
    ) -> None:
        self.workspace, self.placement = workspace, placement
        few, judges = _split(workspace.part(_SAMPLES))
        graph = workspace.graph
        corrected = [
            layer
            for layer, choice in placement.layers.values()
            if choice.bias_correction and layer.op != "Conv" and correctable(graph, layer)
        ]
        stats = few.collect([*_probes(groups, placement), *map(mean_probe, corrected)])
        self.groups = {g.name: _known(g, stats, placement) for g in groups}
        self.means = {layer.node: _mean(stats, layer) for layer in corrected}
        self.labels = (NONE, LOCAL, *(f"{alpha:g}" for alpha in config.alphas))
        self.scales = self._scales(groups, stats, config)
        self.ranges = {key: _extremes(stats, placed.tensor) for key, placed in placement.tensors.items()}
        self.plan = self._plan()
        model = workspace.model()
        self.simulated: SmoothingSimulation = simulate_smoothing(model, self.plan, groups, corrected)
        elements = sum(s.extent.count for s in stats.values() if isinstance(s, ChannelStats))
        affordable = _JUDGED_ELEMENTS * len(few.calibration) / max(elements, 1)
        judged = list(judges.part(int(np.clip(affordable, _JUDGED, _MOST_JUDGED))).calibration)
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

    def _scales(
        self, groups: Sequence[SmoothGroup], stats: Mapping[Probe, Stats], config: AutoSmooth
    ) -> dict[str, dict[str, Floats | None]]:
        return {group.name: self._candidates(group, stats, config) for group in groups}

    def _candidates(
        self, group: SmoothGroup, stats: Mapping[Probe, Stats], config: AutoSmooth
    ) -> dict[str, Floats | None]:
        seen = smoothing.channels(group, stats)
        if seen is None:
            return dict.fromkeys(self.labels)
        graph = self.workspace.graph
        act = smoothing.reduce_channels(group, seen.absmax, np.max)
        weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.max)
        scales: dict[str, Floats | None] = {NONE: None}
        scales |= {f"{a:g}": _normalized(act, weight, a) for a in config.alphas}
        rows = stats[row_probe(group)]
        assert isinstance(rows, RowStats)
        layers = self.groups[group.name].layers
        centred = all(layer.node in self.means for layer in layers)
        error = GroupError(graph, layers, rows.rows[:_ROWS], seen.lo, seen.hi, _OUTPUTS, centred)
        tried = [_normalized(act, weight, a) for a in _LOCAL]
        errors = [error.of(smoothing.expand(group, s)) for s in tried]
        best = int(np.argmin(errors))
        alone = error.of(np.ones(group.channels))
        return scales | {LOCAL: tried[best] if errors[best] < alone else None}

    def best(self) -> dict[str, str]:
        """A label for every group: one for all, then what betters that for one kind, or in one block of the graph."""
        names = list(self.groups)
        nothing = dict.fromkeys(names, NONE)
        best = self._better(nothing, names)
        for part in self._parts(names):
            best = self._better(best, part)
        if self.score(best) < self.score(nothing) + _GAIN_DB:
            return nothing
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
        scale = self._full(name, label).astype(np.float32)
        self.feed[self.simulated.inverse[name]] = 1 / scale
        for layer in self.groups[name].layers:
            use = Use(layer.node, layer.weight)
            buffer = self.feed[self.simulated.weights[use]]
            largest = _LARGEST[self.workspace.reduce_range]
            _round_into(buffer, self.workspace.graph, layer, scale, self.plan.weights[use].spec, largest)
            if layer.node in self.means:
                self._shift(layer, buffer, self.means[layer.node] / scale)
        self.rounded[name] = label

    def _full(self, name: str, label: str) -> Floats:
        """The scale [channels]."""
        group, scale = self.groups[name].group, self.scales[name][label]
        return np.ones(group.channels) if scale is None else smoothing.expand(group, scale)

    def _numbers(self, chosen: Mapping[str, str]) -> dict[str, QParams]:
        by_tensor = {g.group.tensor: name for name, g in self.groups.items()}
        numbers = {}
        for key, placed in self.placement.tensors.items():
            name = by_tensor.get(placed.tensor)
            found = self.ranges[key]
            if name is not None:
                known, scale = self.groups[name], self._full(name, chosen[name])
                found = Range(np.asarray((known.lo / scale).min()), np.asarray((known.hi / scale).max()))
            numbers[key] = params_from_range(found, placed.spec)
        return numbers


def _probes(groups: Sequence[SmoothGroup], placement: Placement) -> list[Probe]:
    own = [p for g in groups for p in (smoothing.channel_probe(g), row_probe(g))]
    smoothed = {g.tensor for g in groups}
    return own + [Probe(p.tensor, "minmax") for p in placement.tensors.values() if p.tensor not in smoothed]


def _known(group: SmoothGroup, stats: Mapping[Probe, Stats], placement: Placement) -> _Group:
    seen = smoothing.channels(group, stats)
    zero = np.zeros(group.channels)
    layers = [c for c in group.consumers if c.node in placement.layers]
    return _Group(group, layers, zero if seen is None else seen.lo, zero if seen is None else seen.hi)


def _split(few: Workspace) -> tuple[Workspace, Workspace]:
    """Samples that give statistics, and others that judge; the same ones where there are fewer than four."""
    samples = list(few.calibration)
    if len(samples) < 4:
        return few, few
    judges = max(len(samples) // 4, min(_MOST_JUDGED, len(samples) // 2))
    every = {int(i) for i in np.linspace(0, len(samples) - 1, judges)}
    parts = ([s for i, s in enumerate(samples) if (i in every) is taken] for taken in (False, True))
    first, second = (replace(few, calibration=part, memo={}) for part in parts)
    return first, second


def _mean(stats: Mapping[Probe, Stats], layer: Linear) -> Floats:
    """E[x] of each input channel; 0 where nothing finite was seen."""
    found = stats[mean_probe(layer)]
    assert isinstance(found, MeanStats)
    return found.mean if found.count else np.zeros(1)


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


def _normalized(act: Floats, weight: Floats, alpha: float) -> Floats:
    """s of SmoothQuant divided by its geometric mean: the tensor keeps its size on the whole."""
    scale = smoothing.power_scale(act, weight, alpha, 1 - alpha)
    return np.asarray(scale / np.exp(np.log(scale).mean()), np.float64)


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
