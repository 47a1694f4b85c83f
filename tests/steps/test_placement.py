"""Where values are quantized, by target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.ranges import Percentile
from onnxslim_ptq.core.choice import WeightForm
from onnxslim_ptq.core.dtypes import INT8, UINT8
from onnxslim_ptq.core.spec import PerChannel, PerTensor, QuantPlan, Result, Use
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.steps.placement import Placement, place
from tests.graph.models import graph_of, parse
from tests.models import cnn, quantized, session_of, weights_of
from tests.steps.layers import PLAIN, choose

CONV = weights_of(1, w=(8, 3, 1, 1), b=(8,), u=(4, 8, 1, 1), v=(4, 8, 1, 1))


def placed(body: str, target: str = "cpu", **changes: object) -> tuple[Graph, Placement, QuantPlan]:
    graph = graph_of(f"g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {body} }}", CONV)
    row = TARGETS[target]
    choice = {"dtype": row.activation, "symmetric": row.symmetric_activation, **changes}
    placement = place(graph, choose(graph, PLAIN, **dict.fromkeys(("c1", "c2", "c3"), choice)), row)
    return graph, placement, placement.plan(row)


def results(plan: QuantPlan) -> list[str]:
    return [site.tensor for site in plan.activations if isinstance(site, Result)]


class TestOutputs:
    def test_a_conv_is_quantized_at_its_output(self) -> None:
        _, _, plan = placed("[c1] y = Conv (x, w, b)")
        assert results(plan) == ["y"]
        assert Use("c1", 0) in plan.activations

    @pytest.mark.parametrize("relu", ["Relu (h)", "Clip (h, zero, six)", "Clip (h, zero)"])
    def test_an_activation_function_with_floor_zero_is_taken_in(self, relu: str) -> None:
        body = (
            f"zero = Constant <value_float = 0.0> () six = Constant <value_float = 6.0> ()"
            f"[c1] h = Conv (x, w, b) y = {relu}"
        )
        assert results(placed(body)[2]) == ["y"]

    @pytest.mark.parametrize(
        "other", ["Clip (h, one, six)", "Clip (h, , six)", "LeakyRelu (h)", "HardSwish (h)"]
    )
    def test_others_are_not(self, other: str) -> None:
        body = (
            f"one = Constant <value_float = -1.0> () six = Constant <value_float = 6.0> ()"
            f"[c1] h = Conv (x, w, b) y = {other}"
        )
        assert results(placed(body)[2]) == ["h"]

    def test_clip_before_opset_11(self) -> None:
        body = """g (float[N,3,8,8] x) => (float[N,8,8,8] y)
            {{ [c1] h = Conv (x, w, b) y = Clip <min = {}, max = 6.0> (h) }}"""
        for low, at in ((0.0, "y"), (-1.0, "h")):
            graph = graph_of(body.format(low), CONV, 9)
            assert results(place(graph, choose(graph), TARGETS["cpu"]).plan(TARGETS["cpu"])) == [at]

    def test_not_when_someone_else_reads_the_value_before(self) -> None:
        assert results(placed("[c1] h = Conv (x, w, b) r = Relu (h) y = Add (h, r)")[2]) == ["h"]

    def test_not_when_symmetric(self) -> None:
        """A lowest code that does not mean 0 cannot stand for the Relu."""
        assert results(placed("[c1] h = Conv (x, w, b) y = Relu (h)", symmetric=True)[2]) == ["h"]

    @pytest.mark.parametrize("target", ["generic", "tensorrt", "openvino", "ascend"])
    def test_other_targets_need_no_output(self, target: str) -> None:
        assert results(placed("[c1] h = Conv (x, w, b) y = Relu (h)", target)[2]) == []


class TestSharing:
    BODY = "[c1] h = Conv (x, w, b) r = Relu (h) [c2] p = Conv (r, u) [c3] q = Conv (r, v) y = Add (p, q)"

    @pytest.mark.parametrize("target", ["cpu", "generic"])
    def test_readers_of_one_value_share_numbers(self, target: str) -> None:
        _, placement, plan = placed(self.BODY, target)
        slots = [plan.activations[Use(n, 0)] for n in ("c2", "c3")]
        assert slots[0].params == slots[1].params
        assert [r.node for r in placement.tensors[slots[0].params].readers] == ["c2", "c3"]
        if target == "cpu":
            assert plan.activations[Result("r")] == slots[0]
            assert [p.node for p in placement.tensors[slots[0].params].producers] == ["c1"]

    def test_readers_that_want_other_numbers_get_their_own(self) -> None:
        graph = graph_of(f"g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {self.BODY} }}", CONV)
        layers = choose(graph, c3={"range": Percentile(), "range_name": "percentile"})
        plan = place(graph, layers, TARGETS["generic"]).plan(TARGETS["generic"])
        assert plan.activations[Use("c2", 0)].params != plan.activations[Use("c3", 0)].params

    def test_unless_the_value_is_quantized_where_it_is_made(self) -> None:
        """Then the graph holds one Q for all, and the plan must say the same."""
        graph = graph_of(f"g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {self.BODY} }}", CONV)
        layers = choose(graph, c3={"range": Percentile(), "range_name": "percentile"})
        placement = place(graph, layers, TARGETS["cpu"])
        plan = placement.plan(TARGETS["cpu"])
        slot = plan.activations[Result("r")]
        assert plan.activations[Use("c2", 0)] == plan.activations[Use("c3", 0)] == slot
        assert sorted(p.tensor for p in placement.tensors.values()) == ["p", "q", "r", "x"]
        assert any("c3" in note and "'r'" in note for note in plan.notes)

    def test_and_the_model_that_follows_uses_integer_kernels(self) -> None:
        proto = parse(f"g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {self.BODY} }}", CONV)
        recipe = {
            "steps": [
                {"type": "quantize", "act": {"range": {"type": "minmax"}}},
                {
                    "type": "quantize",
                    "include": ["c3"],
                    "act": {"range": {"type": "percentile", "percentile": 99.0}},
                },
            ]
        }
        result = quantized(proto, recipe=recipe)
        assert result.skipped == {}
        for use, slot in result.plan.biases.items():
            codes = result.plan.bias_codes[slot.params]
            used = result.plan.activations[Use(use.node, 0)].params
            weight = result.plan.weight_codes[codes.weight].params.scale
            np.testing.assert_allclose(codes.scale, result.plan.params[used].scale * weight, rtol=1e-6)


class TestTargets:
    def test_cpu(self) -> None:
        _, _, plan = placed("[c1] h = Conv (x, w, b) [c2] y = Conv (h, u)")
        assert {(s.spec.dtype, s.spec.symmetric) for s in plan.activations.values()} == {(UINT8, False)}
        assert plan.weights[Use("c1", 1)].spec.grain == PerChannel(0)
        assert list(plan.biases) == [Use("c1", 2)]

    def test_tensorrt(self) -> None:
        _, _, plan = placed("[c1] h = Conv (x, w, b) [c2] y = Conv (h, u)", "tensorrt")
        assert {(s.spec.dtype, s.spec.symmetric) for s in plan.activations.values()} == {(INT8, True)}
        assert plan.biases == {}, "TensorRT takes no int32 bias"

    def test_tensorrt_graph(self) -> None:
        """Zero points 0 everywhere, and biases float."""
        result = quantized(cnn(), target="tensorrt")
        values = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
        pairs = [n for n in result.model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert pairs
        assert all(not values[n.input[2]].any() for n in pairs)
        assert {values[n.input[2]].dtype.name for n in pairs} == {"int8"}
        convs = [n for n in result.model.graph.node if n.op_type == "Conv" and len(n.input) > 2]
        assert all(values[n.input[2]].dtype == np.float32 for n in convs)

    def test_openvino(self) -> None:
        _, _, plan = placed("[c1] h = Conv (x, w, b) [c2] y = Conv (h, u)", "openvino")
        assert {(s.spec.dtype, s.spec.symmetric) for s in plan.activations.values()} == {(UINT8, False)}
        assert plan.biases == {}

    def test_ascend(self) -> None:
        """Per-channel weights for Conv only."""
        body = "[c1] h = Conv (x, w, b) r = Reshape (h, s) m = MatMul (r, k) y = Reshape (m, t)"
        weights = {
            **CONV,
            "s": np.asarray([-1, 8]),
            "k": CONV["u"].reshape(8, 4),
            "t": np.asarray([-1, 4, 8, 8]),
        }
        graph = graph_of(f"g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {body} }}", weights)
        plan = place(graph, choose(graph), TARGETS["ascend"]).plan(TARGETS["ascend"])
        grains = {use.node: slot.spec.grain for use, slot in plan.weights.items()}
        assert grains == {"c1": PerChannel(0), "MatMul_m": PerTensor()}

    def test_per_tensor_weights_on_request(self) -> None:
        graph = graph_of("g (float[N,3,8,8] x) => (float[N,8,8,8] y) { [c1] y = Conv (x, w, b) }", CONV)
        choice = replace(PLAIN, weight=WeightForm(per_channel=False))
        plan = place(graph, choose(graph, choice), TARGETS["cpu"]).plan(TARGETS["cpu"])
        assert plan.weights[Use("c1", 1)].spec.grain == PerTensor()

    def test_layers_that_stay_float(self) -> None:
        graph = graph_of(
            "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { [c1] h = Conv (x, w, b) [c2] y = Conv (h, u) }",
            CONV,
        )
        placement = place(graph, choose(graph), TARGETS["cpu"], floats={"c1": "because"})
        assert placement.skipped == {"c1": "because"}
        assert list(placement.layers) == ["c2"]
        assert not any(p.tensor == "x" for p in placement.tensors.values())


class TestSums:
    BODY = "[c1] h = Conv (x, w, b) [c2] k = Conv (x, w, b) s = Add (h, k) [c3] y = Conv (s, u)"

    def test_a_sum_of_conv_outputs_is_quantized_where_it_is_made(self) -> None:
        assert results(placed(self.BODY)[2]) == ["s", "h", "k", "y"]

    @pytest.mark.parametrize("target", ["generic", "tensorrt", "openvino"])
    def test_not_elsewhere(self, target: str) -> None:
        assert results(placed(self.BODY, target)[2]) == []

    def test_behind_its_relu(self) -> None:
        body = self.BODY.replace("[c3] y = Conv (s, u)", "r = Relu (s) [c3] y = Conv (r, u)")
        assert "r" in results(placed(body)[2])

    def test_a_sum_with_a_float_value_is_not(self) -> None:
        body = "[c1] h = Conv (x, w, b) k = Sin (h) s = Add (h, k) [c2] y = Conv (s, u)"
        assert results(placed(body)[2]) == ["h", "y"]

    def test_a_sum_that_no_layer_reads_is_not(self) -> None:
        body = "[c1] h = Conv (x, w, b) [c2] k = Conv (x, w, b) s = Add (h, k) y = ReduceMax <axes = [1]> (s)"
        assert results(placed(body)[2]) == ["h", "k"]

    def test_sums_of_sums(self) -> None:
        body = (
            "[c1] h = Conv (x, w, b) [c2] k = Conv (x, w, b) s = Add (h, k) [c3] m = Conv (s, id) t = Add (s, m)"
            "[c4] y = Conv (t, u)"
        )
        graph = graph_of(
            f"g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {body} }}", CONV | weights_of(2, id=(8, 8, 1, 1))
        )
        changes = {"dtype": UINT8}
        row = TARGETS["cpu"]
        plan = place(
            graph, choose(graph, PLAIN, **dict.fromkeys(("c1", "c2", "c3", "c4"), changes)), row
        ).plan(row)
        assert {"s", "t"} <= set(results(plan))

    def test_onnxruntime_adds_in_integers(self, tmp_path: Path) -> None:
        proto = parse(f"g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {self.BODY} }}", CONV)
        written = tmp_path / "optimized.onnx"
        session_of(quantized(proto).model, written)
        assert "QLinearAdd" in {n.op_type for n in onnx.load(written).graph.node}


def test_a_graph_output_is_quantized_too() -> None:
    """Without an output Q the last Conv would not be an integer kernel."""
    proto = parse("g (float[N,3,8,8] x) => (float[N,8,8,8] y) { [c1] y = Conv (x, w, b) }", CONV)
    result = quantized(proto)
    assert result.plan.quantized_nodes() == ["c1"]
    assert [o.name for o in result.model.graph.output] == ["y"]
    seen = session_of(result.model).run(None, {"x": np.ones((1, 3, 8, 8), np.float32)})[0]
    assert len(np.unique(seen)) <= 256
