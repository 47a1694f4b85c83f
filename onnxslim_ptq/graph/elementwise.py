"""What becomes of a value before the next layer sees it: the elementwise operators that read it alone.

A Conv's output is quantized before its activation function runs. How good a range is depends on what comes out of
that function: HardSwish is 0 below -3, so nothing below -3 needs a code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.provider import SessionOptions, create_session
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Aftermath", "aftermath"]

_ELEMENTWISE = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
    "Mish", "Mul", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
    "ThresholdedRelu",
})
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Aftermath:
    """The functions of one value that the rest of the graph reads; ``exits`` are their tensor names."""

    exits: tuple[str, ...]
    apply: Callable[[Floats], list[Floats]]

    @property
    def is_identity(self) -> bool:
        return len(self.exits) == 1 and not self.apply.__closure__


def aftermath(graph: Graph, tensor: gs.Tensor) -> Aftermath:
    """Follow ``tensor`` through operators whose other inputs are scalar constants, to where anything else reads it."""
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
    exits = [n for n, t in inside.items()
             if n in graph.outputs or any(id(c) not in nodes for c in graph.consumers(t))]
    computed = [n for n in exits if n != tensor.name]
    if not computed:
        return Aftermath((tensor.name,), _identity)
    session = _session(graph, tensor.name, [n for n in graph.nodes if id(n) in nodes], computed)
    if session is None:
        return Aftermath((tensor.name,), _identity)

    def apply(x: Floats) -> list[Floats]:
        results = session.run(computed, {tensor.name: x.astype(np.float32)})
        return ([x] if tensor.name in exits else []) + [np.asarray(r, np.float64) for r in results]

    return Aftermath(tuple(([tensor.name] if tensor.name in exits else []) + computed), apply)


def _identity(x: Floats) -> list[Floats]:
    return [x]


def _follows(graph: Graph, node: gs.Node, inside: dict[str, gs.Tensor]) -> bool:
    if node.op not in _ELEMENTWISE or node.domain not in (None, "", "ai.onnx") or len(node.outputs) != 1:
        return False
    for tensor in node.inputs:
        if tensor.name and tensor.name not in inside:
            value = graph.value(tensor)
            if value is None or value.size != 1:
                return False
    return True


def _session(graph: Graph, source: str, nodes: list[gs.Node], exits: list[str]):  # type: ignore[no-untyped-def]
    constants = {t.name: graph.value(t) for n in nodes for t in n.inputs if graph.is_constant(t)}
    scalars = [onnx.numpy_helper.from_array(_as_float32(np.asarray(v)), k) for k, v in constants.items()]
    body = onnx.helper.make_graph(
        [graph.export_node(n) for n in nodes], "aftermath",
        [onnx.helper.make_tensor_value_info(source, onnx.TensorProto.FLOAT, ["n"])],
        [onnx.ValueInfoProto(name=e) for e in exits], scalars,
    )
    opset = onnx.helper.make_opsetid("", graph.opset)
    model = onnx.helper.make_model_gen_version(body, opset_imports=[opset], ir_version=8)
    try:
        return create_session(model.SerializeToString(), options=SessionOptions(threads=1))
    except Exception:  # an operator this runtime lacks: the value is then judged by itself
        return None


def _as_float32(value: np.ndarray) -> np.ndarray:
    """A float16 graph's scalars, and one-element tensors, as what a float32 vector can meet."""
    scalar = value.reshape(())
    return scalar.astype(np.float32) if scalar.dtype in (np.float16, np.float64) else scalar
