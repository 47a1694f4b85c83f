"""`analyze` and `LayerSelector`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from onnxslim_ptq import LayerSelector, Recipe, analyze, quantize
from onnxslim_ptq.cli import main
from onnxslim_ptq.core.match import literal
from onnxslim_ptq.errors import GraphError, RecipeError
from onnxslim_ptq.sensitivity import Analysis, Ranked
from tests.models import feeds_for, mlp, parse, weights_of

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
MODEL, CALIB = str(DIGITS / "digits.onnx"), str(DIGITS / "calib")
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("metric", ["sqnr", "std", "quantile", "kurtosis"])
def test_linear(metric: str, capsys: Captured) -> None:
    assert main(["analyze", "linear", MODEL, "--calib", CALIB, "--metrics", metric, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = [ranked["score"] for ranked in found["ranking"]]
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    assert len(found["exclude"]) == 10
    assert (found["scope"], found["metric"]) == ("linear", metric)


@pytest.mark.parametrize("metric", ["mse_model_wise", "mse_layer_wise"])
def test_layer(metric: str, capsys: Captured) -> None:
    assert main(["analyze", "layer", MODEL, "--calib", CALIB, "--metrics", metric, "--json"]) == 0
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    nodes = [node for ranked in ranking for node in ranked["nodes"]]
    assert len(nodes) == len(set(nodes)) == 10
    assert len(ranking) < 10
    assert all(ranked["score"] > 0 for ranked in ranking)


def test_a_person_gets_lines_for_the_recipe(capsys: Captured) -> None:
    assert main(["analyze", "linear", MODEL, "--calib", CALIB, "--topk", "2", "--pattern", "*block1*"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 of 3 by sqnr, most sensitive first")
    snippet = yaml.safe_load(
        "\n".join(line for line in text.splitlines() if line.startswith(("exclude:", "- ")))
    )
    assert len(snippet["exclude"]) == 2
    recipe = Recipe.load({"steps": [{"type": "quantize", **snippet}]})
    reasons = quantize(MODEL, recipe, CALIB).skipped.values()
    assert sum("excluded by" in reason for reason in reasons) == 2


def test_the_worst_layer_is_found() -> None:
    """A hidden unit that is never active has one huge weight per column, which leaves the other weights no codes."""
    proto = mlp()
    edited = {t.name: onnx.numpy_helper.to_array(t).copy() for t in proto.graph.initializer}
    edited["w1"][:, 3], edited["b1"][3], edited["w2"][3] = 0, -1, 60
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(edited[tensor.name], tensor.name))
    found = analyze(proto, calib_data=feeds_for(proto), recipe="w8a8-minmax")
    assert found.ranking[0].name == "mm2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lineer", MODEL], "scope 'lineer' is unknown; use one of linear"),
        (
            ["layer", MODEL, "--metrics", "sqnr"],
            "metric 'sqnr' is unknown for scope 'layer'; use one of",
        ),
        (["linear", MODEL, "--pattern", "*nothing*"], "--pattern '*nothing*' matches no layer"),
        (["linear", MODEL, "--pattern", "group:ov"], "--pattern 'group:ov': groups choose in recipes"),
        (["linear", "missing.onnx"], "does not exist"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["analyze", *arguments, "--calib", CALIB]) == 2
    assert message in capsys.readouterr().err


def test_patterns_match_the_names_and_nothing_else() -> None:
    from onnxslim_ptq.core.match import Layer, Pattern

    for name in ("/a/b", "conv[1]", "re:x", "op:Conv", "group:ov", "a*b", "a?\\(b"):
        text = literal(name)
        assert Pattern.parse(text).matches(Layer(name, "X"))
        assert not Pattern.parse(text).matches(Layer(name.replace("[1]", "1").replace("*", "_") + "x", "X"))


class TestLayerSelector:
    def test_threshold_and_level(self) -> None:
        selector = LayerSelector(MODEL, range_method="std")
        ranking = selector.run(CALIB)
        scores = [ranked.score for ranked in ranking]
        middle = float(np.median(scores))
        assert selector.select_layers_by_threshold(middle) == [r.name for r in ranking if r.score > middle]
        assert selector.select_layers_by_disable_level(2) == [r.name for r in ranking[:2]]
        assert selector.select_layers_by_disable_level(0) == []
        assert len(selector.select_layers_by_disable_level(99)) == 10

    def test_some_layers_only(self) -> None:
        selector = LayerSelector(MODEL, ["/fc/Gemm", "/stem/stem.0/Conv"])
        selector.run(CALIB)
        assert set(selector.select_layers_by_threshold(-1e9)) == {"/fc/Gemm", "/stem/stem.0/Conv"}

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            (lambda: LayerSelector(3), TypeError),  # type: ignore[arg-type]
            (lambda: LayerSelector(MODEL, "name"), TypeError),
            (lambda: LayerSelector(MODEL, range_method="max"), ValueError),
            (lambda: LayerSelector(MODEL, ["nothing"]).run(CALIB), ValueError),
            (lambda: LayerSelector(MODEL).select_layers_by_threshold(1.0), ValueError),
            (lambda: LayerSelector(MODEL).select_layers_by_threshold(True), TypeError),
            (lambda: LayerSelector(MODEL).select_layers_by_disable_level(1.5), TypeError),  # type: ignore[arg-type]
            (lambda: LayerSelector(MODEL).select_layers_by_disable_level(-1), ValueError),
        ],
    )
    def test_wrong_arguments(self, call: object, error: type[Exception]) -> None:
        with pytest.raises(error):
            call()  # type: ignore[operator]


def test_unknown_scope_from_python() -> None:
    with pytest.raises(RecipeError, match="scope 'x' is unknown"):
        analyze(MODEL, "x")


class TestAttention:
    def model(self) -> onnx.ModelProto:
        weights = weights_of(4, wq=(24, 24), wk=(24, 24), wv=(24, 24), wo=(24, 24))
        shapes = {"split": np.array([0, 0, 4, 6]), "merge": np.array([0, 0, 24])}
        body = """g (float[B,T,24] x) => (float[B,T,24] y) {
            [q] q = MatMul (x, wq)  q4 = Reshape (q, split)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
            [k] k = MatMul (x, wk)  k4 = Reshape (k, split)  kh = Transpose <perm = [0, 2, 3, 1]> (k4)
            [v] v = MatMul (x, wv)  v4 = Reshape (v, split)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
            s = MatMul (qh, kh)  p = Softmax <axis = -1> (s)  a = MatMul (p, vh)
            at = Transpose <perm = [0, 2, 1, 3]> (a)  o = Reshape (at, merge)
            [out] y = MatMul (o, wo) }"""
        return parse(body, {**weights, **shapes}, 17, 8)

    def test_its_output_is_measured(self) -> None:
        proto = self.model()
        feeds = feeds_for(proto, 12, {"B": 1, "T": 5})
        found = analyze(proto, "attn", calib_data=feeds, recipe="w8a8-minmax")
        (ranked,) = found.ranking
        assert ranked.nodes == ("q", "k", "v")
        assert 0 < ranked.score < 1e-2
        assert found.exclude(1) == ["q", "k", "v"]

    def test_shapes_computed_from_the_residual_stream_lead_nowhere(self) -> None:
        """The second attention's sizes come from the first one's result, as exporters write them."""
        names = ("wq", "wk", "wv", "wo", "vq", "vk", "vv")
        weights = weights_of(4, **dict.fromkeys(names, (24, 24)))
        shapes = {"split": np.array([0, 0, 4, 6]), "merge": np.array([0, 0, 24])}
        shapes |= {"last": np.array([4, 6]), "first": np.array([0, 1])}
        body = """g (float[B,T,24] x) => (float[B,h,T,d] y) {
            [q] q = MatMul (x, wq)  q4 = Reshape (q, split)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
            [k] k = MatMul (x, wk)  k4 = Reshape (k, split)  kh = Transpose <perm = [0, 2, 3, 1]> (k4)
            [v] v = MatMul (x, wv)  v4 = Reshape (v, split)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
            s = MatMul (qh, kh)  p = Softmax <axis = -1> (s)  a = MatMul (p, vh)
            at = Transpose <perm = [0, 2, 1, 3]> (a)  o = Reshape (at, merge)
            [out] r = MatMul (o, wo)  z = Add (r, x)
            sizes = Shape (z)  some = Gather (sizes, first)  to = Concat <axis = 0> (some, last)
            [q2] e = MatMul (z, vq)  e4 = Reshape (e, to)  eh = Transpose <perm = [0, 2, 1, 3]> (e4)
            [k2] f = MatMul (z, vk)  f4 = Reshape (f, to)  fh = Transpose <perm = [0, 2, 3, 1]> (f4)
            [v2] g = MatMul (z, vv)  g4 = Reshape (g, to)  gh = Transpose <perm = [0, 2, 1, 3]> (g4)
            t = MatMul (eh, fh)  w = Softmax <axis = -1> (t)  y = MatMul (w, gh) }"""
        proto = parse(body, {**weights, **shapes}, 17, 8)
        feeds = feeds_for(proto, 12, {"B": 1, "T": 5})
        found = analyze(proto, "attn", calib_data=feeds, recipe="w8a8-minmax")
        assert {ranked.nodes for ranked in found.ranking} == {("q", "k", "v"), ("q2", "k2", "v2")}

    def test_a_layer_of_two_entries_is_listed_once(self) -> None:
        both = [Ranked("a", ("n1", "n2"), "attention", 2.0), Ranked("b", ("n2", "n3"), "attention", 1.0)]
        assert Analysis("attn", "mse", both, 1).exclude(2) == ["n1", "n2", "n3"]

    def test_none(self) -> None:
        with pytest.raises(GraphError, match="no attention whose layers are quantized was found"):
            analyze(MODEL, "attn", calib_data=CALIB)


def test_notes_are_no_warnings(capsys: Captured) -> None:
    assert main(["analyze", "linear", MODEL, "--calib", CALIB, "--recipe", "w8a8-m4", "--topk", "1"]) == 0
    text, errors = capsys.readouterr()
    assert "note: iter_smooth scaled" in text
    assert errors == ""
    assert main(["analyze", "linear", MODEL, "--metrics", "std", "--topk", "1"]) == 0
    assert capsys.readouterr().err == "warning: no data was given: the ranking is that of random inputs\n"
