"""Shape arithmetic that fixed input shapes decide, and reshapes of reshapes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.edit import is_captured, is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.shapes import infer_shapes

__all__ = ["fix_shapes", "merge_reshapes"]

_SHAPE_READERS = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "ConstantOfShape": (0,),
    "Slice": (1, 2, 3, 4),
}


def fix_shapes(graph: Graph) -> int:
    """Targets of Reshape, Expand, Tile, Slice and ConstantOfShape become constants where every input has fixed dims.

    The nodes that computed them go too where nobody else reads them.
    """
    for value in graph.inputs:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
            return 0
    shapes = infer_shapes(graph)
    count = 0
    for node in graph.nodes:
        if not is_standard(node):
            continue
        for port in _SHAPE_READERS.get(node.op, ()):
            if port >= len(node.inputs) or graph.is_constant(node.inputs[port]):
                continue
            known = shapes.values.get(node.inputs[port].name)
            if known is not None and known.dtype == np.int64:
                node.inputs[port] = graph.constant(f"{node.name}.fixed{port}", known)
                count += 1
    if count:
        _sweep(graph)
    return count


def _sweep(graph: Graph) -> None:
    """Remove nodes nobody reads."""
    while True:
        dead = [
            n for n in graph.nodes if not graph.has_subgraph(n) and all(_unread(graph, t) for t in n.outputs)
        ]
        if not dead:
            return
        for node in dead:
            graph.remove(node)


def _unread(graph: Graph, tensor: gs.Tensor) -> bool:
    return not graph.consumers(tensor) and tensor.name not in graph.outputs


def merge_reshapes(graph: Graph) -> int:
    """Reshape, Flatten, Squeeze or Unsqueeze that a Reshape to a constant shape alone reads: that Reshape is enough.

    The target must hold no 0, which would copy a dimension of the value in between.
    """
    count = 0
    for node in graph.nodes:
        if node.op != "Reshape" or not is_standard(node):
            continue
        target = graph.value(node.inputs[1])
        first = graph.producer(node.inputs[0])
        if target is None or (target == 0).any() or first is None or not is_standard(first):
            continue
        if first.op not in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") or graph.is_constant(
            first.inputs[0]
        ):
            continue
        if graph.reads_alone(node, first.outputs[0]) and not is_captured(graph, first.outputs[0]):
            node.inputs[0] = first.inputs[0]
            graph.remove(first)
            count += 1
    return count
