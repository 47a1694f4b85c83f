"""Every smoothing step on a real model: it finds groups, and the float function stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calib.model import Model, open_model
from calib.provider import Optimize, SessionOptions, create_session
from calib.readers import from_iterable
from calib.types import Array, Feed
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.opset import raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.smooth_groups import GroupKind
from onnxslim_ptq.steps import STEPS
from onnxslim_ptq.workspace import Workspace
from tests.steps.smoothing_models import smoothed
from tools import zoo

ONE = {"include": ["*layer.1/*"]}  # of six, to save time
EVERYWHERE = {"groups": [kind.value for kind in GroupKind if kind is not GroupKind.CONV_CONV], **ONE}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "auto_smooth": [
        {"groups": EVERYWHERE["groups"]}
    ],  # judged by the outputs, for which one layer does little
    "awq": [EVERYWHERE, {**EVERYWHERE, "loss": "block", "grid": 4}],
    "outlier_suppression_lite": [ONE, {**ONE, "loss": "block"}],
    "equalize": [{}],
    "kv_smooth": [{}],
    "split_outliers": [{**EVERYWHERE, "ratio": 2}],
}
RUNS = [(kind, options) for kind in STEPS for options in OPTIONS.get(kind, [EVERYWHERE])]


@pytest.mark.network
@pytest.mark.parametrize(("kind", "options"), RUNS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_a_real_model(kind: str, options: dict[str, Any]) -> None:
    """cls has the convolutions, MiniLM the transformer; the bound is that of tests/graph/test_smooth_zoo.py."""
    try:
        case = zoo.load("cls" if kind == "equalize" else "minilm")
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))
    model = raise_opset(open_model(case.model), 13)
    graph = Graph(model)
    optimize(graph)
    data = [case.calibration[i] for i in range(0, 64, 16)]
    found = smoothed(Workspace(graph, TARGETS["cpu"], from_iterable(data, model.inputs())), kind, **options)
    assert found
    assert all(np.isfinite(f.scale).all() and (f.scale > 0).all() for f in found)
    before, fast = outputs(model, data[0]), outputs(model, data[0], Optimize.ALL)
    for old, optimized, new in zip(before, fast, outputs(graph.to_model(), data[0]), strict=True):
        assert np.abs(new - old).max() <= max(1e-5 * np.abs(old).max(), 3 * np.abs(optimized - old).max())


def outputs(model: Model, feed: Feed, optimize: str = Optimize.OFF) -> list[Array]:
    options = SessionOptions(optimize=optimize, frugal=True)
    session = create_session(model.proto.SerializeToString(), model.weights, options=options)
    found: list[Array] = session.run(None, dict(feed))
    return found
