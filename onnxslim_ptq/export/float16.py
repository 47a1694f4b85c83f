"""Float16 models on targets without float16 integer kernels: quantized layers compute in float32 between casts.

x (float16) -> Cast -> QuantizeLinear -> DequantizeLinear -> layer -> Cast -> y (float16): everything between the casts
becomes an integer kernel, and no QuantizeLinear with a float16 scale (opset 19) is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.graph.edit import is_captured, is_standard
from onnxslim_ptq.graph.graph import Graph

__all__ = ["ABSORBED", "compute_in_float32", "half_layers"]

# Integer kernels take these in when they follow a layer and precede its QuantizeLinear.
ABSORBED = frozenset({"Relu", "Clip"})


def half_layers(graph: Graph, plan: QuantPlan) -> set[str]:
    """The layers of ``plan`` whose weight is float16."""
    return {
        use.node
        for use in plan.weights
        if (value := graph.value(graph.node(use.node).inputs[use.port])) is not None
        and value.dtype == np.float16
    }


def compute_in_float32(graph: Graph, layers: set[str]) -> None:
    """Give ``layers``, their Q/DQ pairs and absorbed activation functions float32 values, and all others float16.

    Every DequantizeLinear around ``layers`` makes float32 already. After this, no operator has inputs of both types.
    """
    region = {name: graph.node(name) for name in layers}
    for name in layers:
        for reader in graph.consumers(graph.node(name).outputs[0]):
            if _is_absorbed(graph, graph.node(name), reader):
                region[reader.name] = reader
    casts = _Casts(graph)
    inside = {id(n) for n in region.values()}
    pairs = _quantizers_around(graph, list(region.values()))
    for node in region.values():
        _widen_outputs(casts, node, inside | {id(q) for q, _ in pairs})
    for node in region.values():
        for port, tensor in enumerate(node.inputs):
            if graph.is_constant(tensor):
                node.inputs[port] = casts.constant(tensor)
            elif tensor.name and not casts.is_wide(tensor):
                node.inputs[port] = casts.up(tensor)
    for quantize, dequantize in pairs:
        if not casts.is_wide(quantize.inputs[0]):
            quantize.inputs[0] = casts.up(quantize.inputs[0])
        _narrow_readers(casts, dequantize, inside)


def _is_absorbed(graph: Graph, layer: gs.Node, reader: gs.Node) -> bool:
    """Whether ``reader`` alone reads the layer and is read by a QuantizeLinear."""
    if (
        reader.op not in ABSORBED
        or not is_standard(reader)
        or not graph.reads_alone(reader, layer.outputs[0])
    ):
        return False
    return any(n.op == "QuantizeLinear" for n in graph.consumers(reader.outputs[0]))


def _quantizers_around(graph: Graph, nodes: list[gs.Node]) -> list[tuple[gs.Node, gs.Node]]:
    """The (QuantizeLinear, DequantizeLinear) pairs that read a result of ``nodes`` or that ``nodes`` read."""
    found: dict[int, tuple[gs.Node, gs.Node]] = {}
    for node in nodes:
        for tensor in node.inputs:
            dequantize = graph.producer(tensor)
            if dequantize is None or dequantize.op != "DequantizeLinear":
                continue
            quantize = graph.producer(dequantize.inputs[0])  # None: an integer weight
            if quantize is not None and quantize.op == "QuantizeLinear":
                found[id(quantize)] = (quantize, dequantize)
        for quantize in graph.consumers(node.outputs[0]):
            if quantize.op == "QuantizeLinear":
                found[id(quantize)] = (quantize, graph.consumers(quantize.outputs[0])[0])
    return list(found.values())


def _widen_outputs(casts: _Casts, node: gs.Node, wide_readers: set[int]) -> None:
    """``node`` makes a float32 value; readers outside get it through a Cast to the value they know."""
    graph = casts.graph
    narrow = node.outputs[0]
    readers = [(n, p) for n in graph.consumers(narrow) for p, t in enumerate(n.inputs) if t is narrow]
    by_name = narrow.name in graph.outputs or is_captured(graph, narrow)
    wide = casts.wide(f"{narrow.name}_float32")
    node.outputs[0] = wide
    for reader, port in readers:
        if id(reader) in wide_readers:
            reader.inputs[port] = wide
    if by_name or any(id(n) not in wide_readers for n, _ in readers):
        casts.add(wide, narrow, TensorProto.FLOAT16)


def _narrow_readers(casts: _Casts, dequantize: gs.Node, inside: set[int]) -> None:
    """Readers of a DequantizeLinear that do not compute in float32 get its value as float16."""
    graph = casts.graph
    result = dequantize.outputs[0]
    readers = [(n, p) for n in graph.consumers(result) for p, t in enumerate(n.inputs) if t is result]
    outside = [(n, p) for n, p in readers if id(n) not in inside and n.op != "Cast"]
    if result.name in graph.outputs or is_captured(graph, result):  # the name belongs to the float16 value
        wide = casts.wide(f"{result.name}_float32")
        dequantize.outputs[0] = wide
        for reader, port in readers:
            if id(reader) in inside:
                reader.inputs[port] = wide
        casts.add(wide, result, TensorProto.FLOAT16)
    elif outside:
        narrow = graph.variable(f"{result.name}_float16")
        casts.add(result, narrow, TensorProto.FLOAT16)
        for reader, port in outside:
            reader.inputs[port] = narrow


@dataclass
class _Casts:
    """The Cast nodes made so far, one per value and direction, and the values known to be float32."""

    graph: Graph
    known: set[int] = field(default_factory=set)
    raised: dict[str, gs.Tensor] = field(default_factory=dict)
    constants: dict[str, gs.Constant] = field(default_factory=dict)

    def is_wide(self, tensor: gs.Tensor) -> bool:
        producer = self.graph.producer(tensor)
        return id(tensor) in self.known or (producer is not None and producer.op == "DequantizeLinear")

    def wide(self, name: str) -> gs.Variable:
        tensor = self.graph.variable(name)
        self.known.add(id(tensor))
        return tensor

    def up(self, tensor: gs.Tensor) -> gs.Tensor:
        if tensor.name not in self.raised:
            self.raised[tensor.name] = self.wide(f"{tensor.name}_float32")
            self.add(tensor, self.raised[tensor.name], TensorProto.FLOAT)
        return self.raised[tensor.name]

    def constant(self, tensor: gs.Constant) -> gs.Constant:
        values = self.graph.value(tensor)
        if values is None or values.dtype != np.float16:
            return tensor
        if tensor.name not in self.constants:
            name = f"{tensor.name}_float32"
            self.constants[tensor.name] = self.graph.constant(name, values.astype(np.float32))
        return self.constants[tensor.name]

    def add(self, source: gs.Tensor, result: gs.Tensor, to: int) -> None:
        self.graph.add_node("Cast", f"{result.name}_Cast", [source], [result], {"to": int(to)})
