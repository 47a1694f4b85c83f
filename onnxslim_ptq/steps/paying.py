"""Leaves layers float whose integer form would cost accuracy and gain no time on the target."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxslim_ptq.core.choice import LayerChoice, StaticActivation
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.steps.placement import after_activation

__all__ = ["not_paying"]

_REASON = "its input arrives in float, and a depthwise Conv is no faster in int8 there"

_PASS_THROUGH = frozenset(
    {
        "Clip",
        "Flatten",
        "Identity",
        "MaxPool",
        "Pad",
        "Relu",
        "Reshape",
        "Resize",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def not_paying(
    graph: Graph, layers: Mapping[str, tuple[Linear, LayerChoice]], target: Target
) -> dict[str, str]:
    """Depthwise Convs (one input channel per group) that do not read a value which is quantized anyway.

    Two quantizers less add no error, and the mobile networks of docs/benchmarks.md did not get slower for it.
    Behind a quantized value it stays integer: its input has been paid for there already.
    """
    floats: dict[str, str] = {}
    if target.depthwise_pays:
        return floats
    quantized: set[str] = set()
    for name, (layer, choice) in layers.items():
        if layer.op != "Conv" or not isinstance(choice.activation, StaticActivation):
            continue
        node = graph.node(name)
        weight = graph.value(node.inputs[layer.weight])
        depthwise = weight is not None and weight.shape[1] == 1 and int(node.attrs.get("group", 1)) > 1
        if depthwise and not _arrives_quantized(graph, node.inputs[layer.activation], quantized):
            floats[name] = _REASON
        else:
            quantized.add(after_activation(graph, node, choice.activation).name)
    return floats


def _arrives_quantized(graph: Graph, tensor: gs.Tensor, quantized: set[str]) -> bool:
    """Whether ``tensor`` is one of ``quantized``, as it is or after operators that ONNX Runtime moves a
    DequantizeLinear across."""
    while tensor.name not in quantized:
        producer = graph.producer(tensor)
        if producer is None or producer.op not in _PASS_THROUGH:
            return False
        tensor = producer.inputs[0]
    return True
