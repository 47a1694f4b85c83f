"""The arithmetic of quantization against the ONNX reference evaluator, ONNX Runtime and its own formulas."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from calib.types import Array, Range
from onnxslim_ptq.core.dtypes import INT8, INT32, UINT8, IntType, int_type
from onnxslim_ptq.core.qmath import (
    SMALLEST_SCALE,
    channel_range,
    dequantize,
    fake_quantize,
    params_from_range,
    quantize,
    quantize_bias,
    sqnr_db,
)
from onnxslim_ptq.core.spec import PerChannel, PerTensor, QParams, QuantSpec

TYPES = [UINT8, INT8]
_AXIS = 1
_MODELS: dict[tuple[str, bool], onnx.ModelProto] = {}
_SESSIONS: dict[tuple[str, bool], ort.InferenceSession] = {}


def qparams(dtype: IntType, scale: object, zero: object) -> QParams:
    s, z = np.asarray(scale, np.float64), np.asarray(zero, np.int64)
    return QParams(QuantSpec(dtype, PerChannel(_AXIS) if s.ndim else PerTensor(), False), s, z)


def pair_model(dtype: IntType, per_channel: bool) -> onnx.ModelProto:
    """x -> QuantizeLinear -> codes -> DequantizeLinear -> y, numbers fed."""
    key = (dtype.name, per_channel)
    if key not in _MODELS:
        size, axis = ("[C]", f"<axis = {_AXIS}>") if per_channel else ("", "")
        _MODELS[key] = onnx.parser.parse_model(
            f'<ir_version: 9, opset_import: ["" : 19]> g (float[N,C] x, float{size} s, {dtype.name}{size} z)'
            f" => ({dtype.name}[N,C] codes, float[N,C] y)"
            f" {{ codes = QuantizeLinear{axis} (x, s, z) y = DequantizeLinear{axis} (codes, s, z) }}"
        )
    return _MODELS[key]


def feed(x: Array, params: QParams) -> dict[str, Array]:
    return {
        "x": x,
        "s": params.scale.astype(np.float32),
        "z": params.zero_point.astype(params.spec.dtype.dtype),
    }


def onnxruntime_pair(x: Array, params: QParams) -> list[Array]:
    key = (params.spec.dtype.name, params.axis is not None)
    if key not in _SESSIONS:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = pair_model(params.spec.dtype, key[1]).SerializeToString()
        _SESSIONS[key] = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    result: list[Array] = _SESSIONS[key].run(None, feed(x, params))
    return result


def reference_pair(x: Array, params: QParams) -> list[Array]:
    model = pair_model(params.spec.dtype, params.axis is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in its own division
        return list(ReferenceEvaluator(model).run(None, feed(x, params)))


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """A warning of numpy (overflow, invalid cast) in our own arithmetic is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


scales = st.floats(min_value=2.0**-20, max_value=2.0**13, width=32)
values = hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], QParams]:
    dtype = draw(st.sampled_from(TYPES))
    zeros = st.integers(dtype.lowest, dtype.highest)
    if draw(st.booleans()):
        return draw(values), qparams(dtype, draw(scales), draw(zeros))
    return draw(values), qparams(
        dtype, draw(hnp.arrays(np.float32, 4, elements=scales)), draw(hnp.arrays(np.int64, 4, elements=zeros))
    )


