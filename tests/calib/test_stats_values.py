"""The numbers each statistic holds, against numpy."""

from __future__ import annotations

from math import fsum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import CalibrationError
from calib.stats import (
    ChannelHistogramStats,
    ChannelStats,
    GramStats,
    HistogramStats,
    MinMaxStats,
    SeriesStats,
)
from calib.stats.exact_sum import ExactSum
from calib.types import Array, Probe, SampleId


def histogram_of(*arrays: Array, **options: float) -> HistogramStats:
    stats = HistogramStats(Probe("t", "histogram", options=tuple(options.items())))
    for index, x in enumerate(arrays):
        stats.update(x, SampleId(index))
    return stats


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "u1", "i4", "i8", "?"])
def test_minmax(dtype: str) -> None:
    x = (
        (np.random.default_rng(1).standard_normal((3, 50)) * 20)
        .clip(0 if dtype == "u1" else -99, 99)
        .astype(dtype)
    )
    stats = MinMaxStats()
    stats.update(x, SampleId(0))
    assert (stats.lo, stats.hi, stats.count) == (float(x.min()), float(x.max()), 150)
    assert (stats.nan, stats.inf, stats.first_bad) == (0, 0, None)


def test_minmax_of_nothing_but_nan() -> None:
    stats = MinMaxStats()
    stats.update(np.full(4, np.nan, np.float16), SampleId(2, "x"))
    assert (stats.lo, stats.hi, stats.count, stats.nan) == (np.inf, -np.inf, 0, 4)
    assert stats.first_bad == (2, "x")


@pytest.mark.parametrize("size", [1, 100, 5000, 300_000])
def test_histogram_counts_by_the_upper_half_of_a_float32(size: int) -> None:
    generator = np.random.default_rng(size)
    x = (generator.standard_normal(size) * 10.0 ** generator.uniform(-30, 30, size)).astype(np.float32)
    expected = np.bincount(x.view(np.uint32) >> 16, minlength=65536)
    stats = histogram_of(x)
    np.testing.assert_array_equal(stats.counts, expected)
    assert (stats.lo, stats.hi, stats.extent.count) == (float(x.min()), float(x.max()), size)


def test_histogram_values_are_sorted_centres_within_the_extremes() -> None:
    x = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    values, counts = histogram_of(x).values_and_counts()
    assert values.dtype == np.float64
    assert (np.diff(values) > 0).all()
    assert (counts > 0).all()
    assert counts.sum() == len(x)
    assert x.min() <= values[0]
    assert values[-1] <= x.max()
    # Each value is represented within half a bin: 2^-8 of itself.
    spread = np.repeat(values, counts)
    assert (np.abs(spread - np.sort(x)) <= np.abs(np.sort(x)) * 2.0**-7 + 1e-30).all()


def test_histogram_edges_hold_their_values() -> None:
    x = np.concatenate(
        [np.random.default_rng(0).standard_normal(5000), [0.0, -0.0, 3.4e38, -3.4e38, 1e-45, 2.0, -2.0]]
    )
    bins = histogram_of(x.astype(np.float32)).bins()
    for value in np.unique(x.astype(np.float32)).astype(np.float64):
        tiny = 2.0**-133  # deeper denormals live in the bin of zero
        assert ((bins.left <= value + tiny) & (value - tiny <= bins.right)).any(), value
    assert (bins.right[:-1] <= bins.left[1:] + 1e-300).all()


def test_histogram_of_a_constant_is_exact() -> None:
    for constant in (3.7, -0.1, 0.0, 1e-42, 3.4e38):
        bins = histogram_of(np.full(10, constant, np.float32)).bins()
        value = float(np.float32(constant))
        assert bins.values.tolist() == pytest.approx([value], abs=2.0**-133)
        assert bins.std == pytest.approx(0.0)


