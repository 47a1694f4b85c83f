"""Blocked and 4- or 16-bit quantization against ONNX Runtime's blocked DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.provider import create_session
from calib.types import Array
from onnxslim_ptq.core.dtypes import INT4, INT8, INT16, UINT4, IntType
from onnxslim_ptq.core.qmath import dequantize, grain_range, params_from_range, quantize
from onnxslim_ptq.core.spec import PerGroup, QParams, QuantSpec

TYPES = [INT4, UINT4, INT8, INT16]


def blocked(weight: NDArray[np.float32], dtype: IntType, axis: int, size: int, symmetric: bool) -> QParams:
    spec = QuantSpec(dtype, PerGroup(axis, size), symmetric)
    return params_from_range(grain_range(weight, spec.grain), spec)


def by_runtime(weight: NDArray[np.float32], params: QParams) -> tuple[Array, Array]:
    """Codes and values as a graph of QuantizeLinear and DequantizeLinear gives them."""
    dtype = params.spec.dtype
    assert isinstance(params.spec.grain, PerGroup)
    attrs: dict[str, Any] = {"axis": params.spec.grain.axis, "block_size": params.spec.grain.size}
    helper = onnx.helper
    constants = [
        onnx.numpy_helper.from_array(params.scale.astype(np.float32), "s"),
        onnx.numpy_helper.from_array(params.zero_point.astype(dtype.stored_dtype), "z"),
    ]
    kind = helper.np_dtype_to_tensor_dtype(dtype.stored_dtype)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attrs),
            helper.make_node("Cast", ["q"], ["codes"], to=onnx.TensorProto.INT32),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(weight.shape))],
        [
            helper.make_tensor_value_info("codes", onnx.TensorProto.INT32, None),
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
        ],
        constants,
        value_info=[helper.make_tensor_value_info("q", kind, list(weight.shape))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    codes, values = create_session(model.SerializeToString()).run(None, {"x": weight})
    return codes, values


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    axis=st.sampled_from([0, 1]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_onnx_runtime(dtype: IntType, axis: int, symmetric: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(32, 16) if axis == 0 else (16, 32)).astype(np.float32)
    params = blocked(weight, dtype, axis, 16, symmetric)
    codes = quantize(weight, params)
    seen, values = by_runtime(weight, params)
    assert np.array_equal(codes.astype(np.int32), seen)
    assert np.array_equal(dequantize(codes, params), values)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_each_block_has_its_own_scale(dtype: IntType, axis: int) -> None:
    weight = np.random.default_rng(3).normal(size=(40, 24)).astype(np.float32)
    params = blocked(weight, dtype, axis, 16, True)
    assert params.scale.shape == ((3, 24) if axis == 0 else (40, 2))  # the last block is shorter
    moved, scale = (weight, params.scale) if axis == 0 else (weight.T, params.scale.T)
    largest = (dtype.highest - dtype.lowest) // 2
    for block in range(len(scale)):
        expected = np.abs(moved[16 * block : 16 * block + 16]).max(axis=0) / largest
        np.testing.assert_allclose(scale[block], expected, rtol=1e-6)
    error = np.abs(dequantize(quantize(weight, params), params) - weight)
    step = params.scale.repeat(16, axis=axis).take(np.arange(weight.shape[axis]), axis=axis)
    assert (error <= 0.5001 * step).all()


def test_four_bits_know_their_container_and_their_file_type() -> None:
    assert (INT4.dtype, UINT4.dtype) == (np.dtype(np.int8), np.dtype(np.uint8))
    assert INT4.stored_dtype.name == "int4"
    assert (INT4.bits, INT8.bits, INT16.bits) == (4, 8, 16)
    assert INT8.stored_dtype is INT8.dtype or INT8.stored_dtype == INT8.dtype