class TestAgainstOnnx:
    @settings(max_examples=200, deadline=None)
    @given(cases())
    def test_equals_reference_and_runtime(self, case: tuple[NDArray[np.float32], QParams]) -> None:
        x, params = case
        codes = quantize(x, params)
        assert codes.dtype == params.spec.dtype.dtype
        real = dequantize(codes, params)
        assert real.dtype == np.float32
        others = [onnxruntime_pair(x, params)]
        if (
            np.abs(x / params.scale).max() < 2**31
        ):  # beyond, the reference evaluator's cast to int32 wraps around
            others.append(reference_pair(x, params))
        for other in others:
            np.testing.assert_array_equal(codes, other[0])
            np.testing.assert_array_equal(real, other[1])
        np.testing.assert_array_equal(fake_quantize(x, params), real)

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_ties_go_to_even(self, dtype: IntType) -> None:
        x = np.asarray([[-3.5, -2.5, -1.5, -0.5], [0.5, 1.5, 2.5, 3.5]], np.float32)
        params = qparams(dtype, 1.0, 10)
        codes = quantize(x, params)
        assert codes.tolist() == [[6, 8, 8, 10], [10, 12, 12, 14]]
        np.testing.assert_array_equal(codes, onnxruntime_pair(x, params)[0])

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    @pytest.mark.parametrize("zero", [0, 100])
    def test_saturates(self, dtype: IntType, zero: int) -> None:
        x = np.asarray([[-3.4e38, -1000, 1000, 3.4e38]], np.float32)
        params = qparams(dtype, 0.01, zero)
        codes = quantize(x, params)
        assert codes.tolist() == [[dtype.lowest, dtype.lowest, dtype.highest, dtype.highest]]
        np.testing.assert_array_equal(codes, onnxruntime_pair(x, params)[0])

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_infinities_saturate(self, dtype: IntType) -> None:
        x = np.asarray([[-np.inf, np.inf, 0, 1]], np.float32)
        assert quantize(x, qparams(dtype, 1.0, 3)).tolist() == [[dtype.lowest, dtype.highest, 3, 4]]

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_the_smallest_scale(self, dtype: IntType) -> None:
        """Quotients may leave float32; the codes saturate all the same."""
        x = np.asarray([[-1.0, -2e-38, 2e-38, 1e30]], np.float32)
        params = qparams(dtype, SMALLEST_SCALE, 5)
        codes = quantize(x, params)
        assert codes.tolist() == [[dtype.lowest, 3, 7, dtype.highest]]
        np.testing.assert_array_equal(codes, onnxruntime_pair(x, params)[0])

    def test_float16_input_is_divided_in_float32(self) -> None:
        x = np.asarray([[60000, 0.1, -0.1, 3]], np.float16)
        params = qparams(INT8, 1e-3, 0)
        np.testing.assert_array_equal(quantize(x, params), quantize(x.astype(np.float32), params))

    def test_axis_counts_from_the_end_too(self) -> None:
        x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        scale, zero = np.asarray([1.0, 2.0, 4.0, 8.0]), np.zeros(4, np.int64)
        last = QParams(QuantSpec(UINT8, PerChannel(-1), False), scale, zero)
        np.testing.assert_array_equal(quantize(x, last), np.clip(np.rint(x / scale), 0, 255))
        np.testing.assert_array_equal(dequantize(quantize(x, last), last), np.rint(x / scale) * scale)

    def test_int32_codes_of_a_bias(self) -> None:
        """DequantizeLinear of int32, per channel, as a bias is read back."""
        params = QParams(
            QuantSpec(INT32, PerChannel(0), True),
            np.asarray([0.1, 3e-7], np.float32).astype(np.float64),
            np.zeros(2, np.int64),
        )
        codes = np.asarray([-(2**31), 2**31 - 1], np.int32)
        model = onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 19]> g (int32[2] c, float[2] s, int32[2] z) => (float[2] y)'
            " { y = DequantizeLinear<axis = 0> (c, s, z) }"
        )
        want = ReferenceEvaluator(model).run(
            None, {"c": codes, "s": params.scale.astype(np.float32), "z": np.zeros(2, np.int32)}
        )[0]
        np.testing.assert_array_equal(dequantize(codes, params), want)


ends = st.floats(-1e30, 1e30, allow_nan=False)


