"""The QOperator form: QLinearConv and QLinearMatMul, whose inputs and outputs are integers.

DequantizeLinear -> Conv | MatMul [-> Relu] -> QuantizeLinear becomes one operator. A Relu vanishes where the lowest
code means 0. A layer whose output is not quantized, and every Gemm (ONNX has no integer form of it), stays QDQ.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from calib.model import Model
from onnxslim_ptq.core.qmath import quantize_bias
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.graph.graph import Graph

__all__ = ["render_qoperator"]

_FORMS = {"Conv": "QLinearConv", "MatMul": "QLinearMatMul"}


def render_qoperator(model: Model, plan: QuantPlan, target: Target) -> Model:
    """The plan as QDQ, with every layer between integers as one operator; raises what `render_qdq` raises."""
    graph = Graph(render_qdq(model, plan, target))
    for node in [n for n in graph.nodes if n.op in _FORMS]:
        _fuse(graph, node)
    for node in [n for n in graph.nodes if n.op == "DequantizeLinear"]:
        if not graph.consumers(node.outputs[0]) and node.outputs[0].name not in graph.outputs:
            graph.remove(node)
    rendered = graph.to_model()
    rendered.proto.ir_version = graph.model.proto.ir_version
    return rendered


def _fuse(graph: Graph, node: gs.Node) -> None:
    sources = [graph.producer(t) for t in node.inputs[:2]]
    if any(s is None or s.op != "DequantizeLinear" for s in sources):
        return
    relu = graph.sole_consumer(node.outputs[0])
    last = relu
    if relu is not None and relu.op == "Relu":
        last = graph.sole_consumer(relu.outputs[0])
    else:
        relu = None
    if last is None or last.op != "QuantizeLinear" or (relu is not None and not _lowest_is_zero(graph, last)):
        return
    inputs: list[gs.Tensor] = []
    for source in sources[:2]:
        assert source is not None
        inputs += source.inputs[:3]
    inputs += last.inputs[1:3]
    if len(inputs) < 8:
        return
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = _integer_bias(graph, node, inputs)
        if bias is None:
            return
        inputs.append(bias)
    name, attrs, form, result = node.name, dict(node.attrs), _FORMS[node.op], last.outputs[0]
    for gone in (node, relu, last):
        if gone is not None:
            graph.remove(gone)
    graph.add_node(form, name, inputs, [result], attrs)


def _integer_bias(graph: Graph, node: gs.Node, numbers: list[gs.Tensor]) -> gs.Tensor | None:
    """The int32 bias behind its DequantizeLinear; one that is float (added by bias correction) is rounded here."""
    source = graph.producer(node.inputs[2])
    if source is not None:
        return source.inputs[0] if source.op == "DequantizeLinear" else None
    values, s_x, s_w = (graph.value(t) for t in (node.inputs[2], numbers[1], numbers[4]))
    if values is None or s_x is None or s_w is None:
        return None
    codes, clipped = quantize_bias(values, np.asarray(s_x, np.float64) * np.asarray(s_w, np.float64))
    return None if clipped else graph.constant(f"{node.inputs[2].name}_quantized", codes)


def _lowest_is_zero(graph: Graph, quantize: gs.Node) -> bool:
    zero = graph.value(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    return zero is not None and int(zero) == {"uint8": 0, "int8": -128}.get(zero.dtype.name)
