"""Every smoothing step against its formula, written out again in numpy over the raw activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.model import open_model
from calib.provider import create_session
from calib.runner import tap
from onnxslim_ptq import Recipe, quantize
from onnxslim_ptq.core.match import Layer
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.steps import STEPS
from onnxslim_ptq.steps.flex_smooth import search
from onnxslim_ptq.steps.smoothing import Smoothed
from onnxslim_ptq.workspace import Workspace
from tests.models import feeds_for, mlp
from tests.steps.layers import place_all, workspace_of
from tools import zoo
from tools.bench.outliers import PLAIN, compare_recipes, llama_block, llama_feeds, with_outliers

Matrix = np.ndarray
QUANTIZE = {"type": "quantize"}


def config(kind: str, **keys: Any) -> Any:
    return Recipe.load({"steps": [{"type": kind, **keys}, QUANTIZE]}).steps[0]


def smoothed(workspace: Workspace, kind: str, **keys: Any) -> list[Smoothed]:
    """What the step does to the workspace's graph."""
    names = {lin.node: Layer(lin.node, lin.op, lin.weight_name) for lin in find_linears(workspace.graph)[0]}
    step = config(kind, **keys)
    placement = place_all(workspace)
    groups = STEPS[kind].groups(workspace.graph, step, names, placement.layers)
    return STEPS[kind].run(workspace, groups, step, placement)


def norm_model() -> onnx.ModelProto:
    """LayerNormalization -> two MatMuls with biases behind them; channel 3 is an outlier, channel 5 is dead."""
    draw = np.random.default_rng(0)
    gamma = np.ones(8, np.float32)
    beta = draw.normal(0, 0.3, 8).astype(np.float32)
    gamma[3], gamma[5], beta[5] = 40, 0, 0
    constants = {
        "gamma": gamma,
        "beta": beta,
        "wa": draw.normal(0, 1, (8, 6)).astype(np.float32),
        "wb": draw.normal(0, 1, (8, 4)).astype(np.float32),
        "bias_a": draw.normal(0, 1, 6).astype(np.float32),
        "bias_b": draw.normal(0, 1, 4).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "wa"], ["a0"], "a"),
        helper.make_node("Add", ["a0", "bias_a"], ["ya"], "add_a"),
        helper.make_node("MatMul", ["n", "wb"], ["b0"], "b"),
        helper.make_node("Add", ["b0", "bias_b"], ["yb"], "add_b"),
    ]
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", 8])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, "T", n]) for y, n in (("ya", 6), ("yb", 4))],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(count: int = 6, tokens: int = 8) -> list[dict[str, Matrix]]:
    draw = np.random.default_rng(1)
    return [{"x": draw.normal(size=(1, tokens, 8)).astype(np.float32)} for _ in range(count)]


def tensors(model: Any, names: list[str], data: list[dict[str, Matrix]]) -> list[Matrix]:
    """Each tensor over all samples, [rows, channels]."""
    session = create_session(tap(model, names).SerializeToString(), model.weights)
    runs = [session.run(names, feed) for feed in data]
    return [np.concatenate([run[i].reshape(-1, run[i].shape[-1]) for run in runs]) for i in range(len(names))]


