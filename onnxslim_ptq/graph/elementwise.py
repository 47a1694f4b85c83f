"""What becomes of a value before the next layer sees it: the elementwise operators that read it alone.

A Conv's output is quantized before its activation function runs. How good a range is depends on what comes out of
that function: HardSwish is 0 below -3, so nothing below -3 needs a code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.errors import GraphError
from calib.provider import SessionOptions, create_session
from calib.types import Array
from onnxslim_ptq.graph.graph import Graph

__all__ = ["follow"]

_ELEMENTWISE = frozenset(
    {
        "Abs",
        "Add",
        "Celu",
        "Clip",
        "Div",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Mish",
        "Mul",
        "Neg",
        "Pow",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    }
)
Floats = NDArray[np.float64]


def follow(graph: Graph, points: Mapping[str, Floats]) -> dict[str, list[Floats]]:
    """For each tensor name, what the rest of the graph reads of it, as functions tabulated at ``points`` (1-D).

    A value is followed through elementwise operators whose other inputs are scalar constants, to where anything else
    reads it; a value nothing follows is its own only table. All chains run in one ONNX Runtime session.
    """
    tables: dict[str, list[Floats]] = {}
    chains: list[_Chain] = []
    for index, name in enumerate(points):
        chain = _chain(graph, graph.tensor(name), f"{index}:")
        tables[name] = [points[name]] if chain.reads_itself or not chain.exits else []
        if chain.exits:
            chains.append(chain)
    results = _run(graph, chains, points)
    for chain in chains:
        own = results.get(chain.source)
        if own is None:  # an operator this runtime lacks: the value is judged by itself
            tables[chain.source] = [points[chain.source]]
        else:
            tables[chain.source] += own
    return tables


@dataclass(frozen=True)
class _Chain:
    """The elementwise nodes behind ``source``; ``exits`` are computed tensors others read; names get ``prefix``."""

    source: str
    prefix: str
    nodes: tuple[gs.Node, ...]
    exits: tuple[str, ...]
    reads_itself: bool


def _chain(graph: Graph, tensor: gs.Tensor, prefix: str) -> _Chain:
    inside: dict[str, gs.Tensor] = {tensor.name: tensor}
    nodes: dict[int, gs.Node] = {}
    queue = [tensor]
    while queue:
        for node in graph.consumers(queue.pop()):
            if id(node) not in nodes and _follows(graph, node, inside):
                nodes[id(node)] = node
                inside[node.outputs[0].name] = node.outputs[0]
                # A node that waited for this value may follow now, so its other inputs are looked at again.
                queue.extend(inside.values())
    exits = [
        n
        for n, t in inside.items()
        if n in graph.outputs or any(id(c) not in nodes for c in graph.consumers(t))
    ]
    return _Chain(
        tensor.name,
        prefix,
        tuple(nodes.values()),
        tuple(n for n in exits if n != tensor.name),
        tensor.name in exits,
    )


def _follows(graph: Graph, node: gs.Node, inside: Mapping[str, gs.Tensor]) -> bool:
    if node.op not in _ELEMENTWISE or node.domain not in (None, "", "ai.onnx") or len(node.outputs) != 1:
        return False
    for tensor in node.inputs:
        if tensor.name and tensor.name not in inside:
            value = graph.value(tensor)
            if value is None or value.size != 1:
                return False
    return True


def _run(graph: Graph, chains: Sequence[_Chain], points: Mapping[str, Floats]) -> dict[str, list[Floats]]:
    if not chains:
        return {}
    body = onnx.GraphProto(name="follow")
    for chain in chains:
        _add(graph, body, chain)
    model = onnx.helper.make_model_gen_version(
        body, opset_imports=[onnx.helper.make_opsetid("", graph.opset)], ir_version=8
    )
    try:
        session = create_session(model.SerializeToString(), options=SessionOptions(threads=1))
    except GraphError:
        if len(chains) == 1:
            return {}
        return {k: v for chain in chains for k, v in _run(graph, [chain], points).items()}
    feed = {c.prefix + c.source: points[c.source].astype(np.float32) for c in chains}
    values = session.run(None, feed)
    found: dict[str, list[Floats]] = {}
    for chain in chains:
        found[chain.source] = [np.asarray(values.pop(0), np.float64) for _ in chain.exits]
    return found


def _add(graph: Graph, body: onnx.GraphProto, chain: _Chain) -> None:
    """One chain's nodes and scalars under its prefix, so that chains through the same tensors do not collide."""
    body.input.append(
        onnx.helper.make_tensor_value_info(chain.prefix + chain.source, onnx.TensorProto.FLOAT, [None])
    )
    body.output.extend(onnx.ValueInfoProto(name=chain.prefix + e) for e in chain.exits)
    added: set[str] = set()
    order = {id(n): i for i, n in enumerate(graph.nodes)}
    for node in sorted(chain.nodes, key=lambda n: order[id(n)]):
        proto = graph.export_node(node)
        for names in (proto.input, proto.output):
            names[:] = [chain.prefix + n if n else "" for n in names]
        body.node.append(proto)
        for tensor in node.inputs:
            if graph.is_constant(tensor) and tensor.name not in added:
                added.add(tensor.name)
                scalar = _as_float32(np.asarray(graph.value(tensor)))
                body.initializer.append(onnx.numpy_helper.from_array(scalar, chain.prefix + tensor.name))


def _as_float32(value: Array) -> Array:
    """A float16 graph's scalars, and one-element tensors, as what a float32 vector can meet."""
    scalar = value.reshape(())
    return scalar.astype(np.float32) if scalar.dtype in (np.float16, np.float64) else scalar
