"""Keeps weights out of the plan that ONNX Runtime would turn back into float at every run."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from onnxslim_ptq.core.choice import LayerChoice, StaticActivation
from onnxslim_ptq.core.qmath import grain_range
from onnxslim_ptq.core.spec import BiasCodes, QParams, QuantPlan, Result, Slot, Use, WeightCodes
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.export.fusion import stored_weight, unfused_weights
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.graph.edit import own_constant
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.steps.paying import not_paying
from onnxslim_ptq.steps.placement import Placement, place
from onnxslim_ptq.steps.weights import float_weight
from onnxslim_ptq.workspace import Workspace

__all__ = ["NOT_FUSED", "dry_placement", "leave_float", "unfused_layers"]

NOT_FUSED = "ONNX Runtime would dequantize its weight at every run, slower than float"
_NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Clip"})
# Clip fuses when the codes cover no more than its interval; 0..255/256 lies inside every usual one. A bias fuses only
# when its scale is the product of the other two, so powers of two, whose product is exact.
_ACTIVATION_SCALE, _WEIGHT_SCALE = 2.0**-8, 2.0**-7
_BIAS_SCALE = _ACTIVATION_SCALE * _WEIGHT_SCALE
Layers = Mapping[str, tuple[Linear, LayerChoice]]


def dry_placement(workspace: Workspace, layers: Layers) -> Placement:
    """Sites for ``layers`` that really become integer kernels, found on the graph alone, before any data is read.

    A layer whose weight does not fuse is tried with a quantized output; when that does not help it stays float.
    """
    graph, target = workspace.graph, workspace.target
    floats = not_paying(graph, layers, target)
    placement = place(graph, layers, target, floats=floats)
    if not target.optimizes_here:
        return placement
    with_output: frozenset[str] = frozenset()
    while placement.layers:
        stuck = unfused_layers(workspace, _dummy_plan(workspace, placement))
        if not stuck:
            break
        helped = {n for n in stuck if n not in with_output and _can_have_output_q(placement, n, target)}
        with_output |= helped
        floats |= {n: NOT_FUSED for n in placement.layers if n in stuck - helped}  # in graph order
        placement = place(graph, layers, target, with_output, floats)
    return placement


def _can_have_output_q(placement: Placement, name: str, target: Target) -> bool:
    layer, choice = placement.layers[name]
    return isinstance(choice.activation, StaticActivation) and layer.op not in target.output_q


def unfused_layers(workspace: Workspace, plan: QuantPlan) -> set[str]:
    """The layers of ``plan`` whose weight ONNX Runtime's optimized graph still dequantizes."""
    rendered = render_qdq(workspace.model(), plan, workspace.target)
    stuck = unfused_weights(rendered, workspace.spool)
    stored = stored_weight(rendered.proto, [(u.node, u.port) for u in plan.weights]) if stuck else {}
    return {node for (node, _), name in stored.items() if name in stuck}


def leave_float(
    plan: QuantPlan, placement: Placement, graph: Graph, name: str, reason: str = NOT_FUSED
) -> None:
    """Take one layer out of ``plan``: its weight, bias and input, and its output unless another layer makes that too.

    The correction that its bias got for the sake of rounded weights is taken back.
    """
    tables: tuple[MutableMapping[Any, Slot], ...] = (plan.activations, plan.weights, plan.biases)
    for sites in tables:
        for site in [s for s in sites if isinstance(s, Use) and s.node == name]:
            del sites[site]
    integer = {use.node for use in plan.weights}
    for placed in placement.tensors.values():
        if placed.at_result and integer.isdisjoint(layer.node for layer in placed.producers):
            plan.activations.pop(
                Result(placed.tensor), None
            )  # layers that read it still quantize it for themselves
    if name in plan.uncorrected:
        node, port, values = plan.uncorrected.pop(name)
        own_constant(graph, graph.node(node), port, values)
    plan.skipped[name] = reason


def _dummy_plan(workspace: Workspace, placement: Placement) -> QuantPlan:
    """The placement's plan with made-up numbers: what fuses depends on structure, types and zero points only."""
    plan = placement.plan(workspace.target)
    plan.weight_codes = workspace.codes()
    graph = workspace.graph
    for key, placed in placement.tensors.items():
        producer = graph.producer(graph.tensor(placed.tensor))
        lowest = producer is not None and producer.op in _NON_NEGATIVE and not placed.spec.symmetric
        dtype = placed.spec.dtype
        zero = dtype.lowest if lowest else (dtype.highest + 1 + dtype.lowest) // 2
        plan.params[key] = QParams(placed.spec, np.asarray(_ACTIVATION_SCALE), np.asarray(zero, np.int64))
    for use, slot in plan.weights.items():
        layer = placement.layers[use.node][0]
        shape = float_weight(graph, layer).shape
        codes = np.ones(shape, slot.spec.dtype.dtype)
        size = grain_range(codes, slot.spec.grain).lo.shape
        params = QParams(slot.spec, np.full(size, _WEIGHT_SCALE), np.zeros(size, np.int64))
        plan.weight_codes[slot.params] = WeightCodes(codes, params, "none", layer.weight_name)
    for use, slot in plan.biases.items():
        layer = placement.layers[use.node][0]
        size_ = (layer.channels,)
        plan.bias_codes[slot.params] = BiasCodes(
            np.zeros(size_, np.int32), np.full(size_, _BIAS_SCALE), "", "", 0, layer.bias_name or ""
        )
    return plan