def known() -> tuple[Matrix, Matrix]:
    """The activation of the group, and its weights side by side, in float64."""
    model = open_model(norm_model())
    rows = tensors(model, ["n"], feeds())[0].astype(np.float64)
    values = {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    return rows, np.concatenate([values["wa"], values["wb"]], axis=1).astype(np.float64)


def int8(weight: Matrix) -> Matrix:
    step = np.abs(weight).max(axis=0) / 127
    return np.asarray(np.rint(weight / step) * step)


def output_error(rows: Matrix, weight: Matrix, scale: Matrix, shift: Matrix | float = 0.0) -> float:
    """RMS of the relative output error with 8-bit activations (asymmetric) and int8 weights."""
    x = (rows - shift) / scale
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    step = (hi - lo) / 255
    seen = np.rint(x / step) * step
    exact = rows @ weight
    off = seen @ int8(weight * scale[:, None]) + (np.broadcast_to(shift, rows.shape[1]) @ weight) - exact
    return float(np.sqrt((off**2).mean()) / np.sqrt((exact**2).mean()))


def powers(act: Matrix, weight: Matrix, alpha: float, beta: float) -> Matrix:
    alive = (act > 0) & (weight > 0)
    scale = np.ones(len(act))
    scale[alive] = np.maximum(act[alive] ** alpha / weight[alive] ** beta, 1e-5)
    return scale


@pytest.fixture
def workspace() -> Workspace:
    return workspace_of(norm_model(), feeds())


class TestFormulas:
    @pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
    def test_smoothquant(self, workspace: Workspace, alpha: float) -> None:
        rows, weight = known()
        (found,) = smoothed(workspace, "smoothquant", alpha=alpha)
        expected = powers(np.abs(rows).max(0), np.abs(weight).max(1), alpha, 1 - alpha)
        np.testing.assert_allclose(found.scale, expected, rtol=1e-6)
        assert found.scale[5] == 1, "a dead channel stays as it is"
        assert (found.step, found.kind, found.nodes) == ("smoothquant", "norm-linear", ("a", "b"))

    def test_iter_smooth(self, workspace: Workspace) -> None:
        rows, weight = known()
        (found,) = smoothed(workspace, "iter_smooth", scale_min=1e-3)
        expected = np.maximum(np.abs(rows).max(0) ** 0.9 / np.abs(weight).max(1) ** 0.1, 1e-3)
        np.testing.assert_allclose(found.scale, expected, rtol=1e-6)
        assert found.shift is None

    def test_iter_smooth_with_shift(self, workspace: Workspace) -> None:
        rows, weight = known()
        (found,) = smoothed(workspace, "iter_smooth", symmetric=False, alpha=0.7)
        middle = (rows.max(0) + rows.min(0)) / 2
        np.testing.assert_allclose(np.asarray(found.shift), middle, atol=1e-6)
        reach = np.abs(rows - middle).max(0)
        expected = np.maximum(reach**0.7 / np.abs(weight).max(1) ** 0.3, 1e-5)
        np.testing.assert_allclose(found.scale, expected, rtol=1e-5)

    def test_awq(self, workspace: Workspace) -> None:
        rows, weight = known()
        (found,) = smoothed(workspace, "awq")
        size = np.abs(rows).mean(0)
        losses, scales = [], []
        for i in range(20):
            scale = np.maximum(size ** (i / 20), 1e-4)
            scale /= np.sqrt(scale.max() * scale.min())
            seen = int8(weight * scale[:, None]) / scale[:, None]
            per_output = ((rows @ seen - rows @ weight) ** 2).mean(0)
            losses.append(per_output[:6].mean() + per_output[6:].mean())
            scales.append(scale)
        np.testing.assert_allclose(found.scale, scales[int(np.argmin(losses))], rtol=1e-5)

    @pytest.mark.parametrize("given", [{}, {"alpha": 0.4}, {"beta": 0.3}, {"alpha": 0.6, "beta": 0.2}])
    def test_flex_smooth(self, workspace: Workspace, given: dict[str, float]) -> None:
        rows, weight = known()
        act, size = np.abs(rows).max(0), np.abs(weight).max(1)
        (found,) = smoothed(workspace, "flex_smooth", **given)

        def error(alpha: float, beta: float) -> float:
            return output_error(rows, weight, powers(act, size, alpha, beta))

        grid = [i / 20 for i in range(21)]
        pairs = [(a, b) for a in grid for b in grid]
        near = min(pairs, key=lambda p: np.abs(np.log(powers(act, size, *p) / found.scale)).max())
        np.testing.assert_allclose(found.scale, powers(act, size, *near), rtol=1e-6)
        assert given.get("alpha", near[0]) == near[0]
        assert given.get("beta", near[1]) == near[1]
        if not given:
            best = min(error(a, 1 - a) for a in grid)
            assert error(*near) <= best * 1.02, "the second phase starts from the best of the first"

    def test_outlier_suppression_plus(self, workspace: Workspace) -> None:
        rows, weight = known()
        (found,) = smoothed(workspace, "outlier_suppression_plus")
        middle = (rows.max(0) + rows.min(0)) / 2
        np.testing.assert_allclose(np.asarray(found.shift), middle, atol=1e-6)
        reach, size = np.abs(rows - middle).max(0), np.abs(weight).max(1)
        scales = [powers(reach, size, i / 20, 1 - i / 20) for i in range(21)]
        errors = [output_error(rows, weight, s, middle) for s in scales]
        mine = min(range(21), key=lambda i: np.abs(np.log(scales[i] / found.scale)).max())
        np.testing.assert_allclose(found.scale, scales[mine], rtol=1e-5)
        assert errors[mine] <= min(errors) * 1.02

    def test_outlier_suppression_lite_leaves_the_norm_alone(self, workspace: Workspace) -> None:
        rows, weight = known()
        before = len(workspace.graph.nodes)
        found = smoothed(workspace, "outlier_suppression_lite")
        assert [f.kind for f in found] == ["unfused"] * len(found)
        assert len(workspace.graph.nodes) > before
        act, size = np.abs(rows).max(0), np.abs(weight).max(1)
        alphas = [0.3, 0.4, *(i / 20 for i in range(10, 21))]
        if len(found) == 1:
            gaps = [np.abs(np.log(powers(act, size, a, 1 - a) / found[0].scale)).max() for a in alphas]
            assert min(gaps) < 1e-5

    def test_ties_go_to_the_last(self) -> None:
        assert search(lambda a, b: 1.0) == (1.0, 1.0)
        assert search(lambda a, b: (a - 0.3) ** 2 + (b - 0.2) ** 2) == (0.55, 0.2)
        assert search(lambda a, b: abs(b - 0.2), alpha=0.4) == (0.4, 0.2)
        assert search(lambda a, b: abs(a - 0.2), beta=0.9) == (0.2, 0.9)

    def test_equalize(self) -> None:
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
            n: np.abs(np.asarray(graph_now.value(graph_now.node(n).inputs[1]), float))
            for n in ("c1", "c2", "c3")
        }
        out1, in2 = size["c1"].max(axis=(1, 2, 3)), size["c2"].max(axis=(1, 2, 3))
        np.testing.assert_allclose(out1, in2, rtol=1e-2)
        np.testing.assert_allclose(in2, size["c3"].max(axis=(0, 2, 3)), rtol=1e-2)
        # What scales leave alone is the product along a channel; each layer gets its cube root.
        product = (
            np.abs(w1).max(axis=(1, 2, 3)) * np.abs(w2).max(axis=(1, 2, 3)) * np.abs(w3).max(axis=(0, 2, 3))
        )
        np.testing.assert_allclose(out1, np.cbrt(product), rtol=1e-2)
        unchanged(model, workspace, [{"x": draw.normal(size=(1, 3, 8, 8)).astype(np.float32)}])


