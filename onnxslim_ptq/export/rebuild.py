"""A runnable quantized graph from the float model and the files of `weight_files`: the proof that they are complete.

Codes, scales and offsets are read from the files and rendered by the same exporter as any plan; float constants that
smoothing or bias correction changed come from the files too. What the files derive (``quant_bias``, ``deq_scale``) is
left to the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calib.model import Model
from calib.types import Array
from onnxslim_ptq.core.dtypes import INT8, INT32
from onnxslim_ptq.core.qmath import quantize_bias
from onnxslim_ptq.core.spec import (
    BelowTimestep,
    BiasCodes,
    Grain,
    ManyTokens,
    PerChannel,
    PerTensor,
    PerToken,
    QParams,
    QuantPlan,
    QuantSpec,
    Slot,
    Use,
    WeightCodes,
)
from onnxslim_ptq.core.targets import BiasForm, Target
from onnxslim_ptq.core.timesteps import CalibratedSteps
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.export.read_weights import read_steps, read_weight_files
from onnxslim_ptq.export.tensors import ATTENTION, FLOAT, bias_of, out_in
from onnxslim_ptq.graph.attention import find_attention
from onnxslim_ptq.graph.edit import own_constant
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.names import module_names
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize

__all__ = ["rebuild"]

Tensors = dict[str, Array]


def rebuild(
    source: Model, description: Path, target: Target, names: Mapping[str, str] | None = None
) -> Model:
    """The quantized model, in the form of ``target``; ``names`` as in the recipe that made the files.

    Raises:
        GraphError: the files do not fit the model.
    """
    tensors, kinds = read_weight_files(description)
    files = _Files(tensors, kinds, read_steps(description))
    graph = Graph(raise_opset(source, PER_CHANNEL_OPSET))
    optimize(graph)
    plan, used = QuantPlan(), set()
    linears = find_linears(graph)[0]
    modules = module_names(graph, linears, names)
    for layer in linears:
        module = modules[layer.node]
        weight = tensors.get(f"{module}.weight")
        if weight is None:
            raise GraphError(f"'{description.name}' has no tensor '{module}.weight' for node '{layer.node}'")
        used |= {f"{module}.{part}" for part in _PARTS}
        if kinds[f"{module}.weight"] == FLOAT:
            _set(graph, layer.node, layer.weight, out_in(layer, graph.node(layer.node), weight))
        bias = bias_of(graph, layer)
        given = tensors.get(f"{module}.bias")
        if given is not None and bias is None:
            raise GraphError(
                f"'{module}.bias' has no place: node '{layer.node}' had no bias in the float model"
            )
        if given is not None and bias is not None:
            _set(graph, bias.node, bias.port, given)
        if kinds[f"{module}.weight"] != FLOAT:
            _plan_layer(graph, plan, layer, module, files, target)
    _plan_attention(graph, plan, tensors)
    rest = {k: v for k, v in tensors.items() if k not in used and kinds[k] != ATTENTION}
    _set_constants(graph, rest)
    return render_qdq(graph.to_model(), plan, target)


_PARTS = (
    "weight",
    "bias",
    "weight_scale",
    "weight_offset",
    "input_scale",
    "input_offset",
    "quant_bias",
    "deq_scale",
)
_KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A8_TIMESTEP", "W8A8_MIX", "W8A16")
Rows = list[tuple[float, int]]


@dataclass(frozen=True)
class _Files:
    """Tensors by name, their kinds, and the time steps their rows are of."""

    tensors: Tensors
    kinds: Mapping[str, str]
    steps: CalibratedSteps | None

    def kind(self, module: str) -> str:
        return self.kinds[f"{module}.weight"]


def _plan_layer(
    graph: Graph, plan: QuantPlan, layer: Linear, module: str, files: _Files, target: Target
) -> None:
    kind = files.kind(module)
    if kind not in _KINDS:
        raise GraphError(f"'{module}' has the kind {kind}; a graph can be made of {', '.join(_KINDS)}")
    stored = _weight(graph, layer, module, files.tensors)
    weight = Slot(stored.params.spec, f"{module}.weight")
    plan.weights[Use(layer.node, layer.weight)] = weight
    plan.weight_codes[weight.params] = stored
    site = Use(layer.node, layer.activation)
    if kind == "W8A8_DYNAMIC":
        rows = QuantSpec(target.activation, PerToken(), target.symmetric_activation)
        plan.activations[site] = Slot(rows, f"{layer.activation_name}@token")
    if kind in ("W8A8_DYNAMIC", "W8A16"):
        return
    plan.activations[site] = slot = _known_input(plan, layer, module, files, target)
    if kind == "W8A8" and layer.bias is not None and target.bias is BiasForm.INT32:
        s_x = plan.params[slot.params].scale
        values = np.asarray(graph.value(graph.node(layer.node).inputs[layer.bias]), np.float64)
        both = np.asarray(np.float32(s_x * np.broadcast_to(stored.params.scale, values.shape)), np.float64)
        integers, clipped = quantize_bias(values, both)
        bias = QuantSpec(INT32, PerChannel(0), True)
        plan.biases[Use(layer.node, layer.bias)] = Slot(bias, f"{module}.bias")
        plan.bias_codes[f"{module}.bias"] = BiasCodes(integers, both, slot.params, weight.params, clipped)


def _known_input(plan: QuantPlan, layer: Linear, module: str, files: _Files, target: Target) -> Slot:
    """The slot of the layer's input, whose numbers are in the files: one pair, or one for each calibrated step."""
    kind = files.kind(module)
    steps = files.steps if kind == "W8A8_TIMESTEP" else None
    if kind == "W8A8_TIMESTEP" and steps is None:
        raise GraphError(
            f"'{module}' has the kind {kind}: its files do not tell from which time step it is static; "
            "save the session again with this version"
        )
    rows = _input_rows(files.tensors, module, 1 if steps is None else len(steps.rows))
    dtype, symmetric = target.activation, target.symmetric_activation
    shift = 0 if dtype.signed else (dtype.highest + 1) // 2
    spec = QuantSpec(dtype, PerTensor(), symmetric)
    params = [QParams(spec, np.asarray(s), np.asarray(z + shift, np.int64)) for s, z in rows]
    # Readers of one tensor that share its numbers share the quantizer, as in the graph the files came from.
    key = f"{layer.activation_name}@{rows!r}"
    plan.params[key] = params[0]
    if steps is not None:
        plan.timesteps[key] = dict(zip(steps.rows, params, strict=True))
        plan.params[key] = plan.timesteps[key][steps.threshold]
        spec = QuantSpec(dtype, PerToken(BelowTimestep(steps.threshold)), symmetric)
    if kind == "W8A8_MIX":
        spec = QuantSpec(dtype, PerToken(ManyTokens()), symmetric)
    return Slot(spec, key)


