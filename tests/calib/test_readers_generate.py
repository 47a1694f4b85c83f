"""Synthetic samples: shapes, ranges, reproducibility, and the two options that describe them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import CalibrationError
from calib.readers import ReadLimits, fingerprint, from_iterable, parse_range, parse_shape, synthetic, take
from calib.types import InputInfo


def info(
    dtype: object = np.float32, shape: tuple[int | str | None, ...] | None = ("batch", 4), name: str = "x"
) -> InputInfo:
    return InputInfo(name, np.dtype(dtype), shape)  # type: ignore[call-overload]


class TestDraw:
    def test_floats_are_standard_normal(self) -> None:
        ((ident, feed),) = synthetic([info(shape=(100, 100))], count=1)
        assert str(ident) == "synthetic 0"
        assert feed["x"].dtype == np.float32
        assert abs(feed["x"].mean()) < 0.05
        assert abs(feed["x"].std() - 1) < 0.05

    def test_float_range_is_uniform(self) -> None:
        ((_, feed),) = synthetic([info(shape=(1000,))], count=1, ranges={"x": (2.0, 4.0)})
        assert 2 <= feed["x"].min() < 2.05
        assert 3.95 < feed["x"].max() <= 4

    def test_integers_are_0_and_1(self) -> None:
        for _, feed in synthetic([info(np.int64, (1, 50))]):
            assert set(np.unique(feed["x"])) == {0, 1}

    def test_integer_range_includes_both_ends(self) -> None:
        ((_, feed),) = synthetic([info(np.int32, (1000,))], count=1, ranges={"x": (-2, 2)})
        assert set(np.unique(feed["x"])) == {-2, -1, 0, 1, 2}

    def test_bool(self) -> None:
        ((_, feed),) = synthetic([info(np.bool_, (100,))], count=1)
        assert feed["x"].dtype == np.bool_
        assert 20 < feed["x"].sum() < 80

    @pytest.mark.parametrize(
        "dtype",
        [
            np.float16,
            np.float64,
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            np.int8,
            np.uint8,
            np.uint64,
            ml_dtypes.int4,
        ],
    )
    @pytest.mark.parametrize("ranges", [None, {"x": (0, 3)}])
    def test_dtypes(self, dtype: object, ranges: dict[str, tuple[float, float]] | None) -> None:
        wanted = info(dtype, (2, 5))
        data = synthetic([wanted], count=2, ranges=ranges)
        for _, feed in data:
            assert feed["x"].dtype == wanted.dtype
            assert feed["x"].shape == (2, 5)
        assert fingerprint(data) == fingerprint(from_iterable(data, [wanted]))

    def test_scalar(self) -> None:
        inputs = [info(dtype, (), name) for name, dtype in (("a", "f4"), ("b", "i8"), ("c", "?"))]
        for _, feed in synthetic(inputs, ranges={"b": (3, 3)}):
            assert [array.shape for array in feed.values()] == [(), (), ()]
            assert feed["b"] == 3

    @pytest.mark.parametrize("dtype", [object, np.complex64])
    def test_dtype_without_a_distribution(self, dtype: object) -> None:
        with pytest.raises(CalibrationError, match=r"input 'x' has dtype .* pass --calib DATA"):
            synthetic([info(dtype)])


class TestSame:
    def test_every_pass_and_every_part(self) -> None:
        data = synthetic([info(), info(np.int64, (1, 9), "ids")])
        assert len(data) == 8
        assert fingerprint(data) == fingerprint(data)
        assert fingerprint(take(data, 3)) == fingerprint(
            synthetic([info(), info(np.int64, (1, 9), "ids")], count=3)
        )

    def test_samples_and_seeds_differ(self) -> None:
        data = list(synthetic([info()]))
        assert len({feed["x"].tobytes() for _, feed in data}) == 8
        assert fingerprint(synthetic([info()])) != fingerprint(synthetic([info()], seed=1))


class TestShapes:
    def test_dynamic_first_dimension_is_1(self) -> None:
        for first in ("batch", None):
            ((_, feed),) = synthetic([info(shape=(first, 3))], count=1)
            assert feed["x"].shape == (1, 3)

    def test_given(self) -> None:
        ((_, feed),) = synthetic([info(shape=("n", 3, "h", "w"))], count=1, shapes={"x": (2, 3, 8, 9)})
        assert feed["x"].shape == (2, 3, 8, 9)
        ((_, feed),) = synthetic([info(shape=None)], count=1, shapes={"x": (5,)})
        assert feed["x"].shape == (5,)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            (("n", 3, "h", None), r"input 'x' has dynamic dimensions \(nx3xhx\?\).*--shape x:1x3x224x224"),
            ((1, "n", 3), r"\(in Python shapes={'x': \(1, 224, 3\)}\)"),
            ((1, "seq"), r"--shape x:1x224"),
            (None, r"input 'x' declares no shape; pass --shape x:1x3x224x224"),
        ],
    )
    def test_unknown(self, shape: tuple[int | str | None, ...] | None, message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            synthetic([info(shape=shape)])

    @pytest.mark.parametrize("given", [(1, 5), (1,), (1, 4, 1), (-1, 4)])
    def test_that_does_not_fit(self, given: tuple[int, ...]) -> None:
        with pytest.raises(CalibrationError, match=r"--shape x:"):
            synthetic([info()], shapes={"x": given})

    def test_of_no_input(self) -> None:
        with pytest.raises(CalibrationError, match=r"--shape y: no such input; the model's inputs are 'x'"):
            synthetic([info()], shapes={"y": (1,)})
        with pytest.raises(CalibrationError, match=r"--range y: no such input"):
            synthetic([info()], ranges={"y": (0, 1)})

    def test_out_of_bounds(self) -> None:
        with pytest.raises(CalibrationError, match=r"more than the 2\.0 GiB allowed"):
            synthetic([info(shape=(1 << 40, 1 << 40) * 20)])
        with pytest.raises(CalibrationError, match="samples allowed"):
            synthetic([info()], count=11, limits=ReadLimits(max_samples=10))
        with pytest.raises(CalibrationError, match="--samples 0"):
            synthetic([info()], count=0)
        with pytest.raises(CalibrationError, match="--seed -1"):
            synthetic([info()], seed=-1)


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [
        (np.float32, (1, 0)),
        (np.float32, (0, float("inf"))),
        (np.float32, (float("nan"), 1)),
        (np.float16, (0, 1e6)),
        (np.uint8, (-1, 1)),
        (np.uint8, (0, 256)),
        (np.int64, (0, 0.5)),
        (np.int64, (0, 1e30)),
        (np.bool_, (0, 1)),
        (ml_dtypes.int4, (0, 8)),
    ],
)
def test_range_that_does_not_fit(dtype: object, bounds: tuple[float, float]) -> None:
    with pytest.raises(CalibrationError, match=r"--range x:"):
        synthetic([info(dtype)], ranges={"x": bounds})


class TestParse:
    def test_shape(self) -> None:
        assert parse_shape("name:1x3x224x224") == ("name", (1, 3, 224, 224))
        assert parse_shape("input:0:7") == ("input:0", (7,))
        assert parse_shape("past:1x0x4") == ("past", (1, 0, 4))

    @pytest.mark.parametrize(
        "text",
        ["", "x", ":1", "x:", "x:1x", "x:x1", "x:-1", "x:1,3", "x:1 x3", "x:1.5", "x:٣", "x:1\n", "1x3x224"],
    )
    def test_bad_shape(self, text: str) -> None:
        with pytest.raises(CalibrationError, match=r"--shape .*expected NAME:DIMxDIM"):
            parse_shape(text)

    def test_range(self) -> None:
        assert parse_range("name:0,1") == ("name", (0.0, 1.0))
        assert parse_range("input:0:-1.5e1,2") == ("input:0", (-15.0, 2.0))

    @pytest.mark.parametrize(
        "text", ["", "x", ":0,1", "x:", "x:1", "x:1,0", "x:0,1,2", "x:a,b", "x:nan,1", "x:0,inf", "0,1"]
    )
    def test_bad_range(self, text: str) -> None:
        with pytest.raises(CalibrationError, match=r"--range .*expected NAME:LOW,HIGH"):
            parse_range(text)

    @given(st.text(min_size=1), st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
    def test_shape_round_trip(self, name: str, shape: list[int]) -> None:
        assert parse_shape(f"{name}:{'x'.join(map(str, shape))}") == (name, tuple(shape))

    @given(st.text(min_size=1), st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
    def test_range_round_trip(self, name: str, a: float, b: float) -> None:
        assert parse_range(f"{name}:{min(a, b)!r},{max(a, b)!r}") == (name, (min(a, b), max(a, b)))
