"""The state of one search for what absorbs a scale: which values are scaled, by which numbers, and what takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.graph.absorb.constants import ConstantScale, Source
from onnxslim_ptq.graph.absorb.layout import NONE, Layout, Numbers, Refusal
from onnxslim_ptq.graph.edit import is_captured
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.shapes import Shape, Shapes

__all__ = ["Made", "Place", "Search"]

_FIRST_OPSET = 7  # before, broadcasting followed an axis attribute


@dataclass(frozen=True)
class Place:
    """The model that is searched: its layers by node name and the shapes of its values."""

    graph: Graph
    shapes: Shapes
    layers: Mapping[str, Linear]

    def dims(self, tensor: gs.Tensor) -> Shape:
        """The dimensions of a value, at least their number; Refusal when that is not known."""
        dims = self.shapes.dims.get(tensor.name)
        if dims is None:
            raise Refusal(f"the shape of '{tensor.name}' is not known")
        return dims

    def check_broadcasting(self) -> None:
        if self.graph.opset < _FIRST_OPSET:
            raise Refusal(f"opset {self.graph.opset} broadcasts in another way")


@dataclass(frozen=True)
class Made:
    """A scaled value as an output of the node that makes it.

    ``shift``: a constant met here may take the shift. ``equal``: it holds the values of the start, perhaps moved.
    """

    node: gs.Node
    output: gs.Tensor
    layout: Layout
    shift: bool
    equal: bool


@dataclass
class Search:
    """One attempt; ``choices`` tells which operand of each product met takes the scale (0: the second)."""

    place: Place
    numbers: Numbers
    choices: Sequence[int]
    decided: int = 0
    values: dict[str, Layout] = field(default_factory=dict)
    equal: set[str] = field(default_factory=set)
    sources: list[Source] = field(default_factory=list)
    undone: list[ConstantScale] = field(default_factory=list)
    consumers: list[tuple[Linear, Layout]] = field(default_factory=list)
    inner: dict[str, frozenset[int]] = field(default_factory=dict)  # node -> its inputs that are scaled
    todo: list[Made] = field(default_factory=list)
    selected: set[str] = field(default_factory=set)  # values of which nodes read parts, and none reads more
    through_product: bool = False
    through_attention: bool = False
    at_norm: bool = False

    def scale(
        self,
        tensor: gs.Tensor,
        layout: Layout,
        shift: bool = False,
        equal: bool = False,
        selected: bool = False,
    ) -> None:
        """Value ``tensor`` is to be scaled by ``layout``; what makes it is looked at later.

        ``selected``: where the layout has no number, its reader does not look (a Slice); another reader may then
        have one there. A rotary embedding reads its input whole, and in halves.
        """
        name, graph = tensor.name, self.place.graph
        if (layout == NONE).all():
            return
        if name in self.values:
            self._agree(name, layout, selected)
            return
        if graph.is_constant(tensor):
            raise Refusal(f"constant '{name}' would have to be scaled")
        if name in graph.outputs:
            raise Refusal(f"'{name}' is a graph output")
        node = graph.producer(tensor)
        if node is None:
            raise Refusal(f"'{name}' is a graph input")
        if is_captured(graph, tensor):
            raise Refusal(f"'{name}' is read inside a subgraph")
        self.values[name] = layout
        if selected:
            self.selected.add(name)
        if equal:
            self.equal.add(name)
        self.todo.append(Made(node, tensor, layout, shift, equal))

    def _agree(self, name: str, layout: Layout, selected: bool) -> None:
        """One more reader of a value that is scaled already."""
        old, new = (np.ascontiguousarray(v) for v in np.broadcast_arrays(self.values[name], layout))
        if selected:
            new = np.where(new == NONE, old, new)
        if name in self.selected:
            grown = np.where(old == NONE, new, old)
            at = next((i for i, made in enumerate(self.todo) if made.output.name == name), None)
            if at is not None and not np.array_equal(grown, old):
                old = self.values[name] = grown
                self.todo[at] = replace(self.todo[at], layout=grown)
            if not selected:
                self.selected.discard(name)
        self.numbers.same(old, new)

    def operand(self, node: gs.Node, port: int, layout: Layout) -> None:
        """Scale an operand of a node that broadcasts, given the layout of its result."""
        source = node.inputs[port]
        self.scale(source, self.numbers.fit(layout, self.place.dims(source)))

    def per_channel(self, layout: Layout, from_right: int, channels: int) -> Layout:
        """``layout`` as one number per index of an axis: [channels]; numbers along other axes become the same."""
        merged = self.numbers.merged(layout, from_right)
        if merged.size not in (1, channels):
            raise Refusal("its channels are not those of the layer that makes it")
        return np.ascontiguousarray(np.broadcast_to(merged, (channels,)))

    def choose(self) -> int:
        """The operand of the next product that takes the scale: 1 (``act(gate) * up``), or 0 when told so."""
        self.decided += 1
        return 1 - self.choices[self.decided - 1] if self.decided <= len(self.choices) else 1

    @property
    def takes_shift(self) -> bool:
        """Whether a constant of the source takes a shift, and no other reader would have to undo it."""
        return any(s.takes_shift for s in self.sources) and not self.undone
