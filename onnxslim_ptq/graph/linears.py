"""Finds the layers that have a constant weight, and says for every other candidate why it is none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from calib.types import Array
from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.precision import is_quantization

__all__ = ["LINEAR_OPS", "Linear", "find_linears"]

LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
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
    functions = {(f.domain, f.name) for f in graph.model.proto.functions}
    for node in graph.nodes:
        if graph.has_subgraph(node):
            reasons[node.name] = f"{node.op}: layers inside its subgraphs stay float"
        elif (node.domain or "", node.op) in functions:
            reasons[node.name] = f"layers inside the local function {node.op} stay float"
        elif node.op in LINEAR_OPS:
            result = _linear(graph, node)
            if isinstance(result, str):
                reasons[node.name] = result
            else:
                found.append(result)
        elif node.op in _OTHER_WEIGHTED:
            reasons[node.name] = f"{node.op} has no integer form in a QuantizeLinear/DequantizeLinear graph"
    return found, reasons


_OTHER_WEIGHTED = frozenset(
    {
        "LSTM",
        "GRU",
        "RNN",
        "Einsum",
        "DeformConv",
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "MoE",
    }
)


def _linear(graph: Graph, node: gs.Node) -> Linear | str:
    if not is_standard(node):
        return f"{node.op} of domain {node.domain} is not the operator of that name in ONNX"
    if len(node.inputs) < 2:
        return "it has no weight"
    activation, weight = node.inputs[0], node.inputs[1]
    if _touches_integers(graph, node):
        return "it reads or feeds values that are quantized already"
    if not graph.is_constant(weight):
        if graph.is_constant(activation):
            return "its constant is on the left side; ONNX Runtime has no integer kernel for that"
        return "both inputs are computed at run time (attention-like)"
    if graph.is_constant(activation):
        return "both inputs are constant"
    values = graph.value(weight)
    assert values is not None
    reason = _unfit(node, values)
    if reason is not None:
        return reason
    channels = _channels(node, values)
    bias = _bias_port(graph, node, channels)
    if isinstance(bias, str):
        return bias
    return Linear(
        node.name,
        node.op,
        0,
        1,
        bias,
        activation.name,
        weight.name,
        node.inputs[bias].name if bias is not None else None,
        node.outputs[0].name,
        _channel_axis(node, values.ndim),
        channels,
        int(values.size // channels),
    )


def _touches_integers(graph: Graph, node: gs.Node) -> bool:
    producers = [graph.producer(t) for t in node.inputs]
    neighbours = [p for p in producers if p is not None] + [
        c for t in node.outputs for c in graph.consumers(t)
    ]
    return any(is_quantization(n.op) for n in neighbours)


def _unfit(node: gs.Node, weight: Array) -> str | None:
    """Why a constant weight cannot become int8, or None."""
    if weight.dtype not in _FLOATS:
        return f"its weight has type {weight.dtype}, not float32 or float16"
    rank = weight.ndim
    if (
        weight.size == 0
        or rank < 2
        or (rank < 3 and node.op in _CONVOLUTIONS)
        or (rank > 2 and node.op == "Gemm")
    ):
        return f"its weight has shape {list(weight.shape)}"
    if not np.isfinite(weight).all():
        return "its weight holds NaN or Inf"
    return None


def _channel_axis(node: gs.Node, ndim: int) -> int | None:
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    # ONNX Runtime turns a stack of matrices with one scale per column into a kernel that refuses it at run time.
    return 1 if ndim == 2 else None


def _channels(node: gs.Node, weight: Array) -> int:
    if node.op == "ConvTranspose":
        return int(weight.shape[1] * node.attrs.get("group", 1))
    if node.op == "MatMul":
        return int(weight.shape[-1])
    return int(weight.shape[_channel_axis(node, weight.ndim) or 0])


def _bias_port(graph: Graph, node: gs.Node, channels: int) -> int | str | None:
    if node.op == "MatMul" or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    bias = graph.value(node.inputs[2])
    if bias is None:
        return "its bias is computed at run time"
    if bias.shape != (channels,):
        return f"its bias has shape {list(bias.shape)}, which is not one value per output channel"
    if not np.isfinite(bias).all():
        return "its bias holds NaN or Inf"
    if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return "its alpha or beta is not 1 and could not be folded into its constants"
    return 2
