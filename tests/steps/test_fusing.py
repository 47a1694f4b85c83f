"""No int8 weight is dequantized at every run by ONNX Runtime: such a layer gets an output Q or stays float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calib.model import Model, open_model
from onnxslim_ptq import Result as Quantized
from onnxslim_ptq.core.spec import QuantPlan, Result, Use
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.fusion import stored_weight, unfused_weights
from onnxslim_ptq.steps import fusing
from onnxslim_ptq.steps.fusing import NOT_FUSED, dry_placement
from onnxslim_ptq.steps.placement import place
from tests.graph.models import model_of, parse
from tests.models import cnn, feeds_for, mlp, outputs_of, quantized, weights_of
from tests.steps.layers import apply_step, choose, place_all, workspace_of

W = weights_of(7, w=(16, 16), v=(16, 16), b=(16,), c1=(8, 3, 3, 3), c2=(8, 8, 3, 3))
BODIES = {
    "matmul": "float[N,16] y) { [l] y = MatMul (x, w) }",
    "matmul relu": "float[N,16] y) { [l] m = MatMul (x, w) r = Relu (m) [k] y = MatMul (r, v) }",
    "matmul relu as output": "float[N,16] y) { [l] m = MatMul (x, w) y = Relu (m) }",
    "2-D matmul and residual": "float[N,16] y) { [l] m = MatMul (x, w) y = Add (m, x) }",
    "residual on the left": "float[N,16] y) { [l] m = MatMul (x, w) y = Add (x, m) }",
    "2-D matmul and bias": "float[N,16] y) { [l] m = MatMul (x, w) y = Add (m, b) }",
    "matmul, bias, residual": "float[N,16] y) { [l] m = MatMul (x, w) a = Add (m, b) y = Add (a, x) }",
    "gemm and residual": "float[N,16] y) { [l] m = Gemm (x, w, b) y = Add (m, x) }",
    "matmul sigmoid": "float[N,16] y) { [l] m = MatMul (x, w) s = Sigmoid (m) [k] y = MatMul (s, v) }",
    "matmul gelu": "float[N,16] y) { [l] m = MatMul (x, w) s = Erf (m) t = Mul (s, m) [k] y = MatMul (t, v) }",
    "shared weight": "float[N,16] y) { [l] m = MatMul (x, w) r = Relu (m) [k] n = MatMul (r, w) y = Add (n, r) }",
    "matmul transposed": "float[16,N] y) { [l] m = MatMul (x, w) y = Transpose (m) }",
    "matmul, two readers": "float[N,16] y) { [l] m = MatMul (x, w) r = Relu (m) s = Sigmoid (m) y = Mul (r, s) }",
    "relu twice": "float[N,16] y) { [l] m = MatMul (x, w) r = Relu (m) s = Relu (r) [k] y = MatMul (s, v) }",
}


def model(name: str) -> onnx.ModelProto:
    return parse(f"g (float[N,16] x) => ({BODIES[name]}", W)


def optimized(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime runs it: an oracle of its own, with ONNX Runtime alone."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


def weights_dequantized_at_run_time(proto: onnx.ModelProto, folder: Path) -> list[str]:
    graph = optimized(proto, folder).graph
    eight_bits = {
        t.name for t in graph.initializer if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    }
    return [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in eight_bits]


def check(result: Quantized, folder: Path) -> None:
    assert weights_dequantized_at_run_time(result.model, folder) == []
    quantized_nodes = set(result.plan.quantized_nodes())
    assert quantized_nodes.isdisjoint(result.skipped)


class TestEveryResult:
    @pytest.mark.parametrize("name", list(BODIES))
    def test_no_weight_is_dequantized_at_run_time(self, name: str, tmp_path: Path) -> None:
        try:
            result = quantized(model(name))
        except GraphError as error:  # its only layer stays float, for that reason
            assert NOT_FUSED in str(error)  # noqa: PT017 - either end is right
            return
        check(result, tmp_path)
        both = [n for n in "lk" if f"[{n}]" in BODIES[name]]
        for node in both:
            assert (node in result.plan.quantized_nodes()) != (result.skipped.get(node) == NOT_FUSED)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("make", [cnn, mlp])
    def test_networks(self, make: object, symmetric: bool, tmp_path: Path) -> None:
        recipe = {"steps": [{"type": "quantize", "act": {"symmetric": symmetric}}]}
        result = quantized(make(), recipe=recipe)  # type: ignore[operator]
        check(result, tmp_path)

    def test_convs_in_sequence(self, tmp_path: Path) -> None:
        body = """g (float[N,3,9,9] x) => (float[N,8,5,5] y)
            { [a] h = Conv (x, c1) r = HardSwish (h) [b] y = Conv (r, c2) }"""
        result = quantized(parse(body, W))
        check(result, tmp_path)
        assert result.skipped == {}

    def test_layers_with_an_output_q_stay_quantized(self) -> None:
        """A 2-D MatMul with a residual Add becomes a Gemm unless something stands between: an output Q does."""
        result = quantized(model("2-D matmul and residual"))
        assert result.plan.quantized_nodes() == ["l"]
        assert [s.tensor for s in result.plan.activations if isinstance(s, Result)] == ["m"]


class TestFinding:
    def _rendered(self, name: str, output_q: frozenset[str]) -> Model:
        from onnxslim_ptq.export.qdq import render_qdq

        workspace = workspace_of(model(name))
        placement = place(workspace.graph, choose(workspace.graph), TARGETS["cpu"], output_q)
        plan, _ = apply_step(workspace, placement=placement)
        return render_qdq(workspace.model(), plan, TARGETS["cpu"])

    def test_the_trap_is_there(self) -> None:
        """If this fails, ONNX Runtime has learnt to fuse it, and dry_placement may be too careful."""
        without = self._rendered("2-D matmul and residual", frozenset())
        assert unfused_weights(without) == {"w_quantized"}
        assert unfused_weights(self._rendered("2-D matmul and residual", frozenset({"l"}))) == set()

    def test_stored_weight(self) -> None:
        proto = self._rendered("matmul", frozenset()).proto
        assert stored_weight(proto, [("l", 1), ("l", 0), ("nobody", 0)]) == {
            ("l", 1): "w_quantized",
            ("l", 0): "x_quantized",
        } or stored_weight(proto, [("l", 1)]) == {("l", 1): "w_quantized"}

    def test_a_float_model_has_none(self) -> None:
        assert unfused_weights(open_model(mlp())) == set()

    def test_a_weight_only_dequantizer_is_found(self) -> None:
        body = """g (float[N,16,3,3] x) => (float[N,16,3,3] y)
            <int8[16,16,1,1] q, float s = {0.01}, int8 z = {0}> { d = DequantizeLinear (q, s, z) y = Conv (x, d) }"""
        loose = model_of(body, {"q": np.ones((16, 16, 1, 1), np.int8)})
        assert unfused_weights(loose) == {"q"}

    def test_other_targets_are_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*_: object) -> set[str]:
            raise AssertionError("ONNX Runtime here is not the target")

        monkeypatch.setattr(fusing, "unfused_layers", never)
        workspace = workspace_of(model("2-D matmul and residual"), target="generic")
        assert list(dry_placement(workspace, choose(workspace.graph)).layers) == ["l"]


class TestGivingUp:
    def test_dry_placement_tries_an_output_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A layer that is stuck whatever is done stays float; others are not affected."""
        monkeypatch.setattr(
            fusing,
            "unfused_layers",
            lambda _, plan: {"mm1"} if any(u.node == "mm1" for u in plan.weights) else set(),
        )
        workspace = workspace_of(mlp())
        placement = dry_placement(workspace, choose(workspace.graph))
        assert placement.skipped == {"mm1": NOT_FUSED}
        assert list(placement.layers) == ["mm2", "mm3"]
        assert placement.output_q == {"mm1"}

    def test_a_layer_that_turns_out_slow_at_the_end_is_float_exactly(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Dry numbers are made up; when real ones do not fuse, the layer leaves the plan and takes its bias along."""
        from onnxslim_ptq import pipeline

        def slow(_: object, plan: QuantPlan) -> set[str]:
            return {"mm1"} & {u.node for u in plan.weights}

        monkeypatch.setattr(pipeline, "unfused_layers", slow)
        proto = mlp()
        result = quantized(proto)
        assert result.skipped == {"mm1": NOT_FUSED}
        assert result.plan.quantized_nodes() == ["mm2", "mm3"]
        values = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
        original = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        add = next(n for n in result.model.graph.node if n.name == "add1")
        np.testing.assert_array_equal(values[add.input[1]], original["b1"])
        np.testing.assert_array_equal(values["w1"], original["w1"])

    def test_reasons_stand_in_graph_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the order of a set is in this process: two runs write the same bytes."""
        from onnxslim_ptq import pipeline

        backwards = dict.fromkeys(["mm3", "mm2", "mm1"]).keys()
        monkeypatch.setattr(
            pipeline, "unfused_layers", lambda _, plan: backwards if len(plan.weights) == 4 else set()
        )
        body = """g (float[N,16] x) => (float[N,16] y) { [mm1] a = MatMul (x, w) [mm2] b = MatMul (a, w)
            [mm3] c = MatMul (b, w) [mm4] y = MatMul (c, w) }"""
        assert list(quantized(parse(body, weights_of(3, w=(16, 16)))).skipped) == ["mm1", "mm2", "mm3"]

    def test_when_all_layers_turn_out_slow_nothing_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from onnxslim_ptq import pipeline

        monkeypatch.setattr(pipeline, "unfused_layers", lambda _, plan: {u.node for u in plan.weights})
        with pytest.raises(GraphError, match=r"no layer can be quantized.*dequantize"):
            quantized(mlp())

    def test_neighbours_keep_what_they_need(self) -> None:
        body = """g (float[N,3,9,9] x) => (float[N,8,3,3] y)
            { [a] h = Conv (x, c1) [b] k = Conv (h, c2) r = HardSwish (k) [c] y = Conv (r, c2) }"""
        workspace = workspace_of(parse(body, W))
        placement = place_all(workspace)
        plan, _ = apply_step(workspace, placement=placement)
        fusing.leave_float(plan, placement, workspace.graph, "a")
        assert Use("b", 0) in plan.activations, "b still reads integers"
        assert Result("h") not in plan.activations, "but nobody needs them where a makes the value"
        assert Result("k") in plan.activations, "b is still an integer kernel"
        fusing.leave_float(plan, placement, workspace.graph, "b")
        assert set(plan.activations) == {Use("c", 0), Result("y")}
        fusing.leave_float(plan, placement, workspace.graph, "c")
        assert (plan.activations, plan.weights) == ({}, {})

    def test_the_layer_behind_one_that_is_given_up_stays_an_integer_kernel(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from onnxslim_ptq import pipeline

        real = pipeline.unfused_layers
        monkeypatch.setattr(
            pipeline,
            "unfused_layers",
            lambda workspace, plan: real(workspace, plan) | ({"a"} & {u.node for u in plan.weights}),
        )
        body = """g (float[N,3,9,9] x) => (float[N,8,5,5] y)
            { [a] h = Conv (x, c1) [b] k = Conv (h, c2) y = HardSwish (k) }"""
        result = quantized(parse(body, W))
        assert result.plan.quantized_nodes() == ["b"]
        check(result, tmp_path)


class TestFloatLayersBetweenQuantizedOnes:
    """ONNX Runtime quantizes the weight of a float Conv that stands between Q/DQ pairs by itself, per tensor."""

    BODY = """g (float[N,3,9,9] x) => (float[N,8,3,3] y)
        { [a] h = Conv (x, c1) r = Relu (h) [b] k = Conv (r, c2) s = Relu (k) [c] y = Conv (s, c3) }"""

    def _model(self, body: str = BODY) -> onnx.ModelProto:
        weights = {**W, **weights_of(8, c3=(8, 8, 3, 3))}
        weights["c2"] = weights["c2"] * np.geomspace(1, 1000, 8, dtype=np.float32)[:, None, None, None]
        return parse(body, weights)

    @pytest.mark.parametrize(
        "body",
        [
            BODY,
            BODY.replace("s = Relu (k)", "s = LeakyRelu (k)"),
            BODY.replace("r = Relu (h)", "r = HardSwish (h)"),
            BODY.replace("r = Relu (h)", "r = MaxPool <kernel_shape = [1, 1]> (h)"),
            BODY.replace("s = Relu (k)", "t = Relu (k) s = MaxPool <kernel_shape = [1, 1]> (t)"),
            BODY.replace("r = Relu (h)", "t = Transpose <perm = [0, 1, 3, 2]> (h) r = Relu (t)"),
        ],
    )
    def test_it_really_stays_float(self, body: str, tmp_path: Path) -> None:
        result = quantized(self._model(body), exclude=["b"])
        graph = optimized(result.model, tmp_path).graph
        assert [n.op_type for n in graph.node].count("QLinearConv") == 2
        assert sum(n.op_type in ("Conv", "FusedConv") for n in graph.node) == 1
        assert not any("with ONNX Runtime's optimizations" in n for n in result.notes)

    def test_only_where_it_is_needed(self) -> None:
        assert all(n.op_type != "Max" for n in quantized(self._model()).model.graph.node)
        assert all(
            n.op_type != "Max"
            for n in quantized(self._model(), exclude=["b"], target="generic").model.graph.node
        )
        assert [n.op_type for n in quantized(self._model(), exclude=["b"]).model.graph.node].count("Max") == 1

    def test_the_trap_is_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """If this fails, ONNX Runtime has mended its ways, and the guard can go."""
        from onnxslim_ptq import pipeline

        monkeypatch.setattr(pipeline, "guard_float_layers", lambda model: model)
        graph = optimized(quantized(self._model(), exclude=["b"]).model, tmp_path).graph
        assert [n.op_type for n in graph.node].count("QLinearConv") == 3


def test_sqnr_of_layers_with_relu_in_between() -> None:
    """The zero point of a Relu's output is the lowest code, so the Relu is taken into the integer kernel."""
    result = quantized(model("matmul relu"), target="cpu")
    for site, slot in result.plan.activations.items():
        if isinstance(site, Result) or site.node == "k":
            assert int(result.plan.params[slot.params].zero_point) == 0
    feeds = feeds_for(model("matmul relu"))
    assert len(outputs_of(result.model, feeds)) == 16
    assert result.metrics["sqnr_db"] > 35
