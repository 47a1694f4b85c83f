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

from collections.abc import Collection, Mapping

import numpy as np

from calib.types import Array
from onnxslim_ptq.core.deq_scale import pack_int64, unpack
from onnxslim_ptq.core.pack import pack_int4
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.packed_int4 import Int4Layer
from onnxslim_ptq.export.tensors import FLOAT, TensorSet

__all__ = ["WEIGHT", "from_ascend_v1", "from_int4", "to_ascend_v1"]

Tensors = dict[str, Array]
_MATMUL, _LAYER, _QUANT = "._layer.matmul.", "._layer.", ".quant_op."
_KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16")
WEIGHT = f"{_LAYER}weight"


def from_ascend_v1(tensors: Mapping[str, Array], kinds: Mapping[str, str]) -> Tensors:
    """Golden Stick's parameters of msModelSlim's tensors.

    Raises:
        GraphError: a tensor of a layer is missing, or a layer has a form these names do not have: numbers per time
            step, groups, or asymmetric weights with int8 activations.
    """
    made: Tensors = {}
    layers = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    for layer in sorted(layers):
        _of(tensors, layer, "weight")
    for name, values in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer not in layers:
            made[name] = values
        elif part == "weight":
            made |= _quantized(layer, tensors, kinds.get(name, ""))
    return made


def _quantized(layer: str, tensors: Mapping[str, Array], kind: str) -> Tensors:
    codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"].reshape(-1)
    if kind not in _KINDS or codes.dtype != np.int8 or codes.ndim == 0 or scale.size != len(codes):
        raise GraphError(
            f"layer '{layer}' of kind {kind} has {codes.dtype} weights {list(codes.shape)} and {scale.size} scales; "
            f"Golden Stick's names take int8 with a scale per output channel, of {', '.join(_KINDS)}"
        )
    made = {f"{layer}{WEIGHT}": codes}
    bias = tensors.get(f"{layer}.bias")
    if bias is not None:
        made[f"{layer}{_LAYER}bias"] = bias
    zero = tensors.get(f"{layer}.weight_offset", np.zeros_like(scale)).reshape(-1)
    if kind != "W8A16" and zero.any():
        raise GraphError(f"layer '{layer}' has asymmetric weights, which Golden Stick has for W8A16 only")
    if kind in ("W8A16", "W8A8_DYNAMIC"):
        made[f"{layer}{_MATMUL}weight_scale"] = scale
        if kind == "W8A16":
            made[f"{layer}{_MATMUL}weight_zp"] = np.asarray(0 - zero, scale.dtype)
        return made
    offset = _of(tensors, layer, "input_offset")
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


def to_ascend_v1(tensors: Mapping[str, Array], packed: Collection[str] = ()) -> TensorSet:
    """msModelSlim's tensors of Golden Stick's parameters; ``packed`` are those known to hold two values to a byte.

    Raises:
        GraphError: a layer is smoothed per channel, has 4 bits or rows out of order, which these files cannot say, or
            lacks a parameter.
    """
    layers = {name.removesuffix(WEIGHT) for name in tensors if name.endswith(WEIGHT)}
    made = TensorSet("")
    for name, values in tensors.items():
        layer = next((name[: name.index(mark)] for mark in (_MATMUL, _LAYER, _QUANT) if mark in name), None)
        if layer not in layers:
            made.add(name, values, FLOAT)
        elif name.endswith(WEIGHT):
            _require_plain(str(layer), tensors, packed)
            _add_layer(made, str(layer), tensors)
    quantized = sorted(kind for kind in made.kinds.values() if kind != FLOAT)
    made.quant_type = max(quantized, key=quantized.count) if quantized else FLOAT
    return made


