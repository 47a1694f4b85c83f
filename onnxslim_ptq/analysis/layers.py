"""The layers of a quantized model, each with the value that it makes of a value the float model has too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto, TensorProto

from calib.model import Model
from calib.provider import Optimize, SessionOptions, create_session
from calib.runner import run_session
from calib.scope import subgraphs
from calib.types import Array, Feed
from onnxslim_ptq.analysis.metrics import OutputError
from onnxslim_ptq.graph.linears import LINEAR_OPS

__all__ = ["LayerError", "Locals", "find_layers", "integer_weights"]

_INTEGER = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4})
_LOCAL = "@local"


@dataclass
class LayerError:
    """One layer: ``local`` is None for a layer whose weight is float."""

    node: str
    op: str
    tensor: str
    quantized: bool
    cumulative: OutputError
    local: OutputError | None

    def as_json(self) -> dict[str, Any]:
        local = self.local
        return {
            "node": self.node,
            "op": self.op,
            "tensor": self.tensor,
            "quantized": self.quantized,
            "cumulative": self.cumulative.as_json(),
            "local": None if local is None else local.as_json(),
        }


def find_layers(exact: Model, quantized: Model) -> list[LayerError]:
    """Every layer whose result the float model has too.

    A quantized layer may be followed by nodes of its own: casts in a float16 model, what gives rows their scale back.
    """
    graph, known = quantized.proto.graph, _tensors(exact)
    producers = {o: n for n in graph.node for o in n.output}
    types = {t.name: t.data_type for t in graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        if node.op_type not in LINEAR_OPS:
            continue
        integer = any(_stored(name, producers, types) for name in node.input)
        result: str | None = node.output[0]
        if result not in known:
            result = _result(node, readers, known) if integer else None
        if result is not None:
            local = OutputError(result) if integer else None
            found.append(
                LayerError(node.name or result, node.op_type, result, integer, OutputError(result), local)
            )
    return found


def _result(layer: NodeProto, readers: dict[str, list[NodeProto]], known: set[str]) -> str | None:
    """The first known value behind ``layer``, as long as one node alone reads each value on the way."""
    node = layer
    while node.output[0] not in known:
        following = readers.get(node.output[0], [])
        if len(following) != 1 or following[0].op_type in LINEAR_OPS or len(following[0].output) != 1:
            return None
        node = following[0]
        if next(subgraphs(node), None) is not None:
            return None
    return str(node.output[0])


def _stored(name: str, producers: dict[str, NodeProto], types: dict[str, int]) -> bool:
    """Whether the value is an integer initializer behind a DequantizeLinear."""
    source = producers.get(name)
    return (
        source is not None and source.op_type == "DequantizeLinear" and types.get(source.input[0]) in _INTEGER
    )


class Locals:
    """All quantized layers in one graph, cut apart: each reads float values of the float model and feeds nobody.

    What makes a layer's result is followed back to values the float model has too, which become inputs; where that
    leads to another layer, to a subgraph or to an input of the quantized model alone, the layer has no local error.
    """

    def __init__(self, quantized: Model, layers: Sequence[LayerError], exact: Model) -> None:
        graph = quantized.proto.graph
        self._quantized = quantized
        self._producers = {o: n for n in graph.node for o in n.output}
        self._constants = {t.name for t in graph.initializer}
        self._known = _tensors(exact)
        self._nodes: dict[str, NodeProto] = {}  # by first output
        self.feeds: dict[str, None] = {}
        self._layers: list[LayerError] = []
        self._session: Any = None
        for layer in layers:
            if self._add_layer(layer.tensor):
                self._layers.append(layer)
            else:
                layer.local = None

    def _add_layer(self, tensor: str) -> bool:
        """Take in the nodes between ``tensor``, a layer's result, and the known values they read."""
        nodes: dict[str, NodeProto] = {}
        feeds: dict[str, None] = {}
        last = self._producers[tensor]
        todo = [tensor]
        while todo:
            name = todo.pop()
            if name in self._constants:
                continue
            if name in self._known and name != tensor:
                feeds[name] = None
                continue
            source = self._producers.get(name)
            if source is None or next(subgraphs(source), None) is not None:
                return False
            if source.output[0] not in nodes:
                nodes[source.output[0]] = source
                todo += [i for i in source.input if i]
        if sum(node.op_type in LINEAR_OPS for node in nodes.values()) != 1:
            return False
        cut = NodeProto()
        cut.CopyFrom(last)
        cut.output[0] += _LOCAL
        self._nodes |= {**nodes, tensor: cut}
        self.feeds |= feeds
        return True

    def add(self, values: Feed, exact: Feed, sample: Any) -> None:
        """Run all layers on the float model's values of one sample."""
        if not self._layers:
            return
        feed = {name: values[name] for name in self.feeds}
        if self._session is None:
            self._session = self._open(feed)
        names = [layer.tensor + _LOCAL for layer in self._layers]
        for layer, seen in zip(self._layers, run_session(self._session, names, feed, sample), strict=True):
            assert layer.local is not None
            layer.local.add(exact[layer.tensor], seen, str(sample))

    def _open(self, feed: dict[str, Array]) -> Any:
        source = self._quantized.proto
        proto = onnx.ModelProto(ir_version=source.ir_version, opset_import=source.opset_import)
        proto.graph.name = "layers"
        names = [next(iter(n.output), "") for n in source.graph.node]
        proto.graph.node.extend(self._nodes[name] for name in names if name in self._nodes)
        read = {name for n in proto.graph.node for name in n.input}
        proto.graph.initializer.extend(t for t in source.graph.initializer if t.name in read)
        for name, values in feed.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        proto.graph.output.extend(onnx.ValueInfoProto(name=layer.tensor + _LOCAL) for layer in self._layers)
        weights = {name: w for name, w in self._quantized.weights.items() if name in read}
        return create_session(
            proto.SerializeToString(), weights, options=SessionOptions(optimize=Optimize.BASIC, simulate=True)
        )


def _tensors(model: Model) -> set[str]:
    graph = model.proto.graph
    return {i.name for i in graph.input} | {o for n in graph.node for o in n.output if o}


def integer_weights(quantized: Model) -> set[str]:
    """Names of the weights that are stored as integers behind a DequantizeLinear."""
    graph = quantized.proto.graph
    types = {t.name: t.data_type for t in graph.initializer if len(t.dims) > 1}
    return {
        n.input[0]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and types.get(n.input[0]) in _INTEGER
    }
