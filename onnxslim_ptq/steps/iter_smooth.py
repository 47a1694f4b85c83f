"""Iterative smoothing (msModelSlim's m4): nearly all of the activation's magnitude goes into the weights."""

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

__all__ = ["IterSmooth", "found_by", "run"]

_LEAST_WEIGHT = 1e-5


class IterSmooth(GroupsConfig):
    """``symmetric: false`` also moves each channel's middle to 0 where a bias can take it back."""

    type: Literal["iter_smooth"]
    alpha: Annotated[float, number(0, 1)] = 0.9
    scale_min: Annotated[float, number(0, open_lo=True)] = 1e-5
    symmetric: bool = True


def run(workspace: Workspace, groups: Sequence[SmoothGroup], config: IterSmooth) -> list[Smoothed]:
    """Scale, and shift unless ``symmetric``, every group by `found_by`."""
    return smoothing.smooth_each(
        config.type,
        workspace,
        groups,
        lambda group: [smoothing.channel_probe(group)],
        lambda group, stats: found_by(workspace.graph, group, stats, config),
    )


def found_by(
    graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats], config: IterSmooth
) -> Found | None:
    """s_j = max(A_j^alpha / max(W_j, 1e-5)^(1-alpha), scale_min), shift z_j = (max x_j + min x_j) / 2 or none.

    A_j = max |x_j - z_j| over all samples, W_j = max_i |W_ij| over all consumers, both [channels]; channels that share
    a scale (one kv head of GQA) take the mean of A and of W. Source: msModelSlim, m4 / ``iter_smooth``.
    """
    seen = smoothing.channels(group, stats)
    if seen is None:
        return None
    shift = (seen.hi + seen.lo) / 2 if group.shiftable and not config.symmetric else None
    if shift is not None:
        shift = smoothing.reduce_channels(group, shift, np.mean)
    middle = 0.0 if shift is None else smoothing.expand(group, shift)
    reach = np.maximum(np.abs(seen.hi - middle), np.abs(seen.lo - middle))
    act = smoothing.reduce_channels(group, reach, np.mean)
    weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.mean)
    scale = act**config.alpha / np.maximum(weight, _LEAST_WEIGHT) ** (1 - config.alpha)
    return Found(np.maximum(scale, config.scale_min), shift)