def _require_plain(layer: str, tensors: Mapping[str, Array], packed: Collection[str]) -> None:
    for part in ("smooth_scale", "beta"):
        if f"{layer}{_MATMUL}{part}" in tensors:
            raise GraphError(
                f"layer '{layer}' is smoothed per channel ({part}), which msModelSlim's files cannot say"
            )
    if f"{layer}{WEIGHT}" in packed or f"{layer}{_MATMUL}perm" in tensors:
        raise GraphError(
            f"layer '{layer}' has 4 bits: msModelSlim's files hold int8 weights without groups only"
        )
    codes = tensors[f"{layer}{WEIGHT}"]
    if codes.dtype != np.int8 or codes.ndim == 0:
        raise GraphError(
            f"layer '{layer}': its weight is {codes.dtype} {list(codes.shape)}, not int8 [out, in]"
        )


def _add_layer(made: TensorSet, layer: str, tensors: Mapping[str, Array]) -> None:
    codes, bias = tensors[f"{layer}{WEIGHT}"], tensors.get(f"{layer}{_LAYER}bias")
    if f"{layer}{_MATMUL}dequant_scale" in tensors:
        _add_static(made, layer, tensors)
    else:
        scale, zero = (tensors.get(f"{layer}{_MATMUL}{part}") for part in ("weight_scale", "weight_zp"))
        if scale is None:
            raise GraphError(
                f"layer '{layer}' has no weight_scale and no dequant_scale; give the whole checkpoint"
            )
        if scale.shape != (len(codes),) or (zero is not None and zero.shape != scale.shape):
            raise GraphError(f"layer '{layer}': msModelSlim's files hold int8 weights without groups only")
        kind = "W8A8_DYNAMIC" if zero is None else "W8A16"
        made.add(f"{layer}.weight", codes, kind)
        column = scale.astype(np.float32)[:, None]
        made.add(f"{layer}.weight_scale", column, kind)
        offset = np.zeros_like(column) if zero is None else 0 - zero.astype(np.float32)[:, None]
        made.add(f"{layer}.weight_offset", offset, kind)
    if bias is not None:
        made.add(f"{layer}.bias", bias, FLOAT)


def _add_static(made: TensorSet, layer: str, tensors: Mapping[str, Array]) -> None:
    codes, bias = tensors[f"{layer}{WEIGHT}"], tensors.get(f"{layer}{_LAYER}bias")
    names = (f"{_QUANT}input_scale", f"{_QUANT}input_zp", f"{_MATMUL}quant_bias", f"{_MATMUL}dequant_scale")
    input_scale, zero, correction, deq = (_parameter(tensors, layer, name) for name in names)
    if input_scale.size != 1 or zero.size != 1:
        raise GraphError(f"layer '{layer}' is smoothed per channel, which msModelSlim's files cannot say")
    real = unpack(deq) if deq.dtype == np.int64 else deq.astype(np.float32)
    if (
        real.shape != (len(codes),)
        or correction.shape != real.shape
        or not (np.isfinite(real) & (real > 0)).all()
    ):
        raise GraphError(f"layer '{layer}': dequant_scale and quant_bias are not {len(codes)} usable numbers")
    column = (real / input_scale.astype(np.float32))[:, None]
    shift = np.zeros(len(codes)) if bias is None else np.asarray(bias, np.float64) / real
    limit = np.iinfo(np.int32)
    whole = np.clip(np.rint(shift) + correction, limit.min, limit.max).astype(np.int32)
    for part, values in (
        ("weight", codes),
        ("weight_scale", column),
        ("weight_offset", np.zeros_like(column)),
        ("input_scale", input_scale.astype(np.float32)),
        ("input_offset", zero.astype(np.float32)),
        ("quant_bias", whole),
        ("deq_scale", pack_int64(real)),
    ):
        made.add(f"{layer}.{part}", values, "W8A8")


def _parameter(tensors: Mapping[str, Array], layer: str, part: str) -> Array:
    if f"{layer}{part}" not in tensors:
        raise GraphError(f"layer '{layer}' has no parameter '{part.lstrip('.')}'; give the whole checkpoint")
    return tensors[f"{layer}{part}"]


def from_int4(layers: Mapping[str, Int4Layer], others: Mapping[str, Array]) -> Tensors:
    """Golden Stick's parameters of 4-bit layers; a bias among ``others`` gets its place, the rest stays."""
    made: Tensors = {}
    for name, layer in layers.items():
        made[f"{name}{WEIGHT}"] = pack_int4(layer.codes)
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
