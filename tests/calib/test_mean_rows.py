"""Means per channel and reservoirs of rows: exact, bounded, the same in any order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats import MeanStats, RowStats
from calib.stats.minmax import MinMaxStats
from calib.stats.patch import Patch
from calib.types import Probe, SampleId


def means(arrays: list[NDArray[np.generic]], axis: int | None = None) -> MeanStats:
    stats = MeanStats(Probe("x", "mean", axis))
    for i, x in enumerate(arrays):
        stats.update(x, SampleId(i))
    return stats


def state_bytes(stats: MeanStats | RowStats) -> list[tuple[str, bytes]]:
    return [(k, v.tobytes()) for k, v in sorted(stats.state().items())]


class TestMean:
    @settings(max_examples=50, deadline=None)
    @given(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
            elements=st.floats(-1e3, 1e3, width=32),
        ),
        st.sampled_from([0, 1, -1, -2]),
    )
    def test_is_the_mean(self, x: NDArray[np.float32], axis: int) -> None:
        want = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64).mean(axis=1)
        np.testing.assert_allclose(means([x], axis).mean, want, rtol=1e-4, atol=1e-3)

    def test_samples_of_different_sizes_count_by_their_elements(self) -> None:
        found = means([np.full((1, 2, 3), 1, np.float32), np.full((4, 2, 6), 2, np.float32)], 1)
        np.testing.assert_allclose(found.mean, (1 * 3 + 2 * 24) / 27)

    def test_the_default_axis_is_the_last(self) -> None:
        np.testing.assert_array_equal(means([np.asarray([[1, 2], [3, 4]], np.float32)]).mean, [2, 3])

    def test_any_order_and_grouping_gives_the_same_bytes(self) -> None:
        rng = np.random.default_rng(0)
        arrays = [(rng.standard_normal((2, 3, 5)) * 10.0**k).astype(np.float32) for k in (-6, 0, 6, 3)]
        states = set()
        for order in itertools.permutations(range(4)):
            stats = MeanStats(Probe("x", "mean", 1))
            for half in (order[:2], order[2:]):
                part = MeanStats(Probe("x", "mean", 1))
                for i in half:
                    part.update(arrays[i], SampleId(i))
                stats.merge(part)
            states.add(tuple(state_bytes(stats)))
        assert len(states) == 1
        assert tuple(state_bytes(means(arrays, 1))) in states

    def test_round_trip(self) -> None:
        stats = means([np.arange(6, dtype=np.float32).reshape(2, 3)])
        again = MeanStats.from_state(stats.state())
        assert state_bytes(again) == state_bytes(stats)
        assert state_bytes(MeanStats.from_state(MeanStats(Probe("x", "mean", 1)).state())) == state_bytes(
            MeanStats(Probe("x", "mean", 1))
        )

    def test_float16_sums_do_not_overflow(self) -> None:
        np.testing.assert_allclose(means([np.full((5000, 2), 100, np.float16)]).mean, 100)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_sample_that_is_not_finite_is_left_out(self, bad: float) -> None:
        good = np.asarray([[1.0, 2.0]], np.float32)
        np.testing.assert_array_equal(means([good, np.asarray([[bad, 9.0]], np.float32)]).mean, [1, 2])

    def test_empty_tensors(self) -> None:
        stats = means([np.zeros((0, 3), np.float32)])
        with pytest.raises(CalibrationError, match="no finite value"):
            _ = stats.mean
        stats.update(np.ones((1, 3), np.float32), SampleId(1))
        np.testing.assert_array_equal(stats.mean, 1)

    def test_errors(self) -> None:
        stats = means([np.ones((2, 3), np.float32)])
        with pytest.raises(CalibrationError, match="3 channels before the eighth"):
            stats.update(np.ones((2, 4), np.float32), SampleId(7, "the eighth"))
        with pytest.raises(CalibrationError, match="no axis 5"):
            means([np.ones((2, 3), np.float32)], 5)
        with pytest.raises(CalibrationError, match="axis -1 and axis 0"):
            stats.merge(MeanStats(Probe("x", "mean", 0)))
        with pytest.raises(TypeError, match="MinMaxStats"):
            stats.merge(MinMaxStats(Probe("x", "minmax")))


WHOLE = Patch()
PATCH = Patch((3, 3), (2, 1), (1, 2), (1, 0), (1, 0))


def rows(
    arrays: list[NDArray[np.float32]], patch: Patch = WHOLE, first: int = 0, **options: float
) -> RowStats:
    stats = RowStats(Probe("x", "rows", None, (*patch.options(), *sorted(options.items()))))
    for i, x in enumerate(arrays):
        stats.update(x, SampleId(first + i))
    return stats


class TestRows:
    def test_every_row_is_one_of_the_tensor(self) -> None:
        x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
        kept = rows([x]).rows
        assert kept.shape == (8, 4)
        assert kept.dtype == np.float32
        given_rows = {r.tobytes() for r in x.reshape(-1, 4)}
        assert all(r.tobytes() in given_rows for r in kept)

    @pytest.mark.parametrize(
        "patch", [PATCH, Patch((3,), (1,), (1,), (0,), (0,)), Patch((1, 1), (1, 1), (1, 1), (0, 0), (0, 0))]
    )
    def test_every_patch_is_a_window_of_the_convolution(self, patch: Patch) -> None:
        """Against all windows, made by padding and slicing."""
        rank = len(patch.kernel)
        x = np.random.default_rng(0).standard_normal((2, 3, 7, 8)[: 2 + rank]).astype(np.float32)
        padded = np.pad(x, [(0, 0), (0, 0), *zip(patch.begin, patch.end, strict=True)])
        windows = set()
        for n in range(len(x)):
            for place in itertools.product(*map(range, patch.places(x.shape[2:]))):
                where = [
                    slice(p * s, p * s + d * (k - 1) + 1, d)
                    for p, s, d, k in zip(place, patch.strides, patch.dilations, patch.kernel, strict=True)
                ]
                windows.add(np.ascontiguousarray(padded[(n, slice(None), *where)]).tobytes())
        kept = rows([x] * 20, patch).rows
        assert {r.tobytes() for r in kept} <= windows
        assert len({r.tobytes() for r in kept}) > 5, "places vary"

    def test_number_of_places(self) -> None:
        """(n + begin + end - dilation (kernel - 1) - 1) // stride + 1, as the Conv operator defines it."""
        assert PATCH.places((7, 8)) == (4, 4)
        assert PATCH.places((1, 4)) == (1, 0)

    def test_bounded(self) -> None:
        arrays = [np.full((4, 2), i, np.float32) for i in range(100)]
        kept = rows(arrays, rows=50.0, each=4.0).rows
        assert kept.shape == (50, 2)
        assert len(np.unique(kept)) > 20, "from all over the samples"

    def test_any_order_and_grouping_gives_the_same_rows(self) -> None:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((5, 4)).astype(np.float32) for _ in range(6)]
        whole = rows(arrays, rows=16.0)
        forwards, backwards = rows(arrays[:3], rows=16.0), rows(arrays[3:], first=3, rows=16.0)
        forwards.merge(rows(arrays[3:], first=3, rows=16.0))
        backwards.merge(rows(arrays[:3], rows=16.0))
        assert state_bytes(whole) == state_bytes(forwards) == state_bytes(backwards)

    def test_round_trip(self) -> None:
        stats = rows([np.ones((1, 3, 5, 5), np.float32)], Patch((3, 3), (1, 1), (1, 1), (1, 1), (1, 1)))
        again = RowStats.from_state(stats.state())
        assert state_bytes(again) == state_bytes(stats)
        assert again.patch == stats.patch
        assert state_bytes(RowStats.from_state(rows([]).state())) == state_bytes(rows([]))

    def test_samples_too_small_for_a_window(self) -> None:
        stats = rows(
            [np.zeros((1, 3, 2, 2), np.float32), np.zeros((0, 3, 9, 9), np.float32)],
            Patch((5, 5), (1, 1), (1, 1), (0, 0), (0, 0)),
        )
        with pytest.raises(CalibrationError, match="no row was seen"):
            _ = stats.rows

    def test_errors(self) -> None:
        with pytest.raises(CalibrationError, match="different windows"):
            rows([]).merge(rows([], rows=10.0))
        with pytest.raises(TypeError):
            rows([]).merge(MeanStats(Probe("x", "mean")))

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 3), st.data())
    def test_patch_options_round_trip(self, rank: int, data: st.DataObject) -> None:
        numbers = [tuple(data.draw(st.integers(1, 9)) for _ in range(rank)) for _ in range(5)]
        patch = Patch(*numbers)
        assert Patch.from_options(dict(patch.options())) == patch
