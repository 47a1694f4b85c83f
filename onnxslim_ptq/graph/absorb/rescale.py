"""The reading side of a smoothing group: layers whose weights undo the scale, and the explicit Mul in front of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.errors import GraphError
from calib.types import Array
from onnxslim_ptq.graph.absorb.constants import Change
from onnxslim_ptq.graph.edit import per_channel_values
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear

__all__ = ["Explicit", "explicit", "input_changes", "insert", "takes_shift"]

Floats = NDArray[np.float64]


def input_changes(graph: Graph, layer: Linear, scale: Floats, shift: Floats | None) -> Iterator[Change]:
    """What ``layer`` must become so that it gives the same for (x - shift) / scale; both are [input channels]."""
    node = graph.node(layer.node)
    weight = _weight(graph, node)
    if shift is not None and shift.any():
        yield _bias_change(graph, node, weight, _through(node, weight, shift))
    yield Change(
        node, 1, np.multiply(weight, _along_inputs(node, weight, scale), dtype=np.float64), weight.dtype
    )


def takes_shift(graph: Graph, layer: Linear) -> bool:
    """Whether a constant term of the output can take W · shift without a new operator, exactly.

    A Conv must not pad: the zeros it pads with are not shifted.
    """
    node = graph.node(layer.node)
    if node.op in ("Conv", "ConvTranspose"):
        padded = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") not in (
            "NOTSET",
            "VALID",
        )
        return node.op == "Conv" and not padded
    return node.op == "Gemm" or _bias_behind(graph, node, layer.channels) is not None


@dataclass(frozen=True)
class Explicit:
    """Constants of the operators in front of layers that read (x - shift) / scale: x * factor, + addend where given."""

    factor: Array
    addend: Array | None


def explicit(graph: Graph, layer: Linear, scale: Floats, shift: Floats | None) -> Explicit:
    """The constants in the type of ``layer``'s weight, shaped to lie along the channel axis of its input.

    Raises:
        GraphError: 1 / scale leaves that type.
    """
    node = graph.node(layer.node)
    weight = _weight(graph, node)
    shape = [-1] + [1] * (weight.ndim - 2 if node.op in ("Conv", "ConvTranspose") else 0)
    with np.errstate(over="ignore"):
        factor = (1.0 / scale).reshape(shape).astype(weight.dtype)
        addend = None
        if shift is not None and shift.any():
            addend = (-shift / scale).reshape(shape).astype(weight.dtype)
    finite = all(np.isfinite(values).all() for values in (factor, addend) if values is not None)
    if not finite or not factor.all():
        raise GraphError(f"node '{layer.node}': its scale leaves {weight.dtype}; use a scale nearer to 1")
    return Explicit(factor, addend)


def insert(graph: Graph, name: str, layers: Sequence[Linear], made: Explicit) -> None:
    """Let ``layers`` read value ``name`` through a Mul, and an Add where there is a shift."""
    tensor = graph.tensor(name)
    for op, word, values in (("Mul", "scaled", made.factor), ("Add", "shifted", made.addend)):
        if values is not None:
            constant = graph.constant(f"{name}.{word}.by", values)
            result = graph.variable(f"{name}.{word}")
            graph.add_node(op, f"{name}.{word}", [tensor, constant], [result])
            tensor = result
    for layer in layers:
        graph.set_input(graph.node(layer.node), layer.activation, tensor)


def _weight(graph: Graph, node: gs.Node) -> Array:
    weight = graph.value(node.inputs[1])
    if weight is None:
        raise GraphError(f"node '{node.name}' has no constant weight any more; find the groups again")
    return weight


def _along_inputs(node: gs.Node, weight: Array, per_channel: Floats) -> Floats:
    """``per_channel`` [input channels] so that it broadcasts over ``weight`` along its input channels."""
    if node.op == "MatMul":
        return per_channel.reshape(-1, 1)
    if node.op == "Gemm":
        return per_channel if node.attrs.get("transB", 0) else per_channel.reshape(-1, 1)
    spatial = [1] * (weight.ndim - 2)
    if node.op == "ConvTranspose":
        return per_channel.reshape([-1, 1, *spatial])
    group = int(node.attrs.get("group", 1))  # weight [out, in/group, ...]: outputs of a group see its inputs
    rows = np.repeat(per_channel.reshape(group, -1), weight.shape[0] // group, axis=0)
    return rows.reshape([*rows.shape, *spatial])


def _through(node: gs.Node, weight: Array, shift: Floats) -> Floats:
    """The layer's output, without bias, for an input that is ``shift`` everywhere: [output channels]."""
    seen = weight.astype(np.float64) * _along_inputs(node, weight, shift)
    if node.op == "Conv":
        total: Floats = seen.sum(axis=tuple(range(1, seen.ndim)))
    elif node.op == "Gemm":
        total = seen.sum(axis=1 if node.attrs.get("transB", 0) else 0)
    else:
        total = seen.sum(axis=-2)
    return total


def _bias_change(graph: Graph, node: gs.Node, weight: Array, extra: Floats) -> Change:
    if node.op != "MatMul":
        present = len(node.inputs) > 2 and bool(node.inputs[2].name)
        old = graph.value(node.inputs[2]) if present else None
        return Change(node, 2, extra if old is None else old.astype(np.float64) + extra, weight.dtype)
    found = _bias_behind(graph, node, extra.size)
    if found is None:
        raise GraphError(
            f"MatMul '{node.name}' has no constant Add behind it any more; find the groups again"
        )
    add, port, values = found
    return Change(add, port, values.astype(np.float64) + extra, values.dtype)


def _bias_behind(graph: Graph, node: gs.Node, channels: int) -> tuple[gs.Node, int, Array] | None:
    """The constant Add that alone reads a MatMul's output, with its constant."""
    weight = _weight(graph, node)
    add = graph.sole_consumer(node.outputs[0])
    if add is None or add.op != "Add" or weight.ndim != 2:
        return None
    port = 1 if add.inputs[0] is node.outputs[0] else 0
    values = graph.value(add.inputs[port])
    if values is None or values.shape != (channels,) or per_channel_values(values, channels, 1, 0) is None:
        return None
    return add, port, values
