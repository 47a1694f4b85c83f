"""AWQ (msModelSlim's m3): channels that see large activations get finer weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from calib.stats import ChannelStats, GramStats
from calib.types import Probe, Stats
from onnxslim_ptq.core.config import number, problem
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import SmoothGroup
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.block_loss import BlockLoss, block_losses
from onnxslim_ptq.steps.layer_error import matrix, round_columns, takes_rows
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.smoothing import Found, GroupsConfig, Smoothed
from onnxslim_ptq.workspace import Workspace

__all__ = ["Awq", "awq_scale", "by_block", "duo_scale", "found_by", "relative_weight", "run", "weight_loss"]

Floats = NDArray[np.float64]
_LEAST = 1e-4


class Awq(GroupsConfig):
    """``grid``: how many exponents are tried, 0/grid, 1/grid, …, unless ``exponents`` names them.

    ``loss``: where their error is taken; ``block`` is Golden Stick's AWQ. ``duo``: weights count in the scale as well
    (`duo_scale`); with ``loss: block`` only.
    """

    type: Literal["awq"]
    grid: Annotated[int, Field(ge=1, le=100, strict=True)] = 20
    exponents: tuple[Annotated[float, number(0, 1)], ...] | None = Field(default=None, min_length=1)
    loss: Literal["layer", "block"] = "layer"
    duo: bool = False

    @property
    def tried(self) -> tuple[float, ...]:
        """The exponents."""
        return self.exponents or tuple(i / self.grid for i in range(self.grid))

    @model_validator(mode="after")
    def _together(self) -> Awq:
        if self.duo and self.loss != "block":
            raise problem("goes with loss: block only", "duo")
        return self


def run(
    workspace: Workspace, groups: Sequence[SmoothGroup], config: Awq, placement: Placement
) -> list[Smoothed]:
    """Scale every group of MatMul or Gemm by `found_by` or, with the loss of its block, `by_block`."""
    fitting = [group for group in groups if takes_rows(group)]
    if config.loss == "block":
        losses = partial(block_losses, workspace, placement=placement)
        find = partial(by_block, workspace.graph, config)
        return smoothing.smooth_by_block(config.type, workspace, fitting, losses, find)
    return smoothing.smooth_each(
        config.type,
        workspace,
        fitting,
        lambda group: [smoothing.channel_probe(group), _gram_probe(group)],
        lambda group, stats: found_by(workspace.graph, group, stats, config),
    )


def _gram_probe(group: SmoothGroup) -> Probe:
    return Probe(group.tensor, "gram", group.axis)


def found_by(graph: Graph, group: SmoothGroup, stats: Mapping[Probe, Stats], config: Awq) -> Found | None:
    """The scale of `awq_scale` with the exponent r of the smallest `weight_loss`.

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

    return Found(min((awq_scale(size, exponent) for exponent in config.tried), key=loss))


def by_block(graph: Graph, config: Awq, group: SmoothGroup, seen: ChannelStats, loss: BlockLoss) -> Floats:
    """The scale with the smallest `BlockLoss` of rounded weights, activations in float, exponents as in `found_by`.

    Source: MindSpore Golden Stick, AWQ (its grid of 20 exponents below 1, ``duo_scaling``).
    """
    size = smoothing.reduce_channels(group, seen.abs_sum / seen.count, np.mean)
    share = relative_weight([matrix(graph, layer) for layer in group.consumers]) if config.duo else None
    weight = None if share is None else smoothing.reduce_channels(group, share, np.mean)

    def scale(exponent: float) -> Floats:
        return awq_scale(size, exponent) if weight is None else duo_scale(size, weight, exponent)

    return min((scale(r) for r in config.tried), key=lambda s: loss.of(smoothing.expand(group, s)))


def duo_scale(size: Floats, weight: Floats, exponent: float) -> Floats:
    """s = max(a^r / (w^(1-r) + 1e-4), 1e-4), divided by sqrt(max(s) min(s)); 1 for channels dead in a or w; [scales].

    a: mean magnitude of the activation, w: `relative_weight`. Source: MindSpore Golden Stick, AWQ with ``duo_scaling``.
    """
    alive = (size > 0) & (weight > 0)
    scale = np.maximum(size**exponent / (weight ** (1 - exponent) + _LEAST), _LEAST)
    return np.where(alive, scale / np.sqrt(scale.max() * scale.min()), 1.0)


def relative_weight(weights: Sequence[NDArray[np.float32]]) -> Floats:
    """w_j = mean over outputs i of |W_ji| / (max_j |W_ji| + 1e-6), float64 [channels]; weights [channels, outputs]."""
    size = np.abs(np.concatenate(weights, axis=1)).astype(np.float64)
    return np.asarray((size / (size.max(axis=0) + 1e-6)).mean(axis=1))


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
