"""Finds the constants that absorb a per-channel scale of a value, and all readers that make up for it.

The search starts at a layer's input and walks back (``makers``). Then every other reader of every value that is scaled
on the way is asked to undo the scale (``readers``). Whatever neither knows ends the search with its reason, so a wrong
guess is impossible: a pattern not understood is a group not found.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.absorb.layout import Layout, Numbers, Refusal
from onnxslim_ptq.graph.absorb.makers import make
from onnxslim_ptq.graph.absorb.readers import check_inner, read
from onnxslim_ptq.graph.absorb.search import Place, Search

__all__ = ["find_absorption", "run_search"]

_TRIES = 16


def find_absorption(place: Place, start: gs.Tensor, layout: Layout, count: int) -> Search:
    """The first attempt that succeeds, over the operands of the products met; ``layout`` holds ``count`` numbers.

    Raises:
        Refusal: none does; the reason is that of the first attempt.
    """
    first: Refusal | None = None
    todo: list[tuple[int, ...]] = [()]
    for _ in range(_TRIES):
        if not todo:
            break
        choices = todo.pop()
        search = Search(place, Numbers(count), choices)
        try:
            run_search(search, start, layout)
            return search
        except Refusal as refusal:
            first = first or refusal
            open_choices = range(len(choices), search.decided)
            todo += [(*choices, *([0] * (at - len(choices))), 1) for at in open_choices]
    assert first is not None
    raise first


def run_search(search: Search, start: gs.Tensor, layout: Layout) -> None:
    """Walk back from ``start`` and let every other reader undo the scale; Refusal when one cannot."""
    search.scale(start, layout, shift=True, equal=True)
    while search.todo:
        make(search, search.todo.pop(0))
    graph = search.place.graph
    pending = list(search.values)
    while pending:
        name = pending.pop(0)
        for node in graph.consumers(graph.tensor(name)):
            if node.name not in search.inner:
                pending += read(search, node, name)
    check_inner(search)
