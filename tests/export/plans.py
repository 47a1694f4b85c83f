"""Hand-made plans: every layer of a graph quantized, with ranges taken from a run of the model."""

from __future__ import annotations

import numpy as np
import onnx

from calib.model import Model
from calib.types import Range
from onnxslim_ptq.core.dtypes import INT8, INT32, IntType
from onnxslim_ptq.core.qmath import channel_range, params_from_range, quantize, quantize_bias
from onnxslim_ptq.core.spec import (
    BiasCodes,
    PerChannel,
    PerTensor,
    QuantPlan,
    QuantSpec,
    Result,
    Slot,
    Use,
    WeightCodes,
)
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from tests.graph.models import embedded, feed_for, run

__all__ = ["observed", "plan_for"]


def observed(model: Model, names: list[str]) -> dict[str, Range]:
    """The minimum and maximum of each value for the feeds that tests use."""
    proto = embedded(model)
    inputs = {i.name for i in proto.graph.input}
    inner = [n for n in names if n not in inputs]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in inner)
    found: dict[str, Range] = {}
    for seed in range(2):
        feed = feed_for(proto, seed)
        values = {n: feed[n] for n in names if n in inputs}
        values |= dict(zip(inner, run(proto, feed), strict=True)) if inner else {}
        for name, value in values.items():
            old = found.get(name, Range(np.zeros(()), np.zeros(())))
            found[name] = Range(
                np.minimum(old.lo, np.float64(value.min())), np.maximum(old.hi, np.float64(value.max()))
            )
    return found


def plan_for(
    model: Model,
    *,
    target: str = "cpu",
    per_channel: bool = True,
    biases: bool = True,
    results: tuple[str, ...] = (),
    weight_only: bool = False,
) -> QuantPlan:
    """All layers of ``model`` as int8; ``results`` are values quantized where they are made."""
    graph = Graph(model)
    layers, _ = find_linears(graph)
    row = TARGETS[target]
    act = QuantSpec(row.activation, PerTensor(), row.symmetric_activation)
    plan = QuantPlan()
    ranges = observed(model, list(dict.fromkeys([*(lin.activation_name for lin in layers), *results])))
    for name, rng in ranges.items():
        plan.params[name] = params_from_range(rng, act)
    for name in results:
        plan.activations[Result(name)] = Slot(act, name)
    for layer in layers:
        if not weight_only:
            plan.activations[Use(layer.node, layer.activation)] = Slot(act, layer.activation_name)
        axis = layer.channel_axis if per_channel else None
        slot = Slot(_spec(INT8, axis), f"{layer.weight_name}@{axis}")
        plan.weights[Use(layer.node, layer.weight)] = slot
        weight = np.asarray(graph.value(graph.node(layer.node).inputs[layer.weight]), np.float32)
        params = params_from_range(channel_range(weight, axis), slot.spec)
        plan.weight_codes[slot.params] = WeightCodes(
            quantize(weight, params), params, "rtn", layer.weight_name
        )
        if layer.bias is not None and biases and not weight_only:
            bias = np.asarray(graph.value(graph.node(layer.node).inputs[layer.bias]), np.float64)
            scale = np.broadcast_to(plan.params[layer.activation_name].scale * params.scale, bias.shape)
            scale = scale.astype(np.float32).astype(np.float64)
            codes, clipped = quantize_bias(bias, scale)
            key = f"{layer.node}.bias"
            plan.biases[Use(layer.node, layer.bias)] = Slot(_spec(INT32, 0), key)
            plan.bias_codes[key] = BiasCodes(
                codes, scale, layer.activation_name, slot.params, clipped, layer.bias_name or ""
            )
    return plan


def _spec(dtype: IntType, axis: int | None) -> QuantSpec:
    return QuantSpec(dtype, PerTensor() if axis is None else PerChannel(axis), True)
