"""Every way to choose a range: the rules all obey, and each against a plain numpy computation."""

from __future__ import annotations

import time
from dataclasses import FrozenInstanceError, dataclass
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.ranges import (
    RANGES,
    Ema,
    Entropy,
    Grid,
    Histogram,
    MeanMinMax,
    MinMax,
    Mixed,
    Mse,
    Percentile,
    RecallWindow,
    Sigma,
    per_channel,
)
from calib.stats import COLLECTORS, ChannelHistogramStats, ChannelStats, HistogramStats
from calib.types import Array, Probe, Range, SampleId, Stats

ASYMMETRIC, SYMMETRIC, COARSE = Grid(), Grid(254, symmetric=True), Grid(15)
GRIDS = [ASYMMETRIC, SYMMETRIC, COARSE]
WITHIN = [name for name in RANGES if name != "msmodelslim"]  # whose sigma rule goes beyond the extremes
BIN = 2.0**-7  # relative width of a histogram bin


def stats_of(*samples: Array) -> dict[str, Stats]:
    kinds = ("minmax", "histogram", "series", "positive")
    stats = {kind: COLLECTORS[kind](Probe("t", kind)) for kind in kinds}
    for index, x in enumerate(samples):
        for stat in stats.values():
            stat.update(x, SampleId(index))
    return stats


def ends(found: Range) -> tuple[float, float]:
    assert found.lo.dtype == found.hi.dtype == np.float64
    assert found.lo.shape == found.hi.shape == ()
    return float(found.lo), float(found.hi)


def error(x: Array, found: Range, grid: Grid) -> float:
    """Mean squared error of quantizing x for real."""
    lo, hi = ends(found)
    step = (hi - lo) / grid.levels or 1.0
    zero = np.rint(-lo / step)
    codes = np.clip(np.rint(x.astype(np.float64) / step) + zero, 0, grid.levels)
    return float(np.mean((x - (codes - zero) * step) ** 2))


def shapes() -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(50_000)
    data = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "heavy": generator.standard_t(3, 50_000),
        "shifted": generator.laplace(0.5, 1, 50_000),
        "uniform": generator.random(50_000),
        "silu": normal * 3 / (1 + np.exp(-3 * normal)),
        "above": generator.random(5_000) + 5,
        "negative": -generator.random(5_000),
        "outlier": np.append(normal * 0.01, 50),
        "constant": np.full(100, 3.7),
        "zeros": np.zeros(100),
        "tiny": normal * 1e-30,
        "huge": normal * 1e37,
        "binary": (normal > 1).astype(float),
        "relu6": np.clip(normal * 5, 0, 6),
        "one": np.array([-2.5]),
    }
    return {name: x.astype(np.float32) for name, x in data.items()}


SHAPES = shapes()


