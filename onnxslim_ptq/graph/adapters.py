"""Operators that onnx's converter turns into something else than they were; they are converted here.

========================  ============================================================================================
Upsample, Resize (< 11)   x_old = x_new / scale (``asymmetric``), rounded down; the default since 11 is ``half_pixel``
Hardmax (< 13)            works on x flattened to 2-D at ``axis``; since 13 along ``axis`` alone
Softmax, LogSoftmax       (< 13) as Hardmax; along the last axis that is the same, but the converter, where it does not
                          know the rank, flattens, and nobody recognizes the attention any more
RoiAlign (< 16)           samples at ``output_half_pixel``; the default since 16 is ``half_pixel``
========================  ============================================================================================

For the converter they are nodes of a domain it passes over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx
from onnx import GraphProto, NodeProto, helper

from calib.scope import subgraphs

__all__ = ["NORMALIZED_IN", "NORMALIZING", "give_back", "set_aside"]

NORMALIZING, NORMALIZED_IN = frozenset({"Softmax", "LogSoftmax"}), 13  # since when they work along one axis

_ASIDE = "onnxslim_ptq.aside"
_CHANGED_IN = {"Upsample": 11, "Resize": 11, "Hardmax": 13, "RoiAlign": 16}
_FIRST_WITHOUT_ROI = 13


def set_aside(model: onnx.ModelProto, old: int, least: int, along_last: Collection[str] = ()) -> None:
    """Move nodes to a domain of their own when the conversion from ``old`` to ``least`` would change their meaning.

    And those of `NORMALIZING` that make a value of ``along_last``, which says that their axis is the last.
    """
    changing = {op for op, version in _CHANGED_IN.items() if old < version <= least}
    moved = _move(model.graph, changing)
    for node in model.graph.node:
        if node.op_type in NORMALIZING and not node.domain and node.output[0] in along_last:
            node.domain = _ASIDE
            moved += 1
    if moved:
        model.opset_import.add(domain=_ASIDE, version=1)


def _move(graph: GraphProto, changing: set[str]) -> int:
    moved = 0
    for node in graph.node:
        if node.op_type in changing and not node.domain:
            node.domain = _ASIDE
            moved += 1
        moved += sum(_move(sub, changing) for sub in subgraphs(node))
    return moved


def give_back(model: onnx.ModelProto, opset: int) -> None:
    """Replace the nodes that were set aside by what they mean at ``opset``."""
    _replace(model.graph, opset)
    kept = [o for o in model.opset_import if o.domain != _ASIDE]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _replace(graph: GraphProto, opset: int) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        for sub in subgraphs(node):
            _replace(sub, opset)
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.domain != _ASIDE:
            nodes.append(copy)
            continue
        copy.domain = ""
        nodes += _ADAPTERS[node.op_type](copy, opset)
    del graph.node[:]
    graph.node.extend(nodes)


def _resize(node: NodeProto, opset: int) -> list[NodeProto]:
    """Inputs x, roi (empty: only one mode reads it, but it must be there up to opset 12), scales."""
    before: list[NodeProto] = []
    attributes = {a.name: a for a in node.attribute}
    if "scales" in attributes:  # Upsample of opset 7
        before.append(_constant(f"{node.output[0]}/scales", list(attributes["scales"].floats)))
        node.input.append(before[-1].output[0])
    roi = ""
    if opset < _FIRST_WITHOUT_ROI:
        before.append(_constant(f"{node.output[0]}/roi", []))
        roi = before[-1].output[0]
    mode = attributes["mode"].s.decode() if "mode" in attributes else "nearest"
    source, scales = node.input
    node.op_type = "Resize"
    del node.input[:], node.attribute[:]
    node.input.extend([source, roi, scales])
    modes = {
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
        "mode": "linear" if mode == "bilinear" else mode,
    }
    node.attribute.extend(helper.make_attribute(k, v) for k, v in modes.items())
    return [*before, node]


def _hardmax(node: NodeProto, opset: int) -> list[NodeProto]:
    """Reshape(Hardmax(Flatten(x, axis), -1), Shape(x))"""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    source, result = node.input[0], node.output[0]
    flat, shape, hard = (f"{result}/{part}" for part in ("flat", "shape", "hardmax"))
    node.input[0], node.output[0] = flat, hard
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", -1))
    before = [
        helper.make_node("Shape", [source], [shape]),
        helper.make_node("Flatten", [source], [flat], axis=axis),
    ]
    return [*before, node, helper.make_node("Reshape", [hard, shape], [result])]


def _roi_align(node: NodeProto, opset: int) -> list[NodeProto]:
    node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "output_half_pixel"))
    return [node]


def _as_it_is(node: NodeProto, opset: int) -> list[NodeProto]:
    return [node]


_ADAPTERS: dict[str, Callable[[NodeProto, int], list[NodeProto]]] = {
    "Upsample": _resize,
    "Resize": _resize,
    "Hardmax": _hardmax,
    "RoiAlign": _roi_align,
    **dict.fromkeys(NORMALIZING, _as_it_is),
}


def _constant(name: str, values: list[float]) -> NodeProto:
    tensor = helper.make_tensor("", onnx.TensorProto.FLOAT, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=tensor)
