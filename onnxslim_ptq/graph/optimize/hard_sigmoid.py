"""Writes the hard sigmoid that exporters decompose as the one operator it is.

clip(x + b, 0, d) / d = max(0, min(1, x/d + b/d)) = HardSigmoid(x; alpha = 1/d, beta = b/d), also when the division
stands behind the product of a hard swish: x * clip(x + 3, 0, 6) / 6. Three elementwise kernels become one.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.edit import bypass
from onnxslim_ptq.graph.graph import Graph

__all__ = ["form_hard_sigmoid"]


def form_hard_sigmoid(graph: Graph) -> int:
    """Rewrite every such chain whose inner values nobody else reads; returns how many."""
    return sum(
        _rewrite(graph, node)
        for node in graph.nodes
        if node.op == "Clip" and node.domain in (None, "", "ai.onnx")
    )


def _rewrite(graph: Graph, clip: gs.Node) -> int:
    limits = _limits(graph, clip)
    shift = graph.producer(clip.inputs[0])
    if limits is None or limits[0] != 0.0 or limits[1] <= 0.0 or shift is None or shift.op != "Add":
        return 0
    if not graph.reads_alone(clip, clip.inputs[0]):
        return 0
    constant = [_scalar(graph, t) for t in shift.inputs]
    if (constant[0] is None) == (constant[1] is None):
        return 0
    x = shift.inputs[0 if constant[0] is None else 1]
    offset = constant[1] if constant[0] is None else constant[0]
    division = _division(graph, clip, limits[1])
    if division is None or offset is None:
        return 0
    before, last = division
    result = clip.outputs[0]
    graph.remove(shift)
    name = clip.name
    graph.remove(clip)
    attrs: dict[str, object] = {"alpha": 1.0 / limits[1], "beta": offset / limits[1]}
    formed = graph.add_node("HardSigmoid", name, [x], [result], attrs)
    bypass(graph, formed if before is None else before, last)
    return 1


def _limits(graph: Graph, clip: gs.Node) -> tuple[float, float] | None:
    if "min" in clip.attrs and "max" in clip.attrs:  # before opset 11
        return float(clip.attrs["min"]), float(clip.attrs["max"])
    ends = [_scalar(graph, t) for t in clip.inputs[1:3]]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def _scalar(graph: Graph, tensor: gs.Tensor) -> float | None:
    value = graph.value(tensor) if tensor.name else None
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 and value.ndim <= 1 else None


def _division(graph: Graph, clip: gs.Node, by: float) -> tuple[gs.Node | None, gs.Node] | None:
    """The node that divides the clipped value by ``by``, and the product before it if there is one."""
    reader = graph.sole_consumer(clip.outputs[0])
    if reader is None:
        return None
    if _divides(graph, reader, clip.outputs[0], by):
        return None, reader
    if reader.op != "Mul" or sum(t is clip.outputs[0] for t in reader.inputs) != 1:
        return None
    product = reader.outputs[0]
    last = graph.sole_consumer(product)
    return (reader, last) if last is not None and _divides(graph, last, product, by) else None


def _divides(graph: Graph, node: gs.Node, value: gs.Tensor, by: float) -> bool:
    if len(node.inputs) != 2 or node.domain not in (None, "", "ai.onnx"):
        return False
    if node.op == "Div":
        return node.inputs[0] is value and _scalar(graph, node.inputs[1]) == by
    other = node.inputs[1 if node.inputs[0] is value else 0]
    factor = _scalar(graph, other) if node.op == "Mul" else None
    return factor is not None and abs(factor * by - 1.0) < 1e-6