def attention_model(heads: int = 2, size: int = 4) -> onnx.ModelProto:
    """Self-attention with separate projections and biases, as BERT has it; one key channel is large."""
    draw = np.random.default_rng(3)
    width = heads * size
    bias = np.zeros(width, np.float32)
    bias[2] = 30
    constants: dict[str, Matrix] = {"bk": bias, "root": np.asarray(size**0.5, np.float32)}
    constants |= {f"w{n}": draw.normal(size=(width, width)).astype(np.float32) for n in "qkvo"}
    constants |= {f"b{n}": draw.normal(size=width).astype(np.float32) for n in "qv"}
    constants["shape"] = np.array([0, 0, heads, size])
    constants["joined"] = np.array([0, 0, width])
    nodes = []
    for n, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["x", f"w{n}"], [f"{n}0"], f"{n}_proj"),
            helper.make_node("Add", [f"{n}0", f"b{n}"], [f"{n}1"], f"{n}_bias"),
            helper.make_node("Reshape", [f"{n}1", "shape"], [f"{n}2"], f"{n}_heads"),
            helper.make_node("Transpose", [f"{n}2"], [n], f"{n}_turn", perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["s0"], "scores"),
        helper.make_node("Div", ["s0", "root"], ["s1"], "scaled"),
        helper.make_node("Softmax", ["s1"], ["p"], "softmax"),
        helper.make_node("MatMul", ["p", "v"], ["m"], "mix"),
        helper.make_node("Transpose", ["m"], ["t"], "turn", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "joined"], ["j"], "join"),
        helper.make_node("MatMul", ["j", "wo"], ["y"], "o_proj"),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", width])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_kv_smooth(factor: float) -> None:
    model = attention_model()
    (keys,) = tensors(open_model(model), ["k1"], feeds())
    workspace = workspace_of(model, feeds())
    (found,) = smoothed(workspace, "kv_smooth", smooth_factor=factor)
    np.testing.assert_allclose(found.scale, np.abs(keys).max(0) ** factor, rtol=1e-5)
    assert set(found.nodes) == {"k_proj", "k_bias", "q_proj", "q_bias"}
    after = np.abs(tensors(workspace.model(), ["k1"], feeds())[0]).max(0)
    np.testing.assert_allclose(after, np.abs(keys).max(0) ** (1 - factor), rtol=1e-4)
    unchanged(model, workspace, feeds())