def test_histogram_moments_and_quantiles() -> None:
    x = (np.random.default_rng(0).standard_normal(200_000) * 3 + 1).astype(np.float32)
    stats = histogram_of(x)
    bins = stats.bins()
    assert bins.mean == pytest.approx(float(x.mean()), abs=1e-3)
    assert bins.std == pytest.approx(float(x.std()), rel=1e-3)
    points = np.array([0.0, 1e-4, 0.1, 0.5, 0.9, 0.9999, 1.0])
    np.testing.assert_allclose(bins.quantile(points), np.quantile(x, points), rtol=2**-7, atol=1e-2)
    np.testing.assert_allclose(bins.rank(bins.quantile(points)) / bins.total, points, atol=1e-9)
    size = stats.magnitudes()
    assert (size.lo, size.hi) == (0.0, float(np.abs(x).max()))
    np.testing.assert_allclose(size.quantile(points[1:]), np.quantile(np.abs(x), points[1:]), rtol=2**-6)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_histogram_keeps_nan_and_inf_out(dtype: str) -> None:
    x = np.array([1, np.nan, -2, np.inf, -np.inf, 3], dtype)
    # A NaN whose payload sits in the lower half shares the upper half with Inf.
    sly = np.array([0x7F800001], np.uint32).view(np.float32)
    stats = histogram_of(x, sly, np.ones(2, np.float32))
    assert (stats.extent.nan, stats.extent.inf, stats.extent.count, stats.counts.sum()) == (2, 2, 5, 5)
    assert (stats.lo, stats.hi, stats.extent.first_bad) == (-2, 3, (0, ""))


def test_histogram_of_float64_beyond_float32() -> None:
    stats = histogram_of(np.array([1e300, -1e300, 1.0]))
    assert (stats.lo, stats.hi, stats.counts.sum()) == (-1e300, 1e300, 3)
    assert stats.bins().total == 3


def test_every_kth_element_sees_all_channels_and_exact_extremes() -> None:
    x = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    x[:, 3] += 100
    x[0, 1] = -77
    stats = histogram_of(x, every=8)
    assert (stats.lo, stats.hi) == (-77, float(x.max()))
    share = stats.counts[np.float32(50).view(np.uint32) >> 16 : 0x7F80].sum() / stats.counts.sum()
    assert share == pytest.approx(1 / 8, abs=0.01)
    assert stats.counts.sum() == pytest.approx(x.size / 9, abs=1)
    assert histogram_of(np.zeros(0, np.float32), every=3).counts.sum() == 0
    with pytest.raises(CalibrationError, match="every: expected a whole number"):
        histogram_of(every=0.5)
    with pytest.raises(CalibrationError, match=r"every 1 \(most 0\) and every 8"):
        histogram_of().merge(stats)


def test_no_values_no_distribution() -> None:
    for method in ("bins", "magnitudes", "values_and_counts"):
        with pytest.raises(CalibrationError, match="no finite value"):
            getattr(histogram_of(np.full(3, np.nan, np.float32)), method)()


def test_series_rows_are_sorted_by_sample() -> None:
    generator = np.random.default_rng(0)
    arrays = {index: generator.standard_normal(100 + index).astype(np.float32) for index in (4, 0, 2)}
    stats = SeriesStats()
    for index, x in arrays.items():
        stats.update(x, SampleId(index))
    stats.update(np.full(3, np.nan, np.float32), SampleId(1))
    assert stats.index.tolist() == [0, 2, 4]
    for row, index in enumerate(stats.index.tolist()):
        x = arrays[index].astype(np.float64)
        assert (stats.lo[row], stats.hi[row], stats.n[row]) == (x.min(), x.max(), len(x))
        assert stats.sum[row] == pytest.approx(fsum(x))
        assert stats.square[row] == pytest.approx(fsum(x * x))
    assert stats.extent.first_bad == (1, "")


def test_series_pools_a_sample_seen_twice() -> None:
    stats = SeriesStats()
    for x in ([1.0, 2.0], [-3.0, np.inf]):
        stats.update(np.array(x), SampleId(6))
    assert (stats.index.tolist(), stats.lo.tolist(), stats.hi.tolist()) == ([6], [-3], [2])
    assert (stats.sum.tolist(), stats.square.tolist(), stats.n.tolist(), len(stats)) == ([0], [14], [3], 1)


