"""Weight codes, bias correction and bias codes of the placed layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calib.stats import MeanStats
from calib.types import Probe
from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.qmath import dequantize, grain_range, params_from_range, quantize, quantize_bias
from onnxslim_ptq.core.spec import (
    BiasCodes,
    PerGroup,
    PerToken,
    QParams,
    QuantPlan,
    QuantSpec,
    Slot,
    Use,
    WeightCodes,
)
from onnxslim_ptq.graph.edit import following_bias, own_constant
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear

__all__ = [
    "add_bias_codes",
    "add_weight_codes",
    "correct_biases",
    "correctable",
    "float_weight",
    "mean_probe",
    "output_shift",
    "round_added_biases",
    "start_numbers",
]

_LARGEST_MAGNITUDE = {False: 127, True: 64}
_BIAS_ROOM = 2.0**30  # codes a bias may use; half of int32, so that the accumulator keeps the other half
Floats = NDArray[np.float64]


def float_weight(graph: Graph, layer: Linear) -> NDArray[np.float32]:
    """The layer's weight as float32, whatever the model's precision."""
    values = graph.value(graph.node(layer.node).inputs[layer.weight])
    assert values is not None, f"layer {layer.node} lost its weight"
    return np.asarray(values, np.float32)


def add_weight_codes(graph: Graph, plan: QuantPlan, layers: dict[str, Linear], reduce_range: bool) -> None:
    """Round every planned weight that has no codes yet to nearest."""
    for use, slot in plan.weights.items():
        if slot.params in plan.weight_codes:
            continue
        layer = layers[use.node]
        weight = float_weight(graph, layer)
        params, _ = start_numbers(weight, slot.spec, reduce_range)
        plan.weight_codes[slot.params] = WeightCodes(
            quantize(weight, params), params, "rtn", layer.weight_name
        )


def start_numbers(
    weight: NDArray[np.float32], spec: QuantSpec, reduce_range: bool
) -> tuple[QParams, tuple[int, int]]:
    """Numbers that cover the weight's extremes, and the lowest and highest code it may use.

    Symmetric int8: scale = max|w| / 127, codes -127..127 (64 with ``reduce_range``); asymmetric and smaller types, and
    a spec of full range without ``reduce_range``, use all codes.
    """
    limited = spec.dtype is INT8 and spec.symmetric and (reduce_range or not spec.full_range)
    largest = _LARGEST_MAGNITUDE[reduce_range] if limited else None
    params = params_from_range(grain_range(weight, spec.grain), spec, codes=largest)
    return params, (spec.dtype.lowest, spec.dtype.highest) if largest is None else (-largest, largest)


def mean_probe(layer: Linear) -> Probe:
    """The statistic bias correction needs: the mean of each input channel."""
    return Probe(layer.activation_name, "mean", 1 if layer.op in ("Conv", "ConvTranspose") else -1)


def correct_biases(
    graph: Graph, plan: QuantPlan, layers: list[Linear], means: Mapping[Probe, MeanStats]
) -> int:
    """Take the mean error of rounded weights out of each layer: b += (W - W_hat) E[x]; returns how many layers changed.

    Where a layer has no bias: a Conv is given one, a MatMul's correction goes into the constant Add behind it, and a
    MatMul without one stays as it is. Exact for the mean over positions whose window lies inside the image.
    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, §4.2.
    """
    changed = 0
    for layer in layers:
        if not correctable(graph, layer):
            continue
        slot = plan.weights[Use(layer.node, layer.weight)]
        weight = float_weight(graph, layer)
        codes = plan.weight_codes[slot.params]
        error = weight.astype(np.float64) - dequantize(codes.codes, codes.params)
        seen = means[mean_probe(layer)]
        if seen.count == 0:
            continue  # whoever looks for the tensor's range tells that nothing finite was seen
        shift = output_shift(layer, graph, error, seen.mean)
        if shift is not None and np.isfinite(shift).all() and shift.any():
            changed += _add_to_bias(graph, plan, layer, shift)
    return changed


def correctable(graph: Graph, layer: Linear) -> bool:
    """Whether the mean error of the layer's weight can be taken out (see `correct_biases`)."""
    if layer.op == "MatMul":
        return following_bias(graph, graph.node(layer.node), layer.channels) is not None
    return layer.op == "Conv" or (layer.op == "Gemm" and not graph.node(layer.node).attrs.get("transA", 0))


