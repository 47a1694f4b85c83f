"""Takes some input channels out of layers and multiplies them beside the layer, in a product of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_ptq.graph.absorb.rescale import Explicit, insert
from onnxslim_ptq.graph.edit import following_bias, own_constant
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear

__all__ = ["divides", "split_channels"]


def divides(graph: Graph, layer: Linear) -> bool:
    """Whether `split_channels` knows how: a MatMul with a matrix, or a Gemm, whose channels lie on the last axis."""
    node = graph.node(layer.node)
    weight = graph.value(node.inputs[layer.weight])
    plain = layer.op == "MatMul" or (layer.op == "Gemm" and not node.attrs.get("transA", 0))
    return plain and layer.activation == 0 and weight is not None and weight.ndim == 2


def split_channels(graph: Graph, layers: Sequence[Linear], chosen: Sequence[int]) -> None:
    """Let ``layers``, all that `divides` and read a value with the same channels, do without its channels ``chosen``.

        y = x W   becomes   y = (x · m) W₀ + Gather(x, chosen) W[chosen]

    m is 0 for a chosen channel, else 1; W₀ is W with those rows 0. The float function stays the same.
    """
    # A smoothing group also has layers that read the value transposed or reshaped.
    for name in dict.fromkeys(layer.activation_name for layer in layers):
        _split(graph, name, [layer for layer in layers if layer.activation_name == name], chosen)


def _split(graph: Graph, name: str, layers: Sequence[Linear], chosen: Sequence[int]) -> None:
    value, index = graph.tensor(name), list(chosen)
    first = graph.node(layers[0].node)
    whole = graph.value(first.inputs[layers[0].weight])
    assert whole is not None, f"layer {layers[0].node} lost its weight"
    mask = np.ones(_rows(graph, layers[0], whole).shape[0], whole.dtype)
    mask[index] = 0
    picked = graph.variable(f"{name}.outliers")
    places = graph.constant(f"{name}.outliers.at", np.asarray(index, np.int64))
    graph.add_node("Gather", f"{name}.outliers", [value, places], [picked], {"axis": -1})
    for layer in layers:
        node = graph.node(layer.node)
        weight = graph.value(node.inputs[layer.weight])
        assert weight is not None, f"layer {layer.node} lost its weight"
        rows = _rows(graph, layer, weight)
        beside = np.ascontiguousarray(rows[index]) * np.asarray(node.attrs.get("alpha", 1.0), weight.dtype)
        rest = weight.copy()
        _rows(graph, layer, rest)[index] = 0
        own_constant(graph, node, layer.weight, rest)
        # A bias stays next to its layer, where steps look for it.
        bias = following_bias(graph, node, rows.shape[1])
        last = node if bias is None else bias[0]
        result, product = last.outputs[0], graph.variable(f"{layer.node}.outliers.product")
        main = graph.variable(f"{layer.node}.others")
        small = graph.constant(f"{layer.node}.outliers.weight", beside.astype(weight.dtype))
        last.outputs[0] = main
        graph.add_node("MatMul", f"{layer.node}.outliers", [picked, small], [product])
        graph.add_node("Add", f"{layer.node}.outliers.add", [main, product], [result])
    insert(graph, name, layers, Explicit(mask, None))


def _rows(graph: Graph, layer: Linear, weight: np.ndarray) -> np.ndarray:
    """``weight`` seen as [input channels, output channels]."""
    node = graph.node(layer.node)
    return weight.T if layer.op == "Gemm" and node.attrs.get("transB", 0) else weight
