"""A runnable quantized graph from the float model and the files of `weight_files`: the proof that they are complete.

Codes, scales and offsets are read from the files and rendered by the same exporter as any plan; float constants that
smoothing or bias correction changed come from the files too. What the files derive (``quant_bias``, ``deq_scale``) is
left to the graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from calib.model import Model
from calib.types import Array
from onnxslim_ptq.core.dtypes import INT8, INT32
from onnxslim_ptq.core.qmath import quantize_bias
from onnxslim_ptq.core.spec import (
    BiasCodes,
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
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.export.tensors import ATTENTION, FLOAT, bias_of, out_in
from onnxslim_ptq.graph.attention import find_attention
from onnxslim_ptq.graph.edit import own_constant
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.names import module_names
from onnxslim_ptq.graph.opset import raise_opset
from onnxslim_ptq.graph.optimize import optimize

__all__ = ["read_weight_files", "rebuild"]

_PER_CHANNEL_OPSET = 13
_MAX_JSON = 256 * 1024**2
Tensors = dict[str, Array]


def read_weight_files(description: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors by name and their kinds, from a description and every .safetensors file of the same save beside it.

    Raises:
        GraphError: a file is no such file, or a tensor that the description names is missing.
    """
    try:
        if description.stat().st_size > _MAX_JSON:
            raise GraphError(f"'{description}' is larger than a description can be")
        document = json.loads(description.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GraphError(f"description '{description}' cannot be read: {error}") from None
    if not isinstance(document, dict) or "model_quant_type" not in document:
        raise GraphError(
            f"'{description}' is no description of quantized weights: it has no model_quant_type"
        )
    tensors: Tensors = {}
    for path in sorted(description.parent.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if name in document}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise GraphError(f"'{path}' cannot be read: {error}") from None
    kinds = {k: v for k, v in document.items() if isinstance(v, str) and k in tensors}
    known = ("model_quant_type", "version", "fa_quant_type", "group_size")
    missing = next((name for name in document if name not in tensors and name not in known), None)
    if missing is not None:
        raise GraphError(
            f"'{description.name}' names the tensor '{missing}', which no .safetensors beside it holds"
        )
    return tensors, kinds


def rebuild(
    source: Model, description: Path, target: Target, names: Mapping[str, str] | None = None
) -> Model:
    """The quantized model, in the form of ``target``; ``names`` as in the recipe that made the files.

    Raises:
        GraphError: the files do not fit the model.
    """
    tensors, kinds = read_weight_files(description)
    graph = Graph(raise_opset(source, _PER_CHANNEL_OPSET))
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
            _plan_layer(graph, plan, layer, module, tensors, kinds[f"{module}.weight"], target)
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


def _plan_layer(
    graph: Graph, plan: QuantPlan, layer: Linear, module: str, tensors: Tensors, kind: str, target: Target
) -> None:
    node = graph.node(layer.node)
    axis = layer.channel_axis
    codes = np.ascontiguousarray(out_in(layer, node, tensors[f"{module}.weight"]))
    scale = np.asarray(_part(tensors, module, "weight_scale").reshape(-1), np.float64)
    grain: Any = PerTensor() if axis is None else PerChannel(axis)
    scale = scale[0].reshape(()) if axis is None else scale
    spec = QuantSpec(INT8, grain, True)
    params = QParams(spec, scale, np.zeros(scale.shape, np.int64))
    plan.weights[Use(layer.node, layer.weight)] = Slot(spec, f"{module}.weight")
    plan.weight_codes[f"{module}.weight"] = WeightCodes(codes, params, "file", layer.weight_name)
    site = Use(layer.node, layer.activation)
    if kind == "W8A8_DYNAMIC":
        rows = QuantSpec(target.activation, PerToken(), target.symmetric_activation)
        plan.activations[site] = Slot(rows, f"{layer.activation_name}@token")
    if kind == "W8A8_TIMESTEP":
        raise GraphError(
            f"'{module}' has the kind {kind}: its files do not tell from which time step it is static"
        )
    if kind not in ("W8A8", "W8A8_MIX"):
        return
    dtype = target.activation
    shift = 0 if dtype.signed else (dtype.highest + 1) // 2
    s_x = np.asarray(_part(tensors, module, "input_scale").reshape(-1)[0], np.float64)
    zero = np.asarray(int(_part(tensors, module, "input_offset").reshape(-1)[0]) + shift, np.int64)
    act = QuantSpec(dtype, PerTensor(), target.symmetric_activation)
    # Readers of one tensor that share its numbers share the quantizer, as in the graph the files came from.
    key = f"{layer.activation_name}@{float(s_x)!r}@{int(zero)}"
    plan.params[key] = QParams(act, s_x, zero)
    if kind == "W8A8_MIX":
        act = QuantSpec(dtype, PerToken(ManyTokens()), target.symmetric_activation)
    plan.activations[site] = Slot(act, key)
    if kind == "W8A8" and layer.bias is not None and target.bias is BiasForm.INT32:
        values = np.asarray(graph.value(node.inputs[layer.bias]), np.float64)
        both = np.asarray(np.float32(s_x * np.broadcast_to(scale, values.shape)), np.float64)
        integers, clipped = quantize_bias(values, both)
        bias = QuantSpec(INT32, PerChannel(0), True)
        plan.biases[Use(layer.node, layer.bias)] = Slot(bias, f"{module}.bias")
        plan.bias_codes[f"{module}.bias"] = BiasCodes(integers, both, key, f"{module}.weight", clipped)


def _plan_attention(graph: Graph, plan: QuantPlan, tensors: Tensors) -> None:
    """The queries, keys and values that the files have scales for; their attention is found as when they were made."""
    if not any(name.endswith(".fa_q.scale") for name in tensors):
        return
    for one in find_attention(graph)[0]:
        for role, entry in one.entries.items():
            scale = tensors.get(f"{one.name}.fa_{role}.scale")
            if scale is None:
                continue
            alone = entry.heads == 1 and entry.width == 1
            numbers = np.asarray(scale.reshape(-1).repeat(entry.width), np.float64)
            numbers = numbers[0].reshape(()) if alone else numbers
            spec = QuantSpec(INT8, PerTensor() if alone else PerChannel(entry.axis), True)
            key = f"{entry.tensor}@{one.name}.fa_{role}"
            plan.params[key] = QParams(spec, numbers, np.zeros(numbers.shape, np.int64))
            plan.activations[entry.use] = Slot(spec, key)


def _part(tensors: Tensors, module: str, part: str) -> Array:
    if f"{module}.{part}" not in tensors:
        raise GraphError(f"tensor '{module}.{part}' is missing; the files are not complete")
    return tensors[f"{module}.{part}"]


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
            f"tensor '{min(left)}' of the files has no place in the model; "
            "give the float model that the files were made from"
        )
