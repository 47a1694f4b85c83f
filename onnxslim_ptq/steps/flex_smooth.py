"""Flexible smoothing (msModelSlim's m6): both exponents searched per group by the error of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from calib.stats import RowStats
from calib.types import Probe, Stats
from onnxslim_ptq.core.config import number
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.layer_error import GroupError, takes_rows
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.workspace import Workspace

__all__ = ["FlexSmooth", "found_by", "row_probe", "run", "search"]

Floats = NDArray[np.float64]
_GRID = tuple(i / 20 for i in range(21))
_LEAST = 1e-5


class FlexSmooth(GroupsConfig):
    """``alpha`` and ``beta`` as given; what is left out is searched."""

    type: Literal["flex_smooth"]
    alpha: Annotated[float, number(0, 1)] | None = None
    beta: Annotated[float, number(0, 1)] | None = None


def run(workspace: Workspace, groups: Sequence[SmoothGroup], config: FlexSmooth) -> list[Smoothed]:
    """Scale every group of MatMul or Gemm by `found_by`; only those have rows to measure the error on."""
    return smoothing.smooth_each(
        config.type,
        workspace,
        [group for group in groups if takes_rows(group)],
        lambda group: [smoothing.channel_probe(group), row_probe(group)],
        lambda group, stats: found_by(workspace.graph, group, stats, config),
    )


def row_probe(group: SmoothGroup) -> Probe:
    """A bounded reservoir of the rows that the group's layers read."""
    return Probe(group.tensor, "rows")


def found_by(
    graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats], config: FlexSmooth
) -> Found | None:
    """s_j = max(A_j^alpha / W_j^beta, 1e-5), exponents as configured or found by `search`.

    A_j = max |x_j| over all samples, W_j = max_i |W_ij| over all consumers, both [channels]; channels that share a
    scale (one kv head of GQA) take the largest. Source: msModelSlim, m6 / ``flex_smooth_quant``.
    """
    seen, rows = smoothing.channels(group, stats), stats[row_probe(group)]
    assert isinstance(rows, RowStats)
    if seen is None:
        return None
    act = smoothing.reduce_channels(group, seen.absmax, np.max)
    weight = smoothing.reduce_channels(group, smoothing.weight_absmax(graph, group), np.max)

    def scale(alpha: float, beta: float) -> Floats:
        return smoothing.power_scale(act, weight, alpha, beta, _LEAST)

    alpha, beta = config.alpha, config.beta
    if alpha is None or beta is None:
        error = GroupError(graph, group.consumers, rows.rows, seen.lo, seen.hi)
        alpha, beta = search(lambda a, b: error.of(smoothing.expand(group, scale(a, b))), alpha, beta)
    return Found(scale(alpha, beta))


def search(
    error: Callable[[float, float], float], alpha: float | None = None, beta: float | None = None
) -> tuple[float, float]:
    """The exponents with the smallest error, in two phases over 0, 0.05, …, 1; ties go to the last.

    First beta = 1 - alpha for every alpha, then every beta for the alpha found; an exponent that is given stays.
    """
    best, chosen = np.inf, (0.5 if alpha is None else alpha, 0.5 if beta is None else beta)
    for a in _GRID if alpha is None else (alpha,):
        b = 1 - a if beta is None else beta
        if (found := error(a, b)) <= best:
            best, chosen = found, (a, b)
    for b in _GRID if beta is None else ():
        if (found := error(chosen[0], b)) <= best:
            best, chosen = found, (chosen[0], b)
    return chosen