class TestParamsFromRange:
    @settings(max_examples=200, deadline=None)
    @given(ends, ends, st.sampled_from(TYPES), st.booleans())
    def test_any_range(self, a: float, b: float, dtype: IntType, symmetric: bool) -> None:
        lo, hi = min(a, b), max(a, b)
        params = params_from_range(
            Range(np.asarray(lo), np.asarray(hi)), QuantSpec(dtype, PerTensor(), symmetric)
        )
        scale, zero = float(params.scale), int(params.zero_point)
        assert scale > 0
        assert scale == float(np.float32(scale)), "the file holds exactly this number"
        assert dtype.lowest <= zero <= dtype.highest
        assert fake_quantize(np.zeros(1, np.float32), params)[0] == 0.0, "0 is always exact"
        low, high = (float(v) for v in params.range())
        if scale == 1.0 and max(-lo, hi) < 255 * SMALLEST_SCALE:
            return  # too small to be told from zero
        slack = scale * (0.5 if not symmetric else 0) + 1e-6 * max(-lo, hi)
        assert low <= min(lo, 0) + slack
        assert high >= max(hi, 0) - slack

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_only_zero_gets_scale_one(self, dtype: IntType, symmetric: bool) -> None:
        params = params_from_range(
            Range(np.zeros(2), np.zeros(2)), QuantSpec(dtype, PerChannel(0), symmetric)
        )
        assert params.scale.tolist() == [1.0, 1.0]
        assert dequantize(quantize(np.zeros(2, np.float32), params), params).tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_denormal_ranges_get_scale_one(self, symmetric: bool) -> None:
        rng = Range(np.asarray(-1e-40), np.asarray(1e-40))
        assert float(params_from_range(rng, QuantSpec(INT8, PerTensor(), symmetric)).scale) == 1.0

    @pytest.mark.parametrize(("lo", "hi"), [(2.0, 3.0), (-3.0, -2.0), (-1.0, 1.0)])
    def test_contains_zero(self, lo: float, hi: float) -> None:
        params = params_from_range(
            Range(np.asarray(lo), np.asarray(hi)), QuantSpec(UINT8, PerTensor(), False)
        )
        low, high = params.range()
        assert low <= 0 <= high
        assert np.isclose(high - low, max(hi, 0) - min(lo, 0))

    def test_symmetric(self) -> None:
        rng = Range(np.asarray(-2.54), np.asarray(1.0))
        signed = params_from_range(rng, QuantSpec(INT8, PerTensor(), True))
        unsigned = params_from_range(rng, QuantSpec(UINT8, PerTensor(), True))
        assert (int(signed.zero_point), int(unsigned.zero_point)) == (0, 128)
        assert float(signed.scale) == float(unsigned.scale) == float(np.float32(2.54 / 127))
        ends = np.asarray([-2.54, 2.54], np.float32)
        assert quantize(ends, signed).tolist() == [-127, 127]
        assert quantize(ends, unsigned).tolist() == [1, 255]

    def test_asymmetric_formula(self) -> None:
        params = params_from_range(
            Range(np.asarray([-1.0, 0.0]), np.asarray([3.0, 51.0])), QuantSpec(UINT8, PerChannel(0), False)
        )
        np.testing.assert_array_equal(params.scale, np.asarray([4 / 255, 0.2], np.float32).astype(np.float64))
        assert params.zero_point.tolist() == [64, 0]  # round(1 / (4 / 255)) = round(63.75)

    def test_a_smaller_number_of_codes(self) -> None:
        params = params_from_range(
            Range(np.asarray(-6.4), np.asarray(6.4)), QuantSpec(INT8, PerTensor(), True), codes=64
        )
        assert quantize(np.asarray([-6.4, 6.4], np.float32), params).tolist() == [-64, 64]

    @pytest.mark.parametrize(("lo", "hi"), [(np.nan, 1.0), (-1.0, np.nan), (-np.inf, 1.0), (-1.0, np.inf)])
    def test_not_finite(self, lo: float, hi: float) -> None:
        with pytest.raises(ValueError, match="finite"):
            params_from_range(Range(np.asarray(lo), np.asarray(hi)), QuantSpec(INT8, PerTensor(), False))


class TestChannelRange:
    @settings(max_examples=50, deadline=None)
    @given(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=2, max_dims=4, max_side=4),
            elements=st.floats(-10, 10, width=32),
        ),
        st.integers(-2, 1),
    )
    def test_extremes(self, weight: NDArray[np.float32], axis: int) -> None:
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        rng = channel_range(weight, axis)
        np.testing.assert_array_equal(rng.lo, rows.min(axis=1))
        np.testing.assert_array_equal(rng.hi, rows.max(axis=1))
        whole = channel_range(weight, None)
        assert (float(whole.lo), float(whole.hi)) == (weight.min(), weight.max())

    def test_empty(self) -> None:
        rng = channel_range(np.zeros((3, 0), np.float32), 0)
        assert rng.lo.tolist() == rng.hi.tolist() == [0, 0, 0]
        assert float(channel_range(np.zeros((3, 0), np.float32), None).lo) == 0.0


class TestBias:
    def test_rounds_half_to_even(self) -> None:
        codes, clipped = quantize_bias(np.asarray([0.25, 0.75, -0.25, 1.0], np.float32), np.asarray(0.5))
        assert codes.dtype == np.int32
        assert codes.tolist() == [0, 2, 0, 2]
        assert clipped == 0

    def test_overflow_is_counted_and_clipped(self) -> None:
        bias = np.asarray([1e12, -1e12, 5.0, 2.0**31 - 1, -(2.0**31)])
        codes, clipped = quantize_bias(bias, np.ones(5))
        assert codes.tolist() == [2**31 - 1, -(2**31), 5, 2**31 - 1, -(2**31)]
        assert clipped == 2


class TestSqnr:
    def test_decibels(self) -> None:
        assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)
        assert sqnr_db(1.0, 4.0) == pytest.approx(-6.0206, abs=1e-4)

    def test_ends(self) -> None:
        assert sqnr_db(1.0, 0.0) == float("inf")
        assert sqnr_db(0.0, 0.0) is None
        assert sqnr_db(0.0, 1.0) is None


class TestTypes:
    def test_names(self) -> None:
        assert int_type("uint8") is UINT8
        assert (INT8.lowest, INT8.highest, INT8.signed, str(INT8)) == (-128, 127, True, "int8")
        assert (UINT8.lowest, UINT8.highest, UINT8.signed) == (0, 255, False)
        with pytest.raises(ValueError, match=r"int3.*int8, uint8, int16, uint16, int32"):
            int_type("int3")

    def test_the_range_of_the_codes(self) -> None:
        low, high = qparams(UINT8, 0.5, 10).range()
        assert (float(low), float(high)) == (-5.0, 122.5)
