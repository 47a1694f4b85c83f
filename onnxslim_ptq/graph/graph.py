"""The user's graph while it is worked on: graphsurgeon holds the structure, the original protos hold everything else.

graphsurgeon alone would drop metadata and doc strings, copy outer initializers into subgraphs and load weights; so
each node remembers the NodeProto it came from (attributes, subgraphs and documentation return verbatim), and
values of constants are read through :meth:`Graph.value` only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from calib.errors import GraphError
from calib.model import LARGE, Model, mark_external
from calib.scope import subgraphs
from calib.tensors import copy_fields, has_plain_dtype
from calib.types import Array
from onnxslim_ptq.graph.convert import (
    Node,
    Origin,
    all_names,
    export_node,
    import_graph,
    in_order,
    plain_attributes,
    renamed_inside,
)

__all__ = ["Graph"]

logging.getLogger("onnx_graphsurgeon").setLevel(logging.ERROR)
_IR_OF_FREE_INITIALIZERS = 4  # before, every initializer had to be a graph input as well


class Graph:
    """Nodes, tensors and constants of a model's main graph, with an index from names to both.

    ``model`` is never changed. ``inputs`` are the values a caller must feed: an initializer that was also listed as
    input is a constant here. ``notes`` tells what the import changed. New constants pass through ``keep``, which may
    return an equal array that lies elsewhere.
    """

    def __init__(self, model: Model, keep: Callable[[Array], Array] | None = None) -> None:
        source = model.proto.graph
        self.model = model
        self._keep = keep or _as_it_is
        self.weights: dict[str, Array] = dict(model.weights)
        self.notes: list[str] = []
        self._protos = {t.name: t for t in source.initializer}
        self.inputs = [i for i in source.input if i.name not in self._protos]
        self._note_defaults([i.name for i in source.input if i.name in self._protos])
        graph, origins = import_graph(model.proto, self.inputs)
        self._input_tensors: dict[str, gs.Tensor] = {t.name: t for t in graph.inputs}
        self._names = all_names(source)
        self._nodes: dict[str, gs.Node] = {n.name: n for n in graph.nodes}
        self._origins = {n.name: o for n, o in zip(graph.nodes, origins, strict=True)}
        self._produced: dict[str, gs.Tensor] = {}

    def _note_defaults(self, names: Sequence[str]) -> None:
        if names:
            self.notes.append(
                f"{len(names)} initializers were also graph inputs; they are constants now "
                f"(first: {names[0]})"
            )

    # ---- reading

    @property
    def nodes(self) -> list[gs.Node]:
        """The nodes in file order, added ones last; a copy, so that passes may remove nodes while they walk it."""
        return list(self._nodes.values())

    @property
    def opset(self) -> int:
        return next((o.version for o in self.model.proto.opset_import if o.domain in ("", "ai.onnx")), 1)

    @cached_property
    def outputs(self) -> frozenset[str]:
        return frozenset(o.name for o in self.model.proto.graph.output)

    def node(self, name: str) -> gs.Node:
        """The node of that name; raises KeyError."""
        return self._nodes[name]

    def tensor(self, name: str) -> gs.Tensor:
        """The tensor a node produces or a graph input, by name; raises KeyError when there is none."""
        if name in self._input_tensors:
            return self._input_tensors[name]
        known = self._produced.get(name)
        if (
            known is None or not known.inputs
        ):  # the index is not made yet, or the value's node was removed since
            self._produced = {t.name: t for n in self._nodes.values() for t in n.outputs if t.name}
        return self._produced[name]

    def value(self, tensor: gs.Tensor | None) -> Array | None:
        """The values of a constant (in an ml_dtypes type where numpy has none), or None when it is not constant."""
        if not isinstance(tensor, gs.Constant):
            return None
        if tensor.name in self.weights:
            return self.weights[tensor.name]
        values: Array = onnx.numpy_helper.to_array(self._protos[tensor.name])
        return values

    def is_constant(self, tensor: gs.Tensor | None) -> bool:
        return isinstance(tensor, gs.Constant)

    def has_subgraph(self, node: gs.Node) -> bool:
        origin = self._origins.get(node.name)
        return origin is not None and next(subgraphs(origin.proto), None) is not None

    def producer(self, tensor: gs.Tensor) -> gs.Node | None:
        return tensor.inputs[0] if tensor.inputs else None

    def consumers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """The nodes that read ``tensor``, each once; a node whose subgraph reads it counts."""
        seen: dict[int, gs.Node] = {id(n): n for n in tensor.outputs}
        return list(seen.values())

    def sole_consumer(self, tensor: gs.Tensor) -> gs.Node | None:
        """The only node that reads ``tensor``, or None when several do, none does, or it is a graph output."""
        consumers = self.consumers(tensor)
        if len(consumers) != 1 or tensor.name in self.outputs:
            return None
        return consumers[0]

    def reads_alone(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        """Whether ``node`` is the only one to see ``tensor``."""
        return self.sole_consumer(tensor) is node

    # ---- changing

    def constant(self, name: str, values: Array) -> gs.Constant:
        """A new constant; its name is made unique by a numeric suffix."""
        unique = self._new_name(name, self._names)
        self.weights[unique] = self._keep(_contiguous(values))
        return gs.Constant(unique, _NO_VALUES)

    def set_value(self, tensor: gs.Constant, values: Array) -> None:
        """Replace the values of a constant that no other node reads."""
        self.weights[tensor.name] = self._keep(_contiguous(values))
        self._protos.pop(tensor.name, None)

    def variable(self, name: str) -> gs.Variable:
        """A new value without producer; its name is made unique by a numeric suffix."""
        return gs.Variable(self._new_name(name, self._names))

    def variable_named(self, name: str) -> gs.Variable:
        """A new value that must have this very name, for the model's interface; GraphError when it is taken."""
        if name in self._names:
            raise GraphError(f"the model already has a value '{name}'; rename it in the float model")
        return self.variable(name)

    def add_node(
        self,
        op: str,
        name: str,
        inputs: Sequence[gs.Tensor],
        outputs: Sequence[gs.Tensor],
        attrs: Mapping[str, object] | None = None,
        domain: str = "",
    ) -> gs.Node:
        """A new node; its name is made unique by a numeric suffix, its place follows from its inputs."""
        unique = self._new_name(name, self._nodes)
        node = Node(op, unique, dict(attrs or {}), list(inputs), list(outputs), domain=domain or None)
        self._nodes[unique] = node
        self._produced.update((t.name, t) for t in node.outputs)
        return node

    def set_input(self, node: gs.Node, port: int, tensor: gs.Tensor) -> None:
        """Let ``node`` read ``tensor`` at ``port``, adding empty inputs before it where there are none yet."""
        if len(node.inputs) <= port:
            if self.has_subgraph(node):
                raise ValueError(f"node '{node.name}' cannot get more inputs: captured values follow its own")
            node.inputs.extend([gs.Variable.empty() for _ in range(port + 1 - len(node.inputs))])
            if node.name in self._origins:
                self._origins[node.name] = Origin(self._origins[node.name].proto, port + 1)
        node.inputs[port] = tensor

    def set_attributes(self, node: gs.Node, attrs: Mapping[str, object]) -> None:
        """Give a node new plain attributes in place of its old ones; tensors, types and subgraphs stay."""
        old = dict(node.attrs)
        node.attrs.clear()
        node.attrs.update(attrs)
        origin = self._origins.get(node.name)
        if origin is None:
            return
        bare = onnx.NodeProto()
        bare.CopyFrom(origin.proto)
        plain = {a.name: a for a in plain_attributes(origin.proto)}
        del bare.attribute[:]
        bare.attribute.extend(
            a
            for a in origin.proto.attribute
            if a.name not in plain or (a.name in attrs and old[a.name] == attrs[a.name])
        )
        kept = {a.name for a in bare.attribute}
        bare.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attrs.items() if k not in kept)
        self._origins[node.name] = Origin(bare, origin.arity)

    def remove(self, node: gs.Node) -> None:
        """Take a node out; its inputs and outputs are disconnected."""
        node.inputs.clear()
        node.outputs.clear()
        del self._nodes[node.name]
        self._origins.pop(node.name, None)

    def replace_everywhere(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let every reader of ``old`` read ``new``; ``old`` must not be a graph output.

        Raises:
            ValueError: a subgraph reads ``old``; it does so by name, which cannot be changed from outside.
        """
        readers = self.consumers(old)
        if any(self.has_subgraph(n) and _position(n, old) >= self._origins[n.name].arity for n in readers):
            raise ValueError(f"value '{old.name}' is read by name inside a subgraph")
        for node in readers:
            for port, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[port] = new

    def read_instead(self, readers: Sequence[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
        """Let ``readers`` read ``new`` in place of ``old``, their subgraphs too."""
        for node in readers:
            for port, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[port] = new
            origin = self._origins.get(node.name)
            if origin is not None and self.has_subgraph(node):
                proto = renamed_inside(origin.proto, old.name, new.name)
                self._origins[node.name] = Origin(proto, origin.arity)

    def _new_name(self, name: str, taken: set[str] | dict[str, gs.Node]) -> str:
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        if isinstance(taken, set):
            taken.add(unique)
        return unique

    # ---- to a Model

    def to_model(self) -> Model:
        """The graph as a skeleton Model: same header, inputs, outputs, documentation and metadata as the source."""
        source = self.model.proto
        proto = onnx.ModelProto()
        copy_fields(source, proto, skip=("graph",))
        copy_fields(source.graph, proto.graph, skip=("node", "initializer", "input", "value_info"))
        ordered = in_order(self._nodes.values())
        made = {o.name for n in ordered for o in n.outputs}
        proto.graph.input.extend(self.inputs)
        proto.graph.node.extend(self.export_node(n) for n in ordered)
        proto.graph.value_info.extend(v for v in source.graph.value_info if v.name in made)
        read = dict.fromkeys(t.name for n in ordered for t in n.inputs if isinstance(t, gs.Constant))
        weights = self._export_constants(proto.graph, read)
        if proto.graph.initializer:
            proto.ir_version = max(proto.ir_version, _IR_OF_FREE_INITIALIZERS)
        return Model(
            proto, weights, self.model.path, proto.ByteSize() + sum(w.nbytes for w in weights.values())
        )

    def export_node(self, node: gs.Node) -> onnx.NodeProto:
        """The node as it will stand in the file."""
        return export_node(node, self._origins.get(node.name))

    def _export_constants(self, graph: onnx.GraphProto, read: Collection[str]) -> dict[str, Array]:
        """Write the constants that nodes or graph outputs read: first those of the file in its order, then new ones."""
        weights: dict[str, Array] = {}
        first = [
            t.name for t in self.model.proto.graph.initializer if t.name in read or t.name in self.outputs
        ]
        for name in dict.fromkeys([*first, *read]):
            values = self.weights.get(name)
            if name in self._protos:
                graph.initializer.append(self._protos[name])
                if values is not None:
                    weights[name] = values
                continue
            assert values is not None
            if values.nbytes >= LARGE and has_plain_dtype(_data_type(values)):
                tensor = TensorProto(name=name, dims=values.shape, data_type=_data_type(values))
                mark_external(tensor)
                weights[name] = values
            else:
                tensor = onnx.numpy_helper.from_array(values, name)
            graph.initializer.append(tensor)
        return weights


_NO_VALUES = np.zeros(0, np.float32)  # of every graphsurgeon constant: the values are in ``Graph.weights``


def _as_it_is(values: Array) -> Array:
    return values


def _contiguous(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(np.shape(values))  # ascontiguousarray makes scalars 1-D


def _data_type(values: Array) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(values.dtype))


def _position(node: gs.Node, tensor: gs.Tensor) -> int:
    return max(port for port, t in enumerate(node.inputs) if t is tensor)
