"""Brings Gemm to its plain form: alpha = beta = 1 and a bias with one value per output channel."""

from __future__ import annotations

import numpy as np

from onnxslim_ptq.graph.edit import own_constant
from onnxslim_ptq.graph.graph import Graph

__all__ = ["normalize_gemm"]


def normalize_gemm(graph: Graph) -> int:
    """Fold alpha and beta into constants and flatten biases shaped [1, N] or []; returns how many nodes changed."""
    changed = 0
    for node in graph.nodes:
        if node.op != "Gemm":
            continue
        weight = graph.value(node.inputs[1])
        bias = graph.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
        dynamic_bias = len(node.inputs) > 2 and bool(node.inputs[2].name) and bias is None
        if weight is None or weight.dtype not in (np.float32, np.float16) or dynamic_bias:
            continue
        alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
        channels = weight.shape[0 if node.attrs.get("transB", 0) else 1]
        flat = None if bias is None else _flat(bias, channels)
        if bias is not None and flat is None:
            continue
        if alpha != 1.0:
            own_constant(graph, node, 1, (weight * weight.dtype.type(alpha)))
        if flat is not None and (beta != 1.0 or flat.shape != bias.shape):
            own_constant(graph, node, 2, (flat * flat.dtype.type(beta)))
        elif alpha == 1.0 and beta == 1.0:
            continue
        graph.set_attributes(node, {k: v for k, v in node.attrs.items() if k not in ("alpha", "beta")})
        changed += 1
    return changed


def _flat(bias: np.ndarray, channels: int) -> np.ndarray | None:
    if bias.size == 1:
        return np.full(channels, bias.reshape(-1)[0], bias.dtype)
    if bias.size == channels and bias.shape[-1] == channels:
        return bias.reshape(-1)
    return None
