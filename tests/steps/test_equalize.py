"""Equalization between convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import smoothed, unchanged


def test_equalize() -> None:
    draw = np.random.default_rng(0)
    w1 = (draw.normal(size=(4, 3, 3, 3)) * [[[[1]]], [[[100]]], [[[0.01]]], [[[1]]]]).astype(np.float32)
    w2 = draw.normal(size=(4, 1, 3, 3)).astype(np.float32)
    w3 = draw.normal(size=(5, 4, 1, 1)).astype(np.float32)
    pads: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "c1", **pads),
        helper.make_node("Relu", ["c1"], ["r1"], "r1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "c2", group=4, **pads),
        helper.make_node("Relu", ["c2"], ["r2"], "r2"),
        helper.make_node("Conv", ["r2", "w3"], ["y"], "c3"),
    ]
    graph = helper.make_graph(
        nodes,
        "cle",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 8, 8])],
        [numpy_helper.from_array(v, n) for n, v in (("w1", w1), ("w2", w2), ("w3", w3))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    workspace = workspace_of(model)
    found = smoothed(workspace, "equalize", rounds=100)
    assert [f.nodes for f in found] == [("c2",), ("c3",)]
    graph_now = workspace.graph
    size = {
        n: np.abs(np.asarray(graph_now.value(graph_now.node(n).inputs[1]), float)) for n in ("c1", "c2", "c3")
    }
    out1, in2 = size["c1"].max(axis=(1, 2, 3)), size["c2"].max(axis=(1, 2, 3))
    np.testing.assert_allclose(out1, in2, rtol=1e-2)
    np.testing.assert_allclose(in2, size["c3"].max(axis=(0, 2, 3)), rtol=1e-2)
    # What scales leave alone is the product along a channel; each layer gets its cube root.
    product = np.abs(w1).max(axis=(1, 2, 3)) * np.abs(w2).max(axis=(1, 2, 3)) * np.abs(w3).max(axis=(0, 2, 3))
    np.testing.assert_allclose(out1, np.cbrt(product), rtol=1e-2)
    unchanged(model, workspace, [{"x": draw.normal(size=(1, 3, 8, 8)).astype(np.float32)}])
