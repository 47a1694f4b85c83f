"""Outlier Suppression Lite: SmoothQuant with the exponent searched for every layer on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from calib.stats import RowStats
from calib.types import Probe, Stats
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.flex_smooth import row_probe
from onnxslim_ptq.steps.layer_error import GroupError, takes_rows
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.workspace import Workspace

__all__ = ["ALPHAS", "OutlierSuppressionLite", "found_by", "run"]

Floats = NDArray[np.float64]
ALPHAS = (0.3, 0.4, *(i / 20 for i in range(10, 21)))


class OutlierSuppressionLite(GroupsConfig):
    """As the original, groups are ``unfused`` by default: nothing is folded, an explicit Mul divides the input."""

    type: Literal["outlier_suppression_lite"]
    groups: tuple[GroupKind, ...] = Field(
        (GroupKind.UNFUSED,), min_length=1, examples=[kind.value for kind in GroupKind]
    )


def run(
    workspace: Workspace, groups: Sequence[SmoothGroup], config: OutlierSuppressionLite
) -> list[Smoothed]:
    """Scale every group of MatMul or Gemm by `found_by`."""
    return smoothing.smooth_each(
        config.type,
        workspace,
        [group for group in groups if takes_rows(group)],
        lambda group: [smoothing.channel_probe(group), row_probe(group)],
        lambda group, stats: found_by(workspace.graph, group, stats),
    )


def found_by(graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats]) -> Found | None:
    """s_j = A_j^alpha / W_j^(1-alpha), the alpha of `ALPHAS` with the smallest `GroupError` of the layers that read x.

    A_j = max |x_j| over all samples, W_j = max_i |W_ij|, both [channels]. Source: Golden Stick,
    OUTLIER_SUPPRESSION_LITE; the original takes the error at the end of the decoder layer, this at the layer itself.
    """
    seen, rows = smoothing.channels(group, stats), stats[row_probe(group)]
    assert isinstance(rows, RowStats)
    if seen is None:
        return None
    act = smoothing.reduce_channels(group, seen.absmax, np.max)
    weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.max)
    error = GroupError(graph, group.consumers, rows.rows, seen.lo, seen.hi)

    def scale(alpha: float) -> Floats:
        return smoothing.power_scale(act, weight, alpha, 1 - alpha)

    return Found(scale(min(ALPHAS, key=lambda a: error.of(smoothing.expand(group, scale(a))))))
