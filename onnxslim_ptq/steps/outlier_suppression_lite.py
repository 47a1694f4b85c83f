"""Outlier Suppression Lite: SmoothQuant with the exponent searched for every layer on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calib.stats import ChannelStats, RowStats
from calib.types import Probe, Stats
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.block_loss import BlockLoss, block_losses
from onnxslim_ptq.steps.flex_smooth import row_probe
from onnxslim_ptq.steps.layer_error import GroupError, takes_rows
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed, kinds_field
from onnxslim_ptq.workspace import Workspace

__all__ = ["ALPHAS", "OutlierSuppressionLite", "by_block", "found_by", "run"]

Floats = NDArray[np.float64]
ALPHAS = (0.3, 0.4, *(i / 20 for i in range(10, 21)))


class OutlierSuppressionLite(GroupsConfig):
    """As the original, groups are ``unfused`` by default: nothing is folded, an explicit Mul divides the input.

    ``loss``: where the error is taken; the original takes it at the end of the ``block``.
    """

    type: Literal["outlier_suppression_lite"]
    groups: tuple[GroupKind, ...] = kinds_field(GroupKind.UNFUSED)
    loss: Literal["layer", "block"] = "layer"


def run(
    workspace: Workspace, groups: Sequence[SmoothGroup], config: OutlierSuppressionLite, placement: Placement
) -> list[Smoothed]:
    """Scale every group of MatMul or Gemm by `found_by` or, with the loss of its block, `by_block`."""
    fitting = [group for group in groups if takes_rows(group)]
    if config.loss == "block":
        losses = partial(block_losses, workspace, placement=placement)
        find = partial(by_block, workspace.graph)
        return smoothing.smooth_by_block(config.type, workspace, fitting, losses, find)
    return smoothing.smooth_each(
        config.type,
        workspace,
        fitting,
        lambda group: [smoothing.channel_probe(group), row_probe(group)],
        lambda group, stats: found_by(workspace.graph, group, stats),
    )


def found_by(graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats]) -> Found | None:
    """s_j = A_j^alpha / W_j^(1-alpha), the alpha of `ALPHAS` with the smallest `GroupError` of the layers that read x.

    A_j = max |x_j| over all samples, W_j = max_i |W_ij|, both [channels]. Source: Golden Stick,
    OUTLIER_SUPPRESSION_LITE, with the error at the layer itself.
    """
    seen, rows = smoothing.channels(group, stats), stats[row_probe(group)]
    assert isinstance(rows, RowStats)
    if seen is None:
        return None
    error = GroupError(graph, group.consumers, rows.rows, seen.lo, seen.hi)
    return Found(min(_scales(graph, group, seen), key=lambda scale: error.of(smoothing.expand(group, scale))))


def by_block(graph: Graph, group: SmoothGroup, seen: ChannelStats, loss: BlockLoss) -> Floats:
    """The scale of `found_by` with the alpha of the smallest `BlockLoss`, weights and input of the group quantized.

    Source: Golden Stick, OUTLIER_SUPPRESSION_LITE (error at the end of the decoder layer).
    """
    reach = (seen.lo, seen.hi)
    return min(_scales(graph, group, seen), key=lambda scale: loss.of(smoothing.expand(group, scale), reach))


def _scales(graph: Graph, group: SmoothGroup, seen: ChannelStats) -> list[Floats]:
    """For every alpha, s_j = A_j^alpha / W_j^(1-alpha)."""
    act = smoothing.reduce_channels(group, seen.absmax, np.max)
    weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.max)
    return [smoothing.power_scale(act, weight, alpha, 1 - alpha) for alpha in ALPHAS]
