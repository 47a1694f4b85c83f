"""Folds BatchNormalization into the Conv, ConvTranspose or Gemm before it.

y = gamma * (Wx + b - mean) / sqrt(var + eps) + beta = (k * W)x + (b - mean) * k + beta, k = gamma / sqrt(var + eps).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.edit import bypass, is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize.scale import output_channels, scale_layer

__all__ = ["fold_batchnorm"]

_FIRST_OPSET = 7  # before, statistics were updated unless is_test said otherwise


def fold_batchnorm(graph: Graph) -> int:
    """Fold every inference-mode BatchNormalization that alone reads a layer's output; returns how many."""
    if graph.opset < _FIRST_OPSET:
        return 0
    return sum(
        _fold(graph, node) for node in graph.nodes if node.op == "BatchNormalization" and is_standard(node)
    )


def _fold(graph: Graph, node: gs.Node) -> bool:
    trains = node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:])
    if trains or node.attrs.get("spatial", 1) != 1 or len(node.inputs) != 5:
        return False
    layer = graph.producer(node.inputs[0])
    known = output_channels(graph, layer)
    if layer is None or known is None or not graph.reads_alone(node, node.inputs[0]):
        return False
    parameters = [np.asarray(v, np.float64) for t in node.inputs[1:] if (v := graph.value(t)) is not None]
    if len(parameters) != 4 or any(p.shape != (known[0],) for p in parameters):
        return False
    gamma, beta, mean, var = parameters
    with np.errstate(all="ignore"):
        k = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
        shift = beta - mean * k
    if not scale_layer(graph, layer, k, shift):
        return False
    bypass(graph, layer, node)
    return True
