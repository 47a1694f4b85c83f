"""The range `easy_quant` against a plain search over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.ranges import EasyQuant, Grid, MinMax, Mse
from calib.stats import HistogramStats
from calib.types import SampleId


def histogram(x: np.ndarray) -> HistogramStats:
    stats = HistogramStats()
    stats.update(x.astype(np.float32), SampleId(0))
    return stats


def error(x: np.ndarray, ratio: float, levels: int) -> float:
    lo, hi = x.min() * ratio, x.max() * ratio
    scale = (hi - lo) / levels
    zero = np.rint(-lo / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, levels)
    return float(np.mean((x - (codes - zero) * scale) ** 2))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_a_thousand_factors(seed: int) -> None:
    """Found on the histogram, the factor is as good as the best found on the values, but for the bins' width."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(20_000) * np.where(rng.random(20_000) < 0.001, 3, 1) + rng.uniform(-1, 1)
    found = EasyQuant().range_of({"histogram": histogram(x)}, Grid(15))
    ratio = float(found.hi) / x.max()
    assert float(found.lo) / x.min() == pytest.approx(ratio, rel=1e-3), "both ends share the factor"
    assert 0.75 - 1e-6 <= ratio <= 1.25
    errors = [error(x, 0.75 + 0.0005 * k, 15) for k in range(0, 1000, 5)]
    assert error(x, ratio, 15) <= 1.02 * min(errors)


def test_uniform_values_keep_their_range() -> None:
    x = np.linspace(-1, 2, 10_001)
    found = EasyQuant().range_of({"histogram": histogram(x)}, Grid(255))
    assert float(found.hi) == pytest.approx(2, rel=0.01)


def test_a_symmetric_grid() -> None:
    found = EasyQuant().range_of({"histogram": histogram(np.linspace(-1, 2, 999))}, Grid(254, True))
    assert float(found.lo) == -float(found.hi)


def test_a_constant() -> None:
    stats = {"histogram": histogram(np.full(9, 3.0))}
    assert float(EasyQuant().range_of(stats, Grid()).hi) == float(MinMax().range_of(stats, Grid()).hi)


def test_never_better_than_the_free_search() -> None:
    x = np.random.default_rng(1).exponential(1, 5000)
    ranges = [method.range_of({"histogram": histogram(x)}, Grid(15)) for method in (Mse(), EasyQuant())]
    free, tied = (error(x, float(r.hi) / x.max(), 15) for r in ranges)
    assert free <= tied * 1.02


def test_nothing_seen() -> None:
    with pytest.raises(CalibrationError):
        EasyQuant().range_of({"histogram": HistogramStats()}, Grid())


@pytest.mark.parametrize(
    "options", [{"factors": 0}, {"lowest": 0.0}, {"lowest": 1.5}, {"step": 0.0}, {"step": 1.0}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EasyQuant(**options)  # type: ignore[arg-type]
