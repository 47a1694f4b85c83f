"""Turns statistics of placed tensors into ranges, by the recipe's method or by every candidate of ``auto``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.ranges import Grid, Histogram, MinMax
from calib.ranges.grid import range_from
from calib.stats import HistogramStats
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.qmath import params_from_range
from onnxslim_ptq.core.spec import QuantSpec
from onnxslim_ptq.graph.elementwise import follow
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.steps.placement import PlacedTensor

__all__ = [
    "after_ranges",
    "candidates",
    "fixed_range",
    "grid_of",
    "range_probe",
    "range_probes",
    "require_values",
]

Floats = NDArray[np.float64]
_SHRINK = 0.9
_STEPS = 40  # 0.9^39: down to 1.6 % of the extreme
_TABLE = 1024
_BINS = 512
_COUNTED = 8192.0  # elements of one tensor of one sample that a histogram counts


def grid_of(spec: QuantSpec) -> Grid:
    return Grid(spec.dtype.highest - spec.dtype.lowest - int(spec.symmetric), spec.symmetric)


def range_probes(placed: PlacedTensor) -> list[Probe]:
    """The statistics a tensor's range needs."""
    method = placed.choice.range
    kinds: tuple[str, ...] = ("histogram",) if isinstance(method, str) else method.kinds
    # Whatever the method, NaN and Inf are counted and named; a histogram's extent or minmax does that.
    watch = () if "histogram" in kinds or "minmax" in kinds else ("minmax",)
    if getattr(method, "needs_tails", False):  # a rare value that is not counted looks like an empty tail
        return [Probe(placed.tensor, kind) for kind in (*kinds, *watch)]
    return [range_probe(placed.tensor, kind) for kind in (*kinds, *watch)]


def range_probe(tensor: str, kind: str) -> Probe:
    """A histogram looks at a bounded number of elements per sample: extremes stay exact, the shape is known well
    enough, and a sweep costs little more than the forward passes."""
    return Probe(tensor, kind, None, (("most", _COUNTED),) if kind == "histogram" else ())


def fixed_range(placed: PlacedTensor, stats: Mapping[Probe, Stats]) -> Range:
    """The range by the recipe's method; CalibrationError naming the tensor when nothing finite was seen."""
    assert not isinstance(placed.choice.range, str)
    try:
        return placed.choice.range.range_of(
            {p.kind: stats[p] for p in range_probes(placed)}, grid_of(placed.spec)
        )
    except CalibrationError as error:
        cure = "give samples that reach it, or exclude its layers"
        raise CalibrationError(f"tensor '{placed.tensor}': {error}; {cure}") from None


def candidates(placed: PlacedTensor, histogram: HistogramStats) -> dict[str, Range]:
    """Named ranges for a tensor under ``auto``: smallest squared error on the `Histogram` path, and its extremes."""
    grid = grid_of(placed.spec)
    require_values(placed, histogram)
    stats: dict[str, Stats] = {"histogram": histogram}
    return {
        "histogram": Histogram().range_of(stats, grid),
        "minmax": MinMax().range_of(stats, grid),
    }


def require_values(placed: PlacedTensor, histogram: HistogramStats) -> None:
    if histogram.extent.count == 0:
        raise CalibrationError(
            f"tensor '{placed.tensor}': no finite value was seen; give samples that reach it, "
            "or exclude its layers"
        )


def after_ranges(
    graph: Graph,
    tensors: Mapping[str, PlacedTensor],
    histograms: Mapping[str, HistogramStats],
    clip_weight: float,
) -> dict[str, Range]:
    """For each tensor the range with the smallest Σ n (f(q(x)) - f(x))² over the functions f the graph reads of it.

    Values that are clipped count ``clip_weight``-fold: clipping shifts many values the same way, rounding errors
    cancel in the sums that follow.
    """
    coarse = {key: _coarse(histograms[key]) for key in tensors}
    points = {
        key: np.unique(np.concatenate([coarse[key][0], np.linspace(*_ends(histograms[key]), _TABLE)]))
        for key in tensors
    }
    tables = follow(graph, {tensors[key].tensor: points[key] for key in tensors})
    found = {}
    for key, placed in tensors.items():
        ends = _ends(histograms[key])
        found[key] = _smallest(
            coarse[key], points[key], tables[placed.tensor], ends, placed.spec, clip_weight
        )
    return found


def _ends(histogram: HistogramStats) -> tuple[float, float]:
    return min(histogram.lo, 0.0), max(histogram.hi, 0.0)


def _coarse(histogram: HistogramStats) -> tuple[Floats, Floats]:
    """At most ``_BINS`` values with counts: neighbouring histogram bins joined at their mean."""
    values, counts = histogram.values_and_counts()
    edges = np.linspace(values[0], values[-1], _BINS + 1)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
    total = np.bincount(place, counts, _BINS)
    mean = np.bincount(place, counts * values, _BINS) / np.maximum(total, 1)
    return mean[total > 0], total[total > 0].astype(np.float64)


def _smallest(
    coarse: tuple[Floats, Floats],
    points: Floats,
    tables: list[Floats],
    ends: tuple[float, float],
    spec: QuantSpec,
    clip_weight: float,
) -> Range:
    values, counts = coarse
    exact = [np.interp(values, points, t) for t in tables]
    grid = grid_of(spec)

    def costs(lo: Floats, hi: Floats) -> Floats:
        params = params_from_range(range_from(lo, hi, grid), spec)
        scale, zero = params.scale[:, None], params.zero_point[:, None]
        codes = np.rint(values / scale) + zero
        kept = np.clip(codes, spec.dtype.lowest, spec.dtype.highest)
        weight = np.where(codes == kept, counts, counts * clip_weight)
        seen = (kept - zero) * scale
        return np.asarray(
            sum(
                (weight * (np.interp(seen, points, t) - y) ** 2).sum(axis=1)
                for t, y in zip(tables, exact, strict=True)
            )
        )

    lo, hi = ends
    ladder = np.asarray(_SHRINK ** np.arange(_STEPS), np.float64)
    for _ in range(2):
        if ends[1] > 0:
            hi = float(ends[1] * ladder[np.argmin(costs(np.full(_STEPS, lo), ends[1] * ladder))])
        if ends[0] < 0:
            lo = float(ends[0] * ladder[np.argmin(costs(ends[0] * ladder, np.full(_STEPS, hi)))])
    return range_from(lo, hi, grid)
