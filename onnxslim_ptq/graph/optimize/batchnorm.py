"""Folds BatchNormalization into the Conv, ConvTranspose or Gemm before it.

y = gamma * (Wx + b - mean) / sqrt(var + eps) + beta = (k * W)x + (b - mean) * k + beta, with k = gamma / sqrt(var + eps).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.edit import bypass, own_constant
from onnxslim_ptq.graph.graph import Graph

__all__ = ["fold_batchnorm", "scale_layer"]


def fold_batchnorm(graph: Graph) -> int:
    """Fold every inference-mode BatchNormalization that alone reads a layer's output; returns how many."""
    folded = 0
    for node in graph.nodes:
        if node.op != "BatchNormalization" or node.attrs.get("training_mode", 0) or len(node.outputs) != 1:
            continue
        layer = graph.producer(node.inputs[0])
        parameters = [graph.value(t) for t in node.inputs[1:5]]
        if layer is None or graph.sole_consumer(node.inputs[0]) is not node or any(p is None for p in parameters):
            continue
        gamma, beta, mean, var = (np.asarray(p, np.float64) for p in parameters)
        k = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
        if np.isfinite(k).all() and scale_layer(graph, layer, k, beta - mean * k):
            bypass(graph, layer, node)
            folded += 1
    return folded


def scale_layer(graph: Graph, layer: gs.Node, factor: np.ndarray, shift: np.ndarray) -> bool:
    """Replace layer(x) by factor * layer(x) + shift (both [channels]); False when the layer's weights are not constant."""
    if layer.op not in ("Conv", "ConvTranspose") or layer.domain not in (None, "", "ai.onnx"):
        return False
    weight = graph.value(layer.inputs[1])
    has_bias = len(layer.inputs) > 2 and bool(layer.inputs[2].name)
    bias = graph.value(layer.inputs[2]) if has_bias else None
    if weight is None or weight.dtype not in (np.float32, np.float16) or (has_bias and bias is None):
        return False
    if layer.op == "Conv":
        scaled = weight * factor.reshape([-1] + [1] * (weight.ndim - 1))
    else:  # weight [in, out/group, ...]: input channels of one group meet that group's outputs only
        group = int(layer.attrs.get("group", 1))
        per_input = np.repeat(factor.reshape(group, -1), weight.shape[0] // group, axis=0)
        scaled = weight * per_input.reshape(list(per_input.shape) + [1] * (weight.ndim - 2))
    old_bias = np.zeros(factor.size) if bias is None else np.asarray(bias, np.float64)
    new_bias = old_bias * factor + shift
    limit = float(np.finfo(weight.dtype).max)
    if np.abs(scaled).max(initial=0) > limit or np.abs(new_bias).max(initial=0) > limit:
        return False
    own_constant(graph, layer, 1, scaled.astype(weight.dtype))
    if has_bias or new_bias.any():
        own_constant(graph, layer, 2, new_bias.astype(weight.dtype))
    return True
