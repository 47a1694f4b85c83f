"""Activation functions that exporters spell out, written as the one operator they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from calib.types import Array
from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph

__all__ = ["form_clip", "form_leaky_relu", "scalar"]

_FIRST_INPUTS = 11  # Clip takes its limits as inputs


def form_clip(graph: Graph) -> int:
    """Max(x, a), Min(x, b), Relu and Clip with constant limits, one reading the other alone, become one Clip.

    min(max(x, a), b) for a <= b; ReLU6 is clip(x, 0, 6). Opset 11 and higher.
    """
    if graph.opset < _FIRST_INPUTS:
        return 0
    count = 0
    for last in graph.nodes:
        outer = _limits(graph, last)
        first = graph.producer(outer.source) if outer is not None else None
        inner = _limits(graph, first) if first is not None else None
        if outer is None or inner is None or first is None or first.op == last.op:
            continue
        dtype = outer.dtype or inner.dtype
        low, high = (min(max(end, outer.low), outer.high) for end in (inner.low, inner.high))
        if dtype is None or not graph.reads_alone(last, outer.source):
            continue
        name, result = last.name, last.outputs[0]
        ends = [_end(graph, f"{name}.{k}", v, dtype) for k, v in (("low", low), ("high", high))]
        graph.remove(first)
        graph.remove(last)
        inputs = [inner.source, *ends]
        while not inputs[-1].name:  # no empty names behind: OpenVINO's CPU plug-in stumbles over them
            inputs.pop()
        graph.add_node("Clip", name, inputs, [result])
        count += 1
    return count


def form_leaky_relu(graph: Graph) -> int:
    """max(x, a x) with 0 < a < 1 becomes LeakyRelu(x; a), whose attribute holds float32."""
    count = 0
    for node in graph.nodes:
        if node.op != "Max" or not is_standard(node) or len(node.inputs) != 2:
            continue
        for source, other in (node.inputs, reversed(node.inputs)):
            scaled = graph.producer(other)
            slope = _slope(graph, scaled, source)
            if scaled is None or slope is None or not graph.reads_alone(node, other):
                continue
            name, result = node.name, node.outputs[0]
            graph.remove(node)
            graph.remove(scaled)
            graph.add_node("LeakyRelu", name, [source], [result], {"alpha": slope})
            count += 1
            break
    return count


def scalar(graph: Graph, tensor: gs.Tensor) -> Array | None:
    """The value of a constant of one element without axes of its own, else None."""
    value = graph.value(tensor) if tensor.name else None
    return value if value is not None and value.size == 1 and value.ndim <= 1 else None


def _slope(graph: Graph, node: gs.Node | None, source: gs.Tensor) -> float | None:
    if node is None or node.op != "Mul" or not is_standard(node) or not any(t is source for t in node.inputs):
        return None
    constant = next((scalar(graph, t) for t in node.inputs if t is not source), None)
    slope = None if constant is None else float(constant.reshape(-1)[0])
    return slope if slope is not None and 0 < slope < 1 else None


@dataclass(frozen=True)
class _Limits:
    """What a node clips, between which numbers, and the type of its constants (None: it has none)."""

    source: gs.Tensor
    low: float
    high: float
    dtype: np.dtype[Any] | None = None


def _limits(graph: Graph, node: gs.Node) -> _Limits | None:
    if not is_standard(node):
        return None
    if node.op == "Relu":
        return _Limits(node.inputs[0], 0.0, np.inf)
    if node.op == "Clip":
        values = [scalar(graph, t) for t in node.inputs[1:3]]
        if any(v is None and t.name for v, t in zip(values, node.inputs[1:3], strict=True)):
            return None
        ends = [*(None if v is None else float(v.reshape(-1)[0]) for v in values), None, None]
        dtype = next((v.dtype for v in values if v is not None), None)
        if dtype is not None and dtype.kind != "f":  # limits of int64 are no float numbers
            return None
        low, high = (
            end if end is not None else other for end, other in zip(ends, (-np.inf, np.inf), strict=False)
        )
        return _Limits(node.inputs[0], low, high, dtype)
    ports = [p for p in (0, 1) if not graph.is_constant(node.inputs[p])] if len(node.inputs) == 2 else []
    if node.op not in ("Max", "Min") or len(ports) != 1:
        return None
    value = scalar(graph, node.inputs[1 - ports[0]])
    if value is None or value.dtype.kind != "f" or value.ndim > 0:
        return None
    end, source = float(value), node.inputs[ports[0]]
    low, high = (end, np.inf) if node.op == "Max" else (-np.inf, end)
    return _Limits(source, low, high, value.dtype)


def _end(graph: Graph, name: str, value: float, dtype: np.dtype[Any]) -> gs.Tensor:
    return graph.constant(name, np.asarray(value, dtype)) if np.isfinite(value) else gs.Variable.empty()
