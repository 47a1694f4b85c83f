"""A float model in which every planned activation passes through Q/DQ whose scales are *inputs*.

Candidates for ranges are then only other feeds: one session judges all of them. Weights are the dequantized codes in
float, so that neither ONNX Runtime's fusions nor its own WeightBiasQuantization take part (pass ``simulate`` when the
session is made).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from calib.model import Model
from calib.types import Array
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import PerChannel, PerToken, QParams, QuantPlan, QuantSpec, Result, Use
from onnxslim_ptq.export.float16 import ABSORBED, half_layers
from onnxslim_ptq.export.per_token import Rows, normalize, row_params, scale_back
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


def simulate(model: Model, plan: QuantPlan, keep: Callable[[Array], Array] | None = None) -> Simulation:
    """Build the simulation of ``plan`` (its activation sites and weight codes; biases stay float)."""
    graph = Graph(model)
    half = half_layers(graph, plan)
    numbers: dict[str, tuple[str, str]] = {}
    dtypes: dict[str, int] = {}
    shapes: dict[str, list[None]] = {}
    done: dict[str, gs.Tensor] = {}
    for use, slot in plan.weights.items():
        node = graph.node(use.node)
        dtype = np.float16 if use.node in half else np.float32
        codes = plan.weight_codes[slot.params]
        key = f"weight:{slot.params}"
        if key not in done:
            values: Array = dequantize(codes.codes, codes.params).astype(dtype)
            values = values if keep is None else keep(values)
            done[key] = graph.constant(f"{node.inputs[use.port].name}.simulated", values)
        node.inputs[use.port] = done[key]
    _quantize_rows(graph, plan, half)
    static = {
        site: slot for site, slot in plan.activations.items() if not isinstance(slot.spec.grain, PerToken)
    }
    pairs: dict[tuple[str, str], gs.Tensor] = {}
    for site, slot in static.items():
        name = site.tensor if isinstance(site, Result) else graph.node(site.node).inputs[site.port].name
        if slot.params not in numbers:
            numbers[slot.params] = (f"__scale_{len(numbers)}", f"__zero_{len(numbers)}")
            shapes[slot.params] = [] if _axis(slot.spec) is None else [None]
            dtypes[slot.params] = onnx.helper.np_dtype_to_tensor_dtype(slot.spec.dtype.dtype)
        if isinstance(site, Result):
            tensor = graph.tensor(name)
            wide = _is_half(graph, tensor, half)
            pairs[name, slot.params] = _quantize_result(graph, tensor, numbers[slot.params], wide)
    for site, slot in static.items():
        if isinstance(site, Result):
            continue
        node = graph.node(site.node)
        tensor = node.inputs[site.port]
        if any(tensor is real for real in pairs.values()):
            continue
        pair = (tensor.name, slot.params)
        if pair not in pairs:
            pairs[pair] = _pair(
                graph, tensor, _inputs(numbers[slot.params]), site.node in half, _axis(slot.spec)
            )
        node.inputs[site.port] = pairs[pair]
    simulated = graph.to_model()
    for key, (scale, zero) in numbers.items():
        simulated.proto.graph.input.append(
            onnx.helper.make_tensor_value_info(scale, onnx.TensorProto.FLOAT, shapes[key])
        )
        simulated.proto.graph.input.append(onnx.helper.make_tensor_value_info(zero, dtypes[key], shapes[key]))
    return Simulation(simulated, numbers)


def _quantize_rows(graph: Graph, plan: QuantPlan, half: set[str]) -> None:
    """Per-token activations as the exporter writes them; their scales are constants, so no input stands for them."""
    made: dict[tuple[str, str], Rows] = {}
    sites = [(s, slot) for s, slot in plan.activations.items() if isinstance(slot.spec.grain, PerToken)]
    for site, slot in sites:
        assert isinstance(site, Use)
        node = graph.node(site.node)
        tensor = node.inputs[site.port]
        key = (tensor.name, slot.params)
        if key not in made:
            narrow = site.node in half
            rows = normalize(graph, tensor, np.float16 if narrow else np.float32, slot.spec.symmetric)
            params = row_params(slot.spec.dtype)
            scale = graph.constant(f"{tensor.name}.row_scale", params.scale.astype(np.float32))
            zero = graph.constant(
                f"{tensor.name}.row_zero", params.zero_point.astype(params.spec.dtype.dtype)
            )
            made[key] = replace(rows, values=_pair(graph, rows.values, (scale, zero), narrow))
        node.inputs[site.port] = made[key].values
        weight = next(s for u, s in plan.weights.items() if u.node == site.node)
        scale_back(graph, node, made[key], plan.weight_codes[weight.params])


def _inputs(names: tuple[str, str]) -> tuple[gs.Tensor, gs.Tensor]:
    return gs.Variable(names[0]), gs.Variable(names[1])


def _quantize_result(graph: Graph, tensor: gs.Tensor, numbers: tuple[str, str], half: bool) -> gs.Tensor:
    """Let every reader of ``tensor`` read it quantized, graph outputs and subgraphs too: it keeps its name."""
    producer = graph.producer(tensor)
    if producer is not None:
        raw = graph.variable(f"{tensor.name}.raw")
        producer.outputs[producer.outputs.index(tensor)] = raw
        real = _pair(graph, raw, _inputs(numbers), half)
        last = graph.producer(real)
        assert last is not None
        last.outputs[0] = tensor
        return tensor
    readers = [(n, p) for n in graph.consumers(tensor) for p, t in enumerate(n.inputs) if t is tensor]
    real = _pair(graph, tensor, _inputs(numbers), half)
    for node, port in readers:
        if not graph.has_subgraph(node):  # it knows the graph input by its name
            node.inputs[port] = real
    return real


def _axis(spec: QuantSpec) -> int | None:
    return spec.grain.axis if isinstance(spec.grain, PerChannel) else None


def _pair(
    graph: Graph,
    tensor: gs.Tensor,
    numbers: tuple[gs.Tensor, gs.Tensor],
    half: bool,
    axis: int | None = None,
) -> gs.Tensor:
    """Q/DQ in float32, between casts when ``tensor`` is float16."""
    attrs = {} if axis is None else {"axis": axis}
    scale, zero = numbers
    codes, real = graph.variable(f"{tensor.name}.codes"), graph.variable(f"{tensor.name}.real")
    source = _cast(graph, tensor, onnx.TensorProto.FLOAT) if half else tensor
    graph.add_node("QuantizeLinear", f"{tensor.name}.Q", [source, scale, zero], [codes], attrs)
    graph.add_node("DequantizeLinear", f"{tensor.name}.DQ", [codes, scale, zero], [real], attrs)
    return _cast(graph, real, onnx.TensorProto.FLOAT16) if half else real


def _is_half(graph: Graph, tensor: gs.Tensor, half: set[str]) -> bool:
    """Whether a layer in ``half`` reads ``tensor`` or makes it, perhaps through an activation function."""
    near = graph.consumers(tensor)
    producer = graph.producer(tensor)
    if producer is not None:
        near.append(producer)
        if producer.op in ABSORBED and (before := graph.producer(producer.inputs[0])) is not None:
            near.append(before)
    return any(node.name in half for node in near)


def _cast(graph: Graph, tensor: gs.Tensor, to: int) -> gs.Tensor:
    result = graph.variable(f"{tensor.name}.cast")
    graph.add_node("Cast", f"{tensor.name}.Cast", [tensor], [result], {"to": int(to)})
    return result
