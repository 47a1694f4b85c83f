"""Turns statistics of placed tensors into ranges, by the recipe's method or by every candidate of ``auto``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.ranges import Grid, MinMax, Mse
from calib.ranges.grid import range_from
from calib.stats import HistogramStats
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.qmath import params_from_range
from onnxslim_ptq.core.spec import QuantSpec
from onnxslim_ptq.graph.elementwise import Aftermath
from onnxslim_ptq.steps.placement import PlacedTensor

__all__ = ["candidates", "fixed_range", "grid_of", "range_probes"]

Floats = NDArray[np.float64]
_SHRINK = 0.9
_STEPS = 40  # 0.9^39: down to 1.6 % of the extreme
_TABLE = 2048


def grid_of(spec: QuantSpec) -> Grid:
    return Grid(spec.dtype.highest - spec.dtype.lowest - int(spec.symmetric), spec.symmetric)


def range_probes(placed: PlacedTensor) -> list[Probe]:
    """The statistics a tensor's range needs."""
    method = placed.choice.range
    kinds: tuple[str, ...] = ("histogram",) if isinstance(method, str) else method.kinds
    # Whatever the method, NaN and Inf are counted and named; a histogram's extent or minmax does that.
    watch = () if any(k in ("histogram", "minmax", "series", "channel") for k in kinds) else ("minmax",)
    return [Probe(placed.tensor, kind) for kind in (*kinds, *watch)]


def fixed_range(placed: PlacedTensor, stats: Mapping[Probe, Stats]) -> Range:
    """The range by the recipe's method; CalibrationError naming the tensor when nothing finite was seen."""
    assert not isinstance(placed.choice.range, str)
    try:
        return placed.choice.range.range_of({p.kind: stats[p] for p in range_probes(placed)}, grid_of(placed.spec))
    except CalibrationError as error:
        raise CalibrationError(f"tensor '{placed.tensor}': {error}; give samples that reach it, or exclude its layers") from None


def candidates(placed: PlacedTensor, histogram: HistogramStats, after: Aftermath) -> dict[str, Range]:
    """Named ranges for a tensor under ``auto``: its extremes, its own smallest squared error, and the smallest squared
    error of what becomes of it (``after``; ``after16`` counts clipping errors sixteenfold, because clipping shifts
    many values the same way while rounding errors cancel)."""
    grid = grid_of(placed.spec)
    if histogram.extent.count == 0:
        raise CalibrationError(f"tensor '{placed.tensor}': no finite value was seen; give samples that reach it, "
                               "or exclude its layers")
    stats: dict[str, Stats] = {"histogram": histogram}
    full = MinMax().range_of(stats, grid)
    found = {"minmax": full, "mse": Mse().range_of(stats, grid)}
    values, counts = histogram.values_and_counts()
    if placed.at_result and not placed.readers:
        for name, weight in (("after", 1.0), ("after16", 16.0)):
            found[name] = after_range(values, counts, after, full, placed.spec, weight)
    return found


def after_range(values: Floats, counts: NDArray[np.int64], after: Aftermath, full: Range, spec: QuantSpec,
                clip_weight: float) -> Range:
    """The range inside ``full`` with the smallest Σ n (f(q(x)) - f(x))² over the functions f of ``after``."""
    points = np.unique(np.concatenate([values, np.linspace(float(full.lo), float(full.hi), _TABLE)]))
    tables = after.apply(points)
    exact = [np.interp(values, points, t) for t in tables]

    def cost(lo: float, hi: float) -> float:
        rng = range_from(lo, hi, grid_of(spec))
        params = params_from_range(rng, spec)
        scale, zero = float(params.scale), float(params.zero_point)
        codes = np.rint(values / scale) + zero
        kept = np.clip(codes, spec.dtype.lowest, spec.dtype.highest)
        weight = np.where(codes == kept, counts, counts * clip_weight)
        seen = (kept - zero) * scale
        return sum(float((weight * (np.interp(seen, points, t) - y) ** 2).sum()) for t, y in zip(tables, exact, strict=True))

    lo, hi = float(full.lo), float(full.hi)
    ladder = _SHRINK ** np.arange(_STEPS)
    for _ in range(2):
        hi = min((float(full.hi) * ladder).tolist(), key=lambda h: cost(lo, h)) if full.hi > 0 else hi
        lo = min((float(full.lo) * ladder).tolist(), key=lambda x: cost(x, hi)) if full.lo < 0 else lo
    return range_from(lo, hi, grid_of(spec))


