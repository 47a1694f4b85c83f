"""What the smoothing steps share: which groups they touch, magnitudes per channel, the record of what was scaled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from calib.stats import ChannelStats
from calib.types import Probe, Stats
from onnxslim_ptq.core.config import Config, Patterns
from onnxslim_ptq.core.match import Layer, Pattern
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup, find_groups, smooth
from onnxslim_ptq.workspace import Workspace

__all__ = [
    "FOLDED",
    "Found",
    "GroupsConfig",
    "Smoothed",
    "SmoothingConfig",
    "channel_probe",
    "channels",
    "chosen_groups",
    "expand",
    "input_absmax",
    "kinds_field",
    "power_scale",
    "reduce_channels",
    "scale_group",
    "smooth_by_block",
    "smooth_each",
    "weight_absmax",
]

Floats = NDArray[np.float64]
Loss = TypeVar("Loss")
FOLDED = (GroupKind.NORM_LINEAR, GroupKind.OV, GroupKind.UP_DOWN, GroupKind.LINEAR_LINEAR)
_STATE = 1 << 29  # bytes of statistics that one sweep may hold; a Gram matrix takes 17 per entry


def kinds_field(*default: GroupKind) -> Any:
    """The key ``groups`` of a step: the kinds it may touch, at least one."""
    return Field(default, min_length=1, examples=[kind.value for kind in GroupKind])


class SmoothingConfig(Config):
    """Keys of every smoothing step."""

    type: str
    include: Patterns = Field(("*",), min_length=1)
    exclude: Patterns = ()


class GroupsConfig(SmoothingConfig):
    """``groups`` are the kinds a step may touch; a group is touched when a layer of it is included, quantized by the
    recipe, and none is excluded."""

    groups: tuple[GroupKind, ...] = kinds_field(*FOLDED)


@dataclass(frozen=True)
class Found:
    """The scale [scales] (> 0) and shift [scales] a step found for a group: x' = (x - shift) / scale."""

    scale: Floats
    shift: Floats | None = None


@dataclass(frozen=True)
class Smoothed:
    """What was done to one group, for the weights JSON; ``channels`` were split off."""

    step: str
    kind: str
    nodes: tuple[str, ...]
    scale: Floats
    shift: Floats | None = None
    channels: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        entry = {"step": self.step, "kind": self.kind, "group": list(self.nodes), "scale": self.scale}
        more = {"shift": self.shift, "channels": list(self.channels) or None}
        return {**entry, **{key: value for key, value in more.items() if value is not None}}


def chosen_groups(
    graph: Graph, config: GroupsConfig, layers: Mapping[str, Layer], quantized: Iterable[str]
) -> list[SmoothGroup]:
    """The groups that ``config`` touches; ``layers``: all layers by node name, ``quantized``: the nodes that matter."""
    include, exclude = ([Pattern.parse(text) for text in texts] for texts in (config.include, config.exclude))
    wanted = set(quantized)

    def hit(patterns: Sequence[Pattern], group: SmoothGroup) -> bool:
        known = [layers[c.node] for c in group.consumers if c.node in layers]
        return any(pattern.matches(layer) for pattern in patterns for layer in known)

    return [
        group
        for group in find_groups(graph, config.groups)
        if any(c.node in wanted for c in group.consumers) and hit(include, group) and not hit(exclude, group)
    ]


def channel_probe(group: SmoothGroup) -> Probe:
    """The per-channel extremes and averages of the group's tensor."""
    return Probe(group.tensor, "channel", group.axis)


def channels(group: SmoothGroup, stats: Mapping[Probe, Stats]) -> ChannelStats | None:
    """The statistics of `channel_probe`, or None when nothing finite was seen."""
    found = stats[channel_probe(group)]
    assert isinstance(found, ChannelStats)
    return found if found.seen and len(found.lo) == group.channels and found.count.all() else None


def smooth_each(
    step: str,
    workspace: Workspace,
    groups: Sequence[SmoothGroup],
    probes: Callable[[SmoothGroup], Sequence[Probe]],
    find: Callable[[SmoothGroup, Mapping[Probe, Stats]], Found | None],
) -> list[Smoothed]:
    """Gather ``probes`` of all groups in one sweep (several when Gram matrices need the room), then scale each group
    by what ``find`` makes of them; None leaves a group as it is."""
    done: list[Smoothed] = []
    for _, part in groupby(_parts(groups, probes), key=lambda pair: pair[0]):
        batch = [group for _, group in part]
        stats = workspace.collect(p for group in batch for p in probes(group))
        for group in batch:
            found = find(group, {p: stats[p] for p in probes(group)})
            if found is not None:
                done.append(scale_group(step, workspace, group, found))
        workspace.changed()
    return done


