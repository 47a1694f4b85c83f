"""What sensitivity is measured of: layers, those that read one tensor together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from calib.model import Model
from calib.scope import reads
from calib.types import Array
from onnxslim_ptq.graph.linears import Linear

__all__ = ["Entry", "entries_of", "find_blocks", "macs_of"]

_TOGETHER = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True)
class Entry:
    """Layers that are ranked, and left float, as one; ``name`` is the first one's."""

    layers: tuple[Linear, ...]

    @property
    def name(self) -> str:
        return self.layers[0].node

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(layer.node for layer in self.layers)


def entries_of(layers: Iterable[Linear]) -> list[Entry]:
    """One entry per layer, but one for all MatMul and Gemm that read the same tensor.

    So are query, key and value, gate and up: the error of what they read is common to them.
    In graph order.
    """
    found: dict[str, list[Linear]] = {}
    for layer in layers:
        key = layer.activation_name if layer.op in _TOGETHER else f"{layer.activation_name}\0{layer.node}"
        found.setdefault(key, []).append(layer)
    return [Entry(tuple(group)) for group in found.values()]


def macs_of(layers: Iterable[Linear], outputs: dict[str, Array]) -> dict[str, int]:
    """Multiply-accumulates of each layer for one sample whose layer outputs are ``outputs``, by node."""
    return {
        layer.node: int(np.prod(outputs[layer.output_name].shape)) * layer.macs_per_output for layer in layers
    }


def find_blocks(model: Model, layers: Sequence[Linear]) -> list[list[Linear]]:
    """Runs of layers between points of the graph that one value alone crosses, in graph order.

    Such a point lies behind each residual sum, so the blocks of a transformer are its attentions and its MLPs. Values
    that no layer's input leads to, such as masks and position tables, do not count.
    """
    by_node = {layer.node: layer for layer in layers}
    nodes = model.proto.graph.node
    main = {layer.activation_name for layer in layers}
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        read = reads(node)
        if not main.isdisjoint(read):
            main.update(node.output)
        last.update(dict.fromkeys(read & main, index))
    blocks: list[list[Linear]] = [[]]
    live = {i.name for i in model.proto.graph.input} & main
    for index, node in enumerate(nodes):
        live = {name for name in (*live, *node.output) if name in main and last.get(name, -1) > index}
        if node.name in by_node:
            blocks[-1].append(by_node[node.name])
        if len(live) <= 1 and blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]
