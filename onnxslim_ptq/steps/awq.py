"""AWQ (msModelSlim's m3): channels that see large activations get finer weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from calib.stats import GramStats
from calib.types import Probe, Stats
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.layer_error import matrix, round_columns, takes_rows
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.workspace import Workspace

__all__ = ["Awq", "awq_scale", "found_by", "run", "weight_loss"]

Floats = NDArray[np.float64]
_LEAST = 1e-4


class Awq(GroupsConfig):
    """``grid``: how many exponents are tried."""

    type: Literal["awq"]
    grid: Annotated[int, Field(ge=1, le=100, strict=True)] = 20


def run(workspace: Workspace, groups: Sequence[SmoothGroup], config: Awq) -> list[Smoothed]:
    """Scale every group of MatMul or Gemm by `found_by`."""
    return smoothing.smooth_each(
        config.type,
        workspace,
        [group for group in groups if takes_rows(group)],
        lambda group: [smoothing.channel_probe(group), _gram_probe(group)],
        lambda group, stats: found_by(workspace.graph, group, stats, config),
    )


def _gram_probe(group: SmoothGroup) -> Probe:
    return Probe(group.tensor, "gram", group.axis)


def found_by(graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats], config: Awq) -> Found | None:
    """The scale of `awq_scale` with the exponent r in {0/grid, 1/grid, …} of the smallest `weight_loss`.

    a_j = mean |x_j| over all rows [channels]; channels that share a scale take the mean. Source: Lin et al., AWQ, 2023,
    section 3.2; msModelSlim, m3 (int8, loss on the layer's output).
    """
    seen, gram = smoothing.channels(group, stats), stats[_gram_probe(group)]
    assert isinstance(gram, GramStats)
    if seen is None or gram.rows == 0:
        return None
    size = smoothing.reduce_channels(group, seen.abs_sum / seen.count, np.mean)
    weights = [matrix(graph, layer) for layer in group.consumers]
    mean = gram.gram / gram.rows

    def loss(scale: Floats) -> float:
        return sum(weight_loss(w, mean, smoothing.expand(group, scale)) for w in weights)

    return Found(min((awq_scale(size, i / config.grid) for i in range(config.grid)), key=loss))


def awq_scale(size: Floats, exponent: float) -> Floats:
    """s = max(a^r, 1e-4), divided by sqrt(max(s) min(s)), so that scales lie around 1; float64 [scales]."""
    scale = np.maximum(size**exponent, _LEAST)
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()), np.float64)


def weight_loss(weight: NDArray[np.float32], gram: Floats, scale: Floats) -> float:
    """Mean square of x (Ŵ - W) over rows and outputs = tr(Eᵀ G E) / outputs, E = Q(diag(s) W) / s - W.

    ``gram`` G = XᵀX / rows [channels, channels], weight [channels, outputs], Q: int8 per output, to nearest.
    """
    column = scale.astype(np.float32)[:, None]
    error = round_columns(weight * column)
    error /= column
    error -= weight
    square = np.einsum("ij,ij->", gram.astype(np.float32) @ error, error, dtype=np.float64)
    return float(square) / int(weight.shape[1])
