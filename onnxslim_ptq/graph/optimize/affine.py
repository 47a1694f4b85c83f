"""Folds a constant Mul, Add, Sub or Div per channel into the Conv, ConvTranspose or Gemm before it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_ptq.graph.edit import bypass, is_standard, per_channel_values
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize.scale import output_channels, scale_layer

__all__ = ["fold_affine"]

Floats = NDArray[np.float64]
_FIRST_OPSET = 7  # before, broadcasting followed an axis attribute


def fold_affine(graph: Graph) -> int:
    """Fold every such node that alone reads a layer's output; returns how many."""
    if graph.opset < _FIRST_OPSET:
        return 0
    return sum(
        _fold(graph, node)
        for node in graph.nodes
        if node.op in ("Mul", "Add", "Sub", "Div") and is_standard(node)
    )


def _fold(graph: Graph, node: gs.Node) -> bool:
    ports = [p for p in (0, 1) if not graph.is_constant(node.inputs[p])]
    if len(ports) != 1:
        return False
    source = node.inputs[ports[0]]
    layer = graph.producer(source)
    known = output_channels(graph, layer)
    if layer is None or known is None or not graph.reads_alone(node, source):
        return False
    channels, rank = known
    constant = per_channel_values(graph.value(node.inputs[1 - ports[0]]), channels, rank, 1)
    steps = None if constant is None else _factor_and_shift(node.op, ports[0], constant)
    if steps is None or not scale_layer(graph, layer, *steps):
        return False
    bypass(graph, layer, node)
    return True


def _factor_and_shift(op: str, port: int, c: Floats) -> tuple[Floats, Floats] | None:
    """(factor, shift) with op(y, c) = factor * y + shift, y being input ``port``; None for c / y and y / 0."""
    one, zero = np.ones(c.size), np.zeros(c.size)
    if op == "Mul":
        return c, zero
    if op == "Add":
        return one, c
    if op == "Sub":
        return (one, -c) if port == 0 else (-one, c)
    return (1.0 / c, zero) if port == 0 and c.all() else None
