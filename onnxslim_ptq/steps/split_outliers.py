"""Channels a hundred times larger than the others leave the integer product and are multiplied in float beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_ptq.core.config import number
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup
from onnxslim_ptq.graph.split_channels import divides, split_channels
from onnxslim_ptq.steps import smoothing
from onnxslim_ptq.steps.smoothing import FOLDED, GroupsConfig, Smoothed, kinds_field
from onnxslim_ptq.workspace import Workspace

__all__ = ["SplitOutliers", "outliers", "run"]

Floats = NDArray[np.float64]


class SplitOutliers(GroupsConfig):
    """``share``: of a value's channels that may leave; ``ratio``: how far the largest has to stand out."""

    type: Literal["split_outliers"]
    groups: tuple[GroupKind, ...] = kinds_field(*FOLDED, GroupKind.UNFUSED)
    share: Annotated[float, number(0, 0.5, open_lo=True)] = 0.03
    ratio: Annotated[float, number(2)] = 4.0


def run(workspace: Workspace, groups: Sequence[SmoothGroup], config: SplitOutliers) -> list[Smoothed]:
    """Split the `outliers` off every group whose layers are MatMul or Gemm.

    x W + b = (x · m) W + x_C W_C + b with m_j = 0 for j in C, else 1, and rows C of W zero in the first product: it
    is quantized, with a range that no channel of C widens; the second, of |C| channels, stays float. An explicit Mul
    by m, a Gather, a small MatMul and an Add per layer run with the model. Before a step that smooths: the Mul takes
    that step's scale. Source: T. Dettmers et al., *LLM.int8()*, NeurIPS 2022, section 3.2, here with channels that
    calibration finds once instead of the runtime.
    """
    fitting = [group for group in groups if all(divides(workspace.graph, c) for c in group.consumers)]
    stats = workspace.collect(smoothing.channel_probe(group) for group in fitting)
    done = []
    for group in fitting:
        seen = smoothing.channels(group, stats)
        if seen is None:
            continue
        chosen = outliers(seen.absmax, seen.mean_peak, config.share, config.ratio)
        if chosen:
            split_channels(workspace.graph, group.consumers, chosen)
            nodes = tuple(c.node for c in group.consumers)
            unscaled = np.ones(group.channels)
            done.append(Smoothed(config.type, group.kind.value, nodes, unscaled, channels=chosen))
    if done:
        workspace.changed()
    return done


def outliers(size: Floats, usual: Floats, share: float, ratio: float) -> tuple[int, ...]:
    """C = {j: A_j > 2 A' and P_j > 2 P'} when max A >= ratio · A'.

    size: A_j = max |x_j| over all samples, usual: P_j = mean over the samples of max |x_j| in each, float64 [channels];
    A' and P' are the largest that remain once max(1, share · channels) are gone. A channel that is loud in a few
    samples only is none of C: in other samples others are, and the range that is left would clip them. Empty when A'
    is 0.
    """
    many = max(1, int(share * size.size))
    if many >= size.size:
        return ()
    largest, mean = (float(np.sort(of)[::-1][many]) for of in (size, usual))
    if largest <= 0 or float(size.max()) < ratio * largest:
        return ()
    return tuple(int(j) for j in np.flatnonzero((size > 2 * largest) & (usual > 2 * mean)))
