"""Cuts a model where few bytes cross, into blocks that fit into memory and run one after another.

The nodes that lead to the wanted values stand in file order, which is topological; a cut between two of them splits
the model. What one block makes and a later one reads crosses every cut between them; graph inputs do not count, they
are read from the data again, and neither do weights, which every block reads from where they lie.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx

from calib.errors import GraphError
from calib.model import Model
from calib.scope import reads
from calib.tensors import copy_fields, has_plain_dtype

__all__ = ["Block", "Layout", "extract", "find_cuts"]

_COPIES = 3  # of a block's weights: one to align them, ONNX Runtime's own, and while it packs that one
_UNTAPPED = (
    2  # a cut at a value that is watched anyway leaves ONNX Runtime's fusions as they are, others may not
)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Block:
    """Nodes to run together. ``reads``: graph inputs and values of earlier blocks; ``leaves``: what later ones read."""

    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    leaves: tuple[str, ...]


class Layout:
    """What cutting needs to know: nodes in order, who makes and reads which value, and how large it is.

    ``wanted`` names values that must come out; nodes that lead to none of them are left out. ``shapes`` are the input
    shapes of a typical sample, from which all others follow by ONNX shape inference.
    """

    def __init__(self, model: Model, wanted: Collection[str], shapes: Shapes) -> None:
        graph = model.proto.graph
        self.model, self.wanted = model, frozenset(wanted)
        self.constants = {t.name for t in graph.initializer}
        self.constants |= {t.values.name for t in graph.sparse_initializer}
        self.inputs = {i.name for i in graph.input} - self.constants
        every = [reads(node) for node in graph.node]
        needed, self.nodes = set(self.wanted), list[int]()
        for at in range(len(graph.node) - 1, -1, -1):
            if not needed.isdisjoint(graph.node[at].output):
                needed |= every[at]
                self.nodes.append(at)
        self.nodes.reverse()
        self.reads = [every[at] - self.constants for at in self.nodes]
        self.weights = [every[at] & model.weights.keys() for at in self.nodes]
        self.makes = [[o for o in graph.node[at].output if o] for at in self.nodes]
        self.made = {name: place for place, names in enumerate(self.makes) for name in names}
        self.last = {name: place for place, names in enumerate(self.reads) for name in names}
        self.types = _infer(model, shapes)
        self.declared = _infer(model, {})
        self.nbytes = self._sizes()

    def _sizes(self) -> dict[str, int]:
        """Each value's bytes for a typical sample: a result that inference knows no size of is taken to be as large as
        the largest value its node reads."""
        sizes = {name: _nbytes(self.types[name]) or 0 for name in self.inputs if name in self.types}
        for read, made in zip(self.reads, self.makes, strict=True):
            largest = max((sizes.get(name, 0) for name in read), default=0)
            for name in made:
                known = _nbytes(self.types[name]) if name in self.types else None
                sizes[name] = largest if known is None else known
        return sizes

    def crossing(self) -> np.ndarray:
        """cost[i] = bytes that cross a cut before node i, those of values nobody watches twice; inf where none can be.

        No cut can be where a value crosses whose type is unknown or none that numpy has.
        """
        steps = np.zeros(len(self.nodes) + 1)
        barred = np.zeros(len(self.nodes) + 1, np.int64)
        for name, made in self.made.items():
            last = self.last.get(name, made)
            if last > made:
                cost = self.nbytes[name] * (1 if name in self.wanted else _UNTAPPED)
                can = name in self.types and has_plain_dtype(self.types[name].elem_type)
                steps[made + 1] += cost
                steps[last + 1] -= cost
                barred[made + 1] += not can
                barred[last + 1] -= not can
        return np.where(np.cumsum(barred) > 0, np.inf, np.cumsum(steps))

    def loads(self, start: int) -> Iterator[int]:
        """Bytes that a block from node ``start`` takes, with one more node each: weights and values alive at once."""
        weights, seen, inside = 0, set[str](), set[str]()
        alive = peak = 0
        for place in range(start, len(self.nodes)):
            for name in self.weights[place] - seen:
                weights += self.model.weights[name].nbytes
                seen.add(name)
            fresh = [n for n in (*self.reads[place], *self.makes[place]) if n not in inside]
            inside.update(fresh)
            alive += sum(self.nbytes.get(n, 0) for n in fresh)
            peak = max(peak, alive)
            alive -= sum(
                self.nbytes.get(n, 0)
                for n in self.reads[place]
                if self.last[n] == place and n not in self.wanted
            )
            yield _COPIES * weights + peak

    def blocks(self, cuts: Collection[int]) -> list[Block]:
        """The blocks between ``cuts`` (positions among the nodes)."""
        edges = [0, *sorted(cuts), len(self.nodes)]
        return [self._block(start, stop) for start, stop in pairwise(edges)]

    def _block(self, start: int, stop: int) -> Block:
        inside = range(start, stop)
        read = dict.fromkeys(n for i in inside for n in sorted(self.reads[i]) if self.made.get(n, -1) < start)
        made = dict.fromkeys(n for i in inside for n in self.makes[i])
        leaves = [n for n in made if self.last.get(n, -1) >= stop]
        return Block(tuple(self.nodes[start:stop]), tuple(read), tuple(leaves))


def find_cuts(layout: Layout, budget: int) -> list[int]:
    """Positions before which to cut so that each block's load stays below ``budget`` bytes where that is possible.

    From each start the cheapest cut is taken among those that leave the block between half full and full; a single
    node, or a stretch that nothing can cut, may exceed the budget.

    Raises:
        GraphError: a node stands before one it reads from.
    """
    for place, names in enumerate(layout.reads):
        unmade = (n for n in names - layout.inputs if layout.made.get(n, place) >= place)
        late = next(unmade, None)
        if late is not None:
            raise GraphError(
                f"node {layout.nodes[place]} reads '{late}', which is made later; "
                "sort the graph, or calibrate the model whole"
            )
    cost, cuts, start = layout.crossing(), list[int](), 0
    while (stop := _next(layout, cost, start, budget)) < len(layout.nodes):
        cuts.append(stop)
        start = stop
    return cuts


def _next(layout: Layout, cost: np.ndarray, start: int, budget: int) -> int:
    """Where the block that begins at ``start`` ends."""
    end, half, full = len(layout.nodes), start + 1, start
    for stop, load in enumerate(layout.loads(start), start + 1):
        half = stop if load <= budget // 2 else half
        if load > budget:
            break
        full = stop
    if full == end:
        return end
    for low, high in ((max(half, start + 1), full), (start + 1, full)):
        places = np.arange(low, high + 1)
        if places.size and np.isfinite(cost[places]).any():
            cheapest = cost[places].min()
            return int(places[cost[places] == cheapest][-1])
    later = np.flatnonzero(np.isfinite(cost[full + 1 : end]))
    return full + 1 + int(later[0]) if later.size else end


def extract(layout: Layout, block: Block, outputs: Collection[str]) -> Model:
    """The block as a model of its own, with ``outputs`` (of its values) in order; weights are shared, not copied."""
    source = layout.model.proto
    proto = onnx.ModelProto()
    copy_fields(source, proto, skip=("graph", "metadata_props"))
    proto.graph.name = source.graph.name or "graph"
    proto.graph.node.extend(source.graph.node[at] for at in block.nodes)
    read = set[str]().union(*(reads(source.graph.node[at]) for at in block.nodes))
    proto.graph.initializer.extend(t for t in source.graph.initializer if t.name in read)
    proto.graph.sparse_initializer.extend(t for t in source.graph.sparse_initializer if t.values.name in read)
    declared = {i.name: i for i in source.graph.input}
    for name in block.reads:
        known = declared.get(name)
        proto.graph.input.append(known if known is not None else _value(layout, name))
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    weights = {name: layout.model.weights[name] for name in layout.model.weights if name in read}
    return replace(layout.model, proto=proto, weights=weights)


def _value(layout: Layout, name: str) -> onnx.ValueInfoProto:
    """A block's input, with what of its shape holds for every sample: ONNX Runtime chooses kernels by that."""
    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = layout.types[name].elem_type
    shape = layout.declared[name].shape if name in layout.declared else None
    if shape is not None and layout.declared[name].HasField("shape"):
        open_dims = value.type.tensor_type.shape.dim
        for dim in shape.dim:
            open_dims.add(**({"dim_value": dim.dim_value} if dim.HasField("dim_value") else {}))
    return value