def _input_rows(tensors: Tensors, module: str, count: int) -> Rows:
    """``count`` scales and signed zero points of the layer's input."""
    scales, offsets = (_numbers(tensors, module, part, count) for part in ("input_scale", "input_offset"))
    for s_x, offset in zip(scales, offsets, strict=True):
        if s_x <= 0 or not -128 <= offset <= 127 or offset != int(offset):
            raise GraphError(
                f"'{module}' has input_scale {s_x:g} and input_offset {offset:g}; the files are damaged"
            )
    return [(float(s), int(z)) for s, z in zip(scales, offsets, strict=True)]


def _weight(graph: Graph, layer: Linear, module: str, tensors: Tensors) -> WeightCodes:
    """The layer's codes and scales; GraphError unless they are symmetric int8 of the shape it has in the model."""
    node = graph.node(layer.node)
    codes = np.ascontiguousarray(out_in(layer, node, tensors[f"{module}.weight"]))
    own = graph.value(node.inputs[layer.weight])
    assert own is not None
    if codes.dtype != np.int8 or codes.shape != own.shape:
        raise GraphError(
            f"'{module}.weight' is {codes.dtype} {list(codes.shape)} in the files, not int8 {list(own.shape)}; "
            "give the float model that the files were made from"
        )
    scale = _numbers(tensors, module, "weight_scale", layer.channels)
    if (scale <= 0).any():
        raise GraphError(f"'{module}.weight_scale' is not above 0 everywhere; the files are damaged")
    if (
        f"{module}.weight_offset" in tensors
        and _numbers(tensors, module, "weight_offset", layer.channels).any()
    ):
        raise GraphError(
            f"'{module}' has asymmetric weights (weight_offset); a graph can be made of symmetric ones"
        )
    axis = layer.channel_axis
    grain: Grain = PerTensor() if axis is None else PerChannel(axis)
    scale = scale[0].reshape(()) if axis is None else scale
    params = QParams(QuantSpec(INT8, grain, True), scale, np.zeros(scale.shape, np.int64))
    return WeightCodes(codes, params, "file", layer.weight_name)


