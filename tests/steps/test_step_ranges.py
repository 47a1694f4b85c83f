"""Ranges of the quantize step: what an activation function leaves, what readers' outputs say, what the judge picks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.ranges import MinMax
from calib.stats import HistogramStats, RowStats
from calib.types import Probe, Range, SampleId
from onnxslim_ptq.core.choice import AUTO, OUTPUT_MSE
from onnxslim_ptq.core.dtypes import INT8, UINT8
from onnxslim_ptq.core.qmath import fake_quantize, params_from_range
from onnxslim_ptq.core.spec import PerTensor, QParams, QuantSpec
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.graph.elementwise import follow
from onnxslim_ptq.steps import quantize
from onnxslim_ptq.steps.output_range import output_range
from onnxslim_ptq.steps.placement import PlacedTensor, place
from onnxslim_ptq.steps.ranges import after_ranges, grid_of
from tests.graph.models import graph_of, parse
from tests.models import cnn, feeds_for, mlp, weights_of
from tests.steps.layers import PLAIN, apply_step, choose, with_activation, workspace_of

SPEC = QuantSpec(UINT8, PerTensor(), False)
CONV = weights_of(1, w=(8, 3, 1, 1), b=(8,), u=(4, 8, 1, 1))
POINTS = np.linspace(-10, 10, 2001)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def hardswish(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * np.clip(x / 6 + 0.5, 0, 1)


CHAINS = {
    "HardSwish": ("y = HardSwish (h)", [hardswish]),
    "hard swish spelled out": (
        "a = Add (h, three) c = Clip (a, zero, six) m = Mul (h, c) y = Div (m, six)",
        [hardswish],
    ),
    "swish": ("s = Sigmoid (h) y = Mul (s, h)", [lambda x: x * sigmoid(x)]),
    "nothing": ("y = Conv (h, id)", [lambda x: x]),
    "two readers": (
        "r = Relu (h) t = Tanh (h) p = Conv (r, id) q = Conv (t, id) y = Add (p, q)",
        [lambda x: np.maximum(x, 0), np.tanh],
    ),
    "itself and a function": (
        "r = Sigmoid (h) p = Conv (r, id) q = Conv (h, id) y = Add (p, q)",
        [lambda x: x, sigmoid],
    ),
    "a constant per channel ends it": ("y = Mul (h, per_channel)", [lambda x: x]),
}
CONSTANTS = {
    "three": np.asarray(3, np.float32),
    "zero": np.asarray(0, np.float32),
    "six": np.asarray([6], np.float32),
    "id": np.eye(8, dtype=np.float32)[:, :, None, None],
    "per_channel": np.ones((8, 1, 1), np.float32),
}


class TestFollow:
    @pytest.mark.parametrize("name", list(CHAINS))
    def test_functions(self, name: str) -> None:
        body, functions = CHAINS[name]
        graph = graph_of(
            f"g (float[N,3,8,8] x) => (float[N,8,8,8] y) {{ h = Conv (x, w, b) {body} }}", CONV | CONSTANTS
        )
        tables = follow(graph, {"h": POINTS})["h"]
        assert len(tables) == len(functions)
        for table, function in zip(tables, functions, strict=True):
            np.testing.assert_allclose(table, function(POINTS), atol=2e-6)

    def test_many_at_once(self) -> None:
        graph = graph_of(
            "g (float[N,3,8,8] x) => (float[N,4,8,8] y) "
            "{ h = Conv (x, w, b) r = HardSwish (h) k = Conv (r, u) y = Tanh (k) }",
            CONV,
        )
        tables = follow(graph, {"h": POINTS, "k": POINTS, "x": POINTS})
        np.testing.assert_allclose(tables["h"][0], hardswish(POINTS), atol=2e-6)
        np.testing.assert_allclose(tables["k"][0], np.tanh(POINTS), atol=2e-6)
        np.testing.assert_array_equal(tables["x"][0], POINTS)

    def test_a_graph_output_is_read(self) -> None:
        graph = graph_of(
            "g (float[N,3,8,8] x) => (float[N,8,8,8] h, float[N,8,8,8] y) { h = Conv (x, w, b) y = Relu (h) }",
            CONV,
        )
        assert len(follow(graph, {"h": POINTS})["h"]) == 2


def histogram_of(values: NDArray[np.float32]) -> HistogramStats:
    stats = HistogramStats(Probe("h", "histogram"))
    stats.update(values, SampleId(0))
    return stats


def after(function: str, values: NDArray[np.float32], weight: float = 1.0, spec: QuantSpec = SPEC) -> Range:
    graph = graph_of(
        f"g (float[N,3,8,8] x) => (float[N,8,8,8] y) {{ h = Conv (x, w, b) y = {function} }}",
        CONV | CONSTANTS,
    )
    placed = PlacedTensor("h@", "h", spec, PLAIN, at_result=True)
    return after_ranges(graph, {"it": placed}, {"it": histogram_of(values)}, weight)["it"]


class TestAfterRanges:
    VALUES = (np.random.default_rng(0).standard_normal(20000) * 4).astype(np.float32)

    def test_hardswish_needs_nothing_below_minus_three(self) -> None:
        rng = after("HardSwish (h)", self.VALUES)
        assert -3 / 0.9 <= float(rng.lo) <= -2.4, "the candidates lie a factor of 0.9 apart"
        assert float(rng.hi) > 0.8 * self.VALUES.max()

    def test_a_saturating_function_needs_neither_end(self) -> None:
        rng = after("Tanh (h)", self.VALUES)
        assert -6 < float(rng.lo) < -1.5
        assert 1.5 < float(rng.hi) < 6

    def test_without_a_function_nearly_everything_is_kept(self) -> None:
        values = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
        rng = after("Conv (h, id)", values)
        assert float(rng.lo) < -0.9
        assert float(rng.hi) > 0.9

    def test_clipping_may_count_more(self) -> None:
        heavy = np.random.default_rng(0).standard_t(2, 20000).astype(np.float32)
        light, strict = after("Conv (h, id)", heavy), after("Conv (h, id)", heavy, 16.0)
        assert strict.hi - strict.lo > light.hi - light.lo

    @pytest.mark.parametrize("function", ["HardSwish (h)", "Tanh (h)", "Conv (h, id)"])
    def test_never_worse_than_everything(self, function: str) -> None:
        actual = {"HardSwish (h)": hardswish, "Tanh (h)": np.tanh, "Conv (h, id)": lambda x: x}[function]
        x = self.VALUES

        def cost(rng: Range) -> float:
            seen = fake_quantize(x, params_from_range(rng, SPEC)).astype(np.float64)
            return float(((actual(seen) - actual(x.astype(np.float64))) ** 2).sum())

        full = Range(np.asarray(float(x.min())), np.asarray(float(x.max())))
        assert cost(after(function, x)) <= cost(full) * 1.02

    def test_symmetric(self) -> None:
        rng = after("HardSwish (h)", self.VALUES, spec=QuantSpec(INT8, PerTensor(), True))
        assert float(rng.lo) == -float(rng.hi)

    @pytest.mark.parametrize(
        "values", [np.zeros(100), np.full(100, 2.5), np.full(100, -2.5), np.linspace(1, 2, 50)]
    )
    def test_degenerate_values(self, values: NDArray[np.float64]) -> None:
        rng = after("HardSwish (h)", values.astype(np.float32))
        assert float(rng.lo) <= 0 <= float(rng.hi)
        assert np.isfinite([rng.lo, rng.hi]).all()


OUTPUT = with_activation(range=OUTPUT_MSE, range_name=OUTPUT_MSE)
READERS = {
    "matmul": ("g (float[N,16] x) => (float[N,8] y) { [l] y = MatMul (x, w) }", {"w": (16, 8)}),
    "matmul batch": (
        "g (float[N,2,3,16] x) => (float[N,2,3,8] y) { [l] y = MatMul (x, w) }",
        {"w": (2, 16, 8)},
    ),
    "gemm": ("g (float[N,16] x) => (float[N,8] y) { [l] y = Gemm <transB = 1> (x, w) }", {"w": (8, 16)}),
    "conv": (
        "g (float[N,4,6,6] x) => (float[N,8,6,6] y) { [l] y = Conv <pads = [1, 1, 1, 1]> (x, w) }",
        {"w": (8, 4, 3, 3)},
    ),
    "depthwise": (
        "g (float[N,4,6,6] x) => (float[N,4,4,4] y) { [l] y = Conv <group = 4> (x, w) }",
        {"w": (4, 1, 3, 3)},
    ),
    "strided conv1d": (
        "g (float[N,4,12] x) => (float[N,8,5] y) { [l] y = Conv <strides = [2], dilations = [2]> (x, w) }",
        {"w": (8, 4, 2)},
    ),
}


class TestOutputRange:
    @pytest.mark.parametrize("name", list(READERS))
    def test_never_worse_than_everything_by_its_own_cost(self, name: str) -> None:
        """The error of W q(x) on the reservoir's rows, computed here from the rows and the weight alone."""
        body, shapes = READERS[name]
        weights = weights_of(3, **{k: v for k, v in shapes.items() if k != "w" or name != "matmul batch"})
        if name == "matmul batch":
            rng = np.random.default_rng(3)
            weights["w"] = rng.standard_normal((16, 8)).astype(np.float32)[None].repeat(2, 0)
        proto = parse(body, weights)
        feeds = [{"x": f["x"] ** 3} for f in feeds_for(proto)]  # heavy tails
        workspace = workspace_of(proto, feeds, "generic")
        placement = place(workspace.graph, choose(workspace.graph, OUTPUT), TARGETS["generic"])
        stats = workspace.collect(quantize.probes(workspace, placement))
        (placed,) = placement.tensors.values()
        chosen = output_range(workspace.graph, placed, stats)
        (rows,) = [s.rows for s in stats.values() if isinstance(s, RowStats)]
        (histogram,) = [s for s in stats.values() if isinstance(s, HistogramStats)]
        full = MinMax().range_of({"histogram": histogram}, grid_of(placed.spec))
        assert full.lo <= chosen.lo <= chosen.hi <= full.hi

        def cost(range_: Range) -> float:
            change = fake_quantize(rows, params_from_range(range_, placed.spec)) - rows
            w = weights["w"]
            if name == "depthwise":
                out = np.einsum(
                    "rck,ock->rc", change.reshape(len(rows), 4, 9), w.reshape(4, 1, 9).transpose(1, 0, 2)
                )
            elif name.endswith(("conv", "conv1d")):
                out = change @ w.reshape(len(w), -1).T
            else:
                out = change @ (w.T if name == "gemm" else w[0] if w.ndim == 3 else w)
            return float((out.astype(np.float64) ** 2).sum())

        assert cost(chosen) <= cost(full) * (1 + 1e-6)

    def test_outliers_that_carry_nothing_are_clipped(self) -> None:
        """Column 0 is huge but has weight 0; only the readers' outputs can tell."""
        weights = weights_of(3, w=(16, 8))
        weights["w"][0] = 0
        proto = parse(READERS["matmul"][0], weights)
        feeds = [
            {"x": np.concatenate([f["x"][:, :1] * 100, f["x"][:, 1:]], axis=1)} for f in feeds_for(proto)
        ]
        plan, _ = apply_step(workspace_of(proto, feeds, "generic"), OUTPUT)
        ((rng, method),) = plan.ranges.values()
        assert method == OUTPUT_MSE
        assert float(rng.hi) < 0.2 * max(float(f["x"].max()) for f in feeds)

    def test_outliers_that_carry_the_signal_are_kept(self) -> None:
        proto = parse(READERS["matmul"][0], weights_of(3, w=(16, 8)))
        feeds = [
            {"x": np.concatenate([f["x"][:, :1] * 100, f["x"][:, 1:]], axis=1)} for f in feeds_for(proto)
        ]
        plan, _ = apply_step(workspace_of(proto, feeds, "generic"), OUTPUT)
        ((rng, _),) = plan.ranges.values()
        assert float(rng.hi) > 0.8 * max(float(f["x"].max()) for f in feeds)

    def test_rows_with_nan_do_not_take_part(self) -> None:
        proto = parse(READERS["matmul"][0], weights_of(3, w=(16, 8)))
        feeds = [{"x": f["x"] ** 3} for f in feeds_for(proto)]
        clean, _ = apply_step(workspace_of(proto, feeds, "generic"), OUTPUT)
        bad = np.full((2, 16), np.nan, np.float32)
        broken, _ = apply_step(workspace_of(proto, [*feeds, {"x": bad}], "generic"), OUTPUT)
        for (a, _), (b, _) in zip(clean.ranges.values(), broken.ranges.values(), strict=True):
            assert (float(a.lo), float(a.hi)) == (float(b.lo), float(b.hi))

    @pytest.mark.parametrize("choice", [OUTPUT, with_activation(range=AUTO, range_name=AUTO), PLAIN])
    def test_nothing_finite_names_the_tensor(self, choice: object) -> None:
        proto = parse(READERS["matmul"][0], weights_of(3, w=(16, 8)))
        workspace = workspace_of(proto, [{"x": np.full((2, 16), np.nan, np.float32)}], "generic")
        with pytest.raises(CalibrationError, match=r"tensor 'x'.*no .*finite value"):
            apply_step(workspace, replace(choice, bias_correction=True))  # type: ignore[type-var]


