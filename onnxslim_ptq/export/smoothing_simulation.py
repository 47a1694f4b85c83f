"""A simulated quantized model whose smoothing scales and smoothed weights are *inputs*.

Candidates for a scale s are then only other feeds of one session: x -> Mul(1 / s) -> Q/DQ -> layer with the weight
Q(diag(s) W), which computes what the graph would after the scale was folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from calib.model import Model
from onnxslim_ptq.core.spec import QuantPlan, Use
from onnxslim_ptq.export.simulation import Simulation, simulate
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.smooth_groups import SmoothGroup

__all__ = ["SmoothingSimulation", "simulate_smoothing"]


@dataclass(frozen=True)
class SmoothingSimulation:
    """``inverse`` names the input of 1 / s [channels] of each group (by its name), ``weights`` those of the weights,
    ``shifts`` those of the bias corrections [outputs], by node."""

    simulation: Simulation
    inverse: dict[str, str]
    weights: dict[Use, str]
    shifts: dict[str, str]


def simulate_smoothing(
    model: Model, plan: QuantPlan, groups: Sequence[SmoothGroup], corrected: Sequence[Linear]
) -> SmoothingSimulation:
    """The simulation of ``plan`` with the scale of every group open, and the weights of the group's planned layers.

    The outputs of ``corrected`` get an open shift, which stands for the correction of their biases.

    Weights and activations of the groups are float32; no value of ``plan`` is quantized where a group's tensor is made.
    """
    graph = Graph(model)
    inverse: dict[str, str] = {}
    weights: dict[Use, str] = {}
    inputs = []
    for group in groups:
        name = inverse[group.tensor] = f"__inverse_{len(inverse)}"
        inputs.append(_info(name, (group.channels,)))
        tensor, scaled = graph.tensor(group.tensor), graph.variable(f"{group.tensor}.smoothed")
        graph.add_node("Mul", f"{group.tensor}.smooth", [tensor, gs.Variable(name)], [scaled])
        for layer in group.consumers:
            use = Use(layer.node, layer.weight)
            if use not in plan.weights:
                continue
            node = graph.node(layer.node)
            values = graph.value(node.inputs[layer.weight])
            assert values is not None
            weights[use] = f"__weight_{len(weights)}"
            inputs.append(_info(weights[use], values.shape))
            node.inputs[layer.weight] = gs.Variable(weights[use])
            node.inputs[layer.activation] = scaled
    shifts: dict[str, str] = {}
    for layer in corrected:
        node, name = graph.node(layer.node), f"__shift_{len(shifts)}"
        result, raw = node.outputs[0], graph.variable(f"{layer.output_name}.uncorrected")
        node.outputs[0] = raw
        graph.add_node("Add", f"{layer.node}.correct", [raw, gs.Variable(name)], [result])
        shifts[layer.node] = name
        inputs.append(_info(name, (layer.channels,)))
    opened = graph.to_model()
    opened.proto.graph.input.extend(inputs)
    closed = {use: slot for use, slot in plan.weights.items() if use not in weights}
    return SmoothingSimulation(simulate(opened, replace(plan, weights=closed)), inverse, weights, shifts)


def _info(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [int(np.int64(d)) for d in shape])
