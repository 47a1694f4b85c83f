"""Which scale each element of a value has, followed through operators that only move elements around.

A layout is an integer array that broadcasts over the value: one scale number per element, -1 where there is none.
Elements along which the number does not change have size 1 there, so (1, 1, 384) is a channel per last index.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.types import Array
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.shapes import Shapes, evaluate

__all__ = ["MOVES", "NONE", "PRESERVING", "Layout", "Numbers", "Refusal", "move_back", "move_forward"]

Layout = NDArray[np.int64]
NONE = -1
_LARGEST = 1 << 23  # elements of an index array
# All values of the input once, in another shape or order; then those that repeat or drop some.
PRESERVING = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
MOVES = PRESERVING | {"Expand", "Tile", "Slice", "Split", "Gather", "DepthToSpace", "SpaceToDepth"}


class Refusal(Exception):
    """Why a value cannot be scaled; its text completes "the scale stays explicit: ..."."""


class Numbers:
    """Scale numbers 0 ... count-1, of which some turn out to be the same one (union-find)."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def same(self, first: Layout, second: Layout) -> None:
        """Make the numbers of two arrays equal, element by element."""
        differ = first != second
        size = self._parent.size + 1  # a pair of numbers as one; -1 becomes 0
        pairs = (first[differ] + 1) * size + second[differ] + 1
        for a, b in zip(*np.divmod(_distinct(pairs, size * size), size), strict=True):
            if 0 in (a, b):
                raise Refusal("a part of it that needs no scale is not separate from one that does")
            x, y = self._root(int(a) - 1), self._root(int(b) - 1)
            self._parent[max(x, y)] = min(x, y)

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            number = int(self._parent[number])
        return number

    def merged(self, layout: Layout, keep: int | None) -> Layout:
        """``layout`` [...] as [size of axis ``keep``, counted from the right, or 1], other axes made equal."""
        moved = layout
        for axis in range(layout.ndim):
            from_right = layout.ndim - 1 - axis
            if from_right != keep and moved.shape[axis] > 1:
                first = moved.take([0], axis)
                self.same(np.ascontiguousarray(np.broadcast_to(first, moved.shape)), moved)
                moved = first
        return moved.reshape(-1)

    def fit(self, layout: Layout, shape: tuple[int | None, ...]) -> Layout:
        """``layout`` of a broadcast result as the layout of an operand of that shape."""
        layout = layout.reshape((1,) * max(0, len(shape) - layout.ndim) + layout.shape)
        extra = layout.ndim - len(shape)
        for axis in range(layout.ndim):
            size = 1 if axis < extra else shape[axis - extra]
            if layout.shape[axis] == 1 or size == layout.shape[axis]:
                continue
            if size != 1:
                raise Refusal("its shape is not known")
            first = layout.take([0], axis)
            self.same(np.ascontiguousarray(np.broadcast_to(first, layout.shape)), layout)
            layout = first
        return layout.reshape(layout.shape[extra:]) if extra > 0 else layout

    def final(self, layout: Layout) -> Layout:
        """``layout`` with equal numbers written the same: the smallest of each class."""
        roots = np.array([self._root(n) for n in range(self._parent.size)] + [NONE])
        return np.asarray(roots[layout], np.int64)


def _distinct(keys: Layout, bound: int) -> Layout:
    """The values among ``keys``, all below ``bound``, each once; sorting millions of them takes seconds."""
    if bound > _LARGEST:
        return np.unique(keys)
    seen = np.zeros(bound, np.bool_)
    seen[keys] = True
    return np.flatnonzero(seen)


def move_back(
    graph: Graph, shapes: Shapes, node: gs.Node, output: gs.Tensor, layout: Layout, numbers: Numbers
) -> Layout:
    """The layout of the data input of a node of ``MOVES`` from that of one of its outputs."""
    source, index = _indices(graph, shapes, node, output)
    wanted = np.broadcast_to(layout, index.shape).reshape(-1)
    found = np.full(math.prod(source), NONE, np.int64)
    found[index.reshape(-1)] = wanted
    numbers.same(found[index.reshape(-1)], wanted)
    return _compressed(found.reshape(source))


def move_forward(graph: Graph, shapes: Shapes, node: gs.Node, output: gs.Tensor, layout: Layout) -> Layout:
    """The layout of an output of a node of ``MOVES`` from that of its data input."""
    source, index = _indices(graph, shapes, node, output)
    return _compressed(np.broadcast_to(layout, source).reshape(-1)[index])


def _indices(
    graph: Graph, shapes: Shapes, node: gs.Node, output: gs.Tensor
) -> tuple[tuple[int, ...], Layout]:
    """The data input's shape, and for each element of ``output`` the flat index of where it comes from."""
    source, result = shapes.known(node.inputs[0].name), shapes.known(output.name)
    if source is None or result is None:
        raise Refusal(f"the shapes at {node.op} '{node.name}' are not known")
    if max(math.prod(source), math.prod(result)) > _LARGEST:
        raise Refusal(f"the value at {node.op} '{node.name}' is too large to follow")
    feed: dict[str, Array] = {node.inputs[0].name: np.arange(math.prod(source)).reshape(source)}
    for tensor in node.inputs[1:]:
        if tensor.name:
            values = shapes.values.get(tensor.name)
            if values is None:
                raise Refusal(f"input '{tensor.name}' of {node.op} '{node.name}' is computed at run time")
            feed[tensor.name] = values
    outputs = evaluate(graph, graph.export_node(node), feed)
    position = [t.name for t in node.outputs].index(output.name)
    if outputs is None or outputs[position].shape != result:
        raise Refusal(f"{node.op} '{node.name}' cannot be followed")
    return source, np.asarray(outputs[position], np.int64)


def _compressed(layout: Layout) -> Layout:
    """Without the axes' extent where nothing changes along them; a value without elements stays as it is."""
    for axis in range(layout.ndim if layout.size else 0):
        first = layout.take([0], axis)
        if layout.shape[axis] > 1 and (layout == first).all():
            layout = first
    return layout
