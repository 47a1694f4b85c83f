"""Kinds of smoothing groups (`onnxslim_ptq.graph.smooth_groups`)."""

from __future__ import annotations

from enum import Enum

__all__ = ["GroupKind"]


class GroupKind(str, Enum):
    """What absorbs the scale of a group."""

    NORM_LINEAR = "norm-linear"
    LINEAR_LINEAR = "linear-linear"
    OV = "ov"
    UP_DOWN = "up-down"
    CONV_CONV = "conv-conv"
    UNFUSED = "unfused"
