"""Cross-layer equalization: the channels between two convolutions get ranges of the same size; needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed, kinds_field
from onnxslim_ptq.workspace import Workspace

__all__ = ["Equalize", "equal_scale", "output_absmax", "run"]

Floats = NDArray[np.float64]
_SETTLED = 1e-3


class Equalize(GroupsConfig):
    """``rounds``: how often the pairs of a chain are equalized in turn; fewer when nothing moves any more."""

    type: Literal["equalize"]
    groups: tuple[GroupKind, ...] = kinds_field(GroupKind.CONV_CONV)
    rounds: Annotated[int, Field(ge=1, le=100, strict=True)] = 20


def run(workspace: Workspace, groups: Sequence[SmoothGroup], config: Equalize) -> list[Smoothed]:
    """Equalize every pair of layers of ``groups`` by `equal_scale` until the scales settle."""
    graph = workspace.graph
    layers = {layer.node: layer for layer in find_linears(graph)[0]}
    pairs = [(g, p) for g in groups if (p := _producer(graph, g, layers)) is not None]
    total = {group.tensor: np.ones(group.scales) for group, _ in pairs}
    for _ in range(config.rounds):
        moved = 0.0
        for group, producer in pairs:
            scale = equal_scale(output_absmax(graph, producer), smoothing.weight_absmax(graph, group))
            smoothing.scale_group(config.type, workspace, group, Found(scale))
            total[group.tensor] *= scale
            moved = max(moved, float(np.abs(np.log(scale)).max()))
        if moved < _SETTLED:
            break
    workspace.changed()
    return [
        Smoothed(config.type, g.kind.value, tuple(c.node for c in g.consumers), total[g.tensor])
        for g, _ in pairs
    ]


def equal_scale(first: Floats, second: Floats) -> Floats:
    """s_j = sqrt(r1_j / r2_j): W1' = W1 / s and W2' = s W2 then both have the range sqrt(r1_j r2_j).

    1 for dead channels. r1_j = max |W1| of output channel j, r2_j = max |W2| of input channel j, [channels]. Source:
    Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1.
    """
    alive = (first > 0) & (second > 0)
    return np.where(alive, np.sqrt(np.where(alive, first, 1) / np.where(alive, second, 1)), 1.0)


def output_absmax(graph: Graph, layer: Linear) -> Floats:
    """max |W| per output channel, float64 [output channels]."""
    node = graph.node(layer.node)
    size = np.abs(np.asarray(graph.value(node.inputs[layer.weight]), np.float32))
    if layer.op == "ConvTranspose":
        group = int(node.attrs.get("group", 1))
        blocks = size.reshape(group, size.shape[0] // group, size.shape[1], -1)
        return np.asarray(blocks.max(axis=(1, 3)).reshape(-1), np.float64)
    axis = layer.channel_axis if layer.channel_axis is not None else size.ndim - 1
    return np.asarray(size.max(axis=tuple(i for i in range(size.ndim) if i != axis)), np.float64)


def _producer(graph: Graph, group: SmoothGroup, layers: Mapping[str, Linear]) -> Linear | None:
    """The layer that makes the group's tensor, through functions that pass a scale on; None when there is none."""
    node = graph.producer(graph.tensor(group.tensor))
    while node is not None and node.name not in layers:
        node = graph.producer(node.inputs[0]) if node.inputs else None
    found = layers.get(node.name) if node is not None else None
    return found if found is not None and found.channels == group.scales else None
