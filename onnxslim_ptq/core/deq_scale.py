"""The scale behind an integer product, packed as Ascend stores it.

deq = float32(s_x * s_w) turns the int32 sum of codes into a real value. Ascend keeps its float32 bit pattern in an
integer: AscendDequant takes uint64 = shiftN << 32 | bits, plus a weight offset (int8) in bits 47..40, and
msModelSlim's files hold the pattern read as int32 and widened to int64. A deq is positive, so its sign bit is 0 and
both hold the same number when shift and offset are 0.
Sources: CANN ops-nn, AscendDequant; files written by msModelSlim 26.1.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.types import Array

__all__ = ["deq_scale", "pack_int64", "pack_uint64", "unpack"]

Float32 = NDArray[np.float32]


def deq_scale(input_scale: Array | float, weight_scale: Array | float) -> Float32:
    """float32(s_x * s_w), the factors rounded to float32 first; they broadcast.

    Raises:
        ValueError: a product is not a finite number above 0, as one that float32 cannot hold.
    """
    with np.errstate(over="ignore", under="ignore"):
        product = np.asarray(np.float32(input_scale) * np.float32(weight_scale), np.float32)
    _require_positive(product)
    return product


def pack_uint64(deq: Array | float, *, shift: int = 0, offset: int = 0) -> NDArray[np.uint64]:
    """AscendDequant's layout, same shape: float32 bits in 31..0, ``shift`` (0..255) in 39..32, ``offset`` in 47..40.

    ``offset`` is the weight's zero point, int8 in two's complement.

    Raises:
        ValueError: a scale is not a finite number above 0, or ``shift`` or ``offset`` does not fit its 8 bits.
    """
    if not 0 <= shift <= 255:
        raise ValueError(f"shift: {shift} is not from 0 to 255")
    if not -128 <= offset <= 127:
        raise ValueError(f"offset: {offset} is not from -128 to 127")
    high = np.uint64(shift << 32 | (offset & 0xFF) << 40)
    return np.asarray(_bits(deq).astype(np.uint64) | high, np.uint64)


def pack_int64(deq: Array | float) -> NDArray[np.int64]:
    """msModelSlim's layout, same shape: the float32 bits as int32, widened. ValueError as `pack_uint64`."""
    return np.asarray(_bits(deq).astype(np.int64), np.int64)


def unpack(packed: Array) -> Float32:
    """The float32 scales of either layout (shift and offset are dropped); ValueError for another dtype."""
    if packed.dtype not in (np.dtype(np.int64), np.dtype(np.uint64)):
        raise ValueError(f"packed scales are int64 or uint64, not {packed.dtype}")
    low = (packed & packed.dtype.type(0xFFFFFFFF)).astype(np.uint32)
    return np.asarray(low.view(np.float32))


def _bits(deq: Array | float) -> NDArray[np.uint32]:
    exact = np.array(deq, np.float32)
    _require_positive(exact)
    return exact.view(np.uint32)


def _require_positive(deq: Float32) -> None:
    if not (np.isfinite(deq).all() and (deq > 0).all()):
        raise ValueError("a dequantization scale must be a finite number above 0")