def _plan_attention(graph: Graph, plan: QuantPlan, tensors: Tensors) -> None:
    """The queries, keys and values that the files have scales for; their attention is found as when they were made."""
    if not any(name.endswith(".fa_q.scale") for name in tensors):
        return
    for one in find_attention(graph)[0]:
        for role, entry in one.entries.items():
            prefix = f"{one.name}.fa_{role}"
            if f"{prefix}.scale" not in tensors:
                continue
            alone = entry.heads == 1 and entry.width == 1
            numbers = _numbers(tensors, prefix, "scale", entry.heads).repeat(entry.width)
            numbers = numbers[0].reshape(()) if alone else numbers
            spec = QuantSpec(INT8, PerTensor() if alone else PerChannel(entry.axis), True)
            key = f"{entry.tensor}@{prefix}"
            plan.params[key] = QParams(spec, numbers, np.zeros(numbers.shape, np.int64))
            plan.activations[entry.use] = Slot(spec, key)


def _numbers(tensors: Tensors, module: str, part: str, count: int) -> NDArray[np.float64]:
    """A tensor of ``count`` finite numbers, float64 [count]."""
    values = tensors.get(f"{module}.{part}")
    if values is None:
        raise GraphError(f"tensor '{module}.{part}' is missing; the files are not complete")
    if values.size != count or not np.isfinite(values).all():
        raise GraphError(f"'{module}.{part}' has shape {list(values.shape)}, not {count} finite numbers")
    return np.asarray(values.reshape(-1), np.float64)


def _set(graph: Graph, node: str, port: int, values: Array) -> None:
    """Replace a constant that differs; GraphError when the shapes do."""
    target = graph.node(node)
    old = graph.value(target.inputs[port])
    if old is None or old.shape != values.shape:
        has = "no constant" if old is None else f"shape {list(old.shape)}"
        raise GraphError(
            f"input {port} of node '{node}' has {has} in the model and shape {list(values.shape)} in the files; "
            "give the float model that the files were made from"
        )
    if not np.array_equal(old, values):
        own_constant(graph, target, port, np.asarray(values, old.dtype))


def _set_constants(graph: Graph, tensors: Tensors) -> None:
    left = set(tensors)
    for node in graph.nodes:
        for port, tensor in enumerate(node.inputs):
            if tensor.name in tensors and graph.is_constant(tensor):
                left.discard(tensor.name)
                _set(graph, node.name, port, tensors[tensor.name])
    if left:
        raise GraphError(
            f"tensor '{min(left)}' of the files has no place in the model; give the float model that the files were "
            "made from; operators that a recipe adds (split_outliers, a Mul that smooths) cannot be rebuilt"
        )
