"""The packed dequantization scales, against the struct module and the layout's own arithmetic."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from onnxslim_ptq.core.deq_scale import deq_scale, pack_int64, pack_uint64, unpack


def test_the_low_bits_are_those_of_float32() -> None:
    scales = np.float32([1e-30, 3.5e-4, 1.0, 7.25, 1e30])
    bits = [struct.unpack("<I", struct.pack("<f", s))[0] for s in scales]
    assert pack_uint64(scales).tolist() == bits
    assert pack_int64(scales).tolist() == bits
    assert pack_uint64(scales).dtype == np.uint64
    assert pack_int64(scales).dtype == np.int64


def test_shift_and_offset_have_their_bits() -> None:
    packed = int(pack_uint64(1.0, shift=5, offset=-3))
    assert (packed & 0xFFFFFFFF, packed >> 32 & 0xFF, packed >> 40) == (0x3F800000, 5, 0xFD)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_unpacking_gives_the_scales_back_in_their_shape(shape: tuple[int, ...]) -> None:
    scales = np.random.default_rng(0).uniform(1e-6, 1, shape).astype(np.float32)
    for packed in (pack_uint64(scales, shift=1, offset=7), pack_int64(scales)):
        assert packed.shape == shape
        np.testing.assert_array_equal(unpack(packed), scales)


def test_the_product_is_rounded_once_from_float32_factors() -> None:
    s_x, s_w = 0.1, np.array([0.3, 1e-3])
    np.testing.assert_array_equal(deq_scale(s_x, s_w), np.float32(s_x) * s_w.astype(np.float32))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite number above 0"):
        pack_uint64(bad)
    with pytest.raises(ValueError, match="finite number above 0"):
        deq_scale(1.0, bad)
    with pytest.raises(ValueError, match="finite number above 0"):
        deq_scale(1e-30, 1e-30)


@pytest.mark.parametrize("key", ["shift", "offset"])
def test_eight_bits_are_eight_bits(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: 300"):
        pack_uint64(1.0, **{key: 300})


def test_only_packed_scales_are_unpacked() -> None:
    with pytest.raises(ValueError, match="not float32"):
        unpack(np.zeros(1, np.float32))
