"""Layers switched one by one: what the session computes is what the exporter would write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from calib.model import open_model
from calib.readers import from_iterable
from onnxslim_ptq.analysis.entries import entries_of, find_blocks
from onnxslim_ptq.analysis.metrics import worst_sqnr
from onnxslim_ptq.analysis.switchboard import Switchboard
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.export.switches import add_twins
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.job import Job
from onnxslim_ptq.pipeline import Planned, make_plan
from onnxslim_ptq.recipe import Recipe
from tests.graph.models import parse
from tests.models import cnn, feeds_for, mlp, outputs_of, session_of, sqnr_of, weights_of


def planned(proto: onnx.ModelProto, recipe: Any = "w8a8-minmax", **options: Any) -> tuple[Planned, list[Any]]:
    source = open_model(proto)
    feeds = feeds_for(proto, 8)
    data = from_iterable(feeds, source.inputs())
    return make_plan(Job(source, Recipe.load(recipe), TARGETS["cpu"], data, data, **options)), feeds


def board_of(proto: onnx.ModelProto, recipe: Any = "w8a8-minmax") -> tuple[Switchboard, Planned, list[Any]]:
    plan, feeds = planned(proto, recipe)
    samples = list(from_iterable(feeds, open_model(proto).inputs()))
    return Switchboard(plan.workspace, plan.placement, plan.plan, samples), plan, feeds


def embedded(values: Any, name: str) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)


def half(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(proto, keep_io_types=False)


@pytest.mark.parametrize("make", [cnn, mlp])
def test_nothing_switched_is_the_float_model(make: Any) -> None:
    proto = make()
    board, _, feeds = board_of(proto)
    assert worst_sqnr(board.outputs(())) == np.inf
    names = [o.name for o in proto.graph.output]
    seen = [board._values(sample, names, ()) for sample in board._samples]
    assert sqnr_of(outputs_of(proto, feeds), seen) > 100, "biases are those before their correction"


@pytest.mark.parametrize(
    ("make", "recipe"), [(cnn, "w8a8-minmax"), (mlp, "w8a8-minmax"), (mlp, "w8a8-dynamic")]
)
def test_everything_switched_is_the_rendered_model(make: Any, recipe: str) -> None:
    """The exporter's QDQ model, run without fusions: only biases of 32 bits differ."""
    board, plan, feeds = board_of(make(), recipe)
    rendered = render_qdq(plan.workspace.model(), plan.plan, TARGETS["cpu"])
    proto = onnx.ModelProto()
    proto.CopyFrom(rendered.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in rendered.weights:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(np.ascontiguousarray(rendered.weights[tensor.name]), tensor.name)
            )
    names = [o.name for o in proto.graph.output]
    seen = [board._values(sample, names, board.layers) for sample in board._samples]
    assert sqnr_of(outputs_of(proto, feeds), seen) > 45
    assert 10 < (worst_sqnr(board.outputs(board.layers)) or 0) < 60


def test_one_layer_alone() -> None:
    """A numpy oracle: only the second MatMul of an MLP is quantized."""
    proto = mlp()
    board, plan, _ = board_of(proto)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    sample, feed = board._samples[0]
    (x,) = feed.values()
    hidden = np.maximum(x @ weights["w1"] + weights["b1"], 0)
    slot = plan.plan.activations[next(s for s in plan.plan.activations if getattr(s, "node", "") == "mm2")]
    numbers = plan.plan.params[slot.params]
    codes = np.clip(np.rint(hidden / np.float32(numbers.scale)) + int(numbers.zero_point), 0, 255)
    seen = (codes - int(numbers.zero_point)) * float(numbers.scale)
    scale = np.abs(weights["w2"]).max(axis=0) / 127
    rounded = np.rint(weights["w2"] / scale) * scale
    means = np.mean(
        [np.maximum(f["x"] @ weights["w1"] + weights["b1"], 0).mean(axis=0) for _, f in board._samples],
        axis=0,
    )
    shift = means @ (weights["w2"] - rounded)
    h2 = np.maximum(seen @ rounded + shift + weights["b2"], 0)
    expected = h2 @ weights["w3"] + weights["b3"]
    (judged,) = board._judged
    (found,) = board._values((sample, feed), [judged], {"mm2"})
    assert np.allclose(found, expected, atol=2e-3)


