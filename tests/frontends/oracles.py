"""What msModelSlim does, written again in numpy from its observed behaviour, without the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def values_in(proto: onnx.ModelProto, feed: dict[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Values of the float model by name."""
    tapped = onnx.ModelProto.FromString(proto.SerializeToString())
    inner = [n for n in dict.fromkeys(names) if n not in feed]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=n) for n in inner)
    session = ort.InferenceSession(tapped.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(inner, feed) if inner else []
    return {**{n: feed[n] for n in names if n in feed}, **dict(zip(inner, found, strict=True))}


def sigma(x: Array) -> tuple[float, float]:
    wide = x.astype(np.float64)
    if wide.min() < 0:
        return -20 * wide.std(), 20 * wide.std()
    return 0.0, 25 * wide[wide > 0].std()


def ema(samples: Sequence[Array]) -> tuple[float, float]:
    lo, hi = float(samples[0].min()), float(samples[0].max())
    for x in samples[1:]:
        lo, hi = 0.95 * lo + 0.05 * float(x.min()), 0.95 * hi + 0.05 * float(x.max())
    return lo, hi


def numbers(lo: float, hi: float, symmetric: bool = False) -> tuple[float, int]:
    """Scale and signed zero point."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if symmetric:
        return max(-lo, hi) / 127, 0
    scale = (hi - lo) / 255
    return scale, round(-lo / scale) - 128


def fake(x: Array, scale: float, zero: int) -> Array:
    return (np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127) - zero) * np.float32(scale)


def least_squares_scale(w: Array, rounds: int) -> float:
    """admm: s = <q, w> / <q, q>, again and again, while the error falls."""
    wide = w.astype(np.float64).ravel()
    scale = np.abs(wide).max() / 127
    best, least = scale, np.inf
    for _ in range(rounds + 1):
        q = np.clip(np.rint(wide / scale), -127, 127)
        error = ((wide - q * scale) ** 2).sum()
        if error < least:
            best, least = scale, error
        scale = (q * wide).sum() / (q * q).sum()
    return float(best)


def layers(path: Any) -> dict[str, dict[str, Any]]:
    """Per integer layer of an Ascend file: source tensor, scale, offset, codes, bias and the packed deq."""
    proto = onnx.load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    quants = {n.output[0]: n for n in proto.graph.node if n.op_type == "AscendQuant"}
    dequants = {n.input[0]: n for n in proto.graph.node if n.op_type == "AscendDequant"}
    found = {}
    for node in proto.graph.node:
        if node.input and node.input[0] in quants and node.op_type in ("Conv", "Gemm", "MatMul"):
            quant = quants[node.input[0]]
            out, bias = node.output[0], stored[node.input[2]] if len(node.input) > 2 else None
            add = next((n for n in proto.graph.node if n.op_type == "Add" and out in n.input), None)
            if out not in dequants:
                assert add is not None
                bias = stored[next(i for i in add.input if i != out)]
                out = add.output[0]
            attrs = attributes(quant)
            found[node.name] = {
                "op": node.op_type,
                "source": quant.input[0],
                "scale": 1 / attrs["scale"],
                "offset": int(attrs["offset"]),
                "codes": stored[node.input[1]],
                "bias": bias,
                "deq": stored[dequants[out].input[1]],
            }
    return found
