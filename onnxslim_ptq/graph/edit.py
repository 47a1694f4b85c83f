"""Small exact questions and edits that several passes share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.types import Array
from onnxslim_ptq.graph.graph import Graph

__all__ = [
    "bypass",
    "following_bias",
    "is_captured",
    "is_standard",
    "narrowed",
    "own_constant",
    "per_channel_values",
]

_LOST = 0.01


def is_standard(node: gs.Node) -> bool:
    """Whether ``node`` is an operator of ONNX itself, whose meaning is known; custom domains reuse names freely."""
    return node.domain in (None, "", "ai.onnx")


def is_captured(graph: Graph, tensor: gs.Tensor) -> bool:
    """Whether a node with subgraphs reads ``tensor``: such a reader knows it by name."""
    return any(graph.has_subgraph(node) for node in graph.consumers(tensor))


def own_constant(graph: Graph, node: gs.Node, port: int, values: Array) -> None:
    """Give input ``port`` of ``node`` new constant values without touching other readers of the old constant."""
    tensor = node.inputs[port] if port < len(node.inputs) else None
    shared = isinstance(tensor, gs.Constant) and (len(tensor.outputs) > 1 or tensor.name in graph.outputs)
    if isinstance(tensor, gs.Constant) and not shared:
        graph.set_value(tensor, values)
        return
    base = tensor.name if isinstance(tensor, gs.Constant) else f"{node.name}.bias"
    graph.set_input(node, port, graph.constant(f"{base}.{node.name}" if shared else base, values))


def narrowed(wide: NDArray[np.float64], dtype: np.dtype[Any]) -> Array | None:
    """``wide`` in the floating type ``dtype``; None when that is not finite or loses the digits of its values.

    Lost is what only denormals can hold (float16 reaches that soon); up to 1 % of the values may be.
    """
    with np.errstate(all="ignore"):
        narrow: Array = np.asarray(wide, dtype)
    lost = (np.abs(narrow) < np.finfo(np.dtype(dtype.name)).tiny) & (wide != 0)
    return None if not np.isfinite(narrow).all() or (lost.size and lost.mean() > _LOST) else narrow


def bypass(graph: Graph, first: gs.Node, last: gs.Node) -> None:
    """Remove ``last``, which reads ``first`` alone; ``first`` now produces ``last``'s output, whose name is kept."""
    result = last.outputs[0]
    graph.remove(last)
    first.outputs[0] = result


def following_bias(graph: Graph, node: gs.Node, channels: int) -> tuple[gs.Node, int, Array] | None:
    """The Add that alone reads the output of ``node``, and the port and values of the constant per channel it adds."""
    output = node.outputs[0]
    add = graph.sole_consumer(output)
    if add is None or add.op != "Add":
        return None
    port = 1 if add.inputs[0] is output else 0
    old = graph.value(add.inputs[port])
    if old is None or old.shape != (channels,) or per_channel_values(old, channels, 1, 0) is None:
        return None
    return add, port, old


def per_channel_values(
    values: Array | None, channels: int, ndim: int, axis: int
) -> NDArray[np.float64] | None:
    """``values`` as [channels] float64 when it broadcasts over a rank-``ndim`` tensor as one value per ``axis`` index.

    Scalars and one-element tensors count; None when the constant varies along any other axis.
    """
    if values is None or not np.issubdtype(values.dtype, np.floating):
        return None
    if values.size == 1 and values.ndim <= ndim:
        return np.full(channels, float(values.reshape(-1)[0]))
    if values.ndim > ndim:
        return None
    shape = (1,) * (ndim - values.ndim) + values.shape
    if values.size != channels or shape[axis] != channels:
        return None
    return np.asarray(values.reshape(-1), np.float64)
