"""Keys and queries of an attention whose channels can trade magnitude: (q s) (k / s)ᵀ = q kᵀ.

Both sides absorb the scale in what makes them (``absorb``). A rotary embedding turns pairs of channels into each other,
(k cos + rotate(k) sin): the search finds that both channels of a pair share one scale, which commutes with the turn.
Keys that the search cannot follow are no group, such as those that are an output of the graph as well (a KV cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_ptq.graph.absorb import run_search
from onnxslim_ptq.graph.absorb.constants import Source, apply_changes, changes_of
from onnxslim_ptq.graph.absorb.layout import NONE, Layout, Numbers, Refusal
from onnxslim_ptq.graph.absorb.search import Place, Search
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.shapes import infer_shapes

__all__ = ["KeyGroup", "find_key_groups", "smooth_keys"]

_SCORES = frozenset({"Mul", "Div", "Add", "Where", "Cast", "Identity", "Sub"})
_STEPS = 8  # nodes between the product and its Softmax
_CHOICES = tuple(product((0, 1), repeat=2))  # which operand of the first two products met takes the scale


@dataclass(frozen=True)
class KeyGroup:
    """One attention; ``tensor`` holds the keys, channels last, and channel c has scale ``index[c]`` (-1: none)."""

    name: str
    tensor: str
    scales: int
    index: tuple[int, ...]
    keys: tuple[Source, ...]
    queries: tuple[Source, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """What absorbs the scale, keys first."""
        return tuple(dict.fromkeys(s.node for s in (*self.keys, *self.queries)))


def find_key_groups(graph: Graph) -> list[KeyGroup]:
    """The groups of ``graph``, one per product of queries and keys that a Softmax reads."""
    place = Place(graph, infer_shapes(graph), {layer.node: layer for layer in find_linears(graph)[0]})
    found = []
    for node in graph.nodes:
        if node.op == "MatMul" and node.name not in place.layers and _leads_to_softmax(graph, node):
            group = _group(place, node)
            if group is not None:
                found.append(group)
    return found


def smooth_keys(graph: Graph, group: KeyGroup, scale: NDArray[np.float64]) -> None:
    """Divide keys by ``scale`` [group.scales], multiply queries by it; GraphError when a constant leaves its type."""
    if scale.shape != (group.scales,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"group '{group.name}' needs {group.scales} finite scales above 0")
    for sources, by in ((group.keys, scale), (group.queries, 1 / scale)):
        apply_changes(graph, [c for source in sources for c in changes_of(graph, source, by, None)])


def _leads_to_softmax(graph: Graph, node: gs.Node) -> bool:
    for _ in range(_STEPS):
        reader = graph.sole_consumer(node.outputs[0])
        if reader is None or reader.op == "Softmax":
            return reader is not None
        if reader.op not in _SCORES:
            return False
        node = reader
    return False


def _group(place: Place, node: gs.Node) -> KeyGroup | None:
    for searches in _attempts(place, node):
        keys = searches[0]
        tensor = _flat_value(keys)
        if tensor is None:
            continue
        roots = keys.numbers.final(keys.values[tensor].reshape(-1))
        scales = np.unique(roots[roots != NONE])
        if scales.size < 2:
            continue
        every = keys.numbers.final(np.arange(_count(place, node)))
        table = np.append(np.searchsorted(scales, every), NONE)
        index = np.where(
            roots == NONE, NONE, np.searchsorted(scales, np.where(roots == NONE, scales[0], roots))
        )
        renumbered = [
            tuple(replace(s, map=s.map.renumbered(table)) for s in search.sources) for search in searches
        ]
        return KeyGroup(
            node.name, tensor, int(scales.size), tuple(int(i) for i in index), renumbered[0], renumbered[1]
        )
    return None


def _attempts(place: Place, node: gs.Node) -> Iterator[tuple[Search, Search]]:
    """Keys and queries searched with the same numbers: a scale for each head and channel of the product."""
    dims = [place.shapes.dims.get(t.name) for t in node.inputs]
    if any(d is None or len(d) < 3 for d in dims) or None in (width := _width(place, node)):
        return
    heads, size = width
    numbered = np.arange(heads * size).reshape(heads, size)
    for first, second in product(_CHOICES, _CHOICES):
        numbers = Numbers(heads * size)
        keys = Search(place, numbers, first, inner={node.name: frozenset({0, 1})})
        queries = Search(place, numbers, second, inner={node.name: frozenset({0, 1})})
        try:
            run_search(keys, node.inputs[1], numbered[:, :, None])
            run_search(queries, node.inputs[0], numbered[:, None, :])
        except Refusal:
            continue
        if not keys.undone and not queries.undone:
            yield keys, queries


def _width(place: Place, node: gs.Node) -> tuple[int, int]:
    """Heads and channels of the product; heads that lie in a batch axis of unknown size share their scales."""
    keys = place.dims(node.inputs[1])
    heads = keys[-3] if len(keys) > 3 else 1
    return int(heads or 1), int(keys[-2] or 0)


def _count(place: Place, node: gs.Node) -> int:
    heads, size = _width(place, node)
    return heads * size


def _flat_value(search: Search) -> str | None:
    """The first value on the way back that has its channels on the last axis alone."""
    return next((name for name, layout in search.values.items() if _is_flat(layout)), None)


def _is_flat(layout: Layout) -> bool:
    return layout.ndim > 0 and layout.shape[-1] == layout.size > 1