def test_a_value_of_two_makers() -> None:
    """A value quantized where it is made is so when its maker is on, not when only its reader is off."""
    board, _, _ = board_of(cnn())
    tensor, makers = next(iter(board.switched.makers.items()))
    gate = board.switched.results[tensor]
    assert not board.switched.feed(())[gate]
    assert board.switched.feed({makers[0][0]})[gate]
    others = set(board.layers) - set(makers[0])
    assert not board.switched.feed(others)[gate]


def test_float16() -> None:
    board, _, _ = board_of(half(cnn(19)))
    alone = [board.decibels({layer}) for layer in board.layers]
    assert all(20 < value < 100 for value in alone)
    assert board.decibels(board.layers) < min(alone) + 0.5


def test_twins_lie_beside_the_layers() -> None:
    proto = mlp()
    plan, feeds = planned(proto)
    model, twins = add_twins(plan.workspace.model(), plan.plan)
    full = onnx.ModelProto()
    full.CopyFrom(model.proto)
    full.graph.output.extend(onnx.ValueInfoProto(name=n) for n in ("m2", twins["mm2"]))
    for tensor in full.graph.initializer:
        if tensor.name in model.weights:
            tensor.CopyFrom(embedded(model.weights[tensor.name], tensor.name))
    exact, seen = session_of(full).run(["m2", twins["mm2"]], dict(feeds[0]))
    assert 20 < sqnr_of([[exact]], [[seen]]) < 60


class TestEntries:
    def test_readers_of_one_tensor_are_one_entry(self) -> None:
        weights = weights_of(0, wq=(8, 8), wk=(8, 8), wv=(8, 8), wo=(8, 8))
        body = """g (float[N,8] x) => (float[N,8] y) {
            [q] a = MatMul (x, wq)
            [k] b = MatMul (x, wk)
            [v] c = MatMul (x, wv)
            [s] d = Add (a, b)
            [t] e = Add (c, d)
            [o] f = MatMul (e, wo)
            [r] y = Add (f, x)
        }"""
        layers = find_linears(Graph(open_model(parse(body, weights, 17, 8))))[0]
        assert [entry.nodes for entry in entries_of(layers)] == [("q", "k", "v"), ("o",)]

    def test_convolutions_stay_apart(self) -> None:
        layers = find_linears(Graph(open_model(cnn())))[0]
        assert [entry.nodes for entry in entries_of(layers)] == [("conv1",), ("conv2",), ("conv3",), ("fc",)]

    def test_blocks_end_behind_residual_sums(self) -> None:
        model = open_model(cnn())
        layers = find_linears(Graph(model))[0]
        names = [[layer.node for layer in block] for block in find_blocks(model, layers)]
        assert names == [["conv1"], ["conv2", "conv3"], ["fc"]]


def test_a_sum_of_integer_convolutions() -> None:
    """Quantized where it is made only when a reader and both its sides are."""
    weights = weights_of(5, w1=(8, 3, 3, 3), w2=(8, 3, 1, 1), w3=(8, 8, 1, 1), w4=(8, 4))
    body = """g (float[N,3,8,8] x) => (float[N,4] y) {
        [a] c1 = Conv <pads = [1, 1, 1, 1]> (x, w1)
        [b] c2 = Conv (x, w2)
        [s] s = Add (c1, c2)
        [c] c3 = Conv (s, w3)
        [t] t = Add (c3, s)
        [p] p = GlobalAveragePool (t)
        [f] f = Flatten (p)
        [fc] y = MatMul (f, w4)
    }"""
    board, plan, feeds = board_of(parse(body, weights, 17, 8))
    gate = board.switched.results["s"]
    assert not board.switched.feed({"a", "b"})[gate]
    assert not board.switched.feed({"a", "c"})[gate]
    assert board.switched.feed({"a", "b", "c"})[gate]
    rendered = render_qdq(plan.workspace.model(), plan.plan, TARGETS["cpu"])
    proto = onnx.ModelProto()
    proto.CopyFrom(rendered.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in rendered.weights:
            tensor.CopyFrom(embedded(rendered.weights[tensor.name], tensor.name))
    seen = [board._values(sample, ["y"], board.layers) for sample in board._samples]
    assert sqnr_of(outputs_of(proto, feeds), seen) > 35
