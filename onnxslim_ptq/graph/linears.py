"""Finds the layers that have a constant weight, and says for every other candidate why it is none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.graph import Graph

__all__ = ["LINEAR_OPS", "Linear", "find_linears"]

LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FLOATS = (np.float32, np.float16)


@dataclass(frozen=True)
class Linear:
    """A Conv, ConvTranspose, Gemm or MatMul with constant weight.

    Ports are input positions; ``channel_axis`` is the weight's output-channel axis (None: one scale only serves),
    ``channels`` how many there are. ``bias`` is None when there is none.
    """

    node: str
    op: str
    activation: int
    weight: int
    bias: int | None
    activation_name: str
    weight_name: str
    bias_name: str | None
    output_name: str
    channel_axis: int | None
    channels: int
    macs_per_output: int


def find_linears(graph: Graph) -> tuple[list[Linear], dict[str, str]]:
    """All quantizable layers in graph order, and a reason for each node that looks like one but is not."""
    found: list[Linear] = []
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        if graph.has_subgraph(node):
            reasons[node.name] = f"{node.op}: layers inside its subgraphs stay float"
        elif node.op in LINEAR_OPS and node.domain in (None, "", "ai.onnx"):
            result = _linear(graph, node)
            if isinstance(result, str):
                reasons[node.name] = result
            else:
                found.append(result)
        elif node.op in _OTHER_WEIGHTED:
            reasons[node.name] = f"{node.op} has no integer form in a QuantizeLinear/DequantizeLinear graph"
    return found, reasons


_OTHER_WEIGHTED = frozenset({"LSTM", "GRU", "RNN", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention"})


def _linear(graph: Graph, node: gs.Node) -> Linear | str:
    activation, weight = node.inputs[0], node.inputs[1]
    if not graph.is_constant(weight):
        if graph.is_constant(activation):
            return "its constant is on the left side; ONNX Runtime has no integer kernel for that"
        return "both inputs are computed at run time (attention-like)"
    if graph.is_constant(activation):
        return "both inputs are constant"
    values = graph.value(weight)
    assert values is not None
    if values.dtype not in _FLOATS:
        return f"its weight has type {values.dtype}, not float32 or float16"
    if values.ndim < 2 or values.size == 0:
        return f"its weight has shape {list(values.shape)}"
    if not np.isfinite(values).all():
        return "its weight holds NaN or Inf"
    bias = _bias_port(graph, node)
    if isinstance(bias, str):
        return bias
    axis = _channel_axis(node, values.ndim)
    channels = _channels(node, values)
    return Linear(
        node.name, node.op, 0, 1, bias, activation.name, weight.name,
        node.inputs[bias].name if bias is not None else None, node.outputs[0].name, axis, channels,
        int(values.size // max(channels, 1)),
    )


def _channel_axis(node: gs.Node, ndim: int) -> int | None:
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return ndim - 1


def _channels(node: gs.Node, values: np.ndarray) -> int:
    if node.op == "ConvTranspose":
        return int(values.shape[1] * node.attrs.get("group", 1))
    axis = _channel_axis(node, values.ndim)
    return int(values.shape[axis if axis is not None else 0])


def _bias_port(graph: Graph, node: gs.Node) -> int | str | None:
    if node.op == "MatMul" or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    bias = graph.value(node.inputs[2])
    if bias is None:
        return "its bias is computed at run time"
    if bias.ndim != 1:
        return f"its bias has shape {list(bias.shape)}, which is not one value per output channel"
    return 2
