"""Rendering: every plan gives a valid model that ONNX Runtime loads, fuses where it should, and that stays close."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calib.errors import GraphError
from calib.model import Model, open_model
from calib.types import Array
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.export.qdq import render_qdq, required_opset
from tests.export.plans import plan_for
from tests.graph.models import embedded, feed_for, parse, run

RNG = np.random.default_rng(3)
CONV = RNG.standard_normal((6, 4, 3, 3), dtype=np.float32) / 4
BIAS = RNG.standard_normal(6, dtype=np.float32)
MAT = RNG.standard_normal((16, 32), dtype=np.float32) / 4
MAT2 = RNG.standard_normal((32, 8), dtype=np.float32) / 4
X = "float[2,4,9,9] x"


def rendered(model: Model, plan: QuantPlan, target: str = "cpu", least: float = 20.0) -> onnx.ModelProto:
    """The complete rendered model: checked, loaded with and without optimizations, ``least`` dB from the float one."""
    before = model.proto.SerializeToString()
    result = render_qdq(model, plan, TARGETS[target])
    assert model.proto.SerializeToString() == before
    proto = embedded(result)
    onnx.checker.check_model(proto, full_check=True)
    assert [o.name for o in proto.graph.output] == [o.name for o in model.proto.graph.output]
    for seed in range(2):
        feed = feed_for(proto, seed)
        exact = run(model, feed)
        for optimize in (False, True):
            for y, z in zip(exact, run(proto, feed, optimize), strict=True):
                assert y.dtype == z.dtype
                signal, noise = np.square(np.float64(y)).sum(), np.square(np.float64(y) - z).sum()
                assert 10 * np.log10(signal / max(noise, 1e-20)) > least
    return proto


def optimized_ops(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators after ONNX Runtime's optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


def model_of(body: str, weights: Mapping[str, Array], opset: int = 17) -> Model:
    return open_model(parse(body, weights, opset))


def names(proto: onnx.ModelProto) -> list[str]:
    return [t.name for t in proto.graph.initializer]


class TestForm:
    BODY = f"g ({X}) => (float[2,6,7,7] y) {{ [conv] y = Conv (x, w, b) }}"

    def test_nodes_and_types(self) -> None:
        model = model_of(self.BODY, {"w": CONV, "b": BIAS})
        proto = rendered(model, plan_for(model))
        assert [(n.op_type, n.name) for n in proto.graph.node] == [
            ("QuantizeLinear", "x_QuantizeLinear"),
            ("DequantizeLinear", "x_DequantizeLinear"),
            ("DequantizeLinear", "w_DequantizeLinear"),
            ("DequantizeLinear", "b_DequantizeLinear"),
            ("Conv", "conv"),
        ] or Counter(n.op_type for n in proto.graph.node) == {
            "QuantizeLinear": 1,
            "DequantizeLinear": 3,
            "Conv": 1,
        }
        kinds = {t.name: (t.data_type, list(t.dims)) for t in proto.graph.initializer}
        assert kinds["w_quantized"] == (onnx.TensorProto.INT8, [6, 4, 3, 3])
        assert kinds["w_scale"] == (onnx.TensorProto.FLOAT, [6])
        assert kinds["b_quantized"] == (onnx.TensorProto.INT32, [6])
        assert kinds["x_zero_point"] == (onnx.TensorProto.UINT8, [])
        assert "w" not in kinds
        assert "b" not in kinds

    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("target", ["cpu", "generic", "tensorrt", "openvino"])
    def test_targets(self, target: str, per_channel: bool) -> None:
        model = model_of(self.BODY, {"w": CONV, "b": BIAS})
        plan = plan_for(model, target=target, per_channel=per_channel, biases=target in ("cpu", "generic"))
        rendered(model, plan, target)

    @pytest.mark.parametrize(("per_channel", "opset", "ir"), [(False, 10, 5), (True, 13, 7)])
    def test_lowest_opset_and_ir(self, per_channel: bool, opset: int, ir: int) -> None:
        model = model_of(self.BODY, {"w": CONV, "b": BIAS}, opset=9)
        plan = plan_for(model, per_channel=per_channel)
        assert required_opset(plan, model, TARGETS["cpu"]) == opset
        proto = rendered(model, plan)
        assert (proto.opset_import[0].version, proto.ir_version) == (opset, ir)

    def test_weight_only(self) -> None:
        model = model_of(self.BODY, {"w": CONV, "b": BIAS})
        proto = rendered(model, plan_for(model, weight_only=True), least=35)
        assert [n.op_type for n in proto.graph.node] == ["DequantizeLinear", "Conv"]

    def test_empty_plan(self) -> None:
        model = model_of(self.BODY, {"w": CONV, "b": BIAS})
        assert rendered(model, QuantPlan()).graph == embedded(model).graph


class TestLayers:
    @pytest.mark.parametrize(
        ("node", "weight", "shapes"),
        [
            ("Conv (x, w)", (6, 4, 3), ("2,4,9", "2,6,7")),
            ("Conv (x, w)", (6, 4, 3, 3, 3), ("2,4,5,5,5", "2,6,3,3,3")),
            ("Conv <group = 4> (x, w)", (8, 1, 3, 3), ("2,4,9,9", "2,8,7,7")),
            ("ConvTranspose <strides = [2, 2]> (x, w)", (4, 6, 3, 3), ("2,4,5,5", "2,6,11,11")),
            ("ConvTranspose <group = 2> (x, w)", (4, 3, 3, 3), ("2,4,5,5", "2,6,7,7")),
            ("Gemm (x, w)", (16, 8), ("3,16", "3,8")),
            ("Gemm <transB = 1> (x, w)", (8, 16), ("3,16", "3,8")),
            ("Gemm <transA = 1> (x, w)", (16, 8), ("16,3", "3,8")),
            ("MatMul (x, w)", (16, 8), ("2,3,16", "2,3,8")),
            ("MatMul (x, w)", (2, 16, 8), ("2,3,16", "2,3,8")),
            ("MatMul (x, w)", (16, 1), ("3,16", "3,1")),
        ],
    )
    @pytest.mark.parametrize("per_channel", [False, True])
    def test_every_kind(
        self, node: str, weight: tuple[int, ...], shapes: tuple[str, str], per_channel: bool
    ) -> None:
        model = model_of(
            f"g (float[{shapes[0]}] x) => (float[{shapes[1]}] y) {{ [it] y = {node} }}",
            {"w": RNG.standard_normal(weight, dtype=np.float32) / 4},
        )
        plan = plan_for(model, per_channel=per_channel)
        assert plan.weights
        proto = rendered(model, plan)
        assert {n.op_type for n in proto.graph.node} > {"QuantizeLinear", "DequantizeLinear"}

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_fusion(self, tmp_path: Path, per_channel: bool) -> None:
        body = f"""g ({X}) => (float[2,6,7,7] y, float[2,8] z) {{ c = Conv (x, w, b) y = Relu (c)
            p = GlobalAveragePool (y) f = Flatten (p) z = Gemm (f, m, mb) }}"""
        weights = {
            "w": CONV,
            "b": BIAS,
            "m": RNG.standard_normal((6, 8), dtype=np.float32),
            "mb": np.ones(8, np.float32),
        }
        model = model_of(body, weights)
        ops = optimized_ops(
            rendered(model, plan_for(model, per_channel=per_channel, results=("y",))), tmp_path
        )
        assert ops["QLinearConv"] == 1
        assert ops["QGemm"] == 1
        assert not {"Conv", "Gemm", "Relu"} & set(ops)


class TestResults:
    def test_graph_output_keeps_its_name_and_fuses(self, tmp_path: Path) -> None:
        model = model_of(f"g ({X}) => (float[2,6,7,7] y) {{ y = Conv (x, w, b) }}", {"w": CONV, "b": BIAS})
        proto = rendered(model, plan_for(model, results=("y",)))
        last = proto.graph.node[-1]
        assert (last.op_type, list(last.output)) == ("DequantizeLinear", ["y"])
        assert "QLinearConv" in optimized_ops(proto, tmp_path)

    def test_graph_output_with_readers(self) -> None:
        body = f"g ({X}) => (float[2,6,7,7] y, float[2,6,7,7] z) {{ y = Conv (x, w, b) z = Neg (y) }}"
        model = model_of(body, {"w": CONV, "b": BIAS})
        proto = rendered(model, plan_for(model, results=("y",)))
        assert next(n for n in proto.graph.node if n.op_type == "Neg").input[0] == "y"

    def test_captured_by_a_subgraph(self) -> None:
        body = f"""g ({X}, bool t) => (float[2,6,7,7] z) {{ y = Conv (x, w, b)
            z = If (t) <then_branch = a () => (float[2,6,7,7] p) {{ p = Neg (y) }},
                        else_branch = e () => (float[2,6,7,7] q) {{ q = Identity (y) }}> }}"""
        model = model_of(body, {"w": CONV, "b": BIAS})
        proto = rendered(model, plan_for(model, results=("y",)))
        assert "y" in {o for n in proto.graph.node if n.op_type == "DequantizeLinear" for o in n.output}

    def test_input_that_is_an_output_and_captured(self) -> None:
        body = """g (float[3,16] x, bool t) => (float[3,32] y, float[3,16] x, float[3,16] z) { y = MatMul (x, m)
            z = If (t) <then_branch = a () => (float[3,16] p) { p = Neg (x) },
                        else_branch = e () => (float[3,16] q) { q = Identity (x) }> }"""
        model = model_of(body, {"m": MAT})
        rendered(model, plan_for(model, results=("x",)))

    def test_result_that_a_layer_reads_is_quantized_once(self) -> None:
        body = "g (float[3,16] x) => (float[3,8] y) { a = MatMul (x, m) r = Relu (a) y = MatMul (r, n) }"
        model = model_of(body, {"m": MAT, "n": MAT2})
        proto = rendered(model, plan_for(model, results=("r",)))
        assert Counter(n.op_type for n in proto.graph.node)["QuantizeLinear"] == 2


class TestSharing:
    def test_input_of_several_layers(self) -> None:
        body = "g (float[3,16] x) => (float[3,32] y, float[3,32] z) { y = MatMul (x, m) z = MatMul (x, m2) }"
        model = model_of(body, {"m": MAT, "m2": MAT[::-1].copy()})
        proto = rendered(model, plan_for(model))
        assert Counter(n.op_type for n in proto.graph.node)["QuantizeLinear"] == 1

    def test_weight_of_several_nodes(self) -> None:
        body = (
            "g (float[3,16] x, float[3,16] v) => (float[3,32] y, float[3,32] z) "
            "{ y = MatMul (x, m) z = MatMul (v, m) }"
        )
        model = model_of(body, {"m": MAT})
        proto = rendered(model, plan_for(model))
        assert [n for n in names(proto) if n.startswith("m")] == ["m_quantized", "m_scale", "m_zero_point"]

    def test_weight_also_read_in_float(self) -> None:
        body = "g (float[3,16] x, int64[2] i) => (float[3,32] y, float[2,32] z) { y = MatMul (x, m) z = Gather (m, i) }"
        model = model_of(body, {"m": MAT})
        assert {"m", "m_quantized"} <= set(names(rendered(model, plan_for(model))))

    def test_one_weight_with_two_sets_of_numbers(self) -> None:
        square = RNG.standard_normal((16, 16), dtype=np.float32)
        body = "g (float[3,16] x) => (float[3,16] y, float[3,16] z) { y = MatMul (x, m) z = Gemm <transB = 1> (x, m) }"
        model = model_of(body, {"m": square})
        plan = plan_for(model)
        assert {s.params for s in plan.weights.values()} == {"m@1", "m@0"}
        proto = rendered(model, plan)
        assert {"m_scale", "m_scale_1"} <= set(names(proto))

    def test_bias_of_several_nodes(self) -> None:
        body = f"""g ({X}, float[2,4,9,9] v) => (float[2,6,7,7] y, float[2,6,7,7] z) {{
            y = Conv (x, w, b) z = Conv (v, u, b) }}"""
        model = model_of(body, {"w": CONV, "u": CONV * 3, "b": BIAS})
        proto = rendered(model, plan_for(model))
        assert {"b_quantized", "b_quantized_1", "b_scale", "b_scale_1"} <= set(names(proto))

    def test_names_that_collide(self) -> None:
        body = """g (float[2,4,9,9] b00) => (float[2,6,7,7] w_quantized, float[2,6,7,7] y) {
            [b0_DequantizeLinear] w_quantized = Conv (b00, w, b0) [w_DequantizeLinear] b0_scale = Relu (w_quantized)
            b00_quantized = Neg (b0_scale) y = Neg (b00_quantized) }"""
        model = model_of(body, {"w": CONV, "b0": BIAS})
        rendered(model, plan_for(model, results=("w_quantized",)))


class TestOddities:
    def test_one_channel_and_zero_weights(self) -> None:
        body = "g (float[3,16] x) => (float[3,1] y) { a = MatMul (x, m) y = Add (a, one) }"
        model = model_of(body, {"m": np.zeros((16, 1), np.float32), "one": np.float32([1])})
        rendered(model, plan_for(model))

    def test_no_rows(self) -> None:
        model = model_of("g (float[N,16] x) => (float[N,32] y) { y = MatMul (x, m) }", {"m": MAT})
        proto = embedded(render_qdq(model, plan_for(model), TARGETS["cpu"]))
        for optimize in (False, True):
            assert run(proto, {"x": np.zeros((0, 16), np.float32)}, optimize)[0].shape == (0, 32)

    def test_unreachable_opset(self) -> None:
        model = model_of(
            "g (float[3,16] x) => (float[3,32] y) { a = MatMul (x, m) y = Affine (a) }", {"m": MAT}, opset=7
        )
        plan = QuantPlan()
        with pytest.raises(GraphError, match="Affine"):
            render_qdq(model, plan, TARGETS["cpu"])
