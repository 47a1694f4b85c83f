"""How strongly each smoothing group could be scaled, and what its own layers would gain by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.stats import MeanStats, RowStats
from calib.types import Probe, Stats
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.smooth_groups import SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.flex_smooth import row_probe
from onnxslim_ptq.steps.layer_error import GroupError
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.weights import correctable, mean_probe

__all__ = ["LOCAL", "NONE", "GroupStrengths", "mean_of", "strength_probes", "strengths_of"]

Floats = NDArray[np.float64]
NONE, LOCAL = "none", "local"
_ROWS, _OUTPUTS = 64, 1024  # of a group that find its own best strength
_LOCAL = tuple(i / 10 for i in range(2, 10))


@dataclass
class GroupStrengths:
    """One group: its planned layers, the extremes of each channel, and the scale for every label of a candidate.

    ``gain_db``: how much smaller the error of its layers is with the scale that is best for them (LOCAL) than without.
    """

    group: SmoothGroup
    layers: list[Linear]
    lo: Floats
    hi: Floats
    scales: dict[str, Floats | None]
    gain_db: float

    def full(self, label: str) -> Floats:
        """The scale [channels]; ones for none."""
        scale = self.scales[label]
        return np.ones(self.group.channels) if scale is None else smoothing.expand(self.group, scale)


def strength_probes(graph: Graph, groups: Sequence[SmoothGroup], placement: Placement) -> list[Probe]:
    """What is to be known of the groups' tensors."""
    own = [p for g in groups for p in (smoothing.channel_probe(g), row_probe(g))]
    return own + [mean_probe(c) for g in groups for c in _corrected(graph, g, placement)]


def _corrected(graph: Graph, group: SmoothGroup, placement: Placement) -> list[Linear]:
    planned = [placement.layers[c.node] for c in group.consumers if c.node in placement.layers]
    return [layer for layer, choice in planned if choice.bias_correction and correctable(graph, layer)]


def strengths_of(
    graph: Graph,
    group: SmoothGroup,
    alphas: Sequence[float],
    stats: Mapping[Probe, Stats],
    placement: Placement,
) -> GroupStrengths:
    """The scales of SmoothQuant, A^alpha / W^(1-alpha), for every alpha and for that of the smallest `GroupError`."""
    layers = [c for c in group.consumers if c.node in placement.layers]
    labels = (NONE, LOCAL, *(f"{alpha:g}" for alpha in alphas))
    seen = smoothing.channels(group, stats)
    if seen is None:
        zero = np.zeros(group.channels)
        return GroupStrengths(group, layers, zero, zero, dict.fromkeys(labels), 0.0)
    act = smoothing.reduce_channels(group, seen.absmax, np.max)
    weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.max)
    rows = stats[row_probe(group)]
    assert isinstance(rows, RowStats)
    corrected = _corrected(graph, group, placement)
    centred = len(corrected) == len(layers) and all(mean_of(stats, c).size > 1 for c in corrected)
    error = GroupError(graph, layers, rows.rows[:_ROWS], seen.lo, seen.hi, _OUTPUTS, centred)
    tried = [_normalized(act, weight, a) for a in _LOCAL]
    errors = [error.of(smoothing.expand(group, s)) for s in tried]
    best, alone = int(np.argmin(errors)), error.of(np.ones(group.channels))
    gain = 20 * float(np.log10(max(alone, 1e-30) / max(errors[best], 1e-30)))
    scales = {f"{a:g}": _normalized(act, weight, a) for a in alphas}
    chosen = {NONE: None, LOCAL: tried[best] if gain > 0 else None, **scales}
    return GroupStrengths(group, layers, seen.lo, seen.hi, chosen, max(gain, 0.0))


def mean_of(stats: Mapping[Probe, Stats], layer: Linear) -> Floats:
    """E[x] of each input channel; one 0 where nothing finite was seen."""
    found = stats[mean_probe(layer)]
    assert isinstance(found, MeanStats)
    return found.mean if found.count else np.zeros(1)


def _normalized(act: Floats, weight: Floats, alpha: float) -> Floats:
    """s of SmoothQuant divided by its geometric mean: the tensor keeps its size on the whole."""
    scale = smoothing.power_scale(act, weight, alpha, 1 - alpha)
    return np.asarray(scale / np.exp(np.log(scale).mean()), np.float64)
