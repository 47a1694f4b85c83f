"""A float model in which every planned activation passes through Q/DQ whose scales are *inputs*.

Candidates for ranges are then only other feeds: one session judges all of them. Weights are the dequantized codes in
float, so that neither ONNX Runtime's fusions nor its own WeightBiasQuantization take part (pass ``simulate`` when the
session is made).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from calib.model import Model
from calib.types import Array
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import QParams, QuantPlan, Result
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Simulation", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """The simulating model and, per params id, the names of its scale and zero point inputs."""

    model: Model
    numbers: Mapping[str, tuple[str, str]]

    def feed(self, params: Mapping[str, QParams]) -> dict[str, Array]:
        """The extra feeds that set every activation's numbers."""
        feed: dict[str, Array] = {}
        for key, (scale, zero) in self.numbers.items():
            feed[scale] = np.asarray(params[key].scale, np.float32)
            feed[zero] = np.asarray(params[key].zero_point, params[key].spec.dtype.dtype)
        return feed


def simulate(model: Model, plan: QuantPlan) -> Simulation:
    """Build the simulation of ``plan`` (its activation sites and weight codes; biases stay float)."""
    graph = Graph(model)
    half = {t.name for t in model.proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    numbers: dict[str, tuple[str, str]] = {}
    dtypes: dict[str, int] = {}
    done: dict[str, gs.Tensor] = {}
    results = {s.tensor: slot for s, slot in plan.activations.items() if isinstance(s, Result)}
    wanted = dict(results)
    for use, slot in plan.activations.items():
        if not isinstance(use, Result):
            wanted.setdefault(graph.node(use.node).inputs[use.port].name, slot)
    for use, slot in plan.weights.items():
        node = graph.node(use.node)
        dtype = np.float16 if node.inputs[use.port].name in half else np.float32
        codes = plan.weight_codes[slot.params]
        key = f"weight:{slot.params}"
        if key not in done:
            values = dequantize(codes.codes, codes.params).astype(dtype)
            done[key] = graph.constant(f"{node.inputs[use.port].name}.simulated", values)
        node.inputs[use.port] = done[key]
    pairs: dict[tuple[str, str], gs.Tensor] = {}
    for site, slot in plan.activations.items():
        name = site.tensor if isinstance(site, Result) else graph.node(site.node).inputs[site.port].name
        if slot.params not in numbers:
            numbers[slot.params] = (f"__scale_{len(numbers)}", f"__zero_{len(numbers)}")
            dtypes[slot.params] = onnx.helper.np_dtype_to_tensor_dtype(slot.spec.dtype.dtype)
        if isinstance(site, Result):
            tensor = graph.tensor(name)
            readers = [(n, p) for n in graph.consumers(tensor) for p, t in enumerate(n.inputs) if t is tensor]
            pairs[name, slot.params] = real = _pair(graph, tensor, numbers[slot.params])
            for node, port in readers:
                if not graph.has_subgraph(node):
                    node.inputs[port] = real
    for site, slot in plan.activations.items():
        if isinstance(site, Result):
            continue
        node = graph.node(site.node)
        tensor = node.inputs[site.port]
        if any(tensor is real for real in pairs.values()):
            continue
        key = (tensor.name, slot.params)
        if key not in pairs:
            pairs[key] = _pair(graph, tensor, numbers[slot.params])
        node.inputs[site.port] = pairs[key]
    simulated = graph.to_model()
    for key, (scale, zero) in numbers.items():
        simulated.proto.graph.input.append(onnx.helper.make_tensor_value_info(scale, onnx.TensorProto.FLOAT, []))
        simulated.proto.graph.input.append(onnx.helper.make_tensor_value_info(zero, dtypes[key], []))
    return Simulation(simulated, numbers)


def _pair(graph: Graph, tensor: gs.Tensor, numbers: tuple[str, str]) -> gs.Tensor:
    scale, zero = (gs.Variable(n) for n in numbers)
    codes, real = graph.variable(f"{tensor.name}.codes"), graph.variable(f"{tensor.name}.real")
    graph.add_node("QuantizeLinear", f"{tensor.name}.Q", [tensor, scale, zero], [codes])
    graph.add_node("DequantizeLinear", f"{tensor.name}.DQ", [codes, scale, zero], [real])
    return real
