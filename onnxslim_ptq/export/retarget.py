"""Turns a plan that was read from a file into what another target takes, as far as that is exact on the integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calib.errors import GraphError
from onnxslim_ptq.core.dtypes import INT8, INT32, UINT8
from onnxslim_ptq.core.qmath import grain_range, params_from_range, quantize, quantize_bias, reciprocal_pair
from onnxslim_ptq.core.spec import (
    BiasCodes,
    PerChannel,
    PerTensor,
    QParams,
    QuantSpec,
    Result,
    Slot,
    Use,
    WeightCodes,
)
from onnxslim_ptq.core.targets import BiasForm, Target
from onnxslim_ptq.export.reading import Reading

__all__ = ["retarget"]

_SHIFT = 128
FloatWeight = Callable[[str, bool, WeightCodes], NDArray[np.float32]]


def retarget(reading: Reading, target: Target, weight_of: FloatWeight | None = None) -> list[str]:
    """Change ``reading`` for ``target`` and tell what changed.

    Exact: codes between int8 and uint8 (zero points move along), biases between int32 and float. ``weight_of`` gives
    the float weight of a node, transposed (transB) or not; with it weights that the target wants with one scale are
    rounded anew.

    Raises:
        GraphError: the target needs other integers, which only the float model can give.
    """
    notes = _activations(reading, target)
    notes += _weights(reading, target, weight_of)
    if target.reciprocal_scale:
        plan = reading.plan
        plan.params = {key: reciprocal_pair(params) for key, params in plan.params.items()}
    notes += _results(reading, target)
    _require_nothing_left(reading, target)
    _biases(reading, target)
    return notes


def _activations(reading: Reading, target: Target) -> list[str]:
    plan, moved = reading.plan, 0
    for key, params in plan.params.items():
        dtype = params.spec.dtype
        if dtype not in (INT8, UINT8):
            if target.static_only:
                raise GraphError(
                    f"activation '{key}' has {dtype} codes; target '{target.name}' takes {target.activation}; quantize "
                    "the float model again"
                )
            continue
        if dtype is not target.activation:
            shift = _SHIFT if target.activation is UINT8 else -_SHIFT
            spec = replace(params.spec, dtype=target.activation)
            plan.params[key] = QParams(spec, params.scale, params.zero_point + shift)
            moved += 1
        if target.symmetric_activation and plan.params[key].zero_point.any():
            raise GraphError(
                f"activation '{key.split('@')[0]}' has a zero point, and target '{target.name}' takes symmetric codes: "
                f"its range has to be found anew; quantize the float model with --target {target.name}"
            )
    plan.activations = {
        site: Slot(plan.params[slot.params].spec, slot.params) for site, slot in plan.activations.items()
    }
    return (
        [f"{moved} activations became {target.activation}: the same codes, shifted by 128"] if moved else []
    )


def _weights(reading: Reading, target: Target, weight_of: FloatWeight | None) -> list[str]:
    plan, graph, anew = reading.plan, reading.graph, 0
    for use, slot in list(plan.weights.items()):
        codes = plan.weight_codes[slot.params]
        if target.symmetric_weight and codes.params.zero_point.any():
            raise GraphError(
                f"node '{use.node}': its weight has zero points, and target '{target.name}' takes symmetric codes; "
                f"quantize the float model with --target {target.name} and symmetric weights"
            )
        if graph.node(use.node).op in target.per_channel or codes.params.axis is None:
            continue
        if weight_of is None:
            raise GraphError(
                f"node '{use.node}': target '{target.name}' takes one scale for the whole weight of a "
                f"{graph.node(use.node).op}, and the codes have one per channel; give the float model with --float"
            )
        transposed = bool(graph.node(use.node).attrs.get("transB", 0))
        weight = weight_of(use.node, transposed, codes)
        spec = QuantSpec(INT8, PerTensor(), True)
        params = params_from_range(grain_range(weight, spec.grain), spec, codes=127)
        key = f"{codes.name}@None"
        plan.weight_codes[key] = replace(codes, codes=quantize(weight, params), params=params, rounder="rtn")
        plan.weights[use] = Slot(spec, key)
        anew += 1
    return [f"{anew} weights rounded anew, with one scale each, from the float model"] if anew else []


def _results(reading: Reading, target: Target) -> list[str]:
    """Targets that quantize no outputs read such a value in float, except where layers quantize it for themselves."""
    plan = reading.plan
    results = [site for site in plan.activations if isinstance(site, Result)]
    if not target.static_only or not results:
        return []
    for site in results:
        del plan.activations[site]
    return [
        f"{len(results)} outputs of layers were quantized for their other readers too; those read float values now"
    ]


def _require_nothing_left(reading: Reading, target: Target) -> None:
    """GraphError where integers are left that are no part of a layer, as those of an int8 KV cache, and must not be."""
    left = next((n for n in reading.graph.nodes if n.op in ("QuantizeLinear", "DequantizeLinear")), None)
    if target.static_only and left is not None:
        raise GraphError(
            f"node '{left.name}': {left.op} that belongs to no layer has no form for target '{target.name}'; quantize "
            f"the float model with --target {target.name}"
        )


def _biases(reading: Reading, target: Target) -> None:
    """int32 biases at the scales as they are now, or none: the float graph has every bias in float already."""
    plan, graph = reading.plan, reading.graph
    if target.bias is BiasForm.FLOAT:
        plan.biases.clear()
        plan.bias_codes.clear()
        return
    for use in plan.weights:
        node = graph.node(use.node)
        activation = plan.activations.get(Use(use.node, 0))
        values = graph.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
        if activation is None or values is None or node.op == "MatMul":
            continue
        key, weight = f"{use.node}.bias", plan.weights[use].params
        s_x, s_w = plan.params[activation.params].scale, plan.weight_codes[weight].params.scale
        scale = np.broadcast_to(np.asarray(s_x * s_w, np.float32), values.shape).astype(np.float64)
        old = plan.bias_codes.get(key)
        if old is not None and np.allclose(old.scale, scale, rtol=1e-6, atol=0):
            plan.bias_codes[key] = replace(old, scale=scale, activation=activation.params, weight=weight)
            continue
        codes, clipped = quantize_bias(values, scale)
        if clipped:
            raise GraphError(f"node '{node.name}': its bias leaves int32 at the new scales; quantize again")
        name = old.name if old is not None else node.inputs[2].name
        plan.bias_codes[key] = BiasCodes(codes, scale, activation.params, weight, 0, name)
        plan.biases[Use(use.node, 2)] = Slot(QuantSpec(INT32, PerChannel(0), True), key)
