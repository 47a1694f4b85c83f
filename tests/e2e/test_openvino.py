"""Models for target openvino, loaded and run by OpenVINO itself; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxslim_ptq import quantize
from tests.models import cnn, feeds_for, mlp, outputs_of, session_of, sqnr_of

openvino = pytest.importorskip("openvino", reason="the openvino wheel is not installed (extra: test)")


@pytest.mark.parametrize(("make", "recipe"), [(cnn, "w8a8"), (mlp, "w8a8"), (cnn, "w8a8-dynamic")])
def test_openvino_answers_like_onnxruntime(make: Any, recipe: str, tmp_path: Path) -> None:
    proto = make()
    feeds = feeds_for(proto)
    path = quantize(proto, recipe, feeds, target="openvino").save(tmp_path / "m.onnx").model
    # Without bfloat16 or other narrow floats between the integer layers, which some processors use by default.
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    seen = [[compiled(dict(feed))[i] for i in range(len(proto.graph.output))] for feed in feeds]
    import onnx

    exact = outputs_of(proto, feeds)
    here = [session_of(onnx.load(path)).run(None, dict(feed)) for feed in feeds]
    assert sqnr_of(exact, seen) > sqnr_of(exact, here) - 0.5
    assert sqnr_of(exact, seen) > 35
