"""How the other readers of a scaled value make up for it: a layer or a constant Mul, by its constant."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.absorb.constants import ConstantScale, ScaleMap
from onnxslim_ptq.graph.absorb.layout import MOVES, NONE, PRESERVING, Layout, Refusal, move_forward
from onnxslim_ptq.graph.absorb.makers import VALUE_KEEPING, covers, is_homogeneous
from onnxslim_ptq.graph.absorb.search import Search
from onnxslim_ptq.graph.edit import is_captured, is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear

__all__ = ["channel_from_right", "check_inner", "input_channels", "read"]


def read(search: Search, node: gs.Node, name: str) -> list[str]:
    """Let ``node`` undo the scale of value ``name``; returns the values that it hands the scale on to.

    Raises:
        Refusal: it cannot.
    """
    place, layout = search.place, search.values[name]
    if node.op in ("Shape", "Size") and is_standard(node):
        return []
    layer = place.layers.get(node.name)
    if layer is not None and layer.activation_name == name and name in search.equal:
        search.consumers.append((layer, _input_numbers(place.graph, layer, layout)))
        search.inner[node.name] = frozenset({layer.activation})
        return []
    if is_standard(node) and not place.graph.has_subgraph(node):
        if node.op in ("Mul", "Div") and _undo(search, node, name):
            return []
        if node.op in MOVES and node.inputs[0].name == name:
            return _moved(search, node, name)
        if node.op in VALUE_KEEPING and name in search.equal and is_homogeneous(place.graph, node):
            return [_pass(search, node, node.outputs[0], layout)]
    raise Refusal(f"'{name}' is also read by {node.op} '{node.name}'")


def check_inner(search: Search) -> None:
    """Refuse when a node reads a scaled value at an input where its rule did not count on one, as x * x does."""
    graph = search.place.graph
    for name, ports in search.inner.items():
        node = graph.node(name)
        for port, tensor in enumerate(node.inputs):
            if tensor.name in search.values and port not in ports:
                raise Refusal(f"'{tensor.name}' is also read by {node.op} '{name}'")


def _undo(search: Search, node: gs.Node, name: str) -> bool:
    """x * c and x / c with a value of c for every scale: c takes the scale back."""
    graph, layout = search.place.graph, search.values[name]
    port = next((p for p in (0, 1) if graph.is_constant(node.inputs[p])), None)
    if port is None or node.inputs[1 - port].name != name or (node.op == "Div" and port == 0):
        return False
    constant = graph.value(node.inputs[port])
    if constant is None or constant.dtype.kind in "iub" or not covers(constant, layout):
        return False
    search.place.check_broadcasting()
    power = -1 if node.op == "Div" else 1
    search.undone.append(ConstantScale(node.name, port, ScaleMap.of(layout), power))
    search.inner[node.name] = frozenset({1 - port})
    return True


def _moved(search: Search, node: gs.Node, name: str) -> list[str]:
    """Outputs of a Split or Slice that take no scaled part are no concern; a moved copy of the start is read on."""
    place, handed = search.place, []
    for output in node.outputs:
        if not output.name:
            continue
        layout = move_forward(place.graph, place.shapes, node, output, search.values[name])
        if (layout == NONE).all():
            continue
        if name not in search.equal or node.op not in PRESERVING:
            raise Refusal(f"'{name}' is also read by {node.op} '{node.name}'")
        handed.append(_pass(search, node, output, layout))
    return handed


def _pass(search: Search, node: gs.Node, output: gs.Tensor, layout: Layout) -> str:
    name: str = output.name
    if name in search.place.graph.outputs:
        raise Refusal(f"'{name}' is a graph output")
    if is_captured(search.place.graph, output):
        raise Refusal(f"'{name}' is read inside a subgraph")
    search.values[name] = layout
    search.equal.add(name)
    search.inner[node.name] = frozenset({0})
    return name


def _input_numbers(graph: Graph, layer: Linear, layout: Layout) -> Layout:
    channels, from_right = input_channels(graph, layer), channel_from_right(graph, layer)
    if channels is None or from_right is None:
        raise Refusal(f"{layer.op} '{layer.node}' has its input channels on another axis")
    if any(size > 1 for at, size in enumerate(layout.shape) if layout.ndim - 1 - at != from_right):
        raise Refusal(f"{layer.op} '{layer.node}' reads several scales as one channel")
    if layout.size != channels:
        raise Refusal(f"{layer.op} '{layer.node}' reads other channels of it")
    return layout.reshape(-1)


def input_channels(graph: Graph, layer: Linear) -> int | None:
    """How many input channels a layer has; None for a Gemm with transA, whose channels are no last axis."""
    node = graph.node(layer.node)
    weight = graph.value(node.inputs[layer.weight])
    assert weight is not None
    if node.op == "Gemm":
        transposed = node.attrs.get("transB", 0)
        return None if node.attrs.get("transA", 0) else int(weight.shape[1 if transposed else 0])
    if node.op == "MatMul":
        return int(weight.shape[-2])
    if node.op == "ConvTranspose":
        return int(weight.shape[0])
    return int(weight.shape[1]) * int(node.attrs.get("group", 1))


def channel_from_right(graph: Graph, layer: Linear) -> int | None:
    """Position of the channel axis of a layer's input, counted from its last axis (0)."""
    if layer.op in ("MatMul", "Gemm"):
        return None if input_channels(graph, layer) is None else 0
    weight = graph.value(graph.node(layer.node).inputs[layer.weight])
    assert weight is not None
    return weight.ndim - 2
