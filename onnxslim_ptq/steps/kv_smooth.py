"""KV smoothing: large channels of an attention's keys hand their magnitude to the queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from calib.stats import ChannelStats
from calib.types import Probe
from onnxslim_ptq.core.config import number
from onnxslim_ptq.core.match import Layer, Pattern
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.key_groups import KeyGroup, find_key_groups, smooth_keys
from onnxslim_ptq.steps.smoothing import Smoothed, SmoothingConfig
from onnxslim_ptq.workspace import Workspace

__all__ = ["KvSmooth", "chosen", "key_scale", "run"]

Floats = NDArray[np.float64]


class KvSmooth(SmoothingConfig):
    """``smooth_factor``: the exponent; 1 makes all key channels equally large."""

    type: Literal["kv_smooth"]
    smooth_factor: Annotated[float, number(0, open_lo=True)] = 1.0


def chosen(graph: Graph, config: KvSmooth, layers: Mapping[str, Layer]) -> list[KeyGroup]:
    """The attentions of which a key or query projection is included and none excluded."""
    include, exclude = ([Pattern.parse(text) for text in texts] for texts in (config.include, config.exclude))

    def hit(patterns: Sequence[Pattern], group: KeyGroup) -> bool:
        known = [layers[node] for node in group.nodes if node in layers]
        return any(pattern.matches(layer) for pattern in patterns for layer in known)

    return [g for g in find_key_groups(graph) if hit(include, g) and not hit(exclude, g)]


def run(workspace: Workspace, groups: Sequence[KeyGroup], config: KvSmooth) -> list[Smoothed]:
    """Divide keys by `key_scale` and multiply queries by it; q kᵀ stays as it is."""
    probes = {group.name: Probe(group.tensor, "channel", -1) for group in groups}
    stats = workspace.collect(probes.values())
    done = []
    for group in groups:
        seen = stats[probes[group.name]]
        assert isinstance(seen, ChannelStats)
        if not seen.seen or len(seen.lo) != len(group.index):
            continue
        scale = key_scale(seen.absmax, group.index, group.scales, config.smooth_factor)
        smooth_keys(workspace.graph, group, scale)
        done.append(Smoothed(config.type, "qk", group.nodes, scale))
    if done:
        workspace.changed()
    return done


def key_scale(size: Floats, index: Sequence[int], scales: int, factor: float) -> Floats:
    """s_j = m_j^factor, m_j = max |k| over all samples and the channels ``index`` maps to j; 1 where m_j is 0.

    size: max |k| per channel [channels]; s float64 [scales]. Source: msModelSlim, KV Smooth.
    """
    largest = np.zeros(scales)
    used = np.asarray(index) >= 0
    np.maximum.at(largest, np.asarray(index)[used], size[used])
    return np.where(largest > 0, largest, 1.0) ** factor
