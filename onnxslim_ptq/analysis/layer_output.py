"""How far each quantized layer's output is from its float output on one sample, every other layer being float."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from calib.model import Model
from calib.provider import SessionOptions, create_session
from calib.runner import run_session
from calib.types import Sample
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import PerToken, QParams, QuantPlan, Use
from onnxslim_ptq.graph.graph import Graph

__all__ = ["LayerOutput", "layer_outputs", "ranked"]


@dataclass(frozen=True)
class LayerOutput:
    """``mse`` = mean (y - ŷ)², ``l2`` = the root of Σ (y - ŷ)², over all elements of the layer's output."""

    mse: float
    l2: float


def layer_outputs(model: Model, plan: QuantPlan, item: Sample, threads: int = 0) -> dict[str, LayerOutput]:
    """For every layer of ``plan`` with a static activation: ŷ from its quantized input and quantized weight.

    All layers in one run of the float ``model`` on one sample; those of float16 in float32 between casts. Source:
    msModelSlim, amp_num: squant_ptq ranks by the mean squared error, post_training_quant by the norm.
    """
    graph = Graph(model)
    outputs: dict[str, tuple[str, str]] = {}
    seen: dict[tuple[str, str], gs.Tensor] = {}
    for use, slot in plan.weights.items():
        activation = plan.activations.get(Use(use.node, 0))
        if activation is None or isinstance(activation.spec.grain, PerToken):
            continue
        node = graph.node(use.node)
        held = graph.value(node.inputs[1])
        assert held is not None, f"layer {node.name} lost its weight"
        half = held.dtype == np.float16
        key = (node.inputs[0].name, activation.params)
        if key not in seen:
            read = _float32(graph, node.inputs[0], half)
            seen[key] = _rounded(graph, read, plan.params[activation.params])
        codes = plan.weight_codes[slot.params]
        weight = dequantize(codes.codes, codes.params)
        stored = graph.constant(f"{node.name}.rounded", weight.astype(np.float32 if half else held.dtype))
        others = [_float32(graph, t, half and bool(t.name)) for t in node.inputs[2:]]
        outputs[use.node] = _error(graph, node, [seen[key], stored, *others], half)
    tapped = graph.to_model()
    names = [name for pair in outputs.values() for name in pair]
    tapped.proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = create_session(
        tapped.proto.SerializeToString(),
        tapped.weights,
        options=SessionOptions(threads=threads, simulate=True),
    )
    sample, feed = item
    found = dict(zip(names, run_session(session, names, feed, sample), strict=True))
    return {node: LayerOutput(*(float(found[name]) for name in pair)) for node, pair in outputs.items()}


def ranked(found: Iterable[tuple[str, float]], count: int) -> list[str]:
    """The ``count`` names with the largest numbers, largest first; the first of equals."""
    return [name for name, _ in sorted(found, key=lambda pair: -pair[1])[:count]]


def _float32(graph: Graph, tensor: gs.Tensor, half: bool) -> gs.Tensor:
    if not half:
        return tensor
    real = graph.variable(f"{tensor.name}.float")
    to = {"to": int(onnx.TensorProto.FLOAT)}
    graph.add_node("Cast", f"{tensor.name}.Cast", [tensor], [real], to)
    return real


def _rounded(graph: Graph, tensor: gs.Tensor, params: QParams) -> gs.Tensor:
    codes, real = graph.variable(f"{tensor.name}.codes"), graph.variable(f"{tensor.name}.rounded")
    scale = graph.constant(f"{tensor.name}.scale", params.scale.astype(np.float32))
    zero = graph.constant(f"{tensor.name}.zero", params.zero_point.astype(params.spec.dtype.dtype))
    graph.add_node("QuantizeLinear", f"{tensor.name}.Q", [tensor, scale, zero], [codes])
    graph.add_node("DequantizeLinear", f"{tensor.name}.DQ", [codes, scale, zero], [real])
    return real


def _error(graph: Graph, node: gs.Node, inputs: list[gs.Tensor], half: bool) -> tuple[str, str]:
    def step(op: str, given: list[gs.Tensor], label: str, attrs: dict[str, int] | None = None) -> gs.Tensor:
        made = graph.variable(f"{node.name}.{label}")
        graph.add_node(op, f"{node.name}.{label}", given, [made], attrs)
        return made

    result = _float32(graph, node.outputs[0], half)
    twin = graph.variable(f"{node.name}.twin")
    graph.add_node(node.op, f"{node.name}.twin", inputs, [twin], dict(node.attrs))
    off = step("Sub", [twin, result], "off")
    mse = step("ReduceMean", [step("Mul", [off, off], "square")], "mse", {"keepdims": 0})
    return mse.name, step("ReduceL2", [off], "l2", {"keepdims": 0}).name
