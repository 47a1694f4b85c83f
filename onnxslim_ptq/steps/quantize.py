"""The ``quantize`` step: places the layers' slots, finds ranges, rounds weights and biases."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from calib.model import Model
from calib.stats import HistogramStats, MeanStats
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.choice import AUTO, OUTPUT_MSE
from onnxslim_ptq.core.qmath import params_from_range
from onnxslim_ptq.core.spec import QParams, QuantPlan
from onnxslim_ptq.graph.elementwise import aftermath
from onnxslim_ptq.steps.output_range import output_probes, output_range
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.ranges import candidates, fixed_range, range_probes
from onnxslim_ptq.steps.weights import add_bias_codes, add_weight_codes, correct_biases, mean_probe
from onnxslim_ptq.workspace import Workspace

__all__ = ["apply", "probes"]

# What `auto` tries, for values that layers read and for values quantized for the sake of their producer alone.
_FOR_READERS = ("minmax", "mse")
_FOR_PRODUCERS = ("minmax", "after16", "after", "mse")
_JUDGED_ELEMENTS = 4e8  # tensor elements that judging one candidate may touch: bounds time, not clock-dependent
_FEWEST, _MOST = 4, 32


def probes(workspace: Workspace, placement: Placement) -> list[Probe]:
    """Every statistic the step needs, for one sweep."""
    needed = [p for placed in placement.tensors.values() for p in range_probes(placed)]
    needed += [p for placed in placement.tensors.values() if placed.choice.range == OUTPUT_MSE
               for p in output_probes(placed, workspace.graph)]
    needed += [mean_probe(layer) for layer, choice in placement.layers.values() if choice.bias_correction]
    return list(dict.fromkeys(needed))


def apply(workspace: Workspace, placement: Placement, stats: Mapping[Probe, Stats]) -> QuantPlan:
    """Fill the placement's plan with numbers and codes; biases of the float graph are corrected on the way."""
    plan = placement.plan(workspace.target)
    layers = {name: layer for name, (layer, _) in placement.layers.items()}
    add_weight_codes(workspace.graph, plan, layers, workspace.reduce_range)
    corrected = [layer for layer, choice in placement.layers.values() if choice.bias_correction]
    means = {p.tensor: s for p, s in stats.items() if isinstance(s, MeanStats)}
    plain = workspace.model()
    if correct_biases(workspace.graph, plan, corrected, means):
        workspace.changed()
    plan.ranges = _ranges(workspace, placement, plan, stats, plain)
    plan.params = _numbers(placement, plan.ranges)
    add_bias_codes(workspace.graph, plan, layers)
    return plan


Ranges = dict[str, tuple[Range, str]]


def _numbers(placement: Placement, ranges: Ranges) -> dict[str, QParams]:
    return {key: params_from_range(rng, placement.tensors[key].spec) for key, (rng, _) in ranges.items()}


def _ranges(workspace: Workspace, placement: Placement, plan: QuantPlan, stats: Mapping[Probe, Stats],
            plain: Model) -> Ranges:
    fixed: Ranges = {}
    searched: dict[str, dict[str, Range]] = {}
    for key, placed in placement.tensors.items():
        if placed.choice.range == OUTPUT_MSE:
            fixed[key] = (output_range(workspace.graph, placed, stats), OUTPUT_MSE)
        elif placed.choice.range == AUTO:
            histogram = stats[Probe(placed.tensor, "histogram")]
            assert isinstance(histogram, HistogramStats)
            after = aftermath(workspace.graph, workspace.graph.tensor(placed.tensor))
            searched[key] = candidates(placed, histogram, after)
        else:
            fixed[key] = (fixed_range(placed, stats), placed.choice.range_name)
    if searched:
        fixed |= _best_assignment(workspace, placement, plan, fixed, searched, plain, _judged_samples(stats, len(workspace.calibration)))
    return {key: fixed[key] for key in placement.tensors}


def _best_assignment(workspace: Workspace, placement: Placement, plan: QuantPlan, fixed: Ranges,
                     searched: dict[str, dict[str, Range]], plain: Model, samples: int) -> Ranges:
    """Of the same method for all tensors of a role, the pair of methods with the smallest output error."""
    judge = workspace.judge(plan, samples, plain)
    best: tuple[float, Ranges] | None = None
    tried: set[tuple[bytes, ...]] = set()
    for readers, producers in product(_FOR_READERS, _FOR_PRODUCERS):
        ranges = dict(fixed)
        for key, found in searched.items():
            method = readers if placement.tensors[key].readers else producers
            ranges[key] = (found[method], method)
        fingerprint = tuple(r.lo.tobytes() + r.hi.tobytes() for r, _ in ranges.values())
        if fingerprint not in tried:
            tried.add(fingerprint)
            score = judge.score(_numbers(placement, ranges))
            if best is None or score > best[0]:
                best = (score, ranges)
    assert best is not None
    return best[1]


def _judged_samples(stats: Mapping[Probe, Stats], samples: int) -> int:
    """How many samples a candidate is judged on: fewer for larger models, by counted elements, never by the clock."""
    seen = sum(s.extent.count for s in stats.values() if isinstance(s, HistogramStats))
    per_sample = max(seen / max(samples, 1), 1.0)
    return int(np.clip(_JUDGED_ELEMENTS / per_sample, _FEWEST, _MOST))
