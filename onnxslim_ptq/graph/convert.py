"""Between protos and graphsurgeon nodes: what graphsurgeon cannot hold stays in the proto a node came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto

from calib.errors import GraphError
from calib.scope import captured, subgraphs

__all__ = [
    "Node",
    "Origin",
    "all_names",
    "export_node",
    "import_graph",
    "in_order",
    "plain_attributes",
    "renamed_inside",
]

_PLAIN = {
    AttributeProto.INT,
    AttributeProto.FLOAT,
    AttributeProto.STRING,
    AttributeProto.INTS,
    AttributeProto.FLOATS,
    AttributeProto.STRINGS,
}


class Node(gs.Node):  # type: ignore[misc]  # graphsurgeon has no types
    """A node equal to itself only.

    graphsurgeon compares attributes, inputs and outputs whenever it disconnects a value; with a constant that
    thousands of nodes read, that takes minutes.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Origin:
    """What a node was in the file: its proto and how many inputs it has besides the values its subgraphs capture."""

    proto: NodeProto
    arity: int


def import_graph(
    source: onnx.ModelProto, inputs: Sequence[onnx.ValueInfoProto]
) -> tuple[gs.Graph, list[Origin]]:
    """graphsurgeon's view of the main graph and, per node, its origin; node names are made unique.

    Subgraphs stay in the protos; the outer values they read become additional inputs of their node, so that these
    values are kept alive and in order. Large tensors must be external already.
    """
    slim = onnx.ModelProto(ir_version=source.ir_version, graph=GraphProto(name=source.graph.name or "graph"))
    slim.opset_import.extend(source.opset_import)
    slim.graph.input.extend(inputs)
    slim.graph.output.extend(source.graph.output)
    for tensor in source.graph.initializer:  # graphsurgeon needs the name only, and decodes what it is given
        slim.graph.initializer.append(
            onnx.TensorProto(name=tensor.name, data_type=onnx.TensorProto.FLOAT, dims=[0])
        )
    origins = []
    for node in source.graph.node:
        bare = slim.graph.node.add(op_type=node.op_type, name=node.name, domain=node.domain)
        bare.input.extend(node.input)
        bare.input.extend(sorted(captured(node)))
        bare.output.extend(node.output)
        bare.attribute.extend(plain_attributes(node))
        origins.append(Origin(node, len(node.input)))
    graph = gs.import_onnx(slim)
    for gs_node in graph.nodes:
        gs_node.__class__ = Node
    _name_nodes(graph.nodes)
    return graph, origins


def export_node(node: gs.Node, origin: Origin | None) -> NodeProto:
    """The node as a proto: with its origin's attributes, subgraphs and documentation, or with ``node.attrs``."""
    inputs = [t.name for t in node.inputs]
    outputs = [t.name for t in node.outputs]
    if origin is None:
        domain = node.domain or ""
        made: NodeProto = onnx.helper.make_node(
            node.op, inputs, outputs, node.name, None, domain, **node.attrs
        )
        return made
    proto = NodeProto()
    proto.CopyFrom(origin.proto)
    del proto.input[:], proto.output[:]
    proto.input.extend(inputs[: origin.arity])
    proto.output.extend(outputs)
    proto.op_type = node.op
    proto.name = node.name
    return proto


def plain_attributes(node: NodeProto) -> list[AttributeProto]:
    """The attributes graphsurgeon can hold: numbers, strings and lists of them."""
    return [
        a for a in node.attribute if a.type in _PLAIN and not a.ref_attr_name and _is_text([a.s, *a.strings])
    ]


def _is_text(strings: list[bytes]) -> bool:
    try:
        return all(s.decode() is not None for s in strings)
    except UnicodeDecodeError:  # bytes in a string attribute are legal, but graphsurgeon decodes every string
        return False


def renamed_inside(node: NodeProto, old: str, new: str) -> NodeProto:
    """The node with outer value ``old`` called ``new`` in its subgraphs, at any depth."""
    made = NodeProto()
    made.CopyFrom(node)
    todo = [*subgraphs(made)]
    while todo:
        graph = todo.pop()
        for output in graph.output:
            output.name = new if output.name == old else output.name
        for inner in graph.node:
            for port, name in enumerate(inner.input):
                if name == old:
                    inner.input[port] = new
            todo += subgraphs(inner)
    return made


def all_names(graph: GraphProto) -> set[str]:
    """Every value name in ``graph`` and its subgraphs: a new name must avoid them all."""
    names = (
        {t.name for t in graph.initializer} | {i.name for i in graph.input} | {o.name for o in graph.output}
    )
    names |= {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        names.update(node.input, node.output)
        for sub in subgraphs(node):
            names |= all_names(sub)
    return names


def _name_nodes(nodes: Iterable[gs.Node]) -> None:
    """Unnamed nodes are named after their first output, duplicates get a suffix: both stable from run to run."""
    nodes = list(nodes)
    given = {node.name for node in nodes}
    taken: set[str] = set()
    for at, node in enumerate(nodes):
        base = node.name or f"{node.op}_{next((t.name for t in node.outputs if t.name), at)}"
        name, count = base, 1
        while name in taken or (
            name != node.name and name in given
        ):  # a name from the file is never given away
            count += 1
            name = f"{base}#{count}"
        node.name = name
        taken.add(name)


def in_order(nodes: Iterable[gs.Node]) -> list[gs.Node]:
    """A stable topological order: nodes keep their place unless an input is produced later.

    Raises:
        GraphError: the nodes form a cycle.
    """
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
