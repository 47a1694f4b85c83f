"""Per-token activations in standard operators: every row along the last axis gets its own scale while the model runs.

r = max|x| over the last axis; x/r -> QuantizeLinear -> DequantizeLinear with the constant scale 1/127 -> layer ->
Mul(r). The layer is linear, so taking r out before and putting it back behind is exact, and ONNX Runtime turns the
inner MatMul into an integer kernel because its activation scale is one constant. A bias goes behind the Mul.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.core.dtypes import IntType
from onnxslim_ptq.core.spec import PerTensor, QParams, QuantSpec
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Normalized", "normalize", "row_params", "scale_back"]

_AXES_ARE_INPUTS = 18  # of ReduceMax
_TINY = 1e-7  # a row of zeros keeps codes 0; representable in float16
Normalized = tuple[gs.Tensor, gs.Tensor]


def row_params(dtype: IntType) -> QParams:
    """The numbers of a normalized row: scale 1/127, zero point in the middle of the type."""
    largest = (dtype.highest - dtype.lowest) // 2
    middle = (dtype.highest + dtype.lowest + 1) // 2
    return QParams(QuantSpec(dtype, PerTensor(), True), np.asarray(1 / largest), np.asarray(middle, np.int64))


def normalize(graph: Graph, tensor: gs.Tensor, dtype: type[np.floating]) -> Normalized:
    """x / r with values in [-1, 1], and r, which keeps the last axis as 1."""
    name = tensor.name
    magnitude, largest, rows, result = (
        graph.variable(f"{name}_{part}") for part in ("abs", "row_max", "row_scale", "rows")
    )
    graph.add_node("Abs", f"{name}_Abs", [tensor], [magnitude])
    if graph.opset >= _AXES_ARE_INPUTS:
        axes = graph.constant(f"{name}_last_axis", np.asarray([-1], np.int64))
        graph.add_node("ReduceMax", f"{name}_ReduceMax", [magnitude, axes], [largest], {"keepdims": 1})
    else:
        graph.add_node(
            "ReduceMax", f"{name}_ReduceMax", [magnitude], [largest], {"axes": [-1], "keepdims": 1}
        )
    floor = graph.constant(f"{name}_row_floor", np.asarray(_TINY, dtype))
    graph.add_node("Max", f"{name}_Max", [largest, floor], [rows])
    graph.add_node("Div", f"{name}_Div", [tensor, rows], [result])
    return result, rows


def scale_back(graph: Graph, node: gs.Node, rows: gs.Tensor) -> None:
    """Multiply what ``node`` makes by ``rows``; a Gemm's bias is added behind."""
    result = node.outputs[0]
    raw = graph.variable(f"{result.name}_normalized")
    node.outputs[0] = raw
    bias = node.inputs[2] if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2].name else None
    if bias is None:
        graph.add_node("Mul", f"{result.name}_Mul", [raw, rows], [result])
        return
    graph.set_input(node, 2, gs.Variable.empty())
    scaled = graph.variable(f"{result.name}_scaled")
    graph.add_node("Mul", f"{result.name}_Mul", [raw, rows], [scaled])
    graph.add_node("Add", f"{result.name}_Add", [scaled, bias], [result])
