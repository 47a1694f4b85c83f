"""The quantized layers as msModelSlim's tensors: codes, scales and what an NPU derives from them.

| kind | tensors of layer L | shapes |
|---|---|---|
| all | ``L.weight`` int8, ``L.weight_scale``, ``L.weight_offset`` (zeros), ``L.bias`` if any | [out, in], [out, 1] |
| W8A8 | ``L.input_scale``, ``L.input_offset``, ``L.deq_scale`` int64, ``L.quant_bias`` int32 | [1], [out] |
| W8A8_TIMESTEP | the same for every calibrated time step, ascending | [T, 1], [T, out] |
| W8A8_MIX | as W8A8: what serves single tokens | |
| FAQuant | ``A.fa_q.scale`` float32, ``A.fa_q.offset`` int8 (zeros), the same for k and v of attention A | [heads, 1] |

    deq = float32(input_scale * weight_scale), stored as `pack_int64`
    quant_bias = round(bias / deq - input_offset * sum_in(q_w)), so that y = (sum q_x q_w + quant_bias) * deq

Activations are signed here whatever the graph uses: q_x = clip(round(x / input_scale) + input_offset, -128, 127).
Layers have module names; every other float constant keeps the name it has in the graph and its kind is FLOAT.
Source: files written by msModelSlim 26.1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from calib.types import Array
from onnxslim_ptq.core.deq_scale import deq_scale, pack_int64
from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.spec import (
    BelowTimestep,
    ManyTokens,
    PerChannel,
    PerTensor,
    PerToken,
    QParams,
    QuantPlan,
    Slot,
    Use,
    WeightCodes,
)
from onnxslim_ptq.core.timesteps import CalibratedSteps
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.graph.edit import following_bias
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears

__all__ = [
    "ATTENTION",
    "FLOAT",
    "LayerBias",
    "TensorSet",
    "bias_of",
    "layer_tensors",
    "out_in",
    "signed_zero",
]

FLOAT, ATTENTION = "FLOAT", "FAQuant"
_WIDTHS = (np.float32, np.float16)


@dataclass
class TensorSet:
    """Tensors by name, and the kind of each (FLOAT, W8A8, W8A8_DYNAMIC, W8A16); ``quant_type`` is the model's.

    ``facts``: what the description says beside that. ``steps``: which time steps the rows of W8A8_TIMESTEP are of; the
    document's description has no place for it, so it goes to the metadata of the .safetensors file.
    """

    quant_type: str
    facts: dict[str, str] = field(default_factory=dict)
    steps: CalibratedSteps | None = None
    tensors: dict[str, Array] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: Array, kind: str) -> None:
        """GraphError when two tensors would have one name."""
        if name in self.tensors:
            raise GraphError(
                f"two tensors would be called '{name}'; tell their modules apart under names: in the recipe"
            )
        self.tensors[name] = np.ascontiguousarray(values).reshape(np.shape(values))
        self.kinds[name] = kind


@dataclass(frozen=True)
class LayerBias:
    """Where the bias of a layer is: a port of its own node, or of the Add behind it."""

    node: str
    port: int
    values: Array


def layer_tensors(graph: Graph, plan: QuantPlan, modules: Mapping[str, str], quant_type: str) -> TensorSet:
    """The tensors of every layer and every other float constant of ``graph``, which ``plan`` quantizes.

    ``modules``: module name by node. Names are sorted by the order of the graph.

    Raises:
        GraphError: a weight has a form these files do not have, or two tensors one name.
    """
    made = TensorSet(quant_type, steps=_steps(plan))
    told: set[str] = set()
    for layer in find_linears(graph)[0]:
        node, module = graph.node(layer.node), modules[layer.node]
        slot = plan.weights.get(Use(layer.node, layer.weight))
        bias = bias_of(graph, layer)
        told |= {layer.weight_name, *([_constant_name(graph, bias)] if bias else [])}
        if slot is None:
            weight = graph.value(node.inputs[layer.weight])
            assert weight is not None
            made.add(f"{module}.weight", out_in(layer, node, weight), FLOAT)
        else:
            _quantized(made, module, layer, node, plan, slot, bias)
        if bias is not None:
            made.add(f"{module}.bias", bias.values, FLOAT)
    for name, values in _constants(graph):
        if name not in told:
            made.add(name, values, FLOAT)
    for prefix, (key, heads) in plan.attention.items():
        scale = np.asarray(plan.params[key].scale, np.float32).reshape(heads, -1)[:, :1]
        made.add(f"{prefix}.scale", scale, ATTENTION)
        made.add(f"{prefix}.offset", np.zeros(scale.shape, np.int8), ATTENTION)
        made.facts["fa_quant_type"] = ATTENTION
    return made


def _steps(plan: QuantPlan) -> CalibratedSteps | None:
    """GraphError when layers become static at different steps: these files know one threshold for all."""
    switched = {
        (grain.while_.threshold, tuple(sorted(plan.timesteps[slot.params])))
        for slot in plan.activations.values()
        if isinstance(grain := slot.spec.grain, PerToken) and isinstance(grain.while_, BelowTimestep)
    }
    if len(switched) > 1:
        several = ", ".join(str(threshold) for threshold, _ in sorted(switched))
        raise GraphError(
            f"timestep_sep is {several} in different steps of the recipe and these files have room for one; "
            "give all the same, or leave out the weight files"
        )
    return CalibratedSteps(*switched.pop()) if switched else None


def _quantized(
    made: TensorSet,
    module: str,
    layer: Linear,
    node: gs.Node,
    plan: QuantPlan,
    slot: Slot,
    bias: LayerBias | None,
) -> None:
    stored = plan.weight_codes[slot.params]
    scale = _require_form(module, stored, layer.channels)
    input_slot = plan.activations.get(Use(layer.node, layer.activation))
    params = None if input_slot is None else plan.params.get(input_slot.params)
    kind = _kind(input_slot)
    codes = out_in(layer, node, stored.codes)
    made.add(f"{module}.weight", codes, kind)
    made.add(f"{module}.weight_scale", scale[:, None], kind)
    made.add(f"{module}.weight_offset", np.zeros_like(scale[:, None]), kind)
    if params is None:
        return
    real = np.zeros(layer.channels) if bias is None else np.asarray(bias.values, np.float64)
    sums = codes.astype(np.int64).reshape(layer.channels, -1).sum(axis=1)
    assert input_slot is not None
    steps = plan.timesteps.get(input_slot.params)
    try:
        if steps is None:
            derived = _derived(params, scale, real, sums)
        else:
            each = [_derived(steps[step], scale, real, sums) for step in sorted(steps)]
            derived = {part: np.stack([one[part] for one in each]) for part in each[0]}
    except ValueError as error:
        raise GraphError(f"layer '{module}': {error}; leave it float or leave out the weight files") from None
    for part, values in derived.items():
        made.add(f"{module}.{part}", values, kind)


def _derived(params: QParams, scale: Array, bias: Array, sums: Array) -> dict[str, Array]:
    """What one set of input numbers makes of the weight scales, the bias and the sums of codes, all [out]."""
    input_scale, offset = np.float32(params.scale), signed_zero(params)
    deq = deq_scale(input_scale, scale)
    codes = np.rint(
        np.asarray(bias, np.float64) / deq.astype(np.float64) - offset * np.asarray(sums, np.int64)
    )
    limit = np.iinfo(np.int32)
    return {
        "input_scale": np.asarray([input_scale]),
        "input_offset": np.asarray([offset], np.float32),
        "quant_bias": np.clip(codes, limit.min, limit.max).astype(np.int32),
        "deq_scale": pack_int64(deq),
    }


def _kind(activation: Slot | None) -> str:
    if activation is None:
        return "W8A16"
    grain = activation.spec.grain
    if not isinstance(grain, PerToken):
        return "W8A8"
    return {BelowTimestep: "W8A8_TIMESTEP", ManyTokens: "W8A8_MIX"}.get(type(grain.while_), "W8A8_DYNAMIC")


def _require_form(module: str, stored: WeightCodes, channels: int) -> Array:
    """The weight's scales [out] float32; GraphError unless it is symmetric int8 per channel or per tensor."""
    spec = stored.params.spec
    if (
        spec.dtype is not INT8
        or not isinstance(spec.grain, PerChannel | PerTensor)
        or stored.params.zero_point.any()
    ):
        raise GraphError(
            f"layer '{module}': these files hold symmetric int8 weights without groups; "
            "leave out the weight files, or use weight: {dtype: int8, per: channel} for it"
        )
    return np.broadcast_to(stored.params.scale, (channels,)).astype(np.float32)


