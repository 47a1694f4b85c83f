"""The ``attention`` step: queries, keys and values in int8, one symmetric scale per head.

    s = max(|lo|, |hi|) / 127,  [lo, hi] the shortest interval that holds the given share of the head's values

Values enter after norms and rotary embeddings. Source: msModelSlim, FA3 (0.9999 for queries and keys, 1 for values;
it takes the interval of each sample and their union, all samples are pooled here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from calib.errors import CalibrationError, GraphError
from calib.ranges import Grid, RecallWindow, per_channel
from calib.stats import ChannelHistogramStats, ChannelStats, HistogramStats
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.config import Config, Patterns, number
from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.match import Layer, Pattern, nearest
from onnxslim_ptq.core.qmath import params_from_range
from onnxslim_ptq.core.spec import PerChannel, PerTensor, QuantPlan, QuantSpec, Slot
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.attention import Attention, Entry, find_attention
from onnxslim_ptq.graph.graph import Graph

__all__ = ["AttentionStep", "Chosen", "apply", "chosen", "probes"]

_METHOD = "recall_window"
_GRID = Grid(levels=254, symmetric=True)


class AttentionStep(Config):
    """Patterns match an attention's name and its nodes' names; ``query``, ``key`` and ``value`` are shares."""

    type: Literal["attention"]
    include: Patterns = Field(("*",), min_length=1)
    exclude: Patterns = ()
    query: Annotated[float, number(0.5, 1)] = 0.9999
    key: Annotated[float, number(0.5, 1)] = 0.9999
    value: Annotated[float, number(0.5, 1)] = 1.0


@dataclass(frozen=True)
class _One:
    """A value to be quantized: the tensors' prefix in weight files, where it enters, and its share."""

    prefix: str
    entry: Entry
    share: float


Chosen = list[_One]


def chosen(graph: Graph, steps: Sequence[AttentionStep], target: Target) -> Chosen:
    """The values of every attention under the last step that includes and does not exclude it.

    Raises GraphError when the graph has no attention or computes it in float16, RecipeError when a pattern matches
    none, or when the target's form has no scales per head.
    """
    if not steps:
        return []
    if not target.integer_attention:
        raise RecipeError(
            f"attention: int8 attention is not available for target '{target.name}'; use generic or cpu"
        )
    found, reasons = find_attention(graph)
    if not found:
        why = next((f" ('{node}': {reason})" for node, reason in reasons.items()), "")
        raise GraphError(
            f"{graph.model.name} has no attention that can be quantized{why}; leave the step out"
        )
    if any(v.dtype == np.float16 for n in graph.nodes for t in n.inputs if (v := graph.value(t)) is not None):
        raise GraphError(
            f"{graph.model.name} computes attention in float16; give the float32 model, or leave the step out"
        )
    taken: dict[str, tuple[Attention, AttentionStep]] = {}
    for step in steps:
        include, exclude = (_parsed(texts, found) for texts in (step.include, step.exclude))
        for one in found:
            if _matches(include, one) and not _matches(exclude, one):
                taken[one.name] = (one, step)
    shares = {"q": "query", "k": "key", "v": "value"}
    return [
        _One(f"{name}.fa_{role}", entry, getattr(step, shares[role]))
        for name, (one, step) in taken.items()
        for role, entry in one.entries.items()
    ]


def _parsed(texts: Sequence[str], found: Sequence[Attention]) -> list[Pattern]:
    patterns = [Pattern.parse(text) for text in texts]
    for pattern in patterns:
        if pattern.text != "*" and not any(_matches([pattern], one) for one in found):
            layers = [_layers(one)[0] for one in found]
            raise RecipeError(
                f"attention: pattern '{pattern.text}' matches no attention; {nearest(pattern, layers)}"
            )
    return patterns


def _matches(patterns: Sequence[Pattern], one: Attention) -> bool:
    return any(pattern.matches(layer) for pattern in patterns for layer in _layers(one))


def _layers(one: Attention) -> list[Layer]:
    return [Layer(one.nodes[0], "", module=one.name), *(Layer(node, "") for node in one.nodes[1:])]


def probes(values: Chosen) -> list[Probe]:
    """What each value's range needs: a histogram per head, extremes per channel where heads share an axis."""
    return list(dict.fromkeys(_probe(one.entry) for one in values))


def _probe(entry: Entry) -> Probe:
    if entry.heads == 1:
        return Probe(entry.tensor, "histogram")
    if entry.width > 1:
        return Probe(entry.tensor, "channel", entry.axis)
    return Probe(entry.tensor, "channel_histogram", entry.axis, (("channels", float(entry.heads)),))


def apply(values: Chosen, stats: Mapping[Probe, Stats], plan: QuantPlan) -> None:
    """Add the values' slots, numbers and ranges to ``plan``; CalibrationError where the samples left nothing."""
    for one in values:
        rng = _range(one, stats[_probe(one.entry)])
        grain = PerTensor() if rng.lo.ndim == 0 else PerChannel(one.entry.axis)
        spec = QuantSpec(INT8, grain, True)
        key = f"{one.entry.tensor}@{one.prefix}"
        plan.params[key] = params_from_range(rng, spec)
        plan.ranges[key] = (rng, _METHOD)
        plan.activations[one.entry.use] = Slot(spec, key)
        plan.attention[one.prefix] = (key, one.entry.heads)


def _range(one: _One, seen: Stats) -> Range:
    entry = one.entry
    method = RecallWindow(one.share)
    if isinstance(seen, HistogramStats):
        rng = method.range_of({"histogram": seen}, _GRID)
        lo, hi = (np.full(entry.width, v) if entry.width > 1 else v for v in (rng.lo, rng.hi))
        return Range(lo, hi)
    if isinstance(seen, ChannelHistogramStats) and len(seen.channels) == entry.heads:
        return per_channel(method, seen.channels, _GRID)
    if isinstance(seen, ChannelStats) and seen.seen and len(seen.lo) == entry.heads * entry.width:
        lo, hi = (v.reshape(entry.heads, entry.width) for v in (seen.lo, seen.hi))
        return Range(lo.min(axis=1).repeat(entry.width), hi.max(axis=1).repeat(entry.width))
    raise CalibrationError(
        f"attention: '{entry.tensor}' had no {entry.heads} heads in the samples; give samples that reach it"
    )