def test_kv_smooth_leaves_a_cache_alone() -> None:
    """The keys of this block turn (rotary embedding), which is no form that can be followed."""
    assert smoothed(workspace_of(llama_block(), llama_feeds(3)), "kv_smooth") == []
    model = attention_model()
    model.graph.output.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, None))
    assert smoothed(workspace_of(model, feeds()), "kv_smooth") == []
    assert smoothed(workspace_of(attention_model(), feeds()), "kv_smooth", exclude=["q_proj"]) == []


def unchanged(before: onnx.ModelProto, workspace: Workspace, data: list[dict[str, Matrix]]) -> None:
    names = [o.name for o in before.graph.output]
    pairs = zip(
        tensors(open_model(before), names, data), tensors(workspace.model(), names, data), strict=True
    )
    for y, z in pairs:
        np.testing.assert_allclose(z, y, atol=1e-5 * max(float(np.abs(y).max()), 1.0))


@pytest.mark.parametrize("kind", [k for k in STEPS if k not in ("equalize", "kv_smooth")])
@pytest.mark.parametrize("source", ["norm", "llama"])
def test_the_float_function_stays(kind: str, source: str) -> None:
    """Also with grouped queries, where several query heads share the scale of one value head."""
    model, data = (norm_model(), feeds()) if source == "norm" else (llama_block(), llama_feeds(4))
    workspace = workspace_of(model, data)
    found = smoothed(workspace, kind)
    if kind != "auto_smooth":
        assert found
    for group in found:
        assert np.isfinite(group.scale).all()
        assert (group.scale > 0).all()
    unchanged(model, workspace, data)


def test_grouped_queries_share_their_scale() -> None:
    """iter_smooth takes the mean of A and W over the query heads of one value head, smoothquant the largest."""
    data = llama_feeds(4)
    model = open_model(llama_block())
    act = np.abs(tensors(model, ["joined.out"], data)[0]).max(0).astype(np.float64)
    weight = np.abs(model.weights["o_proj.weight"]).max(1).astype(np.float64)
    heads = np.arange(64).reshape(4, 16)
    shared = [
        np.concatenate([heads[2 * i : 2 * i + 2]]) for i in range(2)
    ]  # [2 query heads, 16] of each value head
    reduced: dict[Callable[..., Any], tuple[Matrix, Matrix]] = {
        how: tuple(np.concatenate([how(v[s], axis=0) for s in shared]) for v in (act, weight))  # type: ignore[misc]
        for how in (np.mean, np.max)
    }
    for kind, how, alpha in (("iter_smooth", np.mean, 0.9), ("smoothquant", np.max, 0.5)):
        (found,) = smoothed(workspace_of(llama_block(), data), kind, groups=["ov"])
        a, w = reduced[how]
        np.testing.assert_allclose(found.scale, a**alpha / w ** (1 - alpha), rtol=1e-5)