def numbers(plan_params: dict[str, QParams], factor: float) -> dict[str, QParams]:
    return {k: replace(p, scale=p.scale * factor) for k, p in plan_params.items()}


class TestJudge:
    @pytest.mark.parametrize("make", [cnn, mlp])
    def test_better_numbers_score_higher(self, make: object) -> None:
        proto = make()  # type: ignore[operator]
        workspace = workspace_of(proto)
        exact = workspace.model()
        plan, _ = apply_step(workspace)
        judge = workspace.judge(plan, 8, exact)
        scores = [judge.score(numbers(plan.params, f)) for f in (1.0, 3.0, 10.0, 0.1)]
        assert scores[0] > scores[1] > scores[2]
        assert scores[0] > scores[3]

    def test_scores_are_decibels_of_the_rendered_model(self) -> None:
        """What the judge expects is what the quantized model then does."""
        from onnxslim_ptq.export.qdq import render_qdq
        from tests.graph.models import embedded
        from tests.models import outputs_of, sqnr_of

        proto = cnn()
        workspace = workspace_of(proto)
        exact = workspace.model()
        plan, _ = apply_step(workspace)
        score = workspace.judge(plan, 16, exact).score(plan.params)
        rendered = embedded(render_qdq(workspace.model(), plan, TARGETS["cpu"]))
        feeds = feeds_for(proto)
        assert score == pytest.approx(sqnr_of(outputs_of(proto, feeds), outputs_of(rendered, feeds)), abs=1.0)

    def test_samples_with_nan_do_not_blind_it(self) -> None:
        proto = mlp()
        feeds = feeds_for(proto)
        feeds[2] = {"x": np.full((3, 16), np.nan, np.float32)}
        workspace = workspace_of(proto, feeds)
        exact = workspace.model()
        plan, _ = apply_step(workspace)
        judge = workspace.judge(plan, 16, exact)
        assert judge.score(plan.params) > judge.score(numbers(plan.params, 4.0)) > 0

    def test_auto_is_the_best_of_its_candidates(self) -> None:
        """With outliers, minmax everywhere is not what auto returns, and its score is at least as high."""
        proto = mlp()
        feeds = [{"x": np.asarray(f["x"] ** 5, np.float32)} for f in feeds_for(proto)]
        scores = {}
        for name, choice in (("auto", with_activation(range=AUTO, range_name=AUTO)), ("minmax", PLAIN)):
            workspace = workspace_of(proto, feeds)
            exact = workspace.model()
            plan, _ = apply_step(workspace, choice)
            scores[name] = workspace.judge(plan, 16, exact).score(plan.params)
        assert scores["auto"] >= scores["minmax"]

    def test_sequence_outputs_are_passed_over(self) -> None:
        proto = parse(
            "g (float[N,16] x) => (float[N,8] y, seq(float[N,8]) s) { y = MatMul (x, w) s = SequenceConstruct (y) }",
            weights_of(3, w=(16, 8)),
        )
        workspace = workspace_of(proto)
        plan, _ = apply_step(workspace, with_activation(range=AUTO, range_name=AUTO))
        assert 20 < workspace.judge(plan, 4, workspace.model()).score(plan.params) < 80

    def test_float16(self) -> None:
        half = {k: onnx.numpy_helper.from_array(v.astype(np.float16), k) for k, v in CONV.items()}
        proto = parse(
            "g (float16[N,3,8,8] x) => (float16[N,4,8,8] y) { h = Conv (x, w, b) r = Relu (h) y = Conv (r, u) }"
        )
        proto.graph.initializer.extend(half.values())
        workspace = workspace_of(proto)
        plan, _ = apply_step(workspace, with_activation(range=AUTO, range_name=AUTO))
        assert workspace.judge(plan, 4, workspace.model()).score(plan.params) > 25
