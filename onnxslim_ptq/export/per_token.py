"""Per-token activations in standard operators: every row along the last axis gets its own numbers while the model runs.

    symmetric:   r = max|x|               c = 0
    asymmetric:  r = (max x - min x) / 2  c = (max x + min x) / 2
    y = x W = r * ((x - c) / r) W + c * (1 W)

Where a known scale s and zero point z serve unless a condition holds, r = 127 s and c = -z s take the place of the
row's: the codes and products are then those of static quantization, with the same one integer weight. There may be
several pairs s, z, of which a number picks one while the model runs.

(x - c) / r lies in [-1, 1] and goes through QuantizeLinear and DequantizeLinear with the constant scale 1/127, so that
ONNX Runtime turns the inner MatMul into an integer kernel. The layer is linear: taking r and c out before and putting
them back behind is exact, 1 W being the column sums of the rounded weight. A bias goes behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from calib.types import Array
from onnxslim_ptq.core.dtypes import IntType
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import PerTensor, QParams, QuantSpec, WeightCodes
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Known", "Rows", "normalize", "row_params", "scale_back", "switch"]

_AXES_ARE_INPUTS = 18  # of ReduceMax and ReduceMin
_TINY = 1e-7  # a row of equal values keeps codes 0; representable in float16


@dataclass(frozen=True)
class Rows:
    """Normalized rows in [-1, 1], what they were divided by, and what was taken off before (None: symmetric)."""

    values: gs.Tensor
    scales: gs.Tensor
    centres: gs.Tensor | None
    dtype: type[np.floating]


@dataclass(frozen=True)
class Known:
    """Numbers known before the model runs, all of one type; ``row``, a scalar int64, is the index of those that serve
    (None: there is one)."""

    params: Sequence[QParams]
    row: gs.Tensor | None = None


def row_params(dtype: IntType) -> QParams:
    """The numbers of a normalized row: scale 1/127, zero point in the middle of the type."""
    largest = (dtype.highest - dtype.lowest) // 2
    middle = (dtype.highest + dtype.lowest + 1) // 2
    return QParams(QuantSpec(dtype, PerTensor(), True), np.asarray(1 / largest), np.asarray(middle, np.int64))


def normalize(graph: Graph, tensor: gs.Tensor, dtype: type[np.floating], symmetric: bool) -> Rows:
    """The rows of ``tensor``; their numbers keep the last axis as 1."""
    name = tensor.name
    if symmetric:
        magnitude = _add(graph, "Abs", f"{name}_abs", [tensor])
        largest, centres, moved = _reduce(graph, "ReduceMax", name, magnitude), None, tensor
    else:
        half = graph.constant(f"{name}_half", np.asarray(0.5, dtype))
        high, low = (_reduce(graph, op, name, tensor) for op in ("ReduceMax", "ReduceMin"))
        width = _add(graph, "Sub", f"{name}_row_width", [high, low])
        middle = _add(graph, "Add", f"{name}_row_ends", [high, low])
        largest, centres = (
            _add(graph, "Mul", f"{name}_{part}", [value, half])
            for part, value in (("row_radius", width), ("row_centre", middle))
        )
        moved = _add(graph, "Sub", f"{name}_centred", [tensor, centres])
    floor = graph.constant(f"{name}_row_floor", np.asarray(_TINY, dtype))
    scales = _add(graph, "Max", f"{name}_row_scale", [largest, floor])
    return Rows(_add(graph, "Div", f"{name}_rows", [moved, scales]), scales, centres, dtype)


def switch(graph: Graph, rows: Rows, tensor: gs.Tensor, known: Known, static: gs.Tensor) -> Rows:
    """``rows`` of ``tensor``, with those that the numbers ``known`` give where the scalar bool ``static`` is true."""
    name, dtype = tensor.name, known.params[0].spec.dtype
    middle = (dtype.highest + dtype.lowest + 1) // 2
    largest = (dtype.highest - dtype.lowest) // 2

    def chosen(what: str, values: list[float]) -> gs.Tensor:
        if known.row is None:
            return graph.constant(f"{name}_static_{what}", np.asarray(values[0], rows.dtype))
        table = graph.constant(f"{name}_static_{what}", np.asarray(values, rows.dtype))
        return _add(graph, "Gather", f"{name}_step_{what}", [table, known.row])

    radius = chosen("radius", [largest * float(p.scale) for p in known.params])
    scales = _add(graph, "Where", f"{name}_scale", [static, radius, rows.scales])
    centres, moved = rows.centres, tensor
    if centres is not None:
        own = chosen("centre", [-(int(p.zero_point) - middle) * float(p.scale) for p in known.params])
        centres = _add(graph, "Where", f"{name}_centre", [static, own, centres])
        moved = _add(graph, "Sub", f"{name}_from_centre", [tensor, centres])
    return Rows(_add(graph, "Div", f"{name}_switched", [moved, scales]), scales, centres, rows.dtype)


def scale_back(graph: Graph, node: gs.Node, rows: Rows, weight: WeightCodes) -> None:
    """Undo `normalize` behind ``node``, which multiplies by ``weight``; a Gemm's bias is added last."""
    result = node.outputs[0]
    name = result.name
    tensor = graph.variable(f"{name}_normalized")
    node.outputs[0] = tensor
    added: list[gs.Tensor] = []
    if rows.centres is not None:
        sums = graph.constant(f"{name}_weight_sums", _column_sums(node, weight, rows.dtype))
        added.append(_add(graph, "Mul", f"{name}_centre", [rows.centres, sums]))
    if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2].name:
        added.append(node.inputs[2])
        # An empty name in its place is as good in ONNX, but OpenVINO's CPU plug-in stumbles over it.
        del node.inputs[2]
    steps = [("Mul", rows.scales), *(("Add", value) for value in added)]
    for index, (op, value) in enumerate(steps):
        last = index == len(steps) - 1
        made = result if last else graph.variable(f"{name}_{op.lower()}")
        graph.add_node(op, f"{name}_{op}", [tensor, value], [made])
        tensor = made


def _column_sums(node: gs.Node, weight: WeightCodes, dtype: type[np.floating]) -> Array:
    """Sums over the input channels, [out], or [..., 1, out] of a stack."""
    real = dequantize(weight.codes, weight.params)
    swapped = node.op == "Gemm" and bool(node.attrs.get("transB", 0))
    axis = 1 if swapped else real.ndim - 2
    sums = real.sum(axis=axis, dtype=np.float64, keepdims=real.ndim > 2)
    return np.asarray(sums, dtype)


def _reduce(graph: Graph, op: str, name: str, tensor: gs.Tensor) -> gs.Tensor:
    result = graph.variable(f"{name}_{op.removeprefix('Reduce').lower()}")
    if graph.opset >= _AXES_ARE_INPUTS:
        axes = graph.constant(f"{name}_last_axis", np.asarray([-1], np.int64))
        graph.add_node(op, f"{name}_{op}", [tensor, axes], [result], {"keepdims": 1})
    else:
        graph.add_node(op, f"{name}_{op}", [tensor], [result], {"axes": [-1], "keepdims": 1})
    return result


def _add(graph: Graph, op: str, name: str, inputs: list[gs.Tensor]) -> gs.Tensor:
    result = graph.variable(name)
    graph.add_node(op, f"{name}_{op}", inputs, [result])
    return result
