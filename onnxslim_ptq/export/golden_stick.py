"""Golden Stick's parameter names, and what they say, from and to msModelSlim's (`onnxslim_ptq.export.tensors`).

| scheme | parameter of layer L | shape, type |
|---|---|---|
| all | ``L._layer.weight`` | int8 [out, in]; 4 bits: two to a byte, int8 [in, out / 2] |
| all | ``L._layer.bias``, if any | [out] |
| W8A8 | ``L.quant_op.input_scale``, ``L.quant_op.input_zp`` | [1] float32, int8 |
| W8A8 | ``L._layer.matmul.dequant_scale`` | [out] int64, the bits of float32(s_x s_w) |
| W8A8 | ``L._layer.matmul.quant_bias`` | [out] int32, -z Σ q_w: the bias stays a float of its own |
| others | ``L._layer.matmul.weight_scale`` | [out] float32; groups: [in / size, out] |
| weights only | ``L._layer.matmul.weight_zp`` | as the scale, the zero point negated |
| 4 bits by importance | ``L._layer.matmul.perm`` | [in] int32, which input channel each row belongs to |

msModelSlim's quant_bias is round(bias / deq) - z Σ q_w, and its files also hold the W8A8 weight scale, which is
deq / s_x here. Source: MindSpore Golden Stick 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calib.types import Array
from onnxslim_ptq.core.deq_scale import unpack
from onnxslim_ptq.core.pack import pack_int4
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.packed_int4 import Int4Layer
from onnxslim_ptq.export.tensors import FLOAT, TensorSet

__all__ = ["from_ascend_v1", "from_int4", "to_ascend_v1"]

Tensors = dict[str, Array]
_MATMUL, _LAYER, _QUANT = "._layer.matmul.", "._layer.", ".quant_op."


def from_ascend_v1(tensors: Mapping[str, Array], kinds: Mapping[str, str]) -> Tensors:
    """Golden Stick's parameters of msModelSlim's tensors; GraphError when one of a layer is missing."""
    made: Tensors = {}
    layers = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    for name, values in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer not in layers:
            made[name] = values
        elif part == "weight":
            made |= _quantized(layer, tensors, kinds.get(name, ""))
    return made


def _quantized(layer: str, tensors: Mapping[str, Array], kind: str) -> Tensors:
    made = {f"{layer}{_LAYER}weight": tensors[f"{layer}.weight"]}
    bias = tensors.get(f"{layer}.bias")
    if bias is not None:
        made[f"{layer}{_LAYER}bias"] = bias
    if f"{layer}.deq_scale" not in tensors:
        scale = tensors[f"{layer}.weight_scale"].reshape(-1)
        made[f"{layer}{_MATMUL}weight_scale"] = scale
        if kind != "W8A8_DYNAMIC":
            made[f"{layer}{_MATMUL}weight_zp"] = np.zeros_like(scale)
        return made
    offset = _of(tensors, layer, "input_offset")
    codes = tensors[f"{layer}.weight"]
    sums = codes.astype(np.int64).reshape(len(codes), -1).sum(axis=1)
    made[f"{layer}{_QUANT}input_scale"] = _of(tensors, layer, "input_scale").astype(np.float32)
    made[f"{layer}{_QUANT}input_zp"] = offset.astype(np.int8)
    made[f"{layer}{_MATMUL}dequant_scale"] = _of(tensors, layer, "deq_scale")
    made[f"{layer}{_MATMUL}quant_bias"] = (-int(offset.reshape(-1)[0]) * sums).astype(np.int32)
    return made


def _of(tensors: Mapping[str, Array], layer: str, part: str) -> Array:
    if f"{layer}.{part}" not in tensors:
        raise GraphError(f"layer '{layer}' has no tensor '{part}'; give the whole checkpoint")
    return tensors[f"{layer}.{part}"]


def to_ascend_v1(tensors: Mapping[str, Array]) -> TensorSet:
    """msModelSlim's tensors of Golden Stick's parameters.

    Raises:
        GraphError: a layer is smoothed per channel or has 4 bits, which these files cannot say, or lacks a parameter.
    """
    weight = f"{_LAYER}weight"
    layers = {name.removesuffix(weight) for name in tensors if name.endswith(weight)}
    made = TensorSet("")
    for name, values in tensors.items():
        layer = next((name[: name.index(mark)] for mark in (_MATMUL, _LAYER, _QUANT) if mark in name), None)
        if layer not in layers:
            made.add(name, values, FLOAT)
        elif name.endswith(weight):
            _add_layer(made, str(layer), tensors)
    quantized = [kind for kind in made.kinds.values() if kind != FLOAT]
    made.quant_type = max(set(quantized), key=quantized.count) if quantized else FLOAT
    return made


def _add_layer(made: TensorSet, layer: str, tensors: Mapping[str, Array]) -> None:
    codes, bias = tensors[f"{layer}{_LAYER}weight"], tensors.get(f"{layer}{_LAYER}bias")
    deq = tensors.get(f"{layer}{_MATMUL}dequant_scale")
    scale = tensors.get(f"{layer}{_MATMUL}weight_scale")
    if deq is None and scale is None:
        raise GraphError(
            f"layer '{layer}' has no weight_scale and no dequant_scale; give the whole checkpoint"
        )
    if deq is None and (scale is None or scale.ndim != 1 or len(scale) != len(codes)):
        raise GraphError(f"layer '{layer}': msModelSlim's files hold int8 weights without groups only")
    weight_only = f"{layer}{_MATMUL}weight_zp" in tensors
    kind = "W8A8" if deq is not None else "W8A16" if weight_only else "W8A8_DYNAMIC"
    made.add(f"{layer}.weight", codes, kind)
    if deq is not None:
        input_scale, zero = (
            _parameter(tensors, layer, f"{_QUANT}{part}") for part in ("input_scale", "input_zp")
        )
        if input_scale.size != 1 or zero.size != 1:
            raise GraphError(f"layer '{layer}' is smoothed per channel, which msModelSlim's files cannot say")
        real = unpack(deq) if deq.dtype == np.int64 else deq.astype(np.float32)
        scale = real / input_scale.astype(np.float32)
    assert scale is not None
    column = scale.astype(np.float32)[:, None]
    made.add(f"{layer}.weight_scale", column, kind)
    made.add(f"{layer}.weight_offset", np.zeros_like(column), kind)
    if deq is not None:
        shift = np.zeros(len(codes)) if bias is None else np.asarray(bias, np.float64) / real
        correction = _parameter(tensors, layer, f"{_MATMUL}quant_bias")
        limit = np.iinfo(np.int32)
        whole = np.clip(np.rint(shift) + correction, limit.min, limit.max).astype(np.int32)
        made.add(f"{layer}.input_scale", input_scale.astype(np.float32), kind)
        made.add(f"{layer}.input_offset", zero.astype(np.float32), kind)
        made.add(f"{layer}.quant_bias", whole, kind)
        made.add(f"{layer}.deq_scale", real.view(np.int32).astype(np.int64), kind)
    if bias is not None:
        made.add(f"{layer}.bias", bias, FLOAT)


def _parameter(tensors: Mapping[str, Array], layer: str, part: str) -> Array:
    if f"{layer}{part}" not in tensors:
        raise GraphError(f"layer '{layer}' has no parameter '{part.lstrip('.')}'; give the whole checkpoint")
    return tensors[f"{layer}{part}"]


def from_int4(layers: Mapping[str, Int4Layer], others: Mapping[str, Array]) -> Tensors:
    """Golden Stick's parameters of 4-bit layers; a bias among ``others`` gets its place, the rest stays."""
    made: Tensors = {}
    for name, layer in layers.items():
        made[f"{name}{_LAYER}weight"] = pack_int4(layer.codes)
        one = len(layer.scale) == 1  # per channel: without the axis of groups
        made[f"{name}{_MATMUL}weight_scale"] = layer.scale[0] if one else layer.scale
        negated = -layer.zero.astype(np.float32)
        made[f"{name}{_MATMUL}weight_zp"] = negated[0] if one else negated
        if layer.order is not None:
            made[f"{name}{_MATMUL}perm"] = layer.order
    for name, values in others.items():
        layer_name, _, part = name.rpartition(".")
        made[f"{layer_name}{_LAYER}bias" if part == "bias" and layer_name in layers else name] = values
    return made