@pytest.mark.parametrize("method", WITHIN)
@pytest.mark.parametrize("grid", GRIDS, ids=["asymmetric", "symmetric", "coarse"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_range_obeys_the_rules(method: str, grid: Grid, name: str) -> None:
    x = SHAPES[name]
    lo, hi = ends(RANGES[method]().range_of(stats_of(x), grid))
    assert -np.inf < lo <= 0 <= hi < np.inf
    assert not np.signbit(lo) or lo < 0
    extreme = float(np.abs(x).max())
    if grid.symmetric:
        assert lo == -hi
        assert hi <= extreme
    else:
        assert min(float(x.min()), 0) <= lo
        assert hi <= max(float(x.max()), 0)
        assert lo == 0 or x.min() < 0
        assert hi == 0 or x.max() > 0
    if len(np.unique(x)) == 1:
        assert max(-lo, hi) == extreme


@pytest.mark.parametrize("method", WITHIN)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.sampled_from(GRIDS),
)
def test_no_small_tensor_breaks_a_range(method: str, values: list[float], grid: Grid) -> None:
    x = np.array(values, np.float32)
    lo, hi = ends(RANGES[method]().range_of(stats_of(x), grid))
    assert lo <= 0 <= hi
    assert max(-lo, hi) <= float(np.abs(x).max())


@pytest.mark.parametrize("method", RANGES)
def test_missing_or_empty_statistics_are_named(method: str) -> None:
    with pytest.raises(CalibrationError, match=f"{RANGES[method].kinds[0]}'; gathered: none"):
        RANGES[method]().range_of({}, ASYMMETRIC)
    with pytest.raises(CalibrationError, match="no finite value"):
        RANGES[method]().range_of(stats_of(np.full(3, np.nan, np.float32)), ASYMMETRIC)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Ema, {"momentum": 1.5}),
        (Entropy, {"bins": 8}),
        (Histogram, {"step": 0.5}),
        (Mixed, {"threshold": 0}),
        (Percentile, {"percentile": 101}),
        (Percentile, {"percentile": float("nan")}),
        (RecallWindow, {"ratio": 0.1}),
        (Sigma, {"factor": True}),
        (Grid, {"levels": 0}),
        (Grid, {"levels": 255, "symmetric": True}),
    ],
)
def test_bad_options_are_named(method: type, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        method(**options)


def test_methods_are_values() -> None:
    assert Percentile(99.0) == Percentile(99.0)
    assert hash(Mse()) == hash(Mse())
    with pytest.raises(FrozenInstanceError):
        Percentile().percentile = 1.0  # type: ignore[misc]


def test_minmax() -> None:
    x = np.array([[-1.5, 2, 0.25]], np.float16)
    stats = stats_of(x, x * 2)
    assert ends(MinMax().range_of(stats, ASYMMETRIC)) == (-3, 4)
    assert ends(MinMax().range_of({"histogram": stats["histogram"]}, SYMMETRIC)) == (-4, 4)


def test_minmax_per_channel() -> None:
    channel = ChannelStats(Probe("t", "channel", axis=1))
    channel.update(np.array([[-1, 2, np.nan], [-3, 1, np.nan]], np.float32), SampleId(0))
    found = MinMax().range_of({"channel": channel}, ASYMMETRIC)
    assert (found.lo.tolist(), found.hi.tolist()) == ([-3, 0, 0], [0, 2, 0])
    found = MinMax().range_of({"channel": channel}, SYMMETRIC)
    assert (found.lo.tolist(), found.hi.tolist()) == ([-3, -2, 0], [3, 2, 0])
    with pytest.raises(CalibrationError, match="no finite value"):
        MinMax().range_of({"channel": ChannelStats()}, ASYMMETRIC)


def test_any_method_per_channel() -> None:
    stats = ChannelHistogramStats(Probe("t", "channel_histogram", axis=0))
    x = np.stack([SHAPES["normal"][:1000], np.full(1000, np.nan, np.float32)])
    stats.update(x, SampleId(0))
    found = per_channel(RecallWindow(1), stats.channels, SYMMETRIC)
    extreme = float(np.abs(x[0]).max())
    assert (found.lo.tolist(), found.hi.tolist()) == ([-extreme, 0], [extreme, 0])


@pytest.mark.parametrize("name", ["normal", "relu", "heavy", "shifted", "silu", "negative"])
@pytest.mark.parametrize("percentile", [99.99, 99.0, 90.0])
def test_percentile(name: str, percentile: float) -> None:
    x, cut = SHAPES[name], (100 - percentile) / 2
    lo, hi = ends(Percentile(percentile).range_of(stats_of(x), ASYMMETRIC))
    low, high = np.percentile(x, [cut, 100 - cut], method="inverted_cdf")
    assert lo == pytest.approx(min(low, 0), rel=BIN, abs=1e-3)
    assert hi == pytest.approx(max(high, 0), rel=BIN, abs=1e-3)
    _, hi = ends(Percentile(percentile).range_of(stats_of(x), SYMMETRIC))
    assert hi == pytest.approx(np.percentile(np.abs(x), percentile, method="inverted_cdf"), rel=BIN)


def test_percentile_100_is_minmax() -> None:
    stats = stats_of(SHAPES["heavy"])
    assert Percentile(100).range_of(stats, SYMMETRIC) == MinMax().range_of(stats, SYMMETRIC)


@pytest.mark.parametrize(
    "name", ["normal", "relu", "heavy", "shifted", "silu", "uniform", "outlier", "binary", "relu6"]
)
@pytest.mark.parametrize("grid", GRIDS, ids=["asymmetric", "symmetric", "coarse"])
def test_mse_and_histogram_come_near_the_best_error(name: str, grid: Grid) -> None:
    x, stats = SHAPES[name], stats_of(SHAPES[name])
    whole_lo, whole_hi = ends(MinMax().range_of(stats, grid))
    shares = np.geomspace(0.05, 1, 25)
    pairs = [(s, s) for s in shares] if grid.symmetric else list(product(shares, shares))
    best = min(error(x, Range(np.array(whole_lo * a), np.array(whole_hi * b)), grid) for a, b in pairs)
    scale = float(np.square(x).mean()) * 1e-6
    assert error(x, Mse().range_of(stats, grid), grid) <= best * 1.05 + scale
    assert error(x, Histogram().range_of(stats, grid), grid) <= best * 1.25 + scale


def test_mse_clips_each_end_by_itself() -> None:
    x = np.append(SHAPES["uniform"], -5).astype(np.float32)  # one lonely value on the left
    lo, hi = ends(Mse().range_of(stats_of(x), COARSE))
    assert lo > -1
    assert hi > 0.9


def test_mse_is_fast() -> None:
    stats = stats_of(SHAPES["heavy"])
    taken = []
    for _ in range(5):
        start = time.process_time()
        Mse().range_of(stats, ASYMMETRIC)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.02  # about 2 ms on an idle core


@dataclass
class Kl:
    """The divergence of `Entropy`, written down plainly."""

    counts: NDArray[np.float64]
    codes: int

    def at(self, kept: int) -> float:
        p = self.counts[:kept].copy()
        p[-1] += self.counts[kept:].sum()
        q = np.zeros(kept)
        bounds = [kept * g // self.codes for g in range(self.codes + 1)]
        for a, b in pairwise(bounds):
            filled = p[a:b] > 0
            if filled.any():
                q[a:b][filled] = self.counts[a:b].sum() / filled.sum()
        p, q = p / p.sum(), q / q.sum()
        if (q[p > 0] == 0).any():
            return np.inf
        return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@pytest.mark.parametrize("name", ["normal", "heavy", "outlier", "relu", "silu"])
@pytest.mark.parametrize("grid", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_entropy_finds_the_smallest_divergence(name: str, grid: Grid) -> None:
    x, bins = SHAPES[name], 512
    stats = stats_of(x)
    histogram = stats["histogram"]
    assert isinstance(histogram, HistogramStats)
    size = histogram.magnitudes()
    counts = np.diff(size.rank(np.linspace(0, size.hi, bins + 1)))
    lo, hi = min(float(x.min()), 0), max(float(x.max()), 0)
    codes = 128 if grid.symmetric else round(255 * size.hi / (hi - lo)) + 1
    kl = Kl(counts, codes)
    divergences = [kl.at(kept) for kept in range(codes, bins + 1)]
    low, high = ends(Entropy(bins).range_of(stats, grid))
    kept = round(max(-low, high) / size.hi * bins)
    assert kl.at(kept) == pytest.approx(min(divergences), rel=1e-9, abs=1e-12)


def test_entropy_clips_a_heavy_tail_and_keeps_a_uniform_one() -> None:
    _, hi = ends(Entropy().range_of(stats_of(SHAPES["heavy"]), SYMMETRIC))
    assert hi < 0.8 * np.abs(SHAPES["heavy"]).max()
    _, hi = ends(Entropy().range_of(stats_of(SHAPES["uniform"]), ASYMMETRIC))
    assert hi == pytest.approx(1, abs=0.02)


def test_mixed_keeps_far_outliers() -> None:
    near, far = stats_of(SHAPES["normal"]), stats_of(SHAPES["outlier"])
    assert Mixed().range_of(near, ASYMMETRIC) == Histogram().range_of(near, ASYMMETRIC)
    assert Mixed().range_of(far, ASYMMETRIC) == MinMax().range_of(far, ASYMMETRIC)
    assert Mixed(1e6).range_of(far, SYMMETRIC) == Histogram().range_of(far, SYMMETRIC)


def test_mean_minmax_and_ema() -> None:
    samples = [np.array([-a, b], np.float32) for a, b in ((1, 2), (3, 4), (0.5, 9))]
    stats = stats_of(*samples)
    assert ends(MeanMinMax().range_of(stats, ASYMMETRIC)) == (-1.5, 5)
    lo, hi = -1.0, 2.0
    for low, high in ((-3, 4), (-0.5, 9)):
        lo, hi = 0.95 * lo + 0.05 * low, 0.95 * hi + 0.05 * high
    assert ends(Ema().range_of(stats, ASYMMETRIC)) == pytest.approx((lo, hi))
    assert ends(Ema(0).range_of(stats, SYMMETRIC)) == (-9, 9)


@pytest.mark.parametrize("ratio", [1.0, 0.9999, 0.99, 0.8])
@pytest.mark.parametrize("name", ["normal", "heavy", "shifted", "relu", "silu"])
def test_recall_window(name: str, ratio: float) -> None:
    x = np.sort(SHAPES[name])
    holds = int(ratio * len(x))
    widths = x[holds - 1 :] - x[: len(x) - holds + 1]
    lo, hi = ends(RecallWindow(ratio).range_of(stats_of(x), ASYMMETRIC))
    inside = np.count_nonzero((lo <= x) & (x <= hi))
    assert inside >= holds - 0.02 * len(x) * (ratio < 1)
    assert hi - lo <= max(float(widths.min()), 0) + (BIN * 2 * np.abs(x).max()) + max(float(x[0]), 0)
    if ratio == 1:
        assert (lo, hi) == (min(float(x[0]), 0), float(x[-1]))


def test_sigma() -> None:
    x = SHAPES["shifted"].astype(np.float64)
    lo, hi = ends(Sigma(2).range_of(stats_of(*np.split(SHAPES["shifted"], 5)), ASYMMETRIC))
    assert lo == pytest.approx(x.mean() - 2 * x.std())
    assert hi == pytest.approx(x.mean() + 2 * x.std())
    assert ends(Sigma(1000).range_of(stats_of(SHAPES["shifted"]), ASYMMETRIC)) == (x.min(), x.max())


@pytest.mark.parametrize("method", WITHIN)
def test_the_order_of_samples_never_matters(method: str) -> None:
    pieces = np.split(SHAPES["heavy"], 10)
    forward = stats_of(*pieces)
    backward = {kind: COLLECTORS[kind](Probe("t", kind)) for kind in forward}
    for index in reversed(range(10)):
        for stat in backward.values():
            stat.update(pieces[index], SampleId(index))
    for grid in GRIDS:
        assert RANGES[method]().range_of(forward, grid) == RANGES[method]().range_of(backward, grid)
