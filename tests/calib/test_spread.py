"""`SpreadStats` against its formulas."""

from __future__ import annotations

import numpy as np
import pytest

from calib.stats import SpreadStats
from calib.types import Array, Probe, SampleId

SAMPLE = SampleId(0, "a")


def scores(*arrays: Array, axis: int | None = -1) -> SpreadStats:
    stat = SpreadStats(Probe("t", "spread", axis))
    for x in arrays:
        stat.update(x, SAMPLE)
    return stat


def oracle(x: Array, axis: int) -> dict[str, float]:
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    x = x.astype(np.float64)
    middle = (x.max(axis=others, keepdims=True) + x.min(axis=others, keepdims=True)) / 2
    first, third = np.percentile(x, [25, 75])
    z = (x - x.mean()) / x.std()
    largest = np.abs(x).max()
    return {
        "std": largest / (x - middle).std(),
        "quantile": 2 * largest / 254 / (third - first),
        "kurtosis": (z**4).mean() - 3,
    }


@pytest.mark.parametrize(("shape", "axis"), [((5, 7, 12), -1), ((2, 6, 5, 5), 1)])
def test_formulas(shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(0).standard_t(4, shape).astype(np.float32) + np.arange(shape[axis]).reshape(
        [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
    )
    stat = scores(x, axis=axis)
    for kind, value in oracle(x, axis).items():
        assert stat.of(kind) == pytest.approx(value, rel=1e-6), kind


def test_the_largest_sample_counts_and_merging_is_exact() -> None:
    rng = np.random.default_rng(1)
    samples = [rng.standard_t(3, (40, 16)).astype(np.float32) for _ in range(4)]
    whole, left, right = scores(*samples), scores(*samples[:2]), scores(*samples[2:])
    left.merge(right)
    assert np.array_equal(whole.scores, left.scores)
    assert whole.of("std") == max(scores(x).of("std") for x in samples)
    again = SpreadStats.from_state(whole.state())
    assert np.array_equal(again.scores, whole.scores)


@pytest.mark.parametrize(("shape", "axis"), [((1000, 512), -1), ((2, 9, 160, 200), 1), ((3, 70000), -1)])
def test_of_large_tensors_only_the_quartiles_are_sampled(shape: tuple[int, ...], axis: int) -> None:
    """One value in a hundred thousand makes the kurtosis."""
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    x.reshape(-1)[::100_001] = 50.0
    stat, exact = scores(x, axis=axis), oracle(x, axis)
    assert stat.of("quantile") == pytest.approx(exact["quantile"], rel=0.05)
    assert stat.of("std") == pytest.approx(exact["std"], rel=1e-6)
    assert stat.of("kurtosis") == pytest.approx(exact["kurtosis"], rel=1e-6)


@pytest.mark.parametrize("x", [np.zeros((0, 4)), np.full((3, 4), 2.0), np.full((3, 4), np.nan)])
def test_nothing_to_say(x: Array) -> None:
    assert scores(x.astype(np.float32)).of("std") is None


def test_a_bad_channel_is_passed_over() -> None:
    x = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)
    x[0, 2] = np.inf
    assert scores(x).of("kurtosis") == pytest.approx(oracle(x[:, [0, 1, 3]], -1)["kurtosis"])


def test_wrong_merge() -> None:
    from calib.stats import MinMaxStats

    with pytest.raises(TypeError, match="MinMaxStats into SpreadStats"):
        SpreadStats().merge(MinMaxStats())
