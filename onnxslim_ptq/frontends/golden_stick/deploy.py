"""The quantized graph without data: the structure that QUANTIZE gives, with placeholders in place of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from calib.model import Model
from calib.provider import SessionOptions
from calib.saved.identity import ModelRef, conditions
from calib.saved.store import Statistics
from calib.stats import COLLECTORS
from calib.types import Array, Probe, SampleId, Stats
from onnxslim_ptq.core.spec import QParams, QuantPlan
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.export.renderers import RENDERERS
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.shapes import infer_shapes
from onnxslim_ptq.job import Job
from onnxslim_ptq.pipeline import make_plan
from onnxslim_ptq.recipe import Recipe

__all__ = ["skeleton"]

_SAMPLE = SampleId(0, "a placeholder")


def skeleton(source: Model, recipe: Recipe, *, empty: bool = True) -> tuple[Model, QuantPlan]:
    """The graph that ``recipe`` makes of ``source``, and its plan: codes 0, scales 1, zero points 0.

    Without ``empty`` weights keep their codes, which is all there is to a recipe of nothing but rounding to nearest.

    Raises ValueError when a size that the graph depends on is not declared, and what `make_plan` raises.
    """
    target = TARGETS[recipe.target]
    graph = Graph(raise_opset(source, PER_CHANNEL_OPSET))
    optimize(graph)
    pretended = _Pretended(
        ModelRef.of(source), (), conditions("cpu", SessionOptions()), shapes=_shapes(graph, source)
    )
    planned = make_plan(Job(source, recipe, target, [], [], recorded=pretended))
    plan = planned.plan
    plan.skipped = {**planned.skipped, **planned.placement.skipped, **plan.skipped}
    if empty:
        _empty(plan)
    return RENDERERS[target.exporter].render(planned.workspace.model(), plan, target), plan


@dataclass
class _Pretended(Statistics):
    """Statistics of values that nobody saw: -1 and 2 in every channel. Only their sizes reach the graph."""

    shapes: dict[str, tuple[int, ...]] | None = None

    def find(self, graph: str, probes: Iterable[Probe]) -> dict[Probe, Stats]:
        return {probe: self._of(probe) for probe in probes}

    def _of(self, probe: Probe) -> Stats:
        made = COLLECTORS[probe.kind](probe)
        made.update(self._values(probe), _SAMPLE)
        return made

    def _values(self, probe: Probe) -> Array:
        pair = np.array([-1, 2], np.float32)
        if probe.kind in ("minmax", "histogram"):
            return pair
        shape = (self.shapes or {}).get(probe.tensor)
        if shape is None:
            raise ValueError(
                f"DEPLOY: the shape of '{probe.tensor}' is not known without data; declare it in the model"
            )
        if probe.kind == "axes":
            reduced = {int(axis) for _, axis in probe.options}
            kept = [
                2 if axis == max(reduced) else 1 if axis in reduced else n for axis, n in enumerate(shape)
            ]
            last = [2 if axis == max(reduced) else 1 for axis in range(len(shape))]
            return np.broadcast_to(pair.reshape(last), kept)
        axis = (-1 if probe.axis is None else probe.axis) % len(shape)
        return np.broadcast_to(
            pair.reshape([2] + [1] * len(shape)), [2, *(n if i == axis else 1 for i, n in enumerate(shape))]
        ).reshape([2 if i == 0 and axis else n if i == axis else 1 for i, n in enumerate(shape)])


def _shapes(graph: Graph, source: Model) -> dict[str, tuple[int, ...]]:
    """Of every value; a size that is not declared is some prime."""
    found = infer_shapes(graph)
    shapes = {name: known for name in found.dims if (known := found.known(name)) is not None}
    for output in source.proto.graph.output:
        dims = output.type.tensor_type.shape.dim
        if len(dims) > 2:  # a cache is asked for its heads and channels
            shapes[output.name] = tuple(d.dim_value or 1 for d in dims)
    return shapes


def _empty(plan: QuantPlan) -> None:
    """Placeholders of the right shape and type everywhere."""
    plan.params = {key: _ones(params) for key, params in plan.params.items()}
    for key, weight in list(plan.weight_codes.items()):
        plan.weight_codes[key] = replace(
            weight, codes=np.zeros_like(weight.codes), params=_ones(weight.params)
        )
    for key, bias in list(plan.bias_codes.items()):
        plan.bias_codes[key] = replace(
            bias, codes=np.zeros_like(bias.codes), scale=np.ones_like(bias.scale), clipped=0
        )
    plan.io = [replace(change, scale=np.ones_like(change.scale)) for change in plan.io]


def _ones(params: QParams) -> QParams:
    zero = np.zeros_like(params.zero_point)
    return replace(params, scale=np.ones_like(params.scale), zero_point=zero)
