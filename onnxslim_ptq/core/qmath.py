"""The arithmetic of quantization: ranges to scales, values to codes and back.

real = (code - zero_point) * scale; code = clip(round_half_even(real / scale) + zero_point). Definitions:
QuantizeLinear and DequantizeLinear of the ONNX specification.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.types import Array, Range
from onnxslim_ptq.core.dtypes import INT32
from onnxslim_ptq.core.spec import Grain, PerChannel, PerGroup, QParams, QuantSpec

__all__ = [
    "SMALLEST_SCALE",
    "channel_range",
    "dequantize",
    "fake_quantize",
    "grain_range",
    "params_from_range",
    "quantize",
    "quantize_bias",
    "reciprocal_pair",
    "sqnr_db",
]

_AT_ONCE = 1 << 22
SMALLEST_SCALE = float(
    np.finfo(np.float32).tiny
)  # a float32 scale below this is denormal: runtimes flush it to zero


def params_from_range(rng: Range, spec: QuantSpec, *, codes: int | None = None) -> QParams:
    """Scale and zero point that cover ``rng`` (in the shape of the scales, float64), which is widened to contain 0.

    Symmetric: scale = max(|lo|, |hi|) / 127 (7 for int4, 32767 for int16), zero point in the middle of the type
    (128 for uint8); with ``spec.full_range`` scale = max(|lo|, |hi|) / 127.5 (7.5 for int4).
    Asymmetric: scale = (hi - lo) / (highest - lowest), zero_point = round(lowest - lo / scale).
    ``codes`` lowers the largest symmetric magnitude (64 = "reduced range" for processors whose int8 sums saturate).
    A range that is only {0} gets scale 1. Raises ValueError when a bound is not finite.
    """
    lo = np.minimum(np.asarray(rng.lo, np.float64), 0.0)
    hi = np.maximum(np.asarray(rng.hi, np.float64), 0.0)
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
        raise ValueError("a quantization range must be finite")
    dtype = spec.dtype
    if spec.symmetric:
        width = dtype.highest - dtype.lowest
        largest = codes if codes is not None else width / 2 if spec.full_range else width // 2
        scale = _float32(np.maximum(-lo, hi) / largest)
        middle = 0 if dtype.signed else (dtype.highest + 1) // 2
        return QParams(spec, scale, np.full(scale.shape, middle, np.int64))
    steps = codes if codes is not None else dtype.highest - dtype.lowest
    scale = _float32((hi - lo) / steps)
    zero = np.clip(np.rint(dtype.lowest - lo / scale), dtype.lowest, dtype.highest)
    return QParams(spec, scale, zero.astype(np.int64))


def _float32(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale as a runtime will read it (float32), with 1 in place of zero and of denormals."""
    rounded = np.asarray(scale, np.float32).astype(np.float64)
    return np.where(rounded < SMALLEST_SCALE, 1.0, rounded)


def channel_range(weight: Array, axis: int | None) -> Range:
    """The exact minima and maxima of ``weight``, 0-d or [channels] along ``axis``; empty tensors give {0}."""
    if weight.size == 0:
        size = () if axis is None else (weight.shape[axis],)
        return Range(np.zeros(size), np.zeros(size))
    axes = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    return Range(np.asarray(weight.min(axis=axes), np.float64), np.asarray(weight.max(axis=axes), np.float64))


def grain_range(weight: Array, grain: Grain) -> Range:
    """The exact minima and maxima of ``weight`` in the shape of the scales of ``grain``."""
    if not isinstance(grain, PerGroup):
        return channel_range(weight, grain.axis if isinstance(grain, PerChannel) else None)
    starts = np.arange(0, weight.shape[grain.axis], grain.size)
    lo, hi = (f.reduceat(weight, starts, axis=grain.axis) for f in (np.minimum, np.maximum))
    return Range(np.asarray(lo, np.float64), np.asarray(hi, np.float64))


def _along(values: NDArray[Any], x: Array, params: QParams) -> NDArray[Any]:
    """``values``, shaped like the scale, so that they broadcast against ``x``."""
    axis, block = params.axis, params.block
    if axis is None or values.ndim == 0:
        return values
    if block is not None:
        return values.repeat(block, axis=axis).take(np.arange(x.shape[axis]), axis=axis)
    return values.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def quantize(x: Array, params: QParams) -> Array:
    """Integer codes of ``x``, saturating, ties to even, in ``params.spec.dtype``.

    The division is made in float32 for float32 input, as QuantizeLinear does, so that codes equal a runtime's.
    """
    dtype = params.spec.dtype
    work = np.float32 if x.dtype in (np.float16, np.float32) else np.float64
    scale = _along(params.scale.astype(work), x, params)
    zero = _along(params.zero_point, x, params)
    codes = np.empty(x.shape, dtype.dtype)
    for part in _parts(x):
        with np.errstate(over="ignore"):  # a quotient beyond the float type saturates like any other
            steps = np.rint(np.asarray(x[part], work) / _part(scale, part))
        codes[part] = np.clip(steps + _part(zero, part), dtype.lowest, dtype.highest)
    return codes


def dequantize(codes: Array, params: QParams) -> NDArray[np.float32]:
    """float32 values of integer codes."""
    zero = _along(params.zero_point, codes, params)
    scale = _along(params.scale.astype(np.float32), codes, params)
    values = np.empty(codes.shape, np.float32)
    for part in _parts(codes):
        exact = codes[part].astype(np.int64) - _part(zero, part)
        values[part] = exact.astype(np.float32) * _part(scale, part)
    return values


def _parts(x: Array) -> list[Any]:
    """Slices of the first axis that hold about `_AT_ONCE` elements each: intermediate results are 8 times the codes."""
    if x.ndim == 0 or x.size <= _AT_ONCE:
        return [...]
    rows = max(_AT_ONCE * len(x) // x.size, 1)
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _part(numbers: NDArray[Any], part: Any) -> NDArray[Any]:
    """``numbers``, which broadcast to the whole, for one of its parts."""
    return numbers if part is ... or numbers.ndim == 0 or len(numbers) == 1 else numbers[part]


def fake_quantize(x: Array, params: QParams) -> NDArray[np.float32]:
    """``dequantize(quantize(x))``: what a quantized graph sees of ``x``."""
    return dequantize(quantize(x, params), params)


def quantize_bias(bias: Array, scale: NDArray[np.float64]) -> tuple[NDArray[np.int32], int]:
    """int32 codes round(bias / scale) and how many of them had to be clipped; ``scale`` = s_activation * s_weight."""
    exact = np.rint(np.asarray(bias, np.float64) / scale)
    clipped = int(np.count_nonzero((exact < INT32.lowest) | (exact > INT32.highest)))
    return np.clip(exact, INT32.lowest, INT32.highest).astype(np.int32), clipped


def reciprocal_pair(params: QParams) -> QParams:
    """``params`` with a scale s that survives the way through its reciprocal: float32(1 / float32(1 / s)) == s.

    Moves s by one unit in the last place of float32 at most; then the file, which holds 1 / s, tells s exactly.
    """
    inverse = np.float32(1) / params.scale.astype(np.float32)
    scale = np.asarray(np.float32(1) / inverse, np.float64)
    return QParams(params.spec, scale, params.zero_point)


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 * log10(signal / noise) for energies summed in float64; None when there is no signal, inf without noise."""
    if signal <= 0.0:
        return None
    return float("inf") if noise <= 0.0 else float(10.0 * np.log10(signal / noise))
