"""Finds attention in its exported forms, and where queries, keys and values enter it.

| form | queries, keys, values |
|---|---|
| MatMul - (scale, mask) - Softmax - MatMul | ports 0 and 1 of the first product, port 1 of the second |
| ``Attention`` (ONNX), ``MultiHeadAttention``, ``GroupQueryAttention`` (com.microsoft) | inputs 0, 1, 2 |

From a product the search walks back over what only arranges or rescales: the transpose of the keys, a constant scale,
heads that move into the batch, the repetition of key and value heads that several query heads share. The value it ends
at has heads on axis 1, after norms and rotary embeddings, which are not crossed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.core.spec import Use
from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.names import noted_scope
from onnxslim_ptq.graph.shapes import Shapes, fixed_shapes, infer_shapes

__all__ = ["Attention", "Entry", "find_attention"]

# A Reshape where heads lie in the batch during the products.
_BETWEEN = frozenset({"Mul", "Div", "Add", "Sub", "Where", "Cast", "Identity", "Reshape"})
_BEHIND = frozenset({"Cast", "Identity", "Dropout", "Reshape"})
_STEPS = 8  # nodes between a product and its Softmax
_FUSED = {
    "Attention": frozenset({"", "ai.onnx"}),
    "MultiHeadAttention": frozenset({"com.microsoft"}),
    "GroupQueryAttention": frozenset({"com.microsoft"}),
}


@dataclass(frozen=True)
class Entry:
    """A value that enters attention: ``tensor``, read by ``use``, with ``heads`` heads on ``axis``.

    ``width``: elements of one head on that axis, 1 where the heads have an axis of their own. A single head is on the
    last axis where its size is fixed: from opset 21 on ONNX Runtime 1.31 cannot load int8 with one scale. One head of
    rank 3 stands for heads that lie in the batch and cannot be told apart.
    """

    use: Use
    tensor: str
    axis: int
    heads: int
    width: int = 1


@dataclass(frozen=True)
class Attention:
    """One attention: ``nodes`` from the first product to the second (one node when fused), ``output`` of the last.

    ``name``: what its nodes' names have in common, as a module name.
    """

    name: str
    nodes: tuple[str, ...]
    output: str
    query: Entry
    key: Entry
    value: Entry

    @property
    def entries(self) -> dict[str, Entry]:
        """The three entries as ``q``, ``k`` and ``v``."""
        return {"q": self.query, "k": self.key, "v": self.value}


def find_attention(graph: Graph) -> tuple[list[Attention], dict[str, str]]:
    """Every attention in graph order, and why a node that looks like one is none; names are unique (``#2``)."""
    shapes = infer_shapes(graph)
    fixed = fixed_shapes(graph, shapes)
    found: list[Attention] = []
    reasons: dict[str, str] = {}
    taken: dict[str, int] = {}
    for node in graph.nodes:
        made: Attention | str | None = None
        if node.op == "Softmax" and is_standard(node):
            made = _decomposed(graph, shapes, fixed, node)
        elif (node.domain or "") in _FUSED.get(node.op, ()):
            made = _fused(graph, shapes, node)
        if isinstance(made, str):
            reasons[node.name] = made
        elif made is not None:
            count = taken[made.name] = taken.get(made.name, 0) + 1
            name = made.name if count == 1 else f"{made.name}#{count}"
            found.append(Attention(name, made.nodes, made.output, made.query, made.key, made.value))
    return found, reasons


def _decomposed(graph: Graph, shapes: Shapes, fixed: Shapes, softmax: gs.Node) -> Attention | str | None:
    """From the Softmax back to the product of queries and keys, and on to the product with the values."""
    before = _scores(graph, softmax.inputs[0])
    behind = _context(graph, softmax)
    if before is None or behind is None:
        return None  # a Softmax of something else
    scores, context = before[0], behind[-1]
    entries = [_entry(graph, shapes, fixed, *spot) for spot in ((scores, 0), (scores, 1), (context, 1))]
    bad = next((entry for entry in entries if isinstance(entry, str)), None)
    if bad is not None:
        return bad
    query, key, value = (entry for entry in entries if isinstance(entry, Entry))
    nodes = [*before, softmax, *behind]
    return Attention(
        _common_name(graph, [n.name for n in nodes]),
        tuple(n.name for n in nodes),
        context.outputs[0].name,
        query,
        key,
        value,
    )


def _scores(graph: Graph, tensor: gs.Tensor, steps: int = _STEPS) -> list[gs.Node] | None:
    """The nodes from the product of two computed values to ``tensor``; None when there is none, or more than one."""
    node = graph.producer(tensor)
    if node is None or steps == 0:
        return None
    if node.op == "MatMul":
        return None if any(graph.is_constant(t) for t in node.inputs) else [node]
    if node.op not in _BETWEEN:
        return None
    paths = [path for t in node.inputs if (path := _scores(graph, t, steps - 1)) is not None]
    return [*paths[0], node] if len(paths) == 1 else None


def _context(graph: Graph, softmax: gs.Node) -> list[gs.Node] | None:
    """The nodes behind the Softmax up to the product with the values."""
    path: list[gs.Node] = []
    tensor = softmax.outputs[0]
    for _ in range(_STEPS):
        readers = [n for n in graph.consumers(tensor) if n.op in _BEHIND | {"MatMul", "Where"}]
        if len(readers) != 1:
            return None
        node = readers[0]
        path.append(node)
        if node.op == "MatMul":
            fits = node.inputs[0] is tensor and not graph.is_constant(node.inputs[1])
            return path if fits else None
        tensor = node.outputs[0]
    return None


def _entry(graph: Graph, shapes: Shapes, fixed: Shapes, node: gs.Node, port: int) -> Entry | str:
    """Walk back from one operand of a product to the value before its arrangement."""
    while True:
        tensor = node.inputs[port]
        producer = graph.producer(tensor)
        step = None if producer is None else _arranged(graph, shapes, producer)
        if producer is None or step is None:
            break
        node, port = producer, step
    dims = shapes.dims.get(tensor.name)
    if dims is None or len(dims) not in (3, 4):
        return f"the shape of '{tensor.name}' is unknown, so its heads cannot be told apart"
    heads = dims[1] if len(dims) == 4 else 1
    if not heads:
        return f"the number of heads of '{tensor.name}' is not fixed"
    width = fixed.dims.get(tensor.name, (None,))[-1]
    if heads == 1 and width:
        return Entry(Use(node.name, port), tensor.name, len(dims) - 1, 1, int(width))
    return Entry(Use(node.name, port), tensor.name, 1 if len(dims) == 4 else 0, int(heads))


def _arranged(graph: Graph, shapes: Shapes, node: gs.Node) -> int | None:
    """The port of ``node``'s data when it only transposes, scales or repeats values whose heads are on axis 1."""
    if node.op in ("Identity", "Cast"):
        return 0
    if node.op == "Transpose":
        perm = [int(p) for p in node.attrs.get("perm", [])]
        return 0 if perm in ([0, 1, 3, 2], [0, 2, 1]) else None
    if node.op in ("Mul", "Div"):
        ports = (1, 0) if node.op == "Mul" else (1,)
        constant = next((p for p in ports if _is_single(graph, shapes, node.inputs[p])), None)
        return None if constant is None else 1 - constant
    if node.op == "Reshape" and (_is_repetition(graph, shapes, node) or _moves_heads(shapes, node)):
        return 0
    if node.op in ("Expand", "Unsqueeze") and _feeds_repetition(graph, shapes, node):
        return 0
    return None


def _is_single(graph: Graph, shapes: Shapes, tensor: gs.Tensor) -> bool:
    """One number for all elements, constant or computed from shapes."""
    value = graph.value(tensor)
    if value is not None:
        return bool(np.size(value) == 1)
    dims = shapes.dims.get(tensor.name)
    return dims is not None and all(d == 1 for d in dims)


def _is_repetition(graph: Graph, shapes: Shapes, node: gs.Node) -> bool:
    """[B, H, S, D] -> Unsqueeze -> [B, H, 1, S, D] -> Expand -> [B, H, r, S, D] -> this Reshape -> [B, H r, S, D]."""
    expand = graph.producer(node.inputs[0])
    if expand is None or expand.op != "Expand":
        return False
    unsqueeze = graph.producer(expand.inputs[0])
    if unsqueeze is None or unsqueeze.op != "Unsqueeze":
        return False
    wide, narrow = (shapes.dims.get(t.name) for t in (node.outputs[0], unsqueeze.inputs[0]))
    middle = shapes.dims.get(expand.inputs[0].name)
    if wide is None or narrow is None or middle is None or (len(wide), len(narrow), len(middle)) != (4, 4, 5):
        return False
    return (
        middle[2] == 1 and narrow[1] == middle[1] and bool(wide[1] and narrow[1]) and wide[2:] == narrow[2:]
    )


def _moves_heads(shapes: Shapes, node: gs.Node) -> bool:
    """[B, H, S, D] -> this Reshape -> [B H, S, D]."""
    wide, narrow = (shapes.dims.get(t.name) for t in (node.inputs[0], node.outputs[0]))
    if wide is None or narrow is None or (len(wide), len(narrow)) != (4, 3) or None in (*wide, *narrow):
        return False
    return wide[2:] == narrow[1:] and bool(wide[1])


def _feeds_repetition(graph: Graph, shapes: Shapes, node: gs.Node) -> bool:
    reader = node
    for _ in range(2):
        following = [n for n in graph.consumers(reader.outputs[0]) if n.op in ("Expand", "Reshape")]
        if len(following) != 1:
            return False
        reader = following[0]
        if reader.op == "Reshape":
            return _is_repetition(graph, shapes, reader)
    return False


def _fused(graph: Graph, shapes: Shapes, node: gs.Node) -> Attention | str:
    """An attention that is one node; its inputs are [B, S, heads * D], or [B, heads, S, D]."""
    inputs = [t for t in node.inputs[:3] if t.name]
    if len(inputs) < 3:
        return "its queries, keys and values lie in one tensor"
    if node.op == "GroupQueryAttention" and node.attrs.get("do_rotary", 0):
        return "it rotates queries and keys itself, so that what enters the product cannot be reached"
    heads = int(node.attrs.get("num_heads", node.attrs.get("q_num_heads", 0)))
    groups = int(node.attrs.get("kv_num_heads", heads))
    entries = []
    for port, tensor in enumerate(inputs):
        dims, count = shapes.dims.get(tensor.name), heads if port == 0 else groups
        if dims is None or len(dims) not in (3, 4):
            return f"the shape of '{tensor.name}' is unknown, so its heads cannot be told apart"
        if len(dims) == 4:
            if not dims[1]:
                return f"the number of heads of '{tensor.name}' is not fixed"
            entries.append(Entry(Use(node.name, port), tensor.name, 1, int(dims[1])))
        elif count < 1 or not dims[2] or dims[2] % count:
            return f"the heads of '{tensor.name}' cannot be told apart"
        else:
            entries.append(Entry(Use(node.name, port), tensor.name, 2, count, int(dims[2]) // count))
    return Attention(_common_name(graph, [node.name]), (node.name,), node.outputs[0].name, *entries)


def _common_name(graph: Graph, nodes: list[str]) -> str:
    """The module dynamo notes; else what their paths share (``/layer.0/self/MatMul``, ``/layer.0/self/Softmax`` ->
    ``layer.0.self``); else the first node's path."""
    noted = {noted_scope(graph, name) for name in nodes}
    if len(noted) == 1 and "" not in noted:
        return noted.pop()
    paths = [[part for part in name.split(";")[0].split("/") if part] for name in nodes]
    common = []
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or ".".join(paths[0])
