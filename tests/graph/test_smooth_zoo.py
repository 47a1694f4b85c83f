"""Smoothing groups of real models: how many of which kind, and that scaling all of them keeps the outputs.

The bound on the change is 1e-5 of the largest output, or three times what ONNX Runtime's own optimizations change.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.model import Model, open_model
from calib.provider import Optimize, SessionOptions, create_session
from calib.types import Array, Feed
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.opset import raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.smooth_groups import GroupKind, find_groups
from tests.graph.smoothing import FOLDED, smooth_at_random
from tools import zoo

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits" / "digits.onnx"
K = GroupKind


def case_of(name: str) -> Any:
    try:
        return zoo.load(name)
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))


def simplified(path: Path) -> tuple[Model, Graph]:
    model = raise_opset(open_model(path), 13)
    graph = Graph(model)
    optimize(graph)
    return model, graph


def outputs(model: Model, feed: Feed, optimize: str = Optimize.OFF) -> list[Array]:
    options = SessionOptions(optimize=optimize, frugal=True)
    session = create_session(model.proto.SerializeToString(), model.weights, options=options)
    found: list[Array] = session.run(None, dict(feed))
    return found


def check(model: Model, graph: Graph, feed: Feed) -> Counter[GroupKind]:
    """Smooth all groups at random and compare every output with the untouched model's."""
    groups = smooth_at_random(graph)
    after = outputs(graph.to_model(), feed)
    before, fast = outputs(model, feed), outputs(model, feed, Optimize.ALL)
    for old, optimized, new in zip(before, fast, after, strict=True):
        bound = max(1e-5 * np.abs(old).max(), 3 * np.abs(optimized - old).max())
        assert np.abs(new - old).max() <= bound
    return Counter(group.kind for group in groups)


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Unlike a real sample, noise leaves no output in the flat part of its softmax."""
    return np.random.default_rng(5).uniform(-1, 1, shape).astype(np.float32)


def test_digits() -> None:
    model, graph = simplified(DIGITS)
    counts = check(model, graph, {"image": noise((3, 1, 8, 8))})
    assert counts[K.UNFUSED] + counts[K.CONV_CONV] + counts[K.LINEAR_LINEAR] == sum(counts.values())


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("cls", {K.CONV_CONV: 15}),
        ("det", {K.CONV_CONV: 20}),
        ("rec", {K.NORM_LINEAR: 5, K.CONV_CONV: 3, K.OV: 2}),
        ("effnet", {K.CONV_CONV: 2}),
        ("effnet-dynamo", {K.CONV_CONV: 2}),
        ("basic-pitch", {K.CONV_CONV: 2}),
    ],
)
def test_vision_and_sound(name: str, folded: dict[GroupKind, int]) -> None:
    case = case_of(name)
    model, graph = simplified(case.model)
    assert Counter(g.kind for g in find_groups(graph, FOLDED)) == folded
    feed = {k: noise(v.shape) for k, v in case.evaluation[0].items()} if name == "cls" else case.evaluation[0]
    check(model, graph, feed)


def short(case: Any, tokens: int) -> Feed:
    return {
        name: value[:, :tokens] if value.ndim == 2 else value for name, value in case.latency_feed.items()
    }


@pytest.mark.network
def test_minilm() -> None:
    """Norms behind the residual sum: the sum reads their result too, so that only v -> out folds."""
    case = case_of("minilm")
    model, graph = simplified(case.model)
    groups = find_groups(graph)
    assert [g.kind for g in groups] == [K.UNFUSED, K.OV, K.UNFUSED, K.UNFUSED] * 6
    assert [len(g.consumers) for g in groups] == [3, 1, 1, 1] * 6
    assert all("is also read by Add" in g.reason for g in groups[0::4] + groups[2::4])
    check(model, graph, short(case, 12))


@pytest.mark.network
def test_minilm_with_exported_outliers() -> None:
    """A Mul that takes outliers of a norm back on the residual path takes any scale back: then the norms fold."""
    case = case_of("minilm")
    model, graph = simplified(case.model)
    for node in [n for n in graph.nodes if n.op == "LayerNormalization"]:
        result = node.outputs[0]
        for add in [n for n in graph.consumers(result) if n.op == "Add"]:
            back = graph.variable(f"{result.name}.back")
            ones = graph.constant(f"{result.name}.ones", np.ones(384, np.float32))
            graph.add_node("Mul", f"{node.name}.back", [result, ones], [back])
            graph.set_input(add, next(p for p, t in enumerate(add.inputs) if t is result), back)
    counts = check(model, graph, short(case, 12))
    assert counts == {K.NORM_LINEAR: 12, K.OV: 6, K.UNFUSED: 6}


@pytest.mark.network
@pytest.mark.slow
def test_smollm2() -> None:
    """Per layer qkv, gate and up, down; the cache is an output, which keeps the scale of o_proj explicit."""
    case = case_of("smollm2")
    model, graph = simplified(case.model)
    groups = find_groups(graph)
    assert [g.kind for g in groups] == [K.NORM_LINEAR, K.UNFUSED, K.NORM_LINEAR, K.UP_DOWN] * 30 + [
        K.NORM_LINEAR
    ]
    assert [len(g.consumers) for g in groups] == [3, 1, 2, 1] * 30 + [1]
    assert [g.reason for g in groups[1:-1:4]] == [f"'present.{i}.value' is a graph output" for i in range(30)]
    check(model, graph, short(case, 8))
