"""The part of a network between some layers and the residual sum behind them: one half of a transformer block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.graph import Graph

__all__ = ["Block", "find_block"]


@dataclass(frozen=True)
class Block:
    """``nodes`` compute ``ends`` from what the layers read and from ``given``, values that do not depend on them."""

    nodes: tuple[str, ...]
    ends: tuple[str, ...]
    given: tuple[str, ...]


def find_block(graph: Graph, tensor: str, layers: Sequence[str]) -> Block | None:
    """From ``layers``, which read ``tensor``, to the first Add of what they make and something ``tensor`` comes from.

    The sum of a shortcut is such an Add; a mask or a bias is not. Without one the graph outputs behind the layers end
    the block. None when nothing behind them can be taken out of the graph: there is no output, or a subgraph reads it.
    """
    behind = _behind(graph, [graph.node(name) for name in layers])
    before = _before(graph, graph.tensor(tensor))
    end = next((node for node in behind.values() if _is_shortcut(graph, node, behind, before)), None)
    ends = [end.outputs[0].name] if end is not None else _outputs(graph, behind)
    nodes = _between(graph, ends, behind)
    if not ends or any(graph.has_subgraph(node) for node in nodes):
        return None
    made = {t.name for node in nodes for t in node.outputs}
    read = [(node, t) for node in nodes for t in node.inputs if t.name and not graph.is_constant(t)]
    given = dict.fromkeys(
        t.name for node, t in read if t.name not in made and not (t.name == tensor and node.name in layers)
    )
    return Block(tuple(n.name for n in nodes), tuple(ends), tuple(given))


def _behind(graph: Graph, layers: Sequence[gs.Node]) -> dict[str, gs.Node]:
    """All nodes that depend on ``layers``, breadth first."""
    found = {node.name: node for node in layers}
    todo = list(layers)
    while todo:
        for output in todo.pop(0).outputs:
            for node in graph.consumers(output):
                if node.name not in found:
                    found[node.name] = node
                    todo.append(node)
    return found


def _before(graph: Graph, tensor: gs.Tensor) -> set[str]:
    """``tensor`` and the values it is computed from."""
    found, todo = {tensor.name}, [tensor]
    while todo:
        node = graph.producer(todo.pop())
        for source in [] if node is None else node.inputs:
            if source.name and source.name not in found and not graph.is_constant(source):
                found.add(source.name)
                todo.append(source)
    return found


def _is_shortcut(graph: Graph, node: gs.Node, behind: Collection[str], before: Collection[str]) -> bool:
    if node.op != "Add":
        return False
    makers = [graph.producer(t) for t in node.inputs]
    inside = [m is not None and m.name in behind for m in makers]
    outside = [t.name in before and not graph.is_constant(t) for t in node.inputs]
    return any(inside) and any(outside)


def _outputs(graph: Graph, behind: dict[str, gs.Node]) -> list[str]:
    return [t.name for node in behind.values() for t in node.outputs if t.name in graph.outputs]


def _between(graph: Graph, ends: Sequence[str], behind: dict[str, gs.Node]) -> list[gs.Node]:
    """The nodes of ``behind`` that ``ends`` need, each after those it reads."""
    order: dict[str, gs.Node] = {}
    todo = [(behind[m.name], False) for e in ends if (m := graph.producer(graph.tensor(e))) is not None]
    while todo:
        node, ready = todo.pop()
        if ready:
            order[node.name] = node
        elif node.name not in order:
            todo.append((node, True))
            makers = [graph.producer(t) for t in node.inputs]
            todo += [(m, False) for m in makers if m is not None and m.name in behind]
    return list(order.values())
