"""Where a per-channel scale can move from activations into weights without changing the float function.

A group is one activation x, the layers that read it, and what produces it. With s > 0 per channel (and a shift z
where the source can take one)

    x' = (x - z) / s,   W' = diag(s) W,   b' = b + Wᵀ z      so that   x' W' + b' = x W + b

and the producer absorbs 1 / s and -z / s: a norm's weight and bias, a layer's output channels, the value projection
of an attention. Where nothing can, an explicit Mul in front of the layers does (``unfused``).

Sources: G. Xiao et al., *SmoothQuant*, ICML 2023, section 4; X. Wei et al., *Outlier Suppression+*, EMNLP 2023,
section 3 (shift); M. Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, ICCV 2019,
section 4.1 (Conv to Conv).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxslim_ptq.core.groups import GroupKind
from onnxslim_ptq.graph.absorb import find_absorption
from onnxslim_ptq.graph.absorb.constants import ConstantScale, LayerOutput, Source, apply_changes, changes_of
from onnxslim_ptq.graph.absorb.layout import NONE, Refusal
from onnxslim_ptq.graph.absorb.readers import channel_from_right, input_channels
from onnxslim_ptq.graph.absorb.rescale import explicit, input_changes, insert, takes_shift
from onnxslim_ptq.graph.absorb.search import Place, Search
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.shapes import infer_shapes

__all__ = ["GroupKind", "SmoothGroup", "find_groups", "smooth"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SmoothGroup:
    """Layers that read one activation, and whether its source absorbs a scale per channel.

    ``tensor`` is what the consumers read, its channels lie on ``axis`` (-1 for MatMul and Gemm, 1 for Conv). Consumer
    channel c has scale number ``index[c]`` (None: c itself) of ``scales``; fewer scales than channels where one value
    head feeds several query heads. ``sources`` are the constants that absorb the scale, ``undone`` those of other
    readers, which make up for it; both are empty for an unfused group, whose ``reason`` tells why nothing absorbs it.
    """

    kind: GroupKind
    name: str
    tensor: str
    axis: int
    channels: int
    scales: int
    index: tuple[int, ...] | None
    consumers: tuple[Linear, ...]
    shiftable: bool
    sources: tuple[Source, ...] = ()
    undone: tuple[ConstantScale, ...] = ()
    reason: str = ""


def find_groups(graph: Graph, kinds: Collection[GroupKind] | None = None) -> list[SmoothGroup]:
    """The groups of ``graph`` in graph order, each layer in at most one; only ``kinds`` when given.

    A layer whose activation a kind could absorb that is left out is ``unfused`` where that is allowed. A layer is in
    no group when its input is one channel, or its channels lie on no axis of their own (Gemm with transA).
    """
    allowed = frozenset(GroupKind if kinds is None else kinds)
    linears, _ = find_linears(graph)
    layers = {linear.node: linear for linear in linears}
    place = Place(graph, infer_shapes(graph), layers)
    groups: list[SmoothGroup] = []
    done: set[str] = set()
    for linear in linears:
        if linear.node in done:
            continue
        group = _group(place, linear, allowed)
        if group is not None:
            groups.append(group)
            done.update(consumer.node for consumer in group.consumers)
    return groups


def smooth(graph: Graph, group: SmoothGroup, scale: Floats, shift: Floats | None = None) -> None:
    """Divide the group's activation by ``scale`` after subtracting ``shift`` (both [group.scales], float64).

    The graph's float function stays the same. Constants that other nodes read are copied first.

    Raises:
        ValueError: a scale is not finite and positive, a size is wrong, or the group takes no shift.
        GraphError: a changed constant would leave its type; the graph is as before.
    """
    scale = np.asarray(scale, np.float64)
    if scale.shape != (group.scales,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"group '{group.name}' needs {group.scales} finite scales above 0")
    if shift is not None:
        shift = np.asarray(shift, np.float64)
        if shift.shape != (group.scales,) or not np.isfinite(shift).all():
            raise ValueError(f"group '{group.name}' needs {group.scales} finite shifts")
        if shift.any() and not group.shiftable:
            raise ValueError(f"group '{group.name}' takes no shift")
    index = slice(None) if group.index is None else list(group.index)
    made = explicit(graph, group.consumers[0], scale, shift) if group.kind is GroupKind.UNFUSED else None
    changes = [c for s in (*group.sources, *group.undone) for c in changes_of(graph, s, scale, shift)]
    for consumer in group.consumers:
        changes += input_changes(graph, consumer, scale[index], None if shift is None else shift[index])
    apply_changes(graph, changes)
    if made is not None:
        insert(graph, group.tensor, group.consumers, made)


def _group(place: Place, linear: Linear, allowed: frozenset[GroupKind]) -> SmoothGroup | None:
    graph = place.graph
    channels, from_right = input_channels(graph, linear), channel_from_right(graph, linear)
    if channels is None or from_right is None or channels < 2:
        return None
    start = graph.node(linear.node).inputs[linear.activation]
    dims = place.shapes.dims.get(start.name)
    if dims is not None and (len(dims) <= from_right or dims[-1 - from_right] not in (None, channels)):
        return None  # the model is invalid; the runtime will say so
    layout = np.arange(channels).reshape([-1] + [1] * from_right)
    try:
        found = find_absorption(place, start, layout, channels)
        group = _absorbing(linear, found, channels)
        reason = f"{group.kind.value} is left out"
    except Refusal as refusal:
        group, reason = None, str(refusal)
    if group is not None and group.kind in allowed:
        return group
    return _unfused(place, linear, channels, reason) if GroupKind.UNFUSED in allowed else None


def _absorbing(linear: Linear, found: Search, channels: int) -> SmoothGroup:
    roots = found.numbers.final(np.arange(channels))
    if any(not np.array_equal(found.numbers.final(read), roots) for _, read in found.consumers):
        raise Refusal(f"'{linear.activation_name}' is read with its channels in another order")
    scales, index = np.unique(roots, return_inverse=True)
    if scales.size < 2:
        raise Refusal("all its channels would have to share one scale")
    table = np.append(index, NONE)  # number while searching -> scale; -1 stays -1
    consumers = tuple(consumer for consumer, _ in found.consumers)
    return SmoothGroup(
        _kind(found, consumers),
        _name(found),
        linear.activation_name,
        _axis(linear),
        channels,
        int(scales.size),
        None if scales.size == channels else tuple(index.tolist()),
        consumers,
        found.takes_shift and all(takes_shift(found.place.graph, c) for c in consumers),
        tuple(replace(s, map=s.map.renumbered(table)) for s in found.sources),
        tuple(replace(s, map=s.map.renumbered(table)) for s in found.undone),
    )


def _unfused(place: Place, linear: Linear, channels: int, reason: str) -> SmoothGroup:
    """All layers that read the value with the same channels, to be given an explicit Mul in front."""
    graph, layers = place.graph, place.layers
    tensor = graph.node(linear.node).inputs[linear.activation]
    consumers = tuple(
        reader
        for node in graph.consumers(tensor)
        if (reader := layers.get(node.name)) is not None
        and reader.activation_name == tensor.name
        and _axis(reader) == _axis(linear)
        and input_channels(graph, reader) == channels
        and channel_from_right(graph, reader) == channel_from_right(graph, linear)
    )
    shiftable = all(takes_shift(graph, c) for c in consumers)
    return SmoothGroup(
        GroupKind.UNFUSED,
        tensor.name,
        tensor.name,
        _axis(linear),
        channels,
        channels,
        None,
        consumers,
        shiftable,
        reason=reason,
    )


def _axis(linear: Linear) -> int:
    return -1 if linear.op in ("MatMul", "Gemm") else 1


def _name(found: Search) -> str:
    """The layer or norm that absorbs; an exporter's Add of a bias stands behind it."""
    named = (s for s in found.sources if not isinstance(s, ConstantScale))
    scaled = (s for s in found.sources if isinstance(s, ConstantScale) and s.multiplies)
    return (next(named, None) or next(scaled, None) or found.sources[0]).node


def _kind(found: Search, consumers: tuple[Linear, ...]) -> GroupKind:
    if found.through_attention:
        return GroupKind.OV
    if found.at_norm:
        return GroupKind.NORM_LINEAR
    if found.through_product:
        return GroupKind.UP_DOWN
    makers = {found.place.graph.node(s.node).op for s in found.sources if isinstance(s, LayerOutput)}
    convolutions = {"Conv", "ConvTranspose"}
    if makers <= convolutions and {c.op for c in consumers} <= convolutions:
        return GroupKind.CONV_CONV
    return GroupKind.LINEAR_LINEAR
