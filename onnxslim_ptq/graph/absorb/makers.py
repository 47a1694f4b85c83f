"""How operators hand the scale of their result on to their inputs, or take it into a constant.

======================================================  ==============================================================
y is made by                                            the scale of y goes to
======================================================  ==============================================================
Conv, ConvTranspose, Gemm, MatMul with constant weight  the weight's output channels and the bias
norm operators (``NORMS``)                              weight and bias
x * c, x / c, c per channel                             c
x + c, x - c                                            c and x
a * b, a / b                                            b, or else a; a
a + b, a - b                                            a and b
f(x) with f(x / s) = f(x) / s for s > 0                 x (``HOMOGENEOUS``: max(x, 0), pooling, Cast, ...)
probabilities @ v, Attention                            v
Reshape, Transpose, Expand, Split, Slice, Concat, ...   x, element by element (``layout``)
======================================================  ==============================================================

What is decomposed needs no pattern: the last per-channel Mul and Add of an exported LayerNormalization or RMSNorm take
the scale, whatever computes the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from calib.types import Array
from onnxslim_ptq.graph.absorb.constants import ConstantScale, LayerOutput, NormOutput, ScaleMap
from onnxslim_ptq.graph.absorb.layout import MOVES, NONE, PRESERVING, Layout, Refusal, move_back
from onnxslim_ptq.graph.absorb.search import Made, Search
from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph

__all__ = ["VALUE_KEEPING", "covers", "is_homogeneous", "make"]

# operator -> (weight port, bias port, channel axis)
NORMS: dict[str, tuple[int, int | None, int]] = {
    "LayerNormalization": (1, 2, -1),
    "RMSNormalization": (1, None, -1),
    "SimplifiedLayerNormalization": (1, None, -1),
    "SkipLayerNormalization": (2, 3, -1),
    "SkipSimplifiedLayerNormalization": (2, None, -1),
    "InstanceNormalization": (1, 2, 1),
    "GroupNormalization": (1, 2, 1),
    "BatchNormalization": (1, 2, 1),
}
VALUE_KEEPING = frozenset({"Identity", "Cast", "Dropout"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
HOMOGENEOUS = VALUE_KEEPING | _POOLS | {"Relu", "LeakyRelu", "PRelu", "Clip", "Abs", "Neg"}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def make(search: Search, made: Made) -> None:
    """Scale what ``made`` is computed from, or note the constant that takes the scale.

    Raises:
        Refusal: its operator does neither.
    """
    node, graph = made.node, search.place.graph
    if node.name in search.place.layers:
        _layer(search, made)
    elif node.op in NORMS and (is_standard(node) or node.domain == "com.microsoft"):
        _norm(search, made)
    elif node.op in _RULES and is_standard(node) and not graph.has_subgraph(node):
        _RULES[node.op](search, made)
    else:
        raise Refusal(f"{node.op} '{node.name}' before it takes no scale")


def _layer(search: Search, made: Made) -> None:
    node = made.node
    from_right = 0
    if node.op in _CONVOLUTIONS:
        from_right = np.ndim(_constant(search.place.graph, node, 1)) - 2
    channels = search.place.layers[node.name].channels
    numbers = search.per_channel(made.layout, from_right, channels)
    # A MatMul has no bias of its own: where it has an Add behind it, that took the shift already.
    can_shift = made.shift and node.op != "MatMul"
    search.sources.append(LayerOutput(node.name, ScaleMap.of(numbers), can_shift))
    search.inner[node.name] = frozenset()


def _norm(search: Search, made: Made) -> None:
    node, graph = made.node, search.place.graph
    weight_port, bias_port, axis = NORMS[node.op]
    weight = graph.value(node.inputs[weight_port]) if len(node.inputs) > weight_port else None
    if weight is None or weight.ndim != 1 or made.output is not node.outputs[0]:
        raise Refusal(f"{node.op} '{node.name}' has no constant weight per channel")
    given = bias_port is not None and len(node.inputs) > bias_port and bool(node.inputs[bias_port].name)
    if given and not graph.is_constant(node.inputs[bias_port or 0]):
        raise Refusal(f"the bias of {node.op} '{node.name}' is computed at run time")
    from_right = 0
    if axis == 1:
        dims = search.place.dims(made.output)
        if len(dims) < 2 or dims[1] != weight.size:
            raise Refusal(f"{node.op} '{node.name}' has no weight per channel")
        from_right = len(dims) - 2
    numbers = search.per_channel(made.layout, from_right, weight.size)
    can_shift = made.shift and bias_port is not None
    bias = bias_port if given or can_shift else None
    search.sources.append(NormOutput(node.name, ScaleMap.of(numbers), weight_port, bias, can_shift))
    search.inner[node.name] = frozenset()
    search.at_norm = True


def _add(search: Search, made: Made) -> None:
    node, graph = made.node, search.place.graph
    search.place.check_broadcasting()
    variable = [port for port in (0, 1) if not graph.is_constant(node.inputs[port])]
    for port in {0, 1} - set(variable):
        _constant(graph, node, port)
        sign = (-1 if node.op == "Sub" and port == 1 else 1) if made.shift else 0
        search.sources.append(
            ConstantScale(node.name, port, ScaleMap.of(made.layout), -1, sign, multiplies=False)
        )
    search.inner[node.name] = frozenset(variable)
    for port in variable:
        search.operand(node, port, made.layout)


def _multiply(search: Search, made: Made) -> None:
    node, graph = made.node, search.place.graph
    search.place.check_broadcasting()
    constant = next((port for port in (1, 0) if graph.is_constant(node.inputs[port])), None)
    if constant is None:
        port = 0 if node.op == "Div" else search.choose()
        search.through_product = True
    elif covers(_constant(graph, node, constant), made.layout):
        power = 1 if node.op == "Div" and constant == 1 else -1
        search.sources.append(ConstantScale(node.name, constant, ScaleMap.of(made.layout), power))
        search.inner[node.name] = frozenset()
        search.at_norm = True
        return
    else:  # one number, or one per token: every channel passes it alike
        port = 1 - constant
        if node.op == "Div" and port == 1:
            raise Refusal(f"Div '{node.name}' before it divides by it")
    search.inner[node.name] = frozenset({port})
    search.operand(node, port, made.layout)


def _homogeneous(search: Search, made: Made) -> None:
    node = made.node
    if made.output is not node.outputs[0] or not is_homogeneous(search.place.graph, node):
        raise Refusal(f"{node.op} '{node.name}' before it does not commute with a scale")
    layout, same = made.layout, node.op in VALUE_KEEPING
    if node.op in _POOLS:  # a window must have one scale
        rank = len(search.place.dims(made.output))
        layout = search.numbers.merged(layout, rank - 2).reshape([-1] + [1] * (rank - 2))
    search.inner[node.name] = frozenset({0})
    search.scale(node.inputs[0], layout, made.shift and same, made.equal and same)


def _matmul(search: Search, made: Made) -> None:
    """(p @ v)[m, n] = Σ_k p[m, k] v[k, n]: a scale per n, and per head, goes to v."""
    node, layout = made.node, made.layout
    if len(search.place.dims(node.inputs[1])) < 2:
        raise Refusal(f"MatMul '{node.name}' reads a vector")
    if layout.ndim > 1 and layout.shape[-2] > 1:
        raise Refusal(f"MatMul '{node.name}' mixes what has different scales")
    search.inner[node.name] = frozenset({1})
    search.through_attention = True
    search.operand(node, 1, layout)


def _attention(search: Search, made: Made) -> None:
    """ONNX's Attention (opset 23): result [B, heads, T, D] or [B, T, heads * D], v likewise with its own heads.

    Head h of the queries reads head h // (heads / own heads) of v.
    """
    node = made.node
    if made.output is not node.outputs[0] or len(node.inputs) < 3:
        raise Refusal(f"'{made.output.name}' is the cache of Attention '{node.name}'")
    if any(t.name for t in node.outputs[2:3]) or any(t.name for t in node.inputs[5:6]):
        raise Refusal(f"Attention '{node.name}' keeps its values in a cache")
    value, rank = search.place.dims(node.inputs[2]), len(search.place.dims(made.output))
    layout: Any = made.layout.reshape((1,) * (rank - made.layout.ndim) + made.layout.shape)
    heads = search.place.dims(made.output)[1] if rank == 4 else node.attrs.get("q_num_heads")
    own = value[1] if rank == 4 else node.attrs.get("kv_num_heads")
    if not heads or not own or heads % own or layout.shape[-1] == 1:
        raise Refusal(f"the heads of Attention '{node.name}' are not known")
    if rank == 3:
        layout = layout.reshape(layout.shape[0], layout.shape[1], heads, -1).transpose(0, 2, 1, 3)
    width = layout.shape[-1]
    if layout.shape[0] > 1 or layout.shape[2] > 1:
        raise Refusal(f"Attention '{node.name}' mixes what has different scales")
    by_head = np.broadcast_to(layout[0, :, 0], (heads, width)).reshape(own, heads // own, width)
    first = by_head[:, :1]
    search.numbers.same(np.ascontiguousarray(np.broadcast_to(first, by_head.shape)), by_head)
    numbers = first.reshape(own, 1, width) if rank == 4 else first.reshape(-1)
    search.inner[node.name] = frozenset({2})
    search.through_attention = True
    search.scale(node.inputs[2], np.ascontiguousarray(numbers))


def _move(search: Search, made: Made) -> None:
    node, place = made.node, search.place
    layout = move_back(place.graph, place.shapes, node, made.output, made.layout, search.numbers)
    if (layout == NONE).all():
        raise Refusal(f"{node.op} '{node.name}' moves nothing")
    search.inner[node.name] = frozenset({0})
    whole = node.op in PRESERVING
    search.scale(node.inputs[0], layout, made.shift, made.equal and whole, selected=not whole)


def _concat(search: Search, made: Made) -> None:
    node, layout = made.node, made.layout
    rank = max(len(search.place.dims(made.output)), 1)
    along = layout.ndim - rank + int(node.attrs.get("axis", 0)) % rank
    search.inner[node.name] = frozenset(range(len(node.inputs)))
    at = 0
    for source in node.inputs:
        part = layout
        if along >= 0 and layout.shape[along] > 1:
            size = search.place.dims(source)[along - layout.ndim]
            if size is None:
                raise Refusal(f"the shape of '{source.name}' is not known")
            part = layout.take(range(at, at + size), along)
            at += size
        search.scale(source, part)


_RULES: dict[str, Callable[[Search, Made], None]] = {
    "Add": _add,
    "Sub": _add,
    "Mul": _multiply,
    "Div": _multiply,
    "MatMul": _matmul,
    "Attention": _attention,
    "Concat": _concat,
    **dict.fromkeys(sorted(MOVES), _move),
    **dict.fromkeys(sorted(HOMOGENEOUS), _homogeneous),
}


def covers(constant: Array, layout: Layout) -> bool:
    """Whether a constant has a value of its own wherever the layout has a number of its own."""
    rank = max(constant.ndim, layout.ndim)
    have = (1,) * (rank - constant.ndim) + constant.shape
    want = (1,) * (rank - layout.ndim) + layout.shape
    return all(h == w for h, w in zip(have, want, strict=True) if w > 1)


def is_homogeneous(graph: Graph, node: gs.Node) -> bool:
    """Whether f(x / s) = f(x) / s for every s > 0, f being a node of ``HOMOGENEOUS``."""
    inputs = [graph.value(t) if t.name else None for t in node.inputs]
    if node.op == "Cast":
        return node.attrs.get("to") in _FLOATS
    if node.op == "PRelu":
        return inputs[1] is not None
    if node.op == "Dropout":  # in training mode it is random
        return len(inputs) < 3 or not node.inputs[2].name or (inputs[2] is not None and not inputs[2].any())
    if node.op == "Clip":
        bounded = len(node.inputs) > 2 and bool(node.inputs[2].name)
        low = inputs[1] if len(inputs) > 1 else None
        return not bounded and low is not None and not low.any()
    return True


def _constant(graph: Graph, node: gs.Node, port: int) -> Array:
    values = graph.value(node.inputs[port])
    assert values is not None
    if values.dtype.kind in "iub":
        raise Refusal(f"{node.op} '{node.name}' before it computes in integers")
    return values
