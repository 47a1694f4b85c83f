"""Folds a Pad with zeros into the Convs that read it.

Conv pads with zeros by itself. Between quantized values a Pad of its own stays float, with a quantizer on each side.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.edit import is_captured, is_standard
from onnxslim_ptq.graph.graph import Graph

__all__ = ["fold_pad"]

_SPATIAL = 2  # axes before are samples and channels
_INPUTS_FROM = 11  # before, sizes and value were attributes


def fold_pad(graph: Graph) -> int:
    """Conv(Pad(x, p), pads=q) = Conv(x, pads=p+q) for constant zeros around spatial axes; returns how many Convs."""
    return sum(_fold(graph, node) for node in graph.nodes if node.op == "Pad" and is_standard(node))


def _fold(graph: Graph, pad: gs.Node) -> int:
    sizes = _sizes(graph, pad)
    if sizes is None or len(sizes) <= 2 * _SPATIAL:
        return 0
    begins, ends = np.split(np.asarray(sizes), 2)
    if min(sizes) < 0 or begins[:_SPATIAL].any() or ends[:_SPATIAL].any():
        return 0
    added = [*begins[_SPATIAL:].tolist(), *ends[_SPATIAL:].tolist()]
    output = pad.outputs[0]
    convs = [n for n in graph.consumers(output) if _pads_itself(graph, n, output, len(added))]
    for conv in convs:
        own = conv.attrs.get("pads", [0] * len(added))
        attrs = {k: v for k, v in conv.attrs.items() if k != "auto_pad"}
        graph.set_attributes(conv, {**attrs, "pads": [int(a) + b for a, b in zip(own, added, strict=True)]})
        graph.set_input(conv, 0, pad.inputs[0])
    if convs and not graph.consumers(output) and output.name not in graph.outputs:
        graph.remove(pad)
    return len(convs)


def _pads_itself(graph: Graph, node: gs.Node, value: gs.Tensor, count: int) -> bool:
    weight = graph.value(node.inputs[1]) if node.op == "Conv" and is_standard(node) else None
    return (
        weight is not None
        and weight.ndim * 2 - 2 * _SPATIAL == count
        and node.inputs[0].name == value.name
        and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and (node.attrs.get("auto_pad") != "VALID" or not any(node.attrs.get("pads", [])))
        and not is_captured(graph, value)
    )


def _sizes(graph: Graph, pad: gs.Node) -> list[int] | None:
    """Begins, then ends, of all axes, when the Pad fills up with zeros; None otherwise."""
    if pad.attrs.get("mode", "constant") != "constant":
        return None
    if graph.opset < _INPUTS_FROM:
        return pad.attrs.get("pads") if float(pad.attrs.get("value", 0.0)) == 0.0 else None
    if len(pad.inputs) > 3 and pad.inputs[3].name:
        return None  # sizes of some axes alone
    sizes = graph.value(pad.inputs[1])
    if len(pad.inputs) > 2 and pad.inputs[2].name:
        fill = graph.value(pad.inputs[2])
        if fill is None or np.any(np.asarray(fill) != 0):
            return None
    return None if sizes is None else [int(v) for v in np.asarray(sizes).reshape(-1)]