@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5), 1), ((4, 5, 3), -1), ((3, 4), 0), ((3,), 0)])
def test_channel(shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stats = ChannelStats(Probe("t", "channel", axis=axis))
    stats.update(x, SampleId(0))
    stats.update(x * 2, SampleId(1))
    both = np.moveaxis(np.stack([x, x * 2]).astype(np.float64), axis % x.ndim + 1, 0).reshape(3, -1)
    np.testing.assert_array_equal(stats.lo, both.min(axis=1))
    np.testing.assert_array_equal(stats.hi, both.max(axis=1))
    np.testing.assert_array_equal(stats.absmax, np.abs(both).max(axis=1))
    np.testing.assert_allclose(stats.sum, both.sum(axis=1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(stats.abs_sum, np.abs(both).sum(axis=1), rtol=1e-12)
    once = np.abs(both[:, : x.size // 3]).max(axis=1)
    np.testing.assert_allclose(stats.mean_peak, 1.5 * once, rtol=1e-12)  # of one sample, and of twice that
    assert (stats.count == both.shape[1]).all()


def test_channel_leaves_out_what_is_not_finite() -> None:
    stats = ChannelStats()
    stats.update(np.array([[1, np.nan, -128], [-2, np.nan, np.inf]], np.float16), SampleId(0))
    assert stats.lo.tolist() == [-2, np.inf, -128]
    assert (stats.absmax.tolist(), stats.count.tolist()) == ([2, 0, 128], [2, 0, 1])
    assert (stats.sum.tolist(), stats.abs_sum.tolist()) == ([-1, 0, -128], [3, 0, 128])
    stats.update(np.array([[6, 4, np.nan]], np.float16), SampleId(1))
    assert stats.mean_peak.tolist() == [4, 2, 64]


def test_channel_of_int8_knows_the_size_of_the_smallest() -> None:
    stats = ChannelStats()
    stats.update(np.array([[-128], [-128]], np.int8), SampleId(0))
    assert (stats.absmax.tolist(), stats.abs_sum.tolist()) == ([128], [256])


def test_gram() -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((n, 2, 5)).astype(np.float32) for n in (1, 7, 3)]
    stats = GramStats()
    for index, x in enumerate(arrays):
        stats.update(x, SampleId(index))
    rows = np.concatenate([x.reshape(-1, 5) for x in arrays]).astype(np.float64)
    np.testing.assert_allclose(stats.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stats.gram, stats.gram.T)
    assert stats.rows == len(rows)


def test_gram_over_another_axis_without_bad_rows() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
    x[0, 1, 2] = np.nan
    stats = GramStats(Probe("t", "gram", axis=1))
    stats.update(x, SampleId(0))
    rows = np.delete(np.moveaxis(x, 1, -1).reshape(-1, 4), 2, axis=0).astype(np.float64)
    np.testing.assert_allclose(stats.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert (stats.rows, stats.extent.nan) == (11, 1)


def test_gram_beyond_float32_and_of_nothing() -> None:
    stats = GramStats()
    with pytest.raises(CalibrationError, match="no finite row"):
        _ = stats.gram
    stats.update(np.full((2, 2), 1e30, np.float32), SampleId(0))
    np.testing.assert_allclose(stats.gram, 2 * float(np.float32(1e30)) ** 2)


def test_channel_histogram_is_a_histogram_per_channel() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, 30)).astype(np.float32)
    stats = ChannelHistogramStats(Probe("t", "channel_histogram", axis=1))
    stats.update(x, SampleId(0))
    for channel in range(4):
        np.testing.assert_array_equal(stats.channels[channel].counts, histogram_of(x[:, channel]).counts)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30))
def test_exact_sum_of_float32_values(values: list[float]) -> None:
    total = ExactSum((1,), folds=3)
    for value in values:
        total.add(np.array([value]))
    largest = max(map(abs, values))
    assert float(total.value[0]) == pytest.approx(fsum(values), rel=2**-50, abs=largest * 2.0**-60)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.randoms())
def test_exact_sum_commutes(values: list[float], order: object) -> None:
    forward, backward = ExactSum((1,), folds=2), ExactSum((1,), folds=2)
    for value in values:
        forward.add(np.array([value]))
    for value in sorted(values):
        part = ExactSum((1,), folds=2)
        part.add(np.array([value]))
        part.merge(backward)
        backward = part
    np.testing.assert_array_equal(forward.digits, backward.digits)
    np.testing.assert_array_equal(forward.top, backward.top)


def test_exact_sum_refuses_infinity_and_other_shapes() -> None:
    with pytest.raises(CalibrationError, match="overflows"):
        ExactSum((1,), folds=2).add(np.array([np.inf]))
    with pytest.raises(ValueError, match="shapes"):
        ExactSum((1,), folds=2).merge(ExactSum((2,), folds=2))
