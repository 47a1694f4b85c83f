"""Errors of outputs against numpy on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from onnxslim_ptq.analysis.metrics import OutputError, leaves, worst_sqnr

floats = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1e3, 1e3, width=32))


class TestFloat:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(floats, min_size=1, max_size=4), st.integers(0, 99))
    def test_pooled_over_samples(self, samples: list[NDArray[np.float32]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        seen = [np.asarray(y + rng.standard_normal(y.shape), np.float32) for y in samples]
        error = OutputError("y")
        for y, z in zip(samples, seen, strict=True):
            error.add(y, z, "s")
        y, z = (np.concatenate(v).astype(np.float64) for v in (samples, seen))
        if (y**2).sum() == 0:
            assert error.sqnr is None
            assert error.cosine is None
        else:
            assert error.sqnr == pytest.approx(10 * np.log10((y**2).sum() / ((y - z) ** 2).sum()), rel=1e-9)
            assert error.cosine == pytest.approx(y @ z / np.sqrt((y @ y) * (z @ z)), rel=1e-9)
        assert error.largest == pytest.approx(np.abs(y - z).max())
        assert error.faults == []

    def test_exact(self) -> None:
        error = OutputError("y")
        error.add(np.ones(3, np.float32), np.ones(3, np.float32), "s")
        assert (error.sqnr, error.cosine, error.largest) == (float("inf"), pytest.approx(1.0), 0.0)

    def test_sums_are_made_in_float64(self) -> None:
        """A thousand samples of 2^24: float32 sums would stop growing."""
        error = OutputError("y")
        y = np.full(1000, 4096.0, np.float32)
        for _ in range(100):
            error.add(y, y + np.float32(1), "s")
        assert error.signal == 100 * 1000 * 4096.0**2
        assert error.noise == 100 * 1000

    def test_shapes_of_any_rank(self) -> None:
        error = OutputError("y")
        for shape in ((), (0, 3), (2, 1, 2)):
            error.add(np.ones(shape, np.float32), np.full(shape, 2, np.float32), "s")
        assert (error.signal, error.noise, error.count) == (5.0, 5.0, 5)

    def test_float16_and_float64(self) -> None:
        for dtype in (np.float16, np.float64):
            error = OutputError("y")
            error.add(np.full(100, 300, dtype), np.full(100, 301, dtype), "s")
            assert error.signal == 100 * 300.0**2, "the square of 300 does not fit float16"


class TestFaults:
    def test_shape(self) -> None:
        error = OutputError("y")
        error.add(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32), "sample 4")
        assert error.faults == ["sample 4: output 'y' has shape [3, 2], float [2, 3]"]

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_new_nan(self, bad: float) -> None:
        error = OutputError("y")
        error.add(np.ones(2, np.float32), np.asarray([1, bad], np.float32), "sample 4")
        assert error.faults == ["sample 4: output 'y' has NaN or Inf where the float model has none"]
        assert error.count == 2
        assert error.signal == 0

    def test_the_float_models_own_nan_is_passed_over(self) -> None:
        error = OutputError("y")
        error.add(
            np.asarray([1, np.nan, np.inf, 2], np.float32), np.asarray([1, 5, np.nan, 3], np.float32), "s"
        )
        assert (error.signal, error.noise, error.faults) == (5.0, 1.0, [])


class TestOtherTypes:
    def test_integers_and_bools(self) -> None:
        error = OutputError("y")
        error.add(np.asarray([1, 2, 3, 4]), np.asarray([1, 2, 3, 5]), "s")
        assert error.as_json() == {"equal": 0.75}
        assert error.sqnr is None
        assert error.cosine is None
        empty = OutputError("y")
        empty.add(np.zeros(0, np.bool_), np.zeros(0, np.bool_), "s")
        assert empty.as_json() == {"equal": None}

    def test_strings(self) -> None:
        error = OutputError("y")
        error.add(np.asarray(["a", "b"], object), np.asarray(["a", "c"], object), "s")
        assert error.as_json() == {"equal": 0.5}

    def test_sequences(self) -> None:
        error = OutputError("s")
        error.add(
            [np.ones(2, np.float32), np.ones(3, np.float32)],
            [np.ones(2, np.float32), np.full(3, 2, np.float32)],
            "s",
        )
        assert (error.signal, error.noise) == (5.0, 3.0)
        error.add([np.ones(2, np.float32)], [], "sample 1")
        assert error.faults == ["sample 1: output 's' has 0 tensors, float 1"]

    def test_maps(self) -> None:
        (array,) = leaves({1: np.ones(2)})
        assert array.tolist() == [1, 1]
        assert [a.tolist() for a in leaves([{0: 0.25, 1: 0.75}])] == [0.25, 0.75]


def test_the_headline_is_the_worst_output_with_a_signal() -> None:
    errors = [
        OutputError("a", signal=100.0, noise=1.0),
        OutputError("b", signal=10.0, noise=1.0),
        OutputError("silent"),
        OutputError("ids", is_float=False),
    ]
    assert worst_sqnr(errors) == pytest.approx(10.0)
    assert worst_sqnr(errors[2:]) is None
    assert errors[0].as_json() == {"sqnr_db": pytest.approx(20.0), "cosine": None, "max_abs_error": 0.0}


def test_top1_is_the_share_of_rows_with_the_same_largest_value() -> None:
    error = OutputError("y")
    y = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]], np.float32)
    z = np.array([[1.0, 3.1, 3.0], [3.0, 1.0, 2.9]], np.float32)
    error.add(y, z, "a")
    error.add(y[1:], z[1:], "b")
    assert error.top1 == 2 / 3
    flat = OutputError("y")
    flat.add(np.ones((4, 1), np.float32), np.ones((4, 1), np.float32), "a")
    assert flat.top1 is None
