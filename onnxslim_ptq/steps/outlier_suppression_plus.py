"""Outlier Suppression+: channels are centred first, then scaled; biases take the shift back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from calib.stats import RowStats
from calib.types import Probe, Stats
from onnxslim_ptq.core.config import number
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.flex_smooth import row_probe
from onnxslim_ptq.steps.layer_error import GroupError, takes_rows
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.workspace import Workspace

__all__ = ["OutlierSuppressionPlus", "found_by", "run"]

Floats = NDArray[np.float64]
_GRID = tuple(i / 20 for i in range(21))


class OutlierSuppressionPlus(GroupsConfig):
    """``alpha`` as in smoothquant; left out, each group's is searched over 0, 0.05, …, 1."""

    type: Literal["outlier_suppression_plus"]
    alpha: Annotated[float, number(0, 1)] | None = None


def run(
    workspace: Workspace, groups: Sequence[SmoothGroup], config: OutlierSuppressionPlus
) -> list[Smoothed]:
    """Shift and scale every group of MatMul or Gemm by `found_by`; one that takes no shift is only scaled."""
    return smoothing.smooth_each(
        config.type,
        workspace,
        [group for group in groups if takes_rows(group)],
        lambda group: [smoothing.channel_probe(group), row_probe(group)],
        lambda group, stats: found_by(workspace.graph, group, stats, config),
    )


def found_by(
    graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats], config: OutlierSuppressionPlus
) -> Found | None:
    """z_j = (max x_j + min x_j) / 2, s_j = A_j^alpha / W_j^(1-alpha) with A_j = max |x_j - z_j|; all [channels].

    alpha with the smallest `GroupError`, ties to the last. Channels that share a scale take the mean z and the largest
    A and W. Source: Wei et al., Outlier Suppression+, EMNLP 2023, section 3; the grid: Golden Stick.
    """
    seen, rows = smoothing.channels(group, stats), stats[row_probe(group)]
    assert isinstance(rows, RowStats)
    if seen is None:
        return None
    shift = smoothing.reduce_channels(group, (seen.hi + seen.lo) / 2, np.mean) if group.shiftable else None
    middle = np.zeros(group.channels) if shift is None else smoothing.expand(group, shift)
    reach = np.maximum(np.abs(seen.hi - middle), np.abs(seen.lo - middle))
    act = smoothing.reduce_channels(group, reach, np.max)
    weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.max)

    def scale(alpha: float) -> Floats:
        return smoothing.power_scale(act, weight, alpha, 1 - alpha)

    alpha = config.alpha
    if alpha is None:
        error = GroupError(graph, group.consumers, rows.rows, seen.lo, seen.hi)
        inner = None if shift is None else middle
        alpha = min(reversed(_GRID), key=lambda a: error.of(smoothing.expand(group, scale(a)), inner))
    return Found(scale(alpha), shift)
