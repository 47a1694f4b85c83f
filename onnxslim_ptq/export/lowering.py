"""An Ascend graph as standard integer operators: ONNX Runtime computes the same integers as the device is asked for.

AscendQuant -> QuantizeLinear; Conv -> ConvInteger; MatMul, Gemm -> MatMulInteger; int32 Add stays; AscendDequant
-> Cast and Mul. Codes are uint8, 128 above Ascend's: q and zero point move together, so every accumulator is the same
number. The scale is s = float32(1 / scale), as `core.qmath.reciprocal_pair` arranges it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from calib.errors import GraphError
from calib.model import Model
from calib.types import Array
from onnxslim_ptq.export.ascend_nodes import constant_of, dequant_scale, layer_weight, quant_numbers
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.ir import lowest_ir

__all__ = ["is_ascend", "lower_ascend"]

_SHIFT = 128


def is_ascend(model: Model) -> bool:
    """Whether the graph holds AscendQuant nodes."""
    return any(node.op_type == "AscendQuant" for node in model.proto.graph.node)


def lower_ascend(model: Model) -> Model:
    """The same computation for ONNX Runtime; value and node names stay.

    Raises:
        GraphError: a node between AscendQuant and AscendDequant is none of Conv, Gemm, MatMul and Add, or one of them
            asks for more than these operators give.
    """
    graph = Graph(model)
    zeros: dict[str, gs.Constant] = {}
    for node in [n for n in graph.nodes if n.op == "AscendQuant"]:
        step, zero = quant_numbers(node)
        codes = node.outputs[0].name
        zeros[codes] = _quantize(graph, node, step, zero)
    layers: dict[str, _Layer] = {}
    for node in graph.nodes:
        source = node.inputs[0].name if node.inputs else ""
        if source in zeros and node.op != "QuantizeLinear":
            result = node.outputs[0].name
            layers[result] = _integer_layer(graph, node, zeros[source])
    for node in [n for n in graph.nodes if n.op == "AscendDequant"]:
        _dequantize(graph, node, layers)
    lowered = graph.to_model()
    lowered.proto.ir_version = lowest_ir(lowered.proto)
    return lowered


@dataclass(frozen=True)
class _Layer:
    """The output channels of a layer, and how many axes lie behind theirs: the positions of a Conv."""

    channels: int
    trailing: int


def _quantize(graph: Graph, node: gs.Node, scale: np.float32, zero: int) -> gs.Constant:
    source, codes, name = node.inputs[0], node.outputs[0], node.name
    graph.remove(node)
    zero_point = graph.constant(f"{name}.zero_point", np.asarray(zero + _SHIFT, np.uint8))
    step = graph.constant(f"{name}.scale", np.asarray(scale))
    graph.add_node("QuantizeLinear", name, [source, step, zero_point], [codes])
    return zero_point


def _integer_layer(graph: Graph, node: gs.Node, zero: gs.Constant) -> _Layer:
    name, op = node.name, node.op
    values = layer_weight(graph, node, node.inputs[0])
    codes, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    attrs = {k: v for k, v in node.attrs.items() if op == "Conv"}
    numbers = None if bias is None else constant_of(graph, node, 2)
    graph.remove(node)
    sums = result if bias is None else graph.variable(f"{result.name}.products")
    kind = "ConvInteger" if op == "Conv" else "MatMulInteger"
    graph.add_node(kind, name, [codes, weight, zero], [sums], attrs)
    layer = _Layer(values.shape[0], values.ndim - 2) if op == "Conv" else _Layer(values.shape[-1], 0)
    if bias is not None and numbers is not None:
        spread = graph.constant(f"{bias.name}.spread", _behind(numbers, layer.trailing))
        graph.add_node("Add", f"{name}.bias", [sums, spread], [result])
    return layer


def _dequantize(graph: Graph, node: gs.Node, layers: dict[str, _Layer]) -> None:
    deq = dequant_scale(graph, node)
    sums, result, name = node.inputs[0], node.outputs[0], node.name
    made, first = graph.producer(sums), sums.name
    if first not in layers and made is not None and made.op == "Add":
        first = next((t.name for t in made.inputs if t.name in layers), "")
    if first not in layers:
        raise GraphError(f"node '{name}': AscendDequant reads no layer behind AscendQuant")
    graph.remove(node)
    real = graph.variable(f"{name}.float")
    graph.add_node("Cast", f"{name}.Cast", [sums], [real], {"to": int(TensorProto.FLOAT)})
    layer = layers[first]
    # One number per channel, although one may do: ONNX Runtime (1.31) folds a factor that is a single number into the
    # MatMul behind it and forgets its other readers.
    wide = np.broadcast_to(deq, layer.channels) if deq.size == 1 else deq
    scale = graph.constant(f"{name}.scale", _behind(wide, layer.trailing))
    graph.add_node("Mul", name, [real, scale], [result])


def _behind(values: Array, trailing: int) -> Array:
    """One value per channel with ``trailing`` axes of 1 behind: the positions of a Conv."""
    return values.reshape(-1, *[1] * trailing)
