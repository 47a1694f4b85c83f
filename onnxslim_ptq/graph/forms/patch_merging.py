"""Swin's patch merging, four strided slices side by side, as one convolution that picks the pixels."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.shapes import fixed_shapes

__all__ = ["merge_patches"]

_FIRST = 10  # Slice takes its ranges as inputs
_TO_CHANNELS, _BACK = [0, 3, 1, 2], [0, 2, 3, 1]
_WHOLE = 2**31 - 1  # an end at or beyond this means the whole axis


def merge_patches(graph: Graph) -> int:
    """Concat over the last axis of x[:, i::2, j::2, :], each (i, j) once, becomes a Conv of stride 2 and kernel 2 x 2.

    Its weight [4 C, C, 2, 2] holds a single 1 per output channel, so the values are the same. x is [N, H, W, C] with
    fixed C, float32; Transposes stand around the Conv. Opset 10 and higher.
    """
    joins = [n for n in graph.nodes if n.op == "Concat" and is_standard(n) and len(n.inputs) == 4]
    if graph.opset < _FIRST or not joins:
        return 0
    shapes = fixed_shapes(graph)
    count = 0
    for join in joins:
        found = [_pixel(graph, t) for t in join.inputs]
        pixels = [f[1:] for f in found if f is not None]
        sources = {f[0].name: f[0] for f in found if f is not None}
        if len(sources) != 1 or sorted(pixels) != [(0, 0), (0, 1), (1, 0), (1, 1)]:
            continue
        (source,) = sources.values()
        dims = shapes.dims.get(source.name)
        axis = join.attrs.get("axis")
        if dims is None or len(dims) != 4 or axis not in (-1, 3) or not dims[3]:
            continue
        if shapes.kinds.get(source.name) != TensorProto.FLOAT:
            continue
        _replace(graph, join, source, dims[3], pixels)
        count += 1
    return count


def _replace(
    graph: Graph, join: gs.Node, source: gs.Tensor, channels: int, pixels: list[tuple[int, int]]
) -> None:
    weight = np.zeros((4 * channels, channels, 2, 2), np.float32)
    for part, (i, j) in enumerate(pixels):
        weight[np.arange(channels) + part * channels, np.arange(channels), i, j] = 1.0
    name, result = join.name, join.outputs[0]
    chains = list(join.inputs)
    graph.remove(join)
    for tensor in chains:
        _drop(graph, tensor)
    image, picked = graph.variable(f"{name}.image"), graph.variable(f"{name}.picked")
    graph.add_node("Transpose", f"{name}.in", [source], [image], {"perm": _TO_CHANNELS})
    constant = graph.constant(f"{name}.pick", weight)
    attrs = {"kernel_shape": [2, 2], "strides": [2, 2]}
    graph.add_node("Conv", name, [image, constant], [picked], attrs)
    graph.add_node("Transpose", f"{name}.out", [picked], [result], {"perm": _BACK})


def _drop(graph: Graph, tensor: gs.Tensor) -> None:
    """Remove the Slices that made ``tensor`` as far as nobody else reads them."""
    while (node := graph.producer(tensor)) is not None and node.op == "Slice":
        if graph.consumers(tensor) or tensor.name in graph.outputs:
            return
        tensor = node.inputs[0]
        graph.remove(node)


def _pixel(graph: Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, int, int] | None:
    """What a chain of Slices takes every second row and column of, and from where; None when it is something else."""
    starts: dict[int, int] = {}
    while (node := graph.producer(tensor)) is not None and node.op == "Slice" and is_standard(node):
        values = [graph.value(t) for t in node.inputs[1:]]
        if len(values) != 4 or any(v is None for v in values):
            break
        first, last, axes, steps = ([int(x) for x in np.ravel(v)] for v in values if v is not None)
        for start, end, axis, step in zip(first, last, axes, steps, strict=True):
            if end < _WHOLE or axis in starts or axis not in (1, 2) or step != 2 or start not in (0, 1):
                return None
            starts[axis] = start
        tensor = node.inputs[0]
    return (tensor, starts[1], starts[2]) if set(starts) == {1, 2} else None
