"""Which values a sweep takes out of the model, and which it lets ONNX Runtime reduce to something small first.

Numpy reads a tensor that lies in the session's memory as fast as a Reduce operator would, and sees NaN and Inf on the
way. What costs is to get at it: a convolution's output is laid out in blocks of channels, and a graph output must be
laid out anew. So large outputs of Relu and Clip in models with fixed image sizes are reduced in that layout, by pooling
operators, the only ones that know it; everything else is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod

import numpy as np
import onnx
from onnx import NodeProto, helper

from calib.stats.histogram import grid_step
from calib.sweep.bounds import Facts, Limits
from calib.sweep.device import Reduced, reduced
from calib.sweep.summary import COUNTED, Summary, Wanted, counted, summarizes
from calib.types import Array, Probe, Stats

__all__ = ["Plan", "Pooled", "make_plan"]

_LARGE = 1 << 16  # elements from which a value is worth two small nodes of its own


@dataclass(frozen=True)
class Pooled:
    """A value between known limits, float32 [N, channels, *area], seen through a grid of its places.

    ``step``: the grid; ``peak``: its maximum is reduced as well (no upper limit is known); ``mean``: its channels'
    means are, because they are wanted or because they show NaN.
    """

    tensor: str
    limits: Limits
    channels: int
    area: tuple[int, int]
    step: int
    mean: bool

    @property
    def peak(self) -> bool:
        return self.limits.hi is None

    @property
    def outputs(self) -> list[str]:
        """Names of the reduced values: grid, peak, mean."""
        kinds = ["grid", *(["peak"] if self.peak else []), *(["mean"] if self.mean else [])]
        return [f"calib:{kind}:{self.tensor}" for kind in kinds]

    def nodes(self) -> list[NodeProto]:
        """Pooling operators only. A window of one element copies it; a NaN passes all but GlobalMaxPool."""
        operators = {"peak": "GlobalMaxPool", "mean": "GlobalAveragePool"}
        grid, *others = self.outputs
        steps = [self.step, self.step]
        found = [helper.make_node("MaxPool", [self.tensor], [grid], kernel_shape=[1, 1], strides=steps)]
        return found + [helper.make_node(operators[o.split(":")[1]], [self.tensor], [o]) for o in others]

    def summary(self, values: Mapping[str, Array]) -> tuple[Summary, bool] | None:
        """What was seen, and whether both extremes are exact; None when there may be a NaN or an Inf.

        An extreme is exact when it is a limit or was reduced.
        """
        grid, *others = (values[name] for name in self.outputs)
        mean = others[-1] if self.mean else None
        lo, hi = float(grid.min()), float(others[0].max() if self.peak else grid.max())
        if not (isfinite(lo) and isfinite(hi)) or (mean is not None and not np.isfinite(mean).all()):
            return None
        shape = (grid.shape[0], self.channels, *self.area)
        sums = mean.reshape(-1, self.channels).sum(axis=0, dtype=np.float64) if mean is not None else None
        if sums is not None:
            sums = sums * prod(self.area)
        exact = lo == self.limits.lo and (self.peak or hi == self.limits.hi)
        return Summary(lo, hi, shape, grid, sums), exact

    def settled(self, lo: float, hi: float) -> bool:
        """Whether no further value can move these extremes, given that the largest of all values was seen if `peak`."""
        return lo <= self.limits.lo and (self.peak or hi >= (self.limits.hi or 0.0))


@dataclass
class Plan:
    """For each value the statistics that want it; ``pooled`` values come reduced, the ``fed`` ones are inputs.

    ``reduced``: values that a device reduces, after its first sample. ``watched``: values whose NaN tells of a NaN in a
    pooled one.
    """

    wanted: dict[str, list[Wanted]] = field(default_factory=dict)
    pooled: dict[str, Pooled] = field(default_factory=dict)
    reduced: dict[str, Reduced] = field(default_factory=dict)
    fed: list[str] = field(default_factory=list)
    watched: frozenset[str] = frozenset()

    @property
    def whole(self) -> list[str]:
        """Values taken out of the model as they are."""
        return [name for name in self.wanted if name not in self.pooled and name not in self.fed]

    @property
    def outputs(self) -> list[str]:
        """The outputs of the tapped model."""
        return self.whole + self.small

    @property
    def small(self) -> list[str]:
        """Outputs that are reduced values."""
        some: list[Pooled | Reduced] = [*self.pooled.values(), *self.reduced.values()]
        return [name for one in some for name in one.outputs]

    def nodes(self, opset: int) -> list[NodeProto]:
        """The nodes to be added to the model."""
        pooling = [node for pooled in self.pooled.values() for node in pooled.nodes()]
        return pooling + [node for reduced in self.reduced.values() for node in reduced.nodes(opset)]


def make_plan(
    proto: onnx.ModelProto, facts: Facts, stats: Mapping[Probe, Stats], *, device: str = "cpu"
) -> Plan:
    """Decide from the graph alone, never from data: the same for every sample, process and order."""
    plan = Plan()
    for probe, stat in stats.items():
        pad = facts.padded(probe.tensor) if summarizes(probe) else None
        if pad is not None and len(pad.pads) != 4:
            pad = None
        wanted = Wanted(probe, stat, pad)
        plan.wanted.setdefault(pad.source if pad else probe.tensor, []).append(wanted)
    inputs = {i.name for i in proto.graph.input}
    plan.fed = [name for name in plan.wanted if name in inputs]
    # Shapes need inference, which is worth its time only where pooling may follow.
    if any(node.op_type == "Conv" for node in proto.graph.node):
        pools = [p for name, w in plan.wanted.items() if (p := _pooled(facts, name, w)) is not None]
        plan.pooled = {p.tensor: p for p in pools}
        counting = {n for n in plan.whole if any(w.extremes is not None for w in plan.wanted[n])}
        plan.watched = frozenset(counting if plan.pooled else ())
        shown = counting | {p.tensor for p in pools if p.mean}
        for p in pools:
            if not p.mean and not facts.shows_nan(p.tensor, shown):
                plan.pooled[p.tensor] = replace(p, mean=True)
    if device != "cpu":
        found = [reduced(name, plan.wanted[name], facts.shape(name)) for name in plan.whole]
        plan.reduced = {one.tensor: one for one in found if one is not None}
    return plan


def _pooled(facts: Facts, tensor: str, wanted: Sequence[Wanted]) -> Pooled | None:
    limits = facts.limits(tensor)
    if limits is None or not all(summarizes(w.probe) for w in wanted):
        return None
    shape = facts.shape(tensor)
    if shape is None or len(shape) != 4 or min(shape[1:]) < 1 or prod(shape[1:]) < _LARGE:
        return None
    most = {counted(w.probe) for w in wanted} - {0} or {COUNTED}
    step = grid_step((1, *shape[1:]), min(most))
    if len(most) > 1 or step == 1:
        return None
    mean = any(w.probe.kind == "mean" for w in wanted)
    return Pooled(tensor, limits, shape[1], (shape[2], shape[3]), step, mean)
