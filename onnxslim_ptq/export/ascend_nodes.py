"""Reads AscendQuant, AscendDequant and the layers between them, as they stand in files that others may have written.

AscendQuant: q = clip(round(x * scale + offset), -128, 127), the zero point is ``offset`` and s_x = float32(1 / scale).
AscendDequant: y = acc * deq, deq in the low 32 bits of a uint64. What the operators can do beyond that (int4, square
roots, a Relu, shifts, offsets of weights) is refused, never passed over.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.errors import GraphError
from calib.types import Array
from onnxslim_ptq.core.deq_scale import unpack
from onnxslim_ptq.graph.graph import Graph

__all__ = ["constant_of", "dequant_scale", "layer_weight", "quant_numbers"]

_LAYERS = ("Conv", "Gemm", "MatMul")
_QUANT: dict[str, Any] = {"quant_bit": 8, "dst_type": "INT8", "sqrt_mode": 0, "round_mode": "Round"}
_DEQUANT: dict[str, Any] = {"sqrt_mode": 0, "relu_flag": 0}
_GEMM: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def quant_numbers(node: gs.Node) -> tuple[np.float32, int]:
    """(s_x, zero point as int8) of an AscendQuant; GraphError when it is not of the form above."""
    _require_form(node, 1, _QUANT)
    scale, offset = (_number(node, key) for key in ("scale", "offset"))
    with np.errstate(all="ignore"):
        step = np.float32(1) / np.float32(scale)
    if not (np.isfinite(step) and step > 0 and offset == round(offset) and -128 <= offset <= 127):
        raise _refused(
            node, f"has scale {scale:g} and offset {offset:g}, no positive scale and an int8 zero point"
        )
    return step, int(offset)


def dequant_scale(graph: Graph, node: gs.Node) -> NDArray[np.float32]:
    """The scales [1 or channels] of an AscendDequant; GraphError when it is not of the form above."""
    _require_form(node, 2, _DEQUANT)
    packed = constant_of(graph, node, 1)
    if packed.dtype != np.uint64 or packed.ndim > 1 or packed.size == 0 or (packed >> np.uint64(32)).any():
        raise _refused(node, "has no scale of type uint64, one per channel, without shift and offset")
    deq = unpack(packed.reshape(-1))
    if not (np.isfinite(deq).all() and (deq > 0).all()):
        raise _refused(node, "has a scale that is not a finite number above 0")
    return deq


def layer_weight(graph: Graph, node: gs.Node, codes: gs.Tensor) -> Array:
    """The int8 weight of a layer that reads ``codes`` first and nowhere else; GraphError when it is none."""
    stored = graph.value(node.inputs[1]) if len(node.inputs) > 1 else None
    wrong = node.op not in _LAYERS or stored is None or node.inputs[0] is not codes
    if wrong or stored is None or sum(t is codes for t in node.inputs) > 1:
        raise _refused(
            node,
            "reads codes of AscendQuant; only Conv, Gemm and MatMul with constant weights do",
        )
    rank = {"Conv": stored.ndim > 2, "Gemm": stored.ndim == 2}.get(node.op, stored.ndim > 1)
    if stored.dtype != np.int8 or not rank:
        raise _refused(node, f"has a weight of type {stored.dtype} and shape {list(stored.shape)}, not int8")
    if node.op == "Gemm":
        _require_form(node, len(node.inputs), _GEMM)
    return stored


def constant_of(graph: Graph, node: gs.Node, port: int) -> Array:
    """The constant at an input; GraphError when it is computed."""
    values = graph.value(node.inputs[port])
    if values is None:
        raise _refused(node, f"computes its input {port}, which must be constant")
    return values


def _require_form(node: gs.Node, inputs: int, plain: dict[str, Any]) -> None:
    if len(node.inputs) != inputs or len(node.outputs) != 1:
        raise _refused(node, f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs")
    for key, value in plain.items():
        if node.attrs.get(key, value) != value:
            raise _refused(node, f"has {key} = {node.attrs[key]!r}, only {value!r} is supported")


def _number(node: gs.Node, key: str) -> float:
    value = node.attrs.get(key, 0.0)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _refused(node, f"has no number as {key}")
    return float(value)


def _refused(node: gs.Node, why: str) -> GraphError:
    return GraphError(f"node '{node.name}': {node.op} {why}; give a graph that was written here")
