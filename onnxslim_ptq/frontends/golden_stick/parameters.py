"""The parameters of a quantized network under Golden Stick's names."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from calib.types import Array
from onnxslim_ptq.api import Result
from onnxslim_ptq.core.spec import PerChannel, PerGroup, Use, WeightCodes
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.golden_stick import WEIGHT, from_ascend_v1, from_int4
from onnxslim_ptq.export.packed_int4 import Int4Layer
from onnxslim_ptq.export.tensors import bias_of, layer_tensors
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.names import module_names

__all__ = ["golden_stick_parameters", "packed_parameters"]

_INT4 = 4
_SMOOTHED = ".scaled.by"  # the constant of the Mul before a smoothed layer


def golden_stick_parameters(result: Result) -> dict[str, Array]:
    """By name; GraphError for a layer whose form these names do not have (asymmetric weights, shifted activations)."""
    graph, plan = result.graph, result.plan
    linears = find_linears(graph)[0]
    modules = module_names(graph, linears)
    codes = {
        layer.node: plan.weight_codes[slot.params]
        for layer in linears
        if (slot := plan.weights.get(Use(layer.node, layer.weight))) is not None
    }
    small = {layer for layer in linears if layer.node in codes and _bits(codes[layer.node]) == _INT4}
    if not small:
        found = layer_tensors(graph, plan, modules, result.recipe.quant_type)
        made = from_ascend_v1(found.tensors, found.kinds)
    elif len(small) == len(codes):
        made = _int4(result, sorted(small, key=linears.index), modules, codes)
    else:
        raise GraphError(
            "a network of int8 and int4 layers has no form under these names; use one type of weight"
        )
    made = {name: values for name, values in made.items() if not name.endswith(_SMOOTHED)}
    return _with_smoothing(result, modules, made)


def packed_parameters(result: Result, names: Iterable[str]) -> dict[str, str]:
    """Which of the parameters hold 4-bit codes, two to a byte: all weights or none."""
    small = any(_bits(codes) == _INT4 for codes in result.plan.weight_codes.values())
    return {name: "int4" for name in names if small and name.endswith(WEIGHT)}


def _bits(codes: WeightCodes) -> int:
    return codes.params.spec.dtype.bits


def _int4(
    result: Result, layers: list[Linear], modules: dict[str, str], codes: dict[str, WeightCodes]
) -> dict[str, Array]:
    packed: dict[str, Int4Layer] = {}
    biases: dict[str, Array] = {}
    taken: set[str] = set()
    for layer in layers:
        stored, name = codes[layer.node], modules[layer.node]
        grain = stored.params.spec.grain
        along_inputs = isinstance(grain, PerChannel) and grain.axis % stored.codes.ndim == 1
        if (
            stored.codes.ndim != 2
            or not (along_inputs or isinstance(grain, PerGroup))
            or layer.op != "MatMul"
        ):
            raise GraphError(f"layer '{name}': int4 weights have a form under these names for MatMul only")
        scale, zero = (np.atleast_2d(v) for v in (stored.params.scale, stored.params.zero_point))
        packed[name] = Int4Layer(stored.codes.astype(np.int8), scale.astype(np.float32), zero.astype(np.int8))
        taken.add(layer.weight_name)
        if (bias := bias_of(result.graph, layer)) is not None:
            biases[f"{name}.bias"] = bias.values
            taken.add(result.graph.node(bias.node).inputs[bias.port].name)
    others = {
        t.name: v
        for node in result.graph.nodes
        for t in node.inputs
        if (v := result.graph.value(t)) is not None and v.ndim and v.dtype.kind == "f" and t.name not in taken
    }
    return from_int4(packed, {**others, **biases})


def _with_smoothing(result: Result, modules: dict[str, str], made: dict[str, Array]) -> dict[str, Array]:
    """Each smoothed layer's scale in its ``input_scale``, [in], or as ``smooth_scale`` = 1 / s."""
    for entry in result.context.smoothing:
        if entry.get("shift") is not None:
            raise GraphError(f"layer '{entry['group'][0]}' is shifted, which these names cannot say")
        scale = np.asarray(entry["scale"], np.float64)
        for node in entry["group"]:
            name = modules.get(node, "")
            static = f"{name}.quant_op.input_scale"
            if static in made:
                made[static] = np.asarray(np.asarray(made[static], np.float64) * scale, np.float32)
                zero = f"{name}.quant_op.input_zp"
                made[zero] = np.broadcast_to(made[zero], scale.shape).copy()
            elif f"{name}._layer.weight" in made:
                made[f"{name}._layer.matmul.smooth_scale"] = (1 / scale).astype(np.float32)
    return made
