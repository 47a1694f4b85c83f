"""Scales and shifts a layer's output channels by changing its weight and bias."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.types import Array
from onnxslim_ptq.graph.edit import is_standard, narrowed, own_constant
from onnxslim_ptq.graph.graph import Graph

__all__ = ["along_outputs", "output_channels", "scale_layer"]

Floats = NDArray[np.float64]


def output_channels(graph: Graph, layer: gs.Node | None) -> tuple[int, int] | None:
    """(channels, rank) of the output of a Conv, ConvTranspose or plain Gemm with constant float weight and bias.

    Axis 1 holds the channels in all three. None for anything else.
    """
    if layer is None or not is_standard(layer) or layer.op not in ("Conv", "ConvTranspose", "Gemm"):
        return None
    weight = graph.value(layer.inputs[1])
    if weight is None or weight.dtype not in (np.float32, np.float16):
        return None
    has_bias = len(layer.inputs) > 2 and bool(layer.inputs[2].name)
    bias = graph.value(layer.inputs[2]) if has_bias else None
    if layer.op == "Conv":
        channels = weight.shape[0]
    elif layer.op == "ConvTranspose":
        channels = weight.shape[1] * int(layer.attrs.get("group", 1))
    elif layer.attrs.get("alpha", 1.0) == 1.0 and layer.attrs.get("beta", 1.0) == 1.0:
        channels = weight.shape[0 if layer.attrs.get("transB", 0) else 1]
    else:
        return None  # normalize_gemm goes first
    if has_bias and (bias is None or bias.shape != (channels,)):
        return None
    return channels, weight.ndim


def scale_layer(graph: Graph, layer: gs.Node, factor: Floats, shift: Floats) -> bool:
    """Replace layer(x) by factor * layer(x) + shift (both [channels]): W' = factor * W, b' = factor * b + shift.

    ``layer`` is one for which ``output_channels`` knows an answer. False, and nothing changed, when a result is not
    finite or leaves the weight's type.
    """
    weight = graph.value(layer.inputs[1])
    assert weight is not None
    has_bias = len(layer.inputs) > 2 and bool(layer.inputs[2].name)
    bias = graph.value(layer.inputs[2]) if has_bias else None
    with np.errstate(all="ignore"):
        along = along_outputs(layer, weight, factor)
        scaled = np.multiply(weight, along, dtype=np.float64)
        new_bias = (np.zeros(factor.size) if bias is None else np.asarray(bias, np.float64)) * factor + shift
        narrow, narrow_bias = narrowed(scaled, weight.dtype), np.asarray(new_bias, weight.dtype)
    if narrow is None or not np.isfinite(narrow_bias).all():
        return False
    own_constant(graph, layer, 1, narrow)
    if has_bias or new_bias.any():
        own_constant(graph, layer, 2, narrow_bias)
    return True


def along_outputs(layer: gs.Node, weight: Array, factor: Floats) -> Floats:
    """``factor`` shaped so that it broadcasts over ``weight`` along its output channels."""
    if layer.op == "Gemm":
        return factor.reshape(-1, 1) if layer.attrs.get("transB", 0) else factor.reshape(1, -1)
    if layer.op == "Conv":
        return factor.reshape([-1] + [1] * (weight.ndim - 1))
    # ConvTranspose weight [in, out/group, ...]: input channels of one group meet that group's outputs only
    group = int(layer.attrs.get("group", 1))
    per_input = np.repeat(factor.reshape(group, -1), weight.shape[0] // group, axis=0)
    return per_input.reshape(list(per_input.shape) + [1] * (weight.ndim - 2))
