"""Brings Gemm to its plain form: alpha = beta = 1 and a bias with one value per output channel."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from calib.types import Array
from onnxslim_ptq.graph.edit import is_standard, narrowed, own_constant
from onnxslim_ptq.graph.graph import Graph

__all__ = ["normalize_gemm"]

_FIRST_OPSET = 7  # before, the bias broadcast only when an attribute said so


def normalize_gemm(graph: Graph) -> int:
    """Fold alpha and beta into constants and flatten biases shaped [1, N] or []; returns how many nodes changed."""
    if graph.opset < _FIRST_OPSET:
        return 0
    return sum(_normalize(graph, node) for node in graph.nodes if node.op == "Gemm" and is_standard(node))


def _normalize(graph: Graph, node: gs.Node) -> bool:
    weight = graph.value(node.inputs[1])
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
    bias = graph.value(node.inputs[2]) if has_bias else None
    if weight is None or weight.dtype not in (np.float32, np.float16) or (has_bias and bias is None):
        return False
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    flat = None if bias is None else _flat(bias, weight.shape[0 if node.attrs.get("transB", 0) else 1])
    if bias is not None and flat is None:
        return False
    reshaped = bias is not None and flat is not None and flat.shape != bias.shape
    if alpha == 1.0 and beta == 1.0 and not reshaped:
        return False
    scaled, shifted = _times(weight, alpha), None if flat is None else _times(flat, beta)
    if scaled is None or (flat is not None and shifted is None):
        return False
    if alpha != 1.0:
        own_constant(graph, node, 1, scaled)
    if shifted is not None and (beta != 1.0 or reshaped):
        own_constant(graph, node, 2, shifted)
    graph.set_attributes(node, {k: v for k, v in node.attrs.items() if k not in ("alpha", "beta")})
    return True


def _times(values: Array, factor: float) -> Array | None:
    return values if factor == 1.0 else narrowed(values.astype(np.float64) * factor, values.dtype)


def _flat(bias: Array, channels: int) -> Array | None:
    if bias.size == 1:
        return np.full(channels, bias.reshape(-1)[0], bias.dtype)
    if bias.size == channels and bias.shape[-1] == channels:
        return bias.reshape(-1)
    return None
