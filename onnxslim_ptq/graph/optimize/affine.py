"""Folds a constant Mul or Add (and Sub, Div) per channel into the Conv or ConvTranspose before it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.edit import bypass, per_channel_values
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize.batchnorm import scale_layer

__all__ = ["fold_affine"]


def fold_affine(graph: Graph) -> int:
    """Fold every such node that alone reads a layer's output; returns how many."""
    folded = 0
    for node in graph.nodes:
        if node.op in ("Mul", "Add", "Sub", "Div") and node.domain in (None, "", "ai.onnx"):
            folded += _fold(graph, node)
    return folded


def _fold(graph: Graph, node: gs.Node) -> int:
    ports = [p for p in (0, 1) if not graph.is_constant(node.inputs[p])]
    if len(ports) != 1 or (node.op in ("Sub", "Div") and ports[0] == 1):
        return 0
    source = node.inputs[ports[0]]
    layer = graph.producer(source)
    if layer is None or layer.op not in ("Conv", "ConvTranspose") or graph.sole_consumer(source) is not node:
        return 0
    weight = graph.value(layer.inputs[1])
    if weight is None:
        return 0
    channels = weight.shape[0] if layer.op == "Conv" else weight.shape[1] * int(layer.attrs.get("group", 1))
    constant = per_channel_values(graph.value(node.inputs[1 - ports[0]]), channels, weight.ndim, 1)
    if constant is None:
        return 0
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op == "Div" and not constant.all():
        return 0
    factor, shift = {"Mul": lambda: (constant, zero), "Div": lambda: (1.0 / constant, zero),
                     "Add": lambda: (one, constant), "Sub": lambda: (one, -constant)}[node.op]()
    if not scale_layer(graph, layer, factor, shift):
        return 0
    bypass(graph, layer, node)
    return 1
