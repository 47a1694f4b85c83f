"""The ``quantize`` step: places the layers' slots, finds ranges, rounds weights and biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np

from calib.model import Model
from calib.stats import HistogramStats, MeanStats
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.choice import AUTO, OUTPUT_MSE, AddedBias
from onnxslim_ptq.core.qmath import params_from_range, reciprocal_pair
from onnxslim_ptq.core.spec import BelowTimestep, QParams, QuantPlan
from onnxslim_ptq.steps.output_range import output_probes, output_range
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.ranges import after_ranges, candidates, fixed_range, range_probe, range_probes
from onnxslim_ptq.steps.rounding import round_weights
from onnxslim_ptq.steps.timesteps import timestep_ranges
from onnxslim_ptq.steps.weights import (
    add_bias_codes,
    add_weight_codes,
    correct_biases,
    mean_probe,
    round_added_biases,
)
from onnxslim_ptq.workspace import Workspace

__all__ = ["apply", "probes"]

# What `auto` tries, for values that layers read and for values quantized for the sake of their producer alone. The
# first is the one to beat: few samples judge, so a smaller gain is chance.
_FOR_READERS = ("histogram", "minmax")
_FOR_PRODUCERS = ("histogram", "minmax", "after")
_GAIN = 0.2  # dB
_CLIPPED = 16.0  # how often a clipped value counts in `after`
_JUDGED_ELEMENTS = 1.5e7  # tensor elements that judging one candidate may touch
_FEWEST, _MOST = 3, 16
_BLOCKS = 4


def probes(workspace: Workspace, placement: Placement) -> list[Probe]:
    """Every statistic the step needs, for one sweep."""
    needed = [p for placed in placement.tensors.values() for p in range_probes(placed)]
    needed += [
        p
        for placed in placement.tensors.values()
        if placed.choice.range == OUTPUT_MSE
        for p in output_probes(placed, workspace.graph)
    ]
    needed += [mean_probe(layer) for layer, choice in placement.layers.values() if choice.bias_correction]
    return list(dict.fromkeys(needed))


def apply(workspace: Workspace, placement: Placement, stats: Mapping[Probe, Stats]) -> QuantPlan:
    """Fill the placement's plan with numbers and codes; biases of the float graph are corrected on the way."""
    plan = placement.plan(workspace.target)
    plan.weight_codes = workspace.codes()
    layers = {name: layer for name, (layer, _) in placement.layers.items()}
    round_weights(workspace, plan, placement.layers)
    add_weight_codes(workspace.graph, plan, layers, workspace.reduce_range)
    corrected = [layer for layer, choice in placement.layers.values() if choice.bias_correction]
    means = {p: s for p, s in stats.items() if isinstance(s, MeanStats)}
    plain = workspace.model()
    if correct_biases(workspace.graph, plan, corrected, means):
        workspace.changed()
    plan.ranges = _ranges(workspace, placement, plan, stats, plain)
    plan.params = _numbers(placement, plan.ranges)
    _at_timesteps(workspace, placement, plan)
    if workspace.target.reciprocal_scale:
        plan.params = {key: reciprocal_pair(params) for key, params in plan.params.items()}
    add_bias_codes(workspace.graph, plan, layers)
    whole = [layer for layer, choice in placement.layers.values() if choice.added_bias is AddedBias.INT32]
    if round_added_biases(workspace.graph, plan, whole):
        workspace.changed()
    return plan


def _at_timesteps(workspace: Workspace, placement: Placement, plan: QuantPlan) -> None:
    """Numbers at each time step; those at the threshold stand where there is room for one."""
    for key, ranges in timestep_ranges(workspace, placement.tensors).items():
        placed = placement.tensors[key]
        assert isinstance(placed.while_, BelowTimestep)
        plan.timesteps[key] = {step: params_from_range(rng, placed.spec) for step, rng in ranges.items()}
        plan.params[key] = plan.timesteps[key][placed.while_.threshold]
        plan.ranges[key] = (ranges[placed.while_.threshold], plan.ranges[key][1])


