"""Nodes and names across subgraphs: what lies inside a node, and which values of its graph it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import GraphProto, NodeProto

__all__ = ["captured", "every_node", "reads", "subgraphs"]


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among the node's attributes: those of If, Loop and Scan."""
    for attr in node.attribute:
        if attr.HasField("g"):
            yield attr.g
        yield from attr.graphs


def every_node(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes and those of their subgraphs, at any depth."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from every_node(graph.node)


def captured(node: NodeProto) -> set[str]:
    """Names of outer values that the node's subgraphs read."""
    return set().union(*map(_free_names, subgraphs(node)))


def reads(node: NodeProto) -> set[str]:
    """Every value a node reads: its inputs, and what its subgraphs capture from outside."""
    return (set(node.input) | captured(node)) - {""}


def _free_names(graph: GraphProto) -> set[str]:
    made = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    made |= {t.values.name for t in graph.sparse_initializer}
    used = {o.name for o in graph.output}
    for node in graph.node:
        made.update(node.output)
        used |= reads(node)
    return used - made - {""}