def signed_zero(params: QParams) -> int:
    """The zero point of a per-tensor activation as int8, whatever integers the graph uses."""
    dtype = params.spec.dtype
    return int(params.zero_point) - (0 if dtype.signed else (dtype.highest + 1) // 2)


def out_in(layer: Linear, node: gs.Node, weight: Array) -> Array:
    """The weight as torch has it, [out, in, ...]; its own inverse for matrices."""
    swapped = layer.op in ("MatMul", "ConvTranspose") or (
        layer.op == "Gemm" and not node.attrs.get("transB", 0)
    )
    if not swapped or weight.ndim < 2:
        return weight
    axes = (-1, -2) if layer.op == "MatMul" else (0, 1)
    return np.swapaxes(weight, *axes)


def bias_of(graph: Graph, layer: Linear) -> LayerBias | None:
    """The layer's constant bias, its own or that of the Add behind a MatMul."""
    node = graph.node(layer.node)
    if layer.bias is not None:
        values = graph.value(node.inputs[layer.bias])
        assert values is not None
        return LayerBias(layer.node, layer.bias, values)
    if layer.op != "MatMul":
        return None
    found = following_bias(graph, node, layer.channels)
    return None if found is None else LayerBias(found[0].name, found[1], found[2])


def _constant_name(graph: Graph, bias: LayerBias) -> str:
    return str(graph.node(bias.node).inputs[bias.port].name)


def _constants(graph: Graph) -> list[tuple[str, Array]]:
    """Float constants of at least one dimension that nodes read, in graph order, each once."""
    found: dict[str, Array] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            values = graph.value(tensor)
            if values is not None and values.ndim and values.dtype in _WIDTHS:
                found.setdefault(tensor.name, values)
    return list(found.items())
