"""SmoothQuant: moves a share of each channel's magnitude from the activation into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np

from calib.types import Probe, Stats
from onnxslim_ptq.core.config import number
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.workspace import Workspace

__all__ = ["SmoothQuant", "run", "scale_of"]


class SmoothQuant(GroupsConfig):
    """``alpha`` from 0 (weights keep their form) to 1 (activations become even)."""

    type: Literal["smoothquant"]
    alpha: Annotated[float, number(0, 1)] = 0.5


def run(workspace: Workspace, groups: Sequence[SmoothGroup], config: SmoothQuant) -> list[Smoothed]:
    """Scale every group by `scale_of`."""
    return smoothing.smooth_each(
        config.type,
        workspace,
        groups,
        lambda group: [smoothing.channel_probe(group)],
        lambda group, stats: scale_of(workspace.graph, group, stats, config.alpha),
    )


def scale_of(graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats], alpha: float) -> Found | None:
    """s_j = A_j^alpha / W_j^(1-alpha), at least 1e-5; 1 where A_j or W_j is 0.

    A_j = max |x_j| over all samples [channels], W_j = max_i |W_ij| over all consumers; channels that share a scale
    (one kv head of GQA) take the largest of their A and W. Source: Xiao et al., SmoothQuant, ICML 2023, eq. 4.
    """
    seen = smoothing.channels(group, stats)
    if seen is None:
        return None
    act = smoothing.reduce_channels(group, seen.absmax, np.max)
    weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.max)
    return Found(smoothing.power_scale(act, weight, alpha, 1 - alpha))