def _infer(model: Model, shapes: Shapes) -> dict[str, onnx.TypeProto.Tensor]:
    """Tensor types by ONNX shape inference, inputs having the given shapes; what it cannot tell is missing."""
    work = onnx.ModelProto()
    work.CopyFrom(model.proto)
    del work.graph.value_info[:]  # declared shapes of real exports are often wrong
    del work.graph.output[:]  # so are theirs
    for value in work.graph.input:
        if value.name in shapes:
            value.type.tensor_type.ClearField("shape")
            dims = value.type.tensor_type.shape.dim
            for size in shapes[value.name]:
                dims.add(dim_value=size)
    try:
        work = onnx.shape_inference.infer_shapes(work, data_prop=True)
    except Exception:  # InferenceError or what protobuf raises: then types are unknown, and nothing is cut
        return {}
    values = (*work.graph.value_info, *work.graph.input)
    return {v.name: v.type.tensor_type for v in values if v.type.HasField("tensor_type")}


def _nbytes(kind: onnx.TypeProto.Tensor) -> int | None:
    if not kind.HasField("shape") or not has_plain_dtype(kind.elem_type):
        return None
    sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
    if any(size < 0 for size in sizes):
        return None
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return int(np.prod(sizes, dtype=np.int64)) * itemsize
