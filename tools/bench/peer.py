"""`onnxruntime.quantization.quantize_static` with a fair chance: the preparation its documents ask for, and more."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import quantization as ort
from onnxruntime.quantization.shape_inference import quant_pre_process

from onnxslim_ptq.cpu import saturates

_LEAST_OPSET = 13  # below it QuantizeLinear has no axis: per-channel weights do not load
_PERCENTILE = 99.99


class Reader(ort.CalibrationDataReader):
    """Samples in the form that `quantize_static` reads."""

    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self._feeds = feeds
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample, None at the end."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Start again."""
        self._left = iter(self._feeds)


def quantize_static(
    model: Path,
    out: Path,
    feeds: Sequence[dict[str, np.ndarray]],
    *,
    prepared: bool,
    method: str,
    ops: Sequence[str] | None,
    name: str,
) -> str:
    """Quantize `model` into `out`; returns what a reader of the figures should know."""
    logging.getLogger().setLevel(logging.ERROR)
    if not prepared:
        ort.quantize_static(str(model), str(out), Reader(feeds))
        return ""
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as folder:
        ready = Path(folder) / "prepared.onnx"
        note = prepare(model, ready)
        ort.quantize_static(
            str(ready),
            str(out),
            Reader(feeds),
            op_types_to_quantize=list(ops) if ops else None,
            per_channel=True,
            reduce_range=saturates(),
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod[method],
            extra_options={"CalibPercentile": _PERCENTILE} if method == "Percentile" else {},
        )
    return note


def prepare(model: Path, out: Path) -> str:
    """Constants lifted to initializers, opset 13 or newer, then ONNX Runtime's own pre-processing."""
    proto = onnx.load(str(model))
    lift_constants(proto)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _LEAST_OPSET:
        proto = onnx.version_converter.convert_version(proto, _LEAST_OPSET)
        lift_constants(proto)
    lifted = out.with_name("lifted.onnx")
    onnx.save(proto, str(lifted))
    options: dict[str, Any] = {"skip_symbolic_shape": find_spec("sympy") is None}
    if options["skip_symbolic_shape"]:
        quant_pre_process(str(lifted), str(out), **options)
        return ""
    try:
        quant_pre_process(str(lifted), str(out), **options)
    except Exception:  # symbolic shape inference gives up with all kinds of exceptions; the rest can go on
        quant_pre_process(str(lifted), str(out), skip_symbolic_shape=True)
        return "without symbolic shape inference, which fails"
    return ""


def lift_constants(proto: onnx.ModelProto) -> None:
    """Turn Constant nodes that hold a tensor into initializers: `quantize_static` quantizes only those."""
    graph = proto.graph
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)
