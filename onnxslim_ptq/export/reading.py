"""Reads a quantized graph back into a float graph and a plan: the integers in the file, nothing measured anew.

QDQ: an activation passes QuantizeLinear -> DequantizeLinear, weights and biases are integers behind DequantizeLinear.
Ascend: AscendQuant tells s_x = float32(1 / scale); the weight's scale is deq / s_x.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from calib.errors import GraphError
from calib.model import Model
from onnxslim_ptq.core.dtypes import INT8, INT32, IntType, int_type
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import (
    BiasCodes,
    Grain,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QuantPlan,
    QuantSpec,
    Result,
    Slot,
    Use,
    WeightCodes,
)
from onnxslim_ptq.export.ascend_nodes import constant_of, dequant_scale, layer_weight, quant_numbers
from onnxslim_ptq.graph.edit import is_captured
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import LINEAR_OPS

__all__ = ["Reading", "read_quantized"]


@dataclass
class Reading:
    """The float graph, whose weights are the real values of their codes, and the plan that quantizes it again."""

    graph: Graph
    plan: QuantPlan = field(default_factory=QuantPlan)

    def add_weight(self, node: gs.Node, codes: np.ndarray, params: QParams) -> None:
        tensor = node.inputs[1]
        name = tensor.name.removesuffix("_quantized")
        key = f"{name}@{params.axis}"
        if key not in self.plan.weight_codes:
            made = WeightCodes(codes, params, "as read", name, tensor.name)
            self.plan.weight_codes[key] = made
        self.plan.weights[Use(node.name, 1)] = Slot(params.spec, key)

    def add_bias(self, node: gs.Node, codes: np.ndarray, scale: np.ndarray, name: str) -> None:
        key = f"{node.name}.bias"
        spec = QuantSpec(INT32, PerChannel(0), True)
        flat = np.asarray(scale, np.float64).reshape(-1)
        if codes.ndim != 1 or flat.size not in (1, codes.size):
            raise GraphError(
                f"node '{node.name}': {flat.size} scales for a bias of shape {list(codes.shape)}"
            )
        wide = np.broadcast_to(flat, codes.shape).copy()
        activation = self.plan.activations[Use(node.name, 0)].params
        weight = self.plan.weights[Use(node.name, 1)].params
        bias = BiasCodes(codes.astype(np.int32), wide, activation, weight, 0, name)
        self.plan.bias_codes[key] = bias
        self.plan.biases[Use(node.name, 2)] = Slot(spec, key)
        values = (codes.astype(np.float64) * wide).astype(np.float32)
        node.inputs[2] = self.graph.constant(name, values)


def read_quantized(model: Model) -> Reading:
    """The plan and float graph of a QDQ or Ascend graph; GraphError when it holds no quantized layer."""
    graph = Graph(model)
    ops = {node.op for node in graph.nodes}
    integer = next((op for op in sorted(ops) if op.startswith("QLinear") or op.endswith("Integer")), None)
    if integer is not None:
        raise GraphError(
            f"{model.name} computes in {integer}; give the QDQ form of it (any target but qoperator) or that for ascend"
        )
    reading = _read_ascend(graph) if "AscendQuant" in ops else _Qdq(Reading(graph)).read()
    if not reading.plan.weights:
        raise GraphError(f"{model.name} holds no quantized layer; give a model that quantize wrote")
    return reading


@dataclass
class _Qdq:
    reading: Reading
    floats: dict[str, gs.Constant] = field(default_factory=dict)

    def read(self) -> Reading:
        graph = self.reading.graph
        for node in [n for n in graph.nodes if n.op in LINEAR_OPS and len(n.inputs) > 1]:
            source = graph.producer(node.inputs[1])
            if source is not None and source.op == "DequantizeLinear" and graph.is_constant(source.inputs[0]):
                self._layer(node, source)
        self._pairs()
        self._biases()
        for node in [n for n in graph.nodes if n.op == "DequantizeLinear" and graph.is_constant(n.inputs[0])]:
            if not graph.consumers(node.outputs[0]) and node.outputs[0].name not in graph.outputs:
                graph.remove(node)
        return self.reading

    def _layer(self, node: gs.Node, source: gs.Node) -> None:
        params = self._params(source)
        codes = self.reading.graph.value(source.inputs[0])
        assert codes is not None
        axis, channels = params.axis, params.scale.size
        if axis is not None and params.block is None:
            if not -codes.ndim <= axis < codes.ndim or channels != codes.shape[axis]:
                raise GraphError(
                    f"node '{source.name}': {channels} scales along axis {axis} of {list(codes.shape)}"
                )
        plain = codes.astype(params.spec.dtype.dtype)
        stored = source.inputs[0]
        node.inputs[1] = stored  # its name is what the plan remembers
        self.reading.add_weight(node, plain, params)
        if stored.name not in self.floats:
            name = stored.name.removesuffix("_quantized")
            self.floats[stored.name] = self.reading.graph.constant(name, dequantize(plain, params))
        node.inputs[1] = self.floats[stored.name]

    def _pairs(self) -> None:
        """Every QuantizeLinear -> DequantizeLinear becomes a slot: of the layers that read it, or of the value."""
        graph, plan = self.reading.graph, self.reading.plan
        quantized = {use.node for use in plan.weights}
        for last in [n for n in graph.nodes if n.op == "DequantizeLinear"]:
            first = graph.producer(last.inputs[0])
            if first is None or first.op != "QuantizeLinear" or not graph.reads_alone(last, first.outputs[0]):
                continue
            params = self._params(last)
            source, real = first.inputs[0], last.outputs[0]
            readers = [(n, p) for n in graph.consumers(real) for p, t in enumerate(n.inputs) if t is real]
            by_name = real.name in graph.outputs or is_captured(graph, real)
            key = f"{source.name}@{last.inputs[1].name}"
            plan.params[key] = params
            slot = Slot(params.spec, key)
            everyone = by_name or any(n.name not in quantized or p != 0 for n, p in readers)
            producer = graph.producer(source)
            graph.remove(first)
            graph.remove(last)
            if by_name and producer is not None:
                producer.outputs[producer.outputs.index(source)] = real
                source = real
            if everyone:
                plan.activations[Result(source.name)] = slot
            for node, port in readers:
                node.inputs[port] = source
                if node.name in quantized and port == 0:
                    plan.activations[Use(node.name, 0)] = slot

    def _biases(self) -> None:
        graph, plan = self.reading.graph, self.reading.plan
        for use in list(plan.weights):
            node = graph.node(use.node)
            source = graph.producer(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
            if source is None or source.op != "DequantizeLinear" or Use(use.node, 0) not in plan.activations:
                continue
            codes, scale = graph.value(source.inputs[0]), graph.value(source.inputs[1])
            if codes is not None and scale is not None:
                self.reading.add_bias(node, codes, scale, source.inputs[0].name.removesuffix("_quantized"))

    def _params(self, node: gs.Node) -> QParams:
        graph = self.reading.graph
        scale = graph.value(node.inputs[1])
        zero = graph.value(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None:
            raise GraphError(
                f"node '{node.name}': its scale is computed while the model runs; quantize again instead"
            )
        codes = graph.value(node.inputs[0])
        kind = zero.dtype if zero is not None else codes.dtype if codes is not None else np.dtype(np.uint8)
        try:
            dtype = int_type(kind.name)
        except ValueError as error:
            raise GraphError(f"node '{node.name}': {error}") from None
        wide = np.asarray(scale, np.float64)
        zeros = np.zeros(wide.shape, np.int64) if zero is None else zero.astype(np.int64)
        if wide.size == 1:
            wide, zeros = wide.reshape(()), zeros.reshape(())
        grain: Grain = PerTensor()
        if node.attrs.get("block_size"):
            grain = PerGroup(int(node.attrs.get("axis", 1)), int(node.attrs["block_size"]))
            wide, zeros = np.asarray(scale, np.float64), zeros.reshape(scale.shape)
        elif wide.ndim:
            grain = PerChannel(int(node.attrs.get("axis", 1)))
        return QParams(QuantSpec(dtype, grain, _symmetric(dtype, zeros)), wide, zeros)


def _symmetric(dtype: IntType, zeros: np.ndarray) -> bool:
    return bool((zeros == (0 if dtype.signed else (dtype.highest + 1) // 2)).all())


def _read_ascend(graph: Graph) -> Reading:
    reading = Reading(graph)
    plan = reading.plan
    for quant in [n for n in graph.nodes if n.op == "AscendQuant"]:
        step, offset = quant_numbers(quant)
        source, codes = quant.inputs[0], quant.outputs[0]
        scale, zero = np.asarray(step, np.float64), np.asarray(offset, np.int64)
        key = f"{source.name}@{quant.name}"
        plan.params[key] = QParams(QuantSpec(INT8, PerTensor(), _symmetric(INT8, zero)), scale, zero)
        readers = graph.consumers(codes)
        graph.remove(quant)
        for node in readers:
            weight = layer_weight(graph, node, codes)
            node.inputs[0] = source
            plan.activations[Use(node.name, 0)] = Slot(plan.params[key].spec, key)
            _ascend_layer(reading, node, weight, float(scale))
    return reading


def _ascend_layer(reading: Reading, node: gs.Node, codes: np.ndarray, s_x: float) -> None:
    graph = reading.graph
    last = graph.sole_consumer(node.outputs[0])
    add = last if last is not None and last.op == "Add" else None
    dequant = graph.sole_consumer(add.outputs[0]) if add is not None else last
    if dequant is None or dequant.op != "AscendDequant":
        raise GraphError(
            f"node '{node.name}': no AscendDequant follows it; give a graph that was written here"
        )
    deq = dequant_scale(graph, dequant).astype(np.float64)
    s_w = (deq / s_x).astype(np.float32).astype(np.float64)
    axis = 0 if node.op == "Conv" else codes.ndim - 1
    if deq.size not in (1, codes.shape[axis]):
        raise GraphError(f"node '{node.name}': {deq.size} scales for {codes.shape[axis]} output channels")
    grain: Grain = PerTensor() if deq.size == 1 else PerChannel(axis)
    s_w = s_w.reshape(()) if deq.size == 1 else s_w
    params = QParams(QuantSpec(INT8, grain, True), s_w, np.zeros(s_w.shape, np.int64))
    reading.add_weight(node, codes, params)
    stored = node.inputs[1].name
    node.inputs[1] = graph.constant(stored.removesuffix("_quantized"), dequantize(codes, params))
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = constant_of(graph, node, 2)
        reading.add_bias(node, bias, deq, node.inputs[2].name.removesuffix("_quantized"))
    if add is not None:
        port = 1 if add.inputs[0] is node.outputs[0] else 0
        shift = constant_of(graph, add, port)
        name = add.inputs[port].name.removesuffix("_quantized")
        add.inputs[port] = graph.constant(name, (shift.astype(np.float64) * deq).astype(np.float32))
        # The name it had before its type became int32: layers are known by the names of their results.
        sums = graph.variable(node.outputs[0].name.removesuffix("_accumulated"))
        node.outputs[0] = add.inputs[1 - port] = sums
    result = dequant.outputs[0]
    before = add if add is not None else node
    graph.remove(dequant)
    before.outputs[0] = result
