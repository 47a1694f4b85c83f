"""How far the layers of a smoothing group get from their float outputs, for a scale under test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.smooth_groups import SmoothGroup

__all__ = ["GroupError", "matrix", "round_columns"]

Floats = NDArray[np.float64]
Matrix = NDArray[np.float32]


def matrix(graph: Graph, layer: Linear) -> Matrix:
    """The weight of a MatMul or Gemm as float32 [inputs, outputs]; batches of a stacked MatMul lie side by side."""
    node = graph.node(layer.node)
    weight = np.asarray(graph.value(node.inputs[layer.weight]), np.float32)
    if layer.op == "Gemm":
        return weight.T if node.attrs.get("transB", 0) else weight
    return np.asarray(np.moveaxis(weight, -2, 0).reshape(weight.shape[-2], -1), np.float32)


def round_columns(weight: Matrix) -> Matrix:
    """int8 to nearest, one symmetric scale per output: s_i = max_j |W_ji| / 127; float32 [inputs, outputs]."""
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    scale[scale == 0] = 1
    rounded: Matrix = weight / scale
    np.rint(rounded, out=rounded)
    rounded *= scale
    return rounded


class GroupError:
    """RMS(Q(x') Q(W') + zW - xW) / RMS(xW) with x' = (x - z) / s, W' = diag(s) W, a group's consumers side by side.

    x: rows [R, channels] float32, W [channels, outputs]. Q(W') is `round_columns`; Q(x') has 255 steps between the
    extremes lo', hi' of all of x' (not of the rows alone), so nothing is clipped. Source of the measure: msModelSlim,
    flex smooth.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[Linear],
        rows: Matrix,
        lo: Floats,
        hi: Floats,
        most: int | None = None,
        centred: bool = False,
    ) -> None:
        """``most``: how many outputs, at regular distances, stand for all; ``centred``: the mean error of an output
        does not count, for a corrected bias takes it out."""
        self.rows = rows[np.isfinite(rows).all(axis=1)]
        weights = [matrix(graph, layer) for layer in layers]
        every = 1 if most is None else max(1, sum(w.shape[1] for w in weights) // most)
        self.weight = np.concatenate([w[:, ::every] for w in weights], axis=1)
        self.lo, self.hi, self.centred = lo, hi, centred
        self.exact = self.rows @ self.weight
        self.energy = max(float(np.sqrt(np.mean(self.exact.astype(np.float64) ** 2))), 1e-30)

    def of(self, scale: Floats, shift: Floats | None = None) -> float:
        """The error for ``scale`` and ``shift``, both [channels]."""
        middle = np.zeros(len(scale)) if shift is None else shift
        lo = min(float(((self.lo - middle) / scale).min()), 0.0)
        hi = max(float(((self.hi - middle) / scale).max()), 0.0)
        step = np.float32(max((hi - lo) / 255, 1e-30))
        zero = np.rint(lo / step)
        codes = (self.rows - middle.astype(np.float32)) / scale.astype(np.float32)
        codes /= step
        np.rint(codes, out=codes)
        np.clip(codes, zero, zero + 255, out=codes)
        codes *= step
        seen = codes @ round_columns(self.weight * scale.astype(np.float32)[:, None])
        if shift is not None:
            seen += middle.astype(np.float32) @ self.weight
        seen -= self.exact
        if self.centred:
            seen -= seen.mean(axis=0)
        return float(np.sqrt(np.mean(np.square(seen, dtype=np.float64)))) / self.energy


def takes_rows(group: SmoothGroup) -> bool:
    """Whether every consumer multiplies plain rows with a matrix, so that `GroupError` fits."""
    return group.axis == -1 and all(layer.op in ("MatMul", "Gemm") for layer in group.consumers)
