"""The user's graph while it is worked on: graphsurgeon holds the structure, the original protos hold everything else.

graphsurgeon alone would drop metadata and doc strings, copy outer initializers into subgraphs and load weights; so
each node remembers the NodeProto it came from (attributes, subgraphs and documentation return verbatim), and
values of constants are read through :meth:`Graph.value` only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from calib.errors import GraphError
from calib.model import LARGE, Model, mark_external
from calib.types import Array
from onnx import AttributeProto, TensorProto

__all__ = ["Graph"]

logging.getLogger("onnx_graphsurgeon").setLevel(logging.ERROR)
_KEPT = {AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING, AttributeProto.INTS, AttributeProto.FLOATS,
         AttributeProto.STRINGS}


@dataclass(frozen=True)
class _Origin:
    """What a node was in the file: its proto and how many inputs it has besides the values its subgraphs capture."""

    proto: onnx.NodeProto
    arity: int


class Graph:
    """Nodes, tensors and constants of a model's main graph, with an index from names to both."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.weights: dict[str, Array] = dict(model.weights)
        self.notes: list[str] = []
        self._origins: dict[int, _Origin] = {}
        self._protos = {t.name: t for t in model.proto.graph.initializer}
        self._produced: dict[str, gs.Tensor] = {}
        self._drop_default_inputs()
        self.gs = self._import()

    # ---- reading

    @property
    def nodes(self) -> list[gs.Node]:
        return list(self.gs.nodes)

    @property
    def opset(self) -> int:
        return next((o.version for o in self.model.proto.opset_import if o.domain in ("", "ai.onnx")), 1)

    @property
    def outputs(self) -> set[str]:
        return {o.name for o in self.model.proto.graph.output}

    def node(self, name: str) -> gs.Node:
        return self._by_name[name]

    def tensor(self, name: str) -> gs.Tensor:
        """The tensor a node produces or a graph input, by name."""
        if not self._produced:
            self._produced = {t.name: t for n in self.gs.nodes for t in n.outputs if t.name}
            self._produced.update({t.name: t for t in self.gs.inputs})
        return self._produced[name]

    def value(self, tensor: gs.Tensor | None) -> Array | None:
        """The values of a constant tensor, or None when it is not constant (or not representable in numpy)."""
        if not isinstance(tensor, gs.Constant):
            return None
        if tensor.name in self.weights:
            return self.weights[tensor.name]
        proto = self._protos.get(tensor.name)
        return onnx.numpy_helper.to_array(proto) if proto is not None else np.asarray(tensor.values)

    def is_constant(self, tensor: gs.Tensor | None) -> bool:
        return isinstance(tensor, gs.Constant)

    def has_subgraph(self, node: gs.Node) -> bool:
        origin = self._origins.get(id(node))
        return origin is not None and any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
                                          for a in origin.proto.attribute)

    def producer(self, tensor: gs.Tensor) -> gs.Node | None:
        return tensor.inputs[0] if tensor.inputs else None

    def consumers(self, tensor: gs.Tensor) -> list[gs.Node]:
        seen: dict[int, gs.Node] = {id(n): n for n in tensor.outputs}
        return list(seen.values())

    def sole_consumer(self, tensor: gs.Tensor) -> gs.Node | None:
        """The only node that reads ``tensor``, or None when several do, none does, or it is a graph output."""
        consumers = self.consumers(tensor)
        if len(consumers) != 1 or tensor.name in self.outputs:
            return None
        return consumers[0]

    # ---- changing

    def constant(self, name: str, values: Array) -> gs.Constant:
        """A new constant; its name is made unique by a numeric suffix."""
        unique, count = name, 1
        taken = self._tensor_names
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        values = np.ascontiguousarray(values).reshape(np.shape(values))
        self.weights[unique] = values
        return gs.Constant(unique, values)

    def set_value(self, tensor: gs.Constant, values: Array) -> None:
        """Replace the values of a constant that no other node reads."""
        self.weights[tensor.name] = np.ascontiguousarray(values).reshape(np.shape(values))
        self._protos.pop(tensor.name, None)

    def variable(self, name: str) -> gs.Variable:
        unique, count = name, 1
        while unique in self._tensor_names:
            unique, count = f"{name}_{count}", count + 1
        self._tensor_names.add(unique)
        return gs.Variable(unique)

    def add_node(self, op: str, name: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor],
                 attrs: dict[str, object] | None = None, domain: str = "") -> gs.Node:
        unique, count = name, 1
        while unique in self._by_name:
            unique, count = f"{name}_{count}", count + 1
        node = gs.Node(op, unique, attrs or {}, inputs, outputs, domain=domain or None)
        self.gs.nodes.append(node)
        self._by_name[unique] = node
        return node

    def set_input(self, node: gs.Node, port: int, tensor: gs.Tensor) -> None:
        while len(node.inputs) <= port:
            node.inputs.append(gs.Variable.empty())
            self._widen(node)
        node.inputs[port] = tensor

    def set_attributes(self, node: gs.Node, attrs: dict[str, object]) -> None:
        """Give a node new plain attributes; they replace those of the file."""
        node.attrs.clear()
        node.attrs.update(attrs)
        origin = self._origins.get(id(node))
        if origin is not None:
            bare = onnx.NodeProto()
            bare.CopyFrom(origin.proto)
            del bare.attribute[:]
            bare.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attrs.items())
            self._origins[id(node)] = _Origin(bare, origin.arity)

    def remove(self, node: gs.Node) -> None:
        """Take a node out; its inputs and outputs are disconnected."""
        node.inputs.clear()
        node.outputs.clear()
        self.gs.nodes.remove(node)
        self._by_name.pop(node.name, None)

    def replace_everywhere(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let every reader of ``old`` read ``new``; ``old`` must not be a graph output nor captured by a subgraph."""
        for node in self.consumers(old):
            for port, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[port] = new

    # ---- to and from a Model

    def _drop_default_inputs(self) -> None:
        graph = self.model.proto.graph
        constants = set(self._protos)
        names = [i.name for i in graph.input if i.name in constants]
        if not names:
            return
        kept = [i for i in graph.input if i.name not in constants]
        copies = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in kept]
        del graph.input[:]
        graph.input.extend(copies)
        self.notes.append(f"{len(names)} initializers were also graph inputs; they are constants now (first: {names[0]})")

    def _import(self) -> gs.Graph:
        source = self.model.proto
        slim = onnx.GraphProto(name=source.graph.name or "graph")
        slim.input.extend(source.graph.input)
        slim.output.extend(source.graph.output)
        slim.initializer.extend(source.graph.initializer)
        captured = []
        for node in source.graph.node:
            bare = slim.node.add()
            bare.CopyFrom(node) if not node.attribute else _copy_without_graphs(node, bare)
            extra = sorted(_captured(node))
            captured.append(len(bare.input))
            bare.input.extend(extra)
        graph = gs.import_onnx(onnx.helper.make_model_gen_version(slim, opset_imports=source.opset_import))
        for gs_node, proto, arity in zip(graph.nodes, source.graph.node, captured, strict=True):
            self._origins[id(gs_node)] = _Origin(proto, arity)
        self._tensor_names = _all_names(source.graph)
        _unique_node_names(graph.nodes)
        self._by_name = {n.name: n for n in graph.nodes}
        return graph

    def _widen(self, node: gs.Node) -> None:
        origin = self._origins.get(id(node))
        if origin is not None:
            self._origins[id(node)] = _Origin(origin.proto, origin.arity + 1)

    def to_model(self) -> Model:
        """The graph as a skeleton Model: same header, inputs, outputs, documentation and metadata as the source."""
        source = self.model.proto
        proto = onnx.ModelProto()
        for descriptor, value in source.ListFields():
            if descriptor.name in ("graph", "opset_import", "functions", "metadata_props", "training_info"):
                continue
            setattr(proto, descriptor.name, value)
        for name in ("opset_import", "functions", "metadata_props", "training_info"):
            getattr(proto, name).extend(getattr(source, name))
        graph = proto.graph
        graph.name, graph.doc_string = source.graph.name, source.graph.doc_string
        graph.input.extend(source.graph.input)
        graph.output.extend(source.graph.output)
        graph.metadata_props.extend(source.graph.metadata_props)
        graph.sparse_initializer.extend(source.graph.sparse_initializer)
        ordered = _in_order(self.gs.nodes)
        graph.node.extend(self.export_node(n) for n in ordered)
        made = {o.name for n in ordered for o in n.outputs}
        graph.value_info.extend(v for v in source.graph.value_info if v.name in made)
        weights = self._export_constants(graph, ordered)
        return Model(proto, weights, self.model.path, self.model.nbytes)

    def export_node(self, node: gs.Node) -> onnx.NodeProto:
        origin = self._origins.get(id(node))
        inputs = [t.name for t in node.inputs]
        outputs = [t.name for t in node.outputs]
        if origin is None:
            proto = onnx.helper.make_node(node.op, inputs, outputs, name=node.name, domain=node.domain or "",
                                          **node.attrs)
            return proto
        proto = onnx.NodeProto()
        proto.CopyFrom(origin.proto)
        del proto.input[:], proto.output[:]
        proto.input.extend(inputs[: origin.arity])
        proto.output.extend(outputs)
        proto.op_type = node.op
        proto.name = node.name
        return proto

    def _export_constants(self, graph: onnx.GraphProto, nodes: Iterable[gs.Node]) -> dict[str, Array]:
        weights: dict[str, Array] = {}
        wanted = {t.name: t for n in nodes for t in n.inputs if isinstance(t, gs.Constant)}
        for name in self.outputs & (set(self._protos) | set(self.weights)):
            wanted.setdefault(name, None)
        for name in wanted:
            if name in self._protos:
                graph.initializer.append(self._protos[name])
                if name in self.weights:
                    weights[name] = self.weights[name]
                continue
            values = self.weights[name]
            if values.nbytes >= LARGE:
                tensor = TensorProto(name=name, dims=values.shape,
                                     data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype))
                mark_external(tensor)
                weights[name] = values
            else:
                tensor = onnx.numpy_helper.from_array(values, name)
            graph.initializer.append(tensor)
        return weights


def _copy_without_graphs(node: onnx.NodeProto, bare: onnx.NodeProto) -> None:
    bare.op_type, bare.name, bare.domain = node.op_type, node.name, node.domain
    bare.input.extend(node.input)
    bare.output.extend(node.output)
    bare.attribute.extend(a for a in node.attribute if a.type in _KEPT and not a.ref_attr_name)


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names of outer values that the node's subgraphs read."""
    names: set[str] = set()
    for attr in node.attribute:
        for sub in [attr.g] if attr.type == AttributeProto.GRAPH else attr.graphs:
            inner = {i.name for i in sub.input} | {t.name for t in sub.initializer}
            inner |= {o for n in sub.node for o in n.output}
            used = {i for n in sub.node for i in n.input if i} | {o.name for o in sub.output}
            for child in sub.node:
                used |= _captured(child)
            names |= used - inner
    return names


def _all_names(graph: onnx.GraphProto) -> set[str]:
    names = {t.name for t in graph.initializer} | {i.name for i in graph.input} | {o.name for o in graph.output}
    for node in graph.node:
        names.update(node.input, node.output)
        for attr in node.attribute:
            for sub in [attr.g] if attr.type == AttributeProto.GRAPH else attr.graphs:
                names |= _all_names(sub)
    return names


def _unique_node_names(nodes: Iterable[gs.Node]) -> None:
    """Unnamed nodes are named after their first output, duplicates get a suffix: both stable from run to run."""
    taken: set[str] = set()
    for node in nodes:
        base = node.name or f"{node.op}_{node.outputs[0].name if node.outputs else len(taken)}"
        name, count = base, 1
        while name in taken:
            name, count = f"{base}#{count + 1}", count + 1
        node.name = name
        taken.add(name)


def _in_order(nodes: list[gs.Node]) -> list[gs.Node]:
    """A stable topological order: nodes keep their place unless an input is produced later."""
    done: set[int] = set()
    ordered: list[gs.Node] = []
    for root in nodes:
        stack: list[tuple[gs.Node, Iterator[gs.Node]]] = []
        if id(root) not in done:
            stack.append((root, _producers(root)))
        on_path = {id(root)}
        while stack:
            node, todo = stack[-1]
            nxt = next((p for p in todo if id(p) not in done), None)
            if nxt is None:
                stack.pop()
                on_path.discard(id(node))
                done.add(id(node))
                ordered.append(node)
            elif id(nxt) in on_path:
                raise GraphError(f"the graph has a cycle through node '{nxt.name}'; export the model again")
            else:
                on_path.add(id(nxt))
                stack.append((nxt, _producers(nxt)))
    return ordered


def _producers(node: gs.Node) -> Iterator[gs.Node]:
    return iter([t.inputs[0] for t in node.inputs if t.inputs])
