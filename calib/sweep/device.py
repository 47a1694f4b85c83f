"""Reductions on an accelerator: a few numbers per tensor leave it instead of the tensor.

On the CPU numpy reads a value where it lies; from a device every value would first have to be copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from calib.stats import ChannelStats, MeanStats, MinMaxStats, SeriesStats
from calib.sweep.summary import Wanted
from calib.types import Array, SampleId

__all__ = ["Reduced", "reduced"]

_PER_CHANNEL = frozenset({"channel", "mean"})
_KINDS = _PER_CHANNEL | {"minmax", "series"}
# What of a tensor is computed, and since which opset its operator takes the axes as an input.
_OPERATORS = {
    "lo": ("ReduceMin", 18),
    "hi": ("ReduceMax", 18),
    "sum": ("ReduceSum", 13),
    "square": ("ReduceSumSquare", 18),
    "size": ("ReduceL1", 18),
}
_WHOLE = ("lo", "hi", "sum", "square")
_CHANNEL = ("lo", "hi", "sum", "size")


@dataclass(frozen=True)
class Reduced:
    """A float32 tensor of which its shape and, over all axes and over all but each of ``axes``, extremes and sums leave
    the device: lo = min x, hi = max x, sum = Σ x, square = Σ x², size = Σ|x|, in the device's float32.

    Σ x is NaN or infinite when any x is, which no device's ReduceMin promises to show.
    """

    tensor: str
    rank: int
    axes: tuple[int, ...]

    @property
    def outputs(self) -> list[str]:
        """Names of the reduced values."""
        own = [self._name(kind) for kind in _WHOLE]
        return [self._name("shape"), *own, *(self._name(k, a) for a in self.axes for k in _CHANNEL)]

    def _name(self, kind: str, axis: int | None = None) -> str:
        return f"calib:{kind}{'' if axis is None else axis}:{self.tensor}"

    def nodes(self, opset: int) -> list[NodeProto]:
        """The operators that compute `outputs`; axes go where ``opset`` wants them."""
        found = [helper.make_node("Shape", [self.tensor], [self._name("shape")])]
        for kind in _WHOLE:
            operator, _ = _OPERATORS[kind]
            found.append(helper.make_node(operator, [self.tensor], [self._name(kind)], keepdims=0))
        for axis in self.axes:
            others = [a for a in range(self.rank) if a != axis]
            for kind in _CHANNEL if others else ():
                found += self._over(kind, axis, others, opset)
            if not others:  # each element is a channel of its own
                found += self._elements(axis)
        return found

    def _over(self, kind: str, axis: int, others: list[int], opset: int) -> list[NodeProto]:
        operator, since = _OPERATORS[kind]
        output = self._name(kind, axis)
        if opset < since:
            return [helper.make_node(operator, [self.tensor], [output], axes=others, keepdims=0)]
        axes = f"{output}:axes"
        values = numpy_helper.from_array(np.array(others, np.int64))
        return [
            helper.make_node("Constant", [], [axes], value=values),
            helper.make_node(operator, [self.tensor, axes], [output], keepdims=0),
        ]

    def _elements(self, axis: int) -> list[NodeProto]:
        operators = {"size": "Abs"}
        return [
            helper.make_node(operators.get(k, "Identity"), [self.tensor], [self._name(k, axis)])
            for k in _CHANNEL
        ]

    def take(self, values: Mapping[str, Array], wanted: Sequence[Wanted], sample: SampleId) -> bool:
        """Hand one sample's numbers to the statistics; False, and nothing done, when the tensor has to be looked at."""
        lo, hi, total, square = (float(values[self._name(kind)]) for kind in _WHOLE)
        shape = [int(n) for n in values[self._name("shape")]]
        count = prod(shape)
        if count == 0 or not np.isfinite([lo, hi, total, square]).all():
            return False
        for one in wanted:
            stat = one.stat
            if isinstance(stat, MinMaxStats):
                stat.note(lo, hi, count)
            elif isinstance(stat, SeriesStats):
                stat.note(sample, lo, hi, total, square, count)
            else:
                axis = _axis(one) % self.rank
                lows, highs, sums, sizes = (values[self._name(kind, axis)] for kind in _CHANNEL)
                each = count // shape[axis]
                if isinstance(stat, MeanStats):
                    stat.note(sums, each)
                else:
                    assert isinstance(stat, ChannelStats)
                    stat.note(sample, (lows, highs, sums, sizes), each)
        return True


def reduced(tensor: str, wanted: Sequence[Wanted], shape: tuple[int, ...] | None) -> Reduced | None:
    """How to reduce a float32 ``tensor`` of known rank for these statistics; None when some need to see its values."""
    rank = len(shape or ())
    axes = {_axis(w) for w in wanted if w.probe.kind in _PER_CHANNEL}
    if (
        rank == 0
        or any(w.pad or w.probe.kind not in _KINDS for w in wanted)
        or not axes <= set(range(-rank, rank))
    ):
        return None
    return Reduced(tensor, rank, tuple(sorted({a % rank for a in axes})))


def _axis(wanted: Wanted) -> int:
    return -1 if wanted.probe.axis is None else wanted.probe.axis
