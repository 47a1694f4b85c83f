"""Small float models as ONNX text, samples for them, and measures of what quantization did to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from calib.types import Array, Feed
from onnxslim_ptq import Result, quantize
from tests.graph.models import feed_for, parse

__all__ = [
    "cnn",
    "feeds_for",
    "mlp",
    "outputs_of",
    "parse",
    "quantized",
    "session_of",
    "sqnr_of",
    "weights_of",
]

# The lowest IR version each opset was released with.
_IR = {7: 3, 9: 4, 11: 6, 12: 7, 13: 7, 15: 8, 17: 8, 18: 8, 19: 9, 21: 10, 23: 11}


def weights_of(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    """Normal weights scaled to keep the size of values: fan-in is everything but the output channels."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) != 2 else shape[0]
        scale = 0.3 if len(shape) == 1 else 1 / np.sqrt(fan_in)
        made[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return made


def cnn(opset: int = 17) -> onnx.ModelProto:
    """Conv, Relu, depthwise Conv, residual Add, pooling, Gemm; dynamic batch and size."""
    weights = weights_of(
        1, w1=(8, 3, 3, 3), b1=(8,), w2=(8, 1, 3, 3), b2=(8,), w3=(8, 8, 1, 1), w4=(8, 5), b4=(5,)
    )
    body = """g (float[N,3,H,W] x) => (float[N,5] y) {
        [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        [relu1] r1 = Relu (c1)
        [conv2] c2 = Conv <pads = [1, 1, 1, 1], group = 8> (r1, w2, b2)
        [relu2] r2 = Relu (c2)
        [conv3] c3 = Conv (r2, w3)
        [add] a = Add (c3, r1)
        [pool] p = GlobalAveragePool (a)
        [flat] f = Flatten (p)
        [fc] y = Gemm (f, w4, b4)
    }"""
    return parse(body, weights, opset, max(_IR.get(opset, 8), 4))


def mlp(opset: int = 17) -> onnx.ModelProto:
    """Three MatMuls with constant Adds between, Relu and Softmax; dynamic batch."""
    weights = weights_of(2, w1=(16, 32), b1=(32,), w2=(32, 32), b2=(32,), w3=(32, 4), b3=(4,))
    body = """g (float[N,16] x) => (float[N,4] y) {
        [mm1] m1 = MatMul (x, w1)
        [add1] a1 = Add (m1, b1)
        [relu1] r1 = Relu (a1)
        [mm2] m2 = MatMul (r1, w2)
        [add2] a2 = Add (m2, b2)
        [relu2] r2 = Relu (a2)
        [mm3] m3 = MatMul (r2, w3)
        [add3] a3 = Add (b3, m3)
        [prob] y = Softmax <axis = 1> (a3)
    }"""
    return parse(body, weights, opset, max(_IR.get(opset, 8), 4))


def feeds_for(
    proto: onnx.ModelProto, count: int = 16, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> list[Feed]:
    """``count`` samples of normal values; dynamic dimensions are 3, or as in ``sizes``."""
    return [feed_for(proto, seed * 1000 + i, {"H": 8, "W": 8, **(sizes or {})}) for i in range(count)]


def quantized(proto: onnx.ModelProto, feeds: Sequence[Feed] | None = None, **options: Any) -> Result:
    """The verified result for 16 samples of normal values, or the given ones."""
    return quantize(proto, calib_data=list(feeds) if feeds is not None else feeds_for(proto), **options)


def session_of(proto: onnx.ModelProto, optimized: Path | None = None) -> ort.InferenceSession:
    """A plain CPU session as any user would make it; ``optimized``: where to write the graph that it runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def outputs_of(proto: onnx.ModelProto, feeds: Sequence[Feed]) -> list[list[Array]]:
    session = session_of(proto)
    return [session.run(None, dict(feed)) for feed in feeds]


def sqnr_of(exact: Sequence[Sequence[Array]], seen: Sequence[Sequence[Array]]) -> float:
    """10 log10(Σ y² / Σ (y - ŷ)²) of the worst float output, pooled over the samples."""
    worst = np.inf
    for ys, zs in zip(zip(*exact, strict=True), zip(*seen, strict=True), strict=True):
        if ys[0].dtype.kind == "f":
            y = np.concatenate([v.astype(np.float64).ravel() for v in ys])
            z = np.concatenate([v.astype(np.float64).ravel() for v in zs])
            noise = float(((y - z) ** 2).sum())
            worst = min(worst, 10 * np.log10(float((y**2).sum()) / noise) if noise else np.inf)
    return float(worst)