def smooth_by_block(
    step: str,
    workspace: Workspace,
    groups: Sequence[SmoothGroup],
    losses: Callable[[Sequence[SmoothGroup]], Iterable[tuple[SmoothGroup, Loss]]],
    find: Callable[[SmoothGroup, ChannelStats, Loss], Floats],
) -> list[Smoothed]:
    """Scale each group by what ``find`` makes of its channels and loss; all losses are of the graph as it is now."""
    stats = workspace.collect(channel_probe(group) for group in groups)
    known = {g.tensor: seen for g in groups if (seen := channels(g, stats)) is not None}
    todo = [group for group in groups if group.tensor in known]
    found = [(group, find(group, known[group.tensor], loss)) for group, loss in losses(todo)]
    done = [scale_group(step, workspace, group, Found(scale)) for group, scale in found]
    if done:
        workspace.changed()
    return done


def scale_group(step: str, workspace: Workspace, group: SmoothGroup, found: Found) -> Smoothed:
    smooth(workspace.graph, group, found.scale, found.shift)
    return Smoothed(step, group.kind.value, tuple(c.node for c in group.consumers), found.scale, found.shift)


def _parts(
    groups: Sequence[SmoothGroup], probes: Callable[[SmoothGroup], Sequence[Probe]]
) -> list[tuple[int, SmoothGroup]]:
    """Each group with the number of the sweep that serves it."""
    numbered, sweep, held = [], 0, 0
    for group in groups:
        size = sum(17 * group.channels**2 for p in probes(group) if p.kind == "gram")
        if held and held + size > _STATE:
            sweep, held = sweep + 1, 0
        held += size
        numbered.append((sweep, group))
    return numbered


def input_absmax(graph: Graph, layer: Linear) -> Floats:
    """max |W| over everything an input channel is multiplied with, float64 [input channels]."""
    node = graph.node(layer.node)
    weight = graph.value(node.inputs[layer.weight])
    assert weight is not None, f"layer {layer.node} lost its weight"
    size = np.abs(np.asarray(weight, np.float32))
    if layer.op == "Conv":
        group = int(node.attrs.get("group", 1))
        blocks = size.reshape(group, size.shape[0] // group, size.shape[1], -1)
        return np.asarray(blocks.max(axis=(1, 3)).reshape(-1), np.float64)
    axis = 0 if layer.op == "ConvTranspose" else size.ndim - 2
    if layer.op == "Gemm" and node.attrs.get("transB", 0):
        axis = 1
    return np.asarray(size.max(axis=tuple(i for i in range(size.ndim) if i != axis)), np.float64)


def weight_absmax(graph: Graph, group: SmoothGroup) -> Floats:
    """W_j = max |W_ij| over the outputs i of all consumers, float64 [channels]."""
    return np.asarray(np.max([input_absmax(graph, layer) for layer in group.consumers], axis=0), np.float64)


def reduce_channels(group: SmoothGroup, values: Floats, how: Callable[[Floats], Any]) -> Floats:
    """[channels] -> [scales]: ``how`` (np.mean, np.max) over the channels that share a scale (one kv head of GQA)."""
    if group.index is None:
        return values
    index = np.asarray(group.index)
    return np.asarray([how(values[index == j]) for j in range(group.scales)], np.float64)


def expand(group: SmoothGroup, values: Floats) -> Floats:
    """[scales] -> [channels]."""
    return values if group.index is None else values[np.asarray(group.index)]


def power_scale(act: Floats, weight: Floats, alpha: float, beta: float, least: float = 1e-5) -> Floats:
    """s = max(A^alpha / W^beta, least); 1 for channels that are dead in A or W."""
    alive = (act > 0) & (weight > 0)
    with np.errstate(divide="ignore"):
        scale = np.where(alive, act, 1.0) ** alpha / np.where(alive, weight, 1.0) ** beta
    return np.where(alive, np.maximum(scale, least), 1.0)
