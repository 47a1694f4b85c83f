"""Constants that take a scale: which ones, and their new values.

Everything is decided on names of nodes, so what was found stays valid while other groups are smoothed, and the values
are read at the time they are changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.errors import GraphError
from calib.types import Array
from onnxslim_ptq.graph.absorb.layout import Layout
from onnxslim_ptq.graph.edit import own_constant
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize.scale import along_outputs

__all__ = [
    "Change",
    "ConstantScale",
    "LayerOutput",
    "NormOutput",
    "ScaleMap",
    "Source",
    "apply_changes",
    "changes_of",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScaleMap:
    """Scale numbers laid out over a constant: ``numbers`` in row-major order of ``shape``; -1 stays as it is."""

    shape: tuple[int, ...]
    numbers: tuple[int, ...]

    @staticmethod
    def of(layout: Layout) -> ScaleMap:
        return ScaleMap(layout.shape, tuple(layout.reshape(-1).tolist()))

    def renumbered(self, table: Layout) -> ScaleMap:
        """With number n replaced by ``table[n]``, whose last entry is that of -1."""
        return ScaleMap(self.shape, tuple(table[list(self.numbers)].tolist()))

    def spread(self, values: Floats, neutral: float) -> Floats:
        """``values`` [scales] as an array of ``shape``, ``neutral`` where there is no scale."""
        picked: Floats = np.append(values, neutral)[list(self.numbers)]
        return picked.reshape(self.shape)


@dataclass(frozen=True)
class ConstantScale:
    """Input ``port`` of ``node`` becomes (c - sign * shift) * scale ** power; sign 0: it takes no shift.

    ``multiplies``: of a Mul or Div, not of an Add or Sub.
    """

    node: str
    port: int
    map: ScaleMap
    power: int = -1
    sign: int = 0
    multiplies: bool = True

    @property
    def takes_shift(self) -> bool:
        return self.sign != 0


@dataclass(frozen=True)
class LayerOutput:
    """The output channels of a layer with constant weight: W / scale, (b - shift) / scale."""

    node: str
    map: ScaleMap
    takes_shift: bool = False


@dataclass(frozen=True)
class NormOutput:
    """Weight and bias of a norm operator: w / scale, (b - shift) / scale; ports are input positions."""

    node: str
    map: ScaleMap
    weight: int
    bias: int | None
    takes_shift: bool = False


Source = ConstantScale | LayerOutput | NormOutput


@dataclass(frozen=True)
class Change:
    """New values, in float64, for a constant input."""

    node: gs.Node
    port: int
    values: Floats
    dtype: np.dtype[Any]


def changes_of(graph: Graph, source: Source, scale: Floats, shift: Floats | None) -> Iterator[Change]:
    """What ``source`` must become so that its output is (y - shift) / scale."""
    node = graph.node(source.node)
    divisor = source.map.spread(scale, 1.0)
    moved = np.zeros_like(divisor)
    if shift is not None and source.takes_shift:
        moved = source.map.spread(shift, 0.0)
    if isinstance(source, ConstantScale):
        old = _float_value(graph, node, source.port)
        values = (old.astype(np.float64) - source.sign * moved) * divisor**source.power
        # A bias [channels] stays one: with axes in front of it nobody would know it for the bias of a MatMul.
        while values.ndim > max(old.ndim, 1) and values.shape[0] == 1:
            values = values[0]
        yield Change(node, source.port, values, old.dtype)
        return
    weight, bias = (source.weight, source.bias) if isinstance(source, NormOutput) else (1, 2)
    old = _float_value(graph, node, weight)
    along = (
        divisor
        if isinstance(source, NormOutput) or node.op == "MatMul"
        else along_outputs(node, old, divisor)
    )
    yield Change(node, weight, np.divide(old, along, dtype=np.float64), old.dtype)
    present = bias is not None and bias < len(node.inputs) and bool(node.inputs[bias].name)
    if bias is not None and (present or moved.any()):
        before = _float_value(graph, node, bias).astype(np.float64) if present else np.zeros_like(moved)
        yield Change(node, bias, (before - moved) / divisor, old.dtype)


def apply_changes(graph: Graph, changes: list[Change]) -> None:
    """Give the nodes their new constants, all or none.

    Raises:
        GraphError: a value would leave the type of its constant.
    """
    narrow = []
    for change in changes:
        with np.errstate(over="ignore"):
            values = change.values.astype(change.dtype)
        if not np.isfinite(values).all():
            raise GraphError(
                f"node '{change.node.name}': a smoothed constant leaves {change.dtype}; use a scale nearer to 1"
            )
        narrow.append(values)
    for change, values in zip(changes, narrow, strict=True):
        own_constant(graph, change.node, change.port, values)


def _float_value(graph: Graph, node: gs.Node, port: int) -> Array:
    values = graph.value(node.inputs[port])
    if values is None:
        raise GraphError(f"node '{node.name}': input {port} is no constant any more; find the groups again")
    return values