class TestGroups:
    def test_kinds(self) -> None:
        workspace = workspace_of(llama_block(), llama_feeds(3))
        assert [f.kind for f in smoothed(workspace, "smoothquant", groups=["up-down"])] == ["up-down"]

    def test_excluded_as_a_whole(self, workspace: Workspace) -> None:
        assert smoothed(workspace, "smoothquant", exclude=["a"]) == []

    def test_one_included_layer_is_enough(self, workspace: Workspace) -> None:
        (found,) = smoothed(workspace, "smoothquant", include=["b"])
        assert found.nodes == ("a", "b")

    def test_float_layers_are_left_alone(self) -> None:
        recipe = {
            "steps": [{"type": "smoothquant"}, {"type": "quantize", "include": ["gate", "up"]}],
        }
        result = quantize(llama_block(), recipe, llama_feeds(4))
        notes = [n for n in result.notes if "scaled" in n]
        assert notes == ["smoothquant scaled 1 norm-linear groups"]


class TestRecipe:
    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ({"type": "smoothquant", "alpha": 1.5}, ".alpha: expected a number from 0 to 1, got 1.5"),
            ({"type": "smoothquant", "alpha": "0.5"}, ".alpha: expected a number from 0 to 1, got '0.5'"),
            ({"type": "smoothquant", "alpha": True}, ".alpha: expected a number from 0 to 1, got true"),
            ({"type": "smoothquant", "beta": 0.5}, ".beta: unknown key; accepted: type, include, exclude, "),
            ({"type": "smoothquant", "alhpa": 0.5}, ".alhpa: unknown key (did you mean 'alpha'?)"),
            ({"type": "smoothquant", "groups": ["norm"]}, ".groups[0]: got 'norm'; use norm-linear, linear-linear, "),
            ({"type": "smoothquant", "groups": []}, ".groups: give at least one, got []"),
            ({"type": "smoothquant", "groups": "ov"}, ".groups: expected a list, got 'ov'; write ['ov']"),
            ({"type": "smoothquant", "include": ["re:("]}, ".include[0]: pattern 're:(' is not a regular expression"),
            ({"type": "iter_smooth", "scale_min": 0}, ".scale_min: expected a number above 0, got 0"),
            ({"type": "iter_smooth", "symmetric": 3}, ".symmetric: "),
            ({"type": "awq", "grid": 0}, ".grid: "),
            ({"type": "flex_smooth", "beta": -0.1}, ".beta: expected a number from 0 to 1, got -0.1"),
            ({"type": "outlier_suppression_plus", "alpha": 2}, ".alpha: expected a number from 0 to 1, got 2"),
            ({"type": "outlier_suppression_lite", "alpha": 2}, ".alpha: unknown key"),
            ({"type": "equalize", "rounds": 0}, ".rounds: "),
            ({"type": "kv_smooth", "smooth_factor": 0}, ".smooth_factor: expected a number above 0, got 0"),
            ({"type": "kv_smooth", "groups": ["ov"]}, ".groups: unknown key; accepted: type, include, exclude, "),
            ({"type": "auto_smooth", "alphas": [0.5, 7]}, ".alphas[1]: expected a number from 0 to 1, got 7"),
            ({"type": "auto_smooth", "alphas": []}, ".alphas: give at least one"),
            ({"type": "smooth"}, ".type: got 'smooth'; use quantize, auto_smooth, awq, "),
        ],
    )  # fmt: skip
    def test_refused(self, given: dict[str, Any], text: str) -> None:
        with pytest.raises(RecipeError) as caught:
            Recipe.load({"steps": [given, QUANTIZE]})
        assert f"recipe: steps[0]{text}" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_smoothing_comes_first_and_something_is_quantized(self) -> None:
        with pytest.raises(RecipeError, match=r"steps\[1\].type: smoothquant changes the float model, so it"):
            Recipe.load({"steps": [QUANTIZE, {"type": "smoothquant"}]})
        with pytest.raises(
            RecipeError, match="steps: nothing is quantized; end with a step of type quantize"
        ):
            Recipe.load({"steps": [{"type": "smoothquant"}]})

    def test_a_pattern_that_matches_nothing(self) -> None:
        recipe = {"steps": [{"type": "smoothquant", "exclude": ["*qq*"]}, QUANTIZE]}
        with pytest.raises(RecipeError, match=r"steps\[0\].exclude: pattern '\*qq\*' matches no layer"):
            quantize(llama_block(), recipe, llama_feeds(3))

    def test_dump_and_patterns_from_outside(self) -> None:
        recipe = Recipe.load("w8a8-m4").with_patterns(exclude=["*head*"])
        assert Recipe.load(recipe.dump()) == recipe
        assert [step.exclude for step in recipe.steps] == [(), ("*head*",)]