def output_shift(layer: Linear, graph: Graph, error: Floats, mean: Floats) -> Floats | None:
    """The weight error applied to the mean input, [channels], or None where the shapes leave no single answer."""
    node = graph.node(layer.node)
    if layer.op == "Conv":
        group = int(node.attrs.get("group", 1))
        summed = error.reshape(group, error.shape[0] // group, error.shape[1], -1).sum(axis=3)
        return np.asarray(np.einsum("goi,gi->go", summed, mean.reshape(group, -1)).reshape(-1), np.float64)
    if layer.op == "Gemm" and not node.attrs.get("transA", 0):
        return error @ mean if node.attrs.get("transB", 0) else mean @ error
    if layer.op == "MatMul" and error.ndim == 2:
        return mean @ error
    return None


def _add_to_bias(graph: Graph, plan: QuantPlan, layer: Linear, shift: Floats) -> int:
    node = graph.node(layer.node)
    if layer.op == "MatMul":
        return _add_to_following(graph, plan, layer, shift)
    old = graph.value(node.inputs[2]) if layer.bias is not None else None
    if old is None:
        old = np.zeros(shift.size, graph.value(node.inputs[1]).dtype)  # type: ignore[union-attr]
    plan.uncorrected.setdefault(layer.node, (node.name, 2, old))
    own_constant(graph, node, 2, np.asarray(old.astype(np.float64) + shift, old.dtype))
    return 1


def _add_to_following(graph: Graph, plan: QuantPlan, layer: Linear, shift: Floats) -> int:
    found = following_bias(graph, graph.node(layer.node), shift.size)
    if found is None:
        return 0
    add, port, old = found
    plan.uncorrected.setdefault(layer.node, (add.name, port, old))
    own_constant(graph, add, port, np.asarray(old.astype(np.float64) + shift, old.dtype))
    return 1


def add_bias_codes(graph: Graph, plan: QuantPlan, layers: dict[str, Linear]) -> None:
    """int32 biases with scale s_x * s_w; a channel whose bias would leave int32 gets a larger weight scale instead."""
    biases = {
        use: np.asarray(graph.value(graph.node(use.node).inputs[use.port]), np.float64) for use in plan.biases
    }
    # Layers that share a weight share its scales too, so all of them must have room before the first code is made.
    least: dict[str, Floats] = {}
    for use, bias in biases.items():
        activation, weight = _slots(plan, layers[use.node])
        wanted = np.abs(bias) / (float(plan.params[activation.params].scale) * _BIAS_ROOM)
        least[weight.params] = np.maximum(wanted, least.get(weight.params, 0.0))
    for use in plan.biases:
        weight = _slots(plan, layers[use.node])[1]
        if weight.params in least:
            _make_room(graph, plan, layers[use.node], weight, least.pop(weight.params))
    for use, slot in plan.biases.items():
        bias = biases[use]
        activation, weight = _slots(plan, layers[use.node])
        s_x = float(plan.params[activation.params].scale)
        scale = np.broadcast_to(s_x * plan.weight_codes[weight.params].params.scale, bias.shape)
        scale = np.asarray(np.asarray(scale, np.float32), np.float64)  # what the file will hold
        codes, clipped = quantize_bias(bias, scale)
        plan.bias_codes[slot.params] = BiasCodes(
            codes,
            scale,
            activation.params,
            weight.params,
            clipped,
            graph.node(use.node).inputs[use.port].name,
        )


def round_added_biases(graph: Graph, plan: QuantPlan, layers: Iterable[Linear]) -> int:
    """The bias in the Add behind each MatMul with one known activation scale becomes a whole multiple of
    float32(s_x * s_w), which changes an output by at most s_x * s_w / 2; returns how many changed.

    An int32 accumulator holds no others: the graph then computes what the weight files say, y = (sum q_x q_w +
    quant_bias) * deq_scale, and a MatMul with an Add what a Gemm with an int32 bias does.
    """
    changed = 0
    for layer in layers:
        activation = plan.activations.get(Use(layer.node, layer.activation))
        if layer.op != "MatMul" or activation is None or isinstance(activation.spec.grain, PerToken):
            continue
        found = following_bias(graph, graph.node(layer.node), layer.channels)
        weight = plan.weight_codes[plan.weights[Use(layer.node, layer.weight)].params].params
        if found is None or found[2].dtype != np.float32 or isinstance(weight.spec.grain, PerGroup):
            continue
        add, port, old = found
        s_x = np.float32(plan.params[activation.params].scale)
        with np.errstate(all="ignore"):  # a product that float32 cannot hold leaves the bias as it is
            unit = np.asarray(s_x * np.broadcast_to(weight.scale, old.shape).astype(np.float32), np.float64)
            codes = np.rint(old.astype(np.float64) / unit)
            rounded = np.where(np.abs(codes) < _BIAS_ROOM, codes * unit, old).astype(old.dtype)
        if not np.array_equal(rounded, old):
            plan.uncorrected.setdefault(layer.node, (add.name, port, old))
            own_constant(graph, add, port, rounded)
            changed += 1
    return changed


def _slots(plan: QuantPlan, layer: Linear) -> tuple[Slot, Slot]:
    """The slots of the layer's activation and weight."""
    return plan.activations[Use(layer.node, layer.activation)], plan.weights[Use(layer.node, layer.weight)]


def _make_room(graph: Graph, plan: QuantPlan, layer: Linear, slot: Slot, least: Floats) -> None:
    """Raise weight scales to ``least`` where they are below it; give dead channels a scale that suits their bias."""
    old = plan.weight_codes[slot.params]
    scale = np.broadcast_to(old.params.scale, least.shape).copy()
    weight = float_weight(graph, layer)
    axis = old.params.axis
    if axis is not None:
        dead = ~weight.astype(bool).any(axis=tuple(i for i in range(weight.ndim) if i != axis % weight.ndim))
        # Codes of a dead channel are 0 whatever the scale, so the scale is free to represent the bias finely.
        scale[dead] = np.median(scale[~dead]) if not dead.all() else 1.0
    raised = np.maximum(scale, least)
    if axis is None:
        raised = np.asarray(raised.max())  # one scale serves all channels
    raised = np.asarray(np.asarray(raised, np.float32), np.float64)
    if np.array_equal(raised, old.params.scale):
        return
    params = QParams(old.params.spec, raised, np.zeros(raised.shape, np.int64))
    codes = quantize(weight, params)
    if axis is not None:  # what a rounder chose for the other channels stays
        same = (raised == old.params.scale).reshape(
            [-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)]
        )
        codes = np.where(same, old.codes, codes)
    plan.weight_codes[slot.params] = replace(old, codes=codes, params=params)
    if count := int((raised > old.params.scale).sum()):
        plan.notes.append(f"{layer.node}: {count} weight scales raised so that the bias fits int32")
