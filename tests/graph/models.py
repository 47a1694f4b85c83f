"""Small models as ONNX text, and their outputs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import numpy_helper

from calib.model import Model, open_model
from calib.types import Array, Feed
from onnxslim_ptq.graph.graph import Graph

__all__ = ["embedded", "feed_for", "graph_of", "model_of", "parse", "run", "same_outputs"]


def parse(
    body: str, weights: Mapping[str, Array] | None = None, opset: int = 17, ir: int = 8
) -> onnx.ModelProto:
    """``name (inputs) => (outputs) { ... }`` as a ModelProto with ``weights`` as initializers."""
    domains = ", ".join(
        [f'"" : {opset}', *(f'"{d}" : 1' for d in ("local", "com.microsoft") if f"{d}." in body)]
    )
    proto = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{domains}]> {body}")
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()
    )
    return proto


def model_of(body: str, weights: Mapping[str, Array] | None = None, opset: int = 17) -> Model:
    return open_model(parse(body, weights, opset))


def graph_of(body: str, weights: Mapping[str, Array] | None = None, opset: int = 17) -> Graph:
    return Graph(model_of(body, weights, opset))


def embedded(model: Model) -> onnx.ModelProto:
    """The complete ModelProto of a skeleton."""
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    for tensor in proto.graph.initializer:
        if tensor.name in model.weights:
            tensor.CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(model.weights[tensor.name]), tensor.name)
            )
    return proto


def run(model: Model | onnx.ModelProto, feed: Feed, optimize: bool = False) -> list[Array]:
    """The outputs in ONNX Runtime."""
    proto = embedded(model) if isinstance(model, Model) else model
    options = ort.SessionOptions()
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: list[Array] = session.run(None, dict(feed))
    return result


def feed_for(
    proto: onnx.ModelProto, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """Random values for every input; a dynamic dimension is 3 or its entry in ``sizes``."""
    rng = np.random.default_rng(seed)
    known = {t.name for t in proto.graph.initializer}
    feed: dict[str, Array] = {}
    for value in proto.graph.input:
        if value.name in known:
            continue
        tensor = value.type.tensor_type
        shape = [d.dim_value or (sizes or {}).get(d.dim_param, 3) for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind == "b":
            feed[value.name] = np.asarray(rng.integers(0, 2, shape), np.bool_)
        elif dtype.kind in "iu":
            feed[value.name] = np.asarray(rng.integers(0, 4, shape), dtype)
        else:
            feed[value.name] = np.asarray(rng.standard_normal(shape), dtype)
    return feed


def same_outputs(
    before: Model | onnx.ModelProto,
    after: Model | onnx.ModelProto,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    feeds: Sequence[Feed] | None = None,
) -> None:
    """Fail unless both models give the same outputs for random inputs."""
    proto = before.proto if isinstance(before, Model) else before
    for feed in feeds or [feed_for(proto, seed) for seed in (0, 1)]:
        for old, new in zip(run(before, feed), run(after, feed), strict=True):
            assert old.dtype == new.dtype
            assert old.shape == new.shape
            np.testing.assert_allclose(new, old, rtol=rtol, atol=atol)