Ranges = dict[str, tuple[Range, str]]


def _numbers(placement: Placement, ranges: Ranges) -> dict[str, QParams]:
    return {key: params_from_range(rng, placement.tensors[key].spec) for key, (rng, _) in ranges.items()}


def _ranges(
    workspace: Workspace, placement: Placement, plan: QuantPlan, stats: Mapping[Probe, Stats], plain: Model
) -> Ranges:
    ranges: Ranges = {}
    searched: dict[str, HistogramStats] = {}
    for key, placed in placement.tensors.items():
        if placed.choice.range == OUTPUT_MSE:
            ranges[key] = (output_range(workspace.graph, placed, stats), OUTPUT_MSE)
        elif placed.choice.range == AUTO:
            histogram = stats[range_probe(placed.tensor, "histogram")]
            assert isinstance(histogram, HistogramStats)
            searched[key] = histogram
        else:
            ranges[key] = (fixed_range(placed, stats), placed.choice.range_name)
    if searched:
        found = _candidates(workspace, placement, searched)
        samples = _judged_samples(searched.values(), workspace.samples)
        ranges |= _best_assignment(workspace, placement, plan, ranges, found, plain, samples)
    return {key: ranges[key] for key in placement.tensors}


def _candidates(
    workspace: Workspace, placement: Placement, histograms: Mapping[str, HistogramStats]
) -> dict[str, dict[str, Range]]:
    found = {key: candidates(placement.tensors[key], h) for key, h in histograms.items()}
    alone = {key: placement.tensors[key] for key in histograms if not placement.tensors[key].readers}
    for key, rng in after_ranges(workspace.graph, alone, histograms, _CLIPPED).items():
        found[key]["after"] = rng
    return found


def _best_assignment(
    workspace: Workspace,
    placement: Placement,
    plan: QuantPlan,
    fixed: Ranges,
    searched: Mapping[str, Mapping[str, Range]],
    plain: Model,
    samples: int,
) -> Ranges:
    """The methods with the smallest output error: first one per role for the whole graph, then, block after block of
    the graph, whatever alternative betters that by `_GAIN`."""
    judge = workspace.judge(plan, samples, plain)
    seen: dict[tuple[bytes, ...], float] = {}

    def score(methods: Mapping[str, str]) -> float:
        ranges = fixed | {key: (searched[key][m], m) for key, m in methods.items()}
        fingerprint = tuple(r.lo.tobytes() + r.hi.tobytes() for r, _ in ranges.values())
        if fingerprint not in seen:
            seen[fingerprint] = judge.score(_numbers(placement, ranges))
        return seen[fingerprint]

    roles = {key: _FOR_READERS if placement.tensors[key].readers else _FOR_PRODUCERS for key in searched}
    uniform = [
        {key: pair[roles[key] is _FOR_PRODUCERS] for key in searched}
        for pair in product(_FOR_READERS, _FOR_PRODUCERS)
    ]

    def better(best: dict[str, str], others: Sequence[dict[str, str]]) -> dict[str, str]:
        other = max(others, key=score)
        return other if score(other) > score(best) + _GAIN else best

    best = better(uniform[0], uniform)
    for block in np.array_split(list(searched), _BLOCKS):
        for role in (_FOR_READERS, _FOR_PRODUCERS):
            changed = [key for key in block.tolist() if roles[key] is role]
            best = better(best, [best | dict.fromkeys(changed, method) for method in role])
    return fixed | {key: (searched[key][method], method) for key, method in best.items()}


def _judged_samples(histograms: Iterable[HistogramStats], samples: int) -> int:
    """How many samples a candidate is judged on: fewer for larger models, by counted elements, never by the clock."""
    per_sample = sum(h.extent.count for h in histograms) / max(samples, 1)
    return int(np.clip(_JUDGED_ELEMENTS / max(per_sample, 1.0), _FEWEST, _MOST))
