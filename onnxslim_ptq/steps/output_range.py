"""Ranges that know the weights: the smallest error of the outputs of the layers that read a tensor.

error(lo, hi) = sum over readers of |W (q(x) - x)|² / |W x|², over a bounded reservoir of rows x.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.ranges import MinMax, Mse
from calib.ranges.grid import range_from
from calib.stats import HistogramStats, RowStats
from calib.stats.patch import Patch
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.qmath import fake_quantize, params_from_range
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.matrix import conv_patch
from onnxslim_ptq.steps.placement import PlacedTensor
from onnxslim_ptq.steps.ranges import after_ranges, grid_of, range_probe, require_values

__all__ = ["output_probes", "output_range"]

Rows = NDArray[np.float32]
_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def output_probes(placed: PlacedTensor, graph: Graph) -> list[Probe]:
    """A reservoir of rows per reader (readers with the same window share it)."""
    return [_row_probe(placed, graph, layer) for layer in placed.readers if _rows_fit(graph, layer)]


def _rows_fit(graph: Graph, layer: Linear) -> bool:
    if layer.op == "Conv":
        return True
    return layer.op in ("MatMul", "Gemm") and not graph.node(layer.node).attrs.get("transA", 0)


def _row_probe(placed: PlacedTensor, graph: Graph, layer: Linear) -> Probe:
    node, patch = graph.node(layer.node), Patch()
    if layer.op == "Conv":
        weight = graph.value(node.inputs[layer.weight])
        assert weight is not None, f"layer {layer.node} lost its weight"
        patch = conv_patch(node, weight.shape[2:])
    return Probe(placed.tensor, "rows", None, patch.options())


def output_range(graph: Graph, placed: PlacedTensor, stats: Mapping[Probe, Stats]) -> Range:
    """The range with the smallest output error among shrunken extremes and the tensor's own best.

    A tensor without readers (quantized for its producer) is judged by what its activation function makes of it.
    """
    histogram = stats[range_probe(placed.tensor, "histogram")]
    assert isinstance(histogram, HistogramStats)
    require_values(placed, histogram)
    grid = grid_of(placed.spec)
    full = MinMax().range_of({"histogram": histogram}, grid)
    readers = [r for r in placed.readers if _rows_fit(graph, r)]
    if not readers:
        return after_ranges(graph, {"it": placed}, {"it": histogram}, 1.0)["it"]
    terms = []
    for layer in readers:
        rows = stats[_row_probe(placed, graph, layer)]
        assert isinstance(rows, RowStats)
        finite = rows.rows[np.isfinite(rows.rows).all(axis=1)]
        if len(finite):
            terms.append(_Term(graph, layer, finite))

    def cost(rng: Range) -> float:
        params = params_from_range(rng, placed.spec)
        return sum(t.error(fake_quantize(t.rows, params) - t.rows) for t in terms)

    own = Mse().range_of({"histogram": histogram}, grid)
    best = min((full, own), key=cost)
    for _ in range(2):
        best = min([best, *(range_from(best.lo, full.hi * f, grid) for f in _FACTORS)], key=cost)
        best = min([best, *(range_from(full.lo * f, best.hi, grid) for f in _FACTORS)], key=cost)
    return best


class _Term:
    """One reader: its rows [R, K] and its weight as [groups, K/groups, outputs/groups]."""

    def __init__(self, graph: Graph, layer: Linear, rows: Rows) -> None:
        node = graph.node(layer.node)
        weight = np.asarray(graph.value(node.inputs[layer.weight]), np.float32)
        if layer.op == "Conv":
            group = int(node.attrs.get("group", 1))
            self.weight = weight.reshape(group, weight.shape[0] // group, -1).transpose(0, 2, 1)
        elif layer.op == "Gemm" and node.attrs.get("transB", 0):
            self.weight = weight.T[None]
        else:  # batched MatMul weights [.., K, N]: every batch is a group that sees the same rows
            self.weight = weight.reshape(-1, *weight.shape[-2:])
        self.shared = layer.op != "Conv" and len(self.weight) > 1
        self.rows = rows
        self.energy = max(self._squares(rows), 1e-30)

    def error(self, change: Rows) -> float:
        return self._squares(change) / self.energy

    def _squares(self, x: Rows) -> float:
        if self.shared:
            grouped = np.broadcast_to(x, (len(self.weight), *x.shape))
        else:
            grouped = x.reshape(len(x), len(self.weight), -1).transpose(1, 0, 2)
        return float((np.matmul(grouped, self.weight).astype(np.float64) ** 2).sum())