class TestMainJob:
    def test_outliers(self) -> None:
        """The same function with channels a hundred times larger: smoothing does not notice, plain collapses."""
        recipes = {
            "plain": PLAIN,
            **{n: n for n in ("w8a8", "w8a8-smoothquant", "w8a8-m4", "w8a8-transformer")},
        }
        found = compare_recipes(llama_block(), llama_feeds(16), llama_feeds(4, seed=9), recipes)
        plain = found.pop("plain")
        assert plain[1] < plain[0] - 10
        for name, (untouched, altered) in found.items():
            assert altered > untouched - 0.5, name
            assert altered > plain[1] + 6, name
        (m6,) = compare_recipes(
            llama_block(), llama_feeds(16), llama_feeds(4, seed=9), {"m6": "w8a8-m6"}
        ).values()
        assert m6[1] > m6[0] - 1

    def test_outliers_keep_the_function(self) -> None:
        data = llama_feeds(2)
        before, after = (
            tensors(open_model(m), ["y"], data)[0] for m in (llama_block(), with_outliers(llama_block()))
        )
        np.testing.assert_allclose(after, before, atol=1e-5 * float(np.abs(before).max()))

    def test_the_json_tells_what_was_scaled(self, tmp_path: Path) -> None:
        paths = quantize(llama_block(), "w8a8-m4", llama_feeds(4)).save(tmp_path / "m.onnx")
        entries = json.loads(paths.json.read_text())["smoothing"]
        assert [(e["step"], e["kind"], e["group"]) for e in entries] == [
            ("iter_smooth", "norm-linear", ["q_proj", "k_proj", "v_proj"]),
            ("iter_smooth", "ov", ["o_proj"]),
            ("iter_smooth", "norm-linear", ["gate", "up"]),
            ("iter_smooth", "up-down", ["down"]),
        ]
        assert [len(e["scale"]) for e in entries] == [64, 32, 64, 160]

    def test_what_fits_few_samples_only_is_left(self) -> None:
        """Scales that even out 40 rows clip others: candidates are judged on samples they were not made from."""
        results = [quantize(mlp(), r, feeds_for(mlp()), target="tensorrt") for r in ("w8a8", PLAIN)]
        assert results[0].metrics["sqnr_db"] >= results[1].metrics["sqnr_db"] - 0.5

    def test_models_without_groups_are_as_before(self) -> None:
        plain = quantize("tools/digits/digits.onnx", PLAIN, "tools/digits/calib")
        smooth = quantize("tools/digits/digits.onnx", "w8a8", "tools/digits/calib")
        assert smooth.model.SerializeToString() == plain.model.SerializeToString()

    @pytest.mark.network
    def test_minilm(self) -> None:
        try:
            case = zoo.load("minilm")
        except zoo.ZooUnavailable as reason:
            pytest.skip(str(reason))
        data = [case.calibration[i] for i in range(0, 64, 8)]
        measured = [case.evaluation[i] for i in (0, 20, 40)]
        results = {
            name: quantize(case.model, recipe, data, eval_data=measured).metrics["sqnr_db"]
            for name, recipe in (("plain", PLAIN), ("transformer", "w8a8-transformer"))
        }
        assert results["transformer"] > results["plain"] + 1.5
