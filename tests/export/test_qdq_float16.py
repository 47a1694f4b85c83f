"""Float16 models: float32 between casts where kernels lack float16, float16 scales elsewhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.errors import GraphError
from onnxslim_ptq.core.targets import TARGETS, BiasForm
from onnxslim_ptq.export.qdq import render_qdq, required_opset
from tests.export.plans import plan_for
from tests.export.test_qdq import model_of, optimized_ops, rendered

RNG = np.random.default_rng(3)
CONV = RNG.standard_normal((6, 4, 3, 3), dtype=np.float32) / 4
BIAS = RNG.standard_normal(6, dtype=np.float32)
MAT = RNG.standard_normal((16, 32), dtype=np.float32) / 4
MAT2 = RNG.standard_normal((32, 8), dtype=np.float32) / 4
X = "float[2,4,9,9] x"


HALF = {
    k: v.astype(np.float16)
    for k, v in {"w": CONV, "b": BIAS, "m": RNG.standard_normal((6, 8)), "mb": np.ones(8)}.items()
}


class TestFloat16:
    CONV_BODY = """g (float16[2,4,9,9] x) => (float16[2,6,7,7] y, float16[2,8] z) {
        [conv] c = Conv (x, w, b) y = Relu (c)
        p = GlobalAveragePool (y) f = Flatten (p) [gemm] z = Gemm (f, m, mb) }"""

    def types(self, proto: onnx.ModelProto) -> dict[str, int]:
        return {t.name: t.data_type for t in proto.graph.initializer}

    @pytest.mark.parametrize("results", [(), ("y",), ("c",)])
    @pytest.mark.parametrize("biases", [False, True])
    def test_computed_in_float32(self, results: tuple[str, ...], biases: bool) -> None:
        model = model_of(self.CONV_BODY, HALF, opset=13)
        plan = plan_for(model, results=results, biases=biases)
        assert required_opset(plan, model, TARGETS["cpu"]) == 13
        proto = rendered(model, plan)
        assert proto.opset_import[0].version == 13
        types = self.types(proto)
        assert types["w_scale"] == onnx.TensorProto.FLOAT
        assert onnx.TensorProto.FLOAT16 not in types.values()

    def test_fuses_to_integer_kernels(self, tmp_path: Path) -> None:
        model = model_of(self.CONV_BODY, HALF, opset=13)
        ops = optimized_ops(rendered(model, plan_for(model, results=("y",))), tmp_path)
        assert ops["QLinearConv"] == ops["QGemm"] == 1
        assert not {"Conv", "Gemm"} & set(ops)

    def test_chain_of_layers_needs_no_casts_between(self, tmp_path: Path) -> None:
        body = "g (float16[3,16] x) => (float16[3,8] y) { a = MatMul (x, m) r = Relu (a) y = MatMul (r, n) }"
        model = model_of(body, {"m": MAT.astype(np.float16), "n": MAT2.astype(np.float16)})
        proto = rendered(model, plan_for(model, results=("r",)))
        assert Counter(n.op_type for n in proto.graph.node)["Cast"] == 2
        assert not {"MatMul"} & set(optimized_ops(proto, tmp_path))

    def test_clip_with_constants(self) -> None:
        body = (
            f"g ({X.replace('float', 'float16')}) => (float16[2,6,7,7] y) "
            "{ c = Conv (x, w) r = Clip (c, lo, hi) y = Neg (r) }"
        )
        model = model_of(body, {"w": HALF["w"], "lo": np.float16(0), "hi": np.float16(1)})
        types = self.types(rendered(model, plan_for(model, results=("r",))))
        assert types["lo_float32"] == onnx.TensorProto.FLOAT

    def test_readers_outside(self) -> None:
        body = """g (float16[3,16] x, bool t) => (float16[3,32] a, float16[3,32] s, float16[3,16] n, float16[3,32] z) {
            n = Neg (x) a = MatMul (x, m) s = Sigmoid (a)
            z = If (t) <then_branch = th () => (float16[3,32] p) { p = Neg (a) },
                        else_branch = el () => (float16[3,32] q) { q = Identity (a) }> }"""
        model = model_of(body, {"m": MAT.astype(np.float16)})
        for results in ((), ("a",), ("a", "x")):
            rendered(model, plan_for(model, results=results))

    def test_result_read_by_float_and_integer_nodes(self) -> None:
        body = """g (float16[3,16] x) => (float16[3,8] y, float16[3,32] s) {
            a = MatMul (x, m) s = Sigmoid (a) y = MatMul (a, n) }"""
        model = model_of(body, {"m": MAT.astype(np.float16), "n": MAT2.astype(np.float16)})
        rendered(model, plan_for(model, results=("a",)))

    def test_layers_of_both_types(self) -> None:
        body = """g (float16[3,16] x) => (float[3,8] y) {
            a = MatMul (x, m) c = Cast <to = 1> (a) r = Relu (c) y = MatMul (r, n) }"""
        model = model_of(body, {"m": MAT.astype(np.float16), "n": MAT2})
        for target in ("cpu", "generic"):
            rendered(model, plan_for(model, target=target, results=("c", "r")), target)

    def test_weight_only(self) -> None:
        model = model_of(
            "g (float16[3,16] x) => (float16[3,32] y) { y = MatMul (x, m) }", {"m": MAT.astype(np.float16)}
        )
        for target in ("cpu", "generic"):
            rendered(model, plan_for(model, target=target, weight_only=True), target, least=35)

    @pytest.mark.parametrize("target", ["generic", "tensorrt", "openvino"])
    def test_float16_scales_elsewhere(self, target: str) -> None:
        model = model_of(self.CONV_BODY, HALF, opset=13)
        biases = TARGETS[target].bias is BiasForm.INT32
        plan = plan_for(model, target=target, results=("y",), biases=biases)
        assert required_opset(plan, model, TARGETS[target]) == 19
        proto = rendered(model, plan, target)
        assert (proto.opset_import[0].version, proto.ir_version) == (19, 9)
        types = self.types(proto)
        assert types["w_scale"] == types["x_scale"] == onnx.TensorProto.FLOAT16
        assert types["b_scale" if biases else "b"] == (
            onnx.TensorProto.FLOAT if biases else onnx.TensorProto.FLOAT16
        )

    def test_biases_survive_onnx_runtime(self) -> None:
        """Its WeightBiasQuantization would write int32 codes with a float16 scale, which cannot hold s_x * s_w."""
        model = model_of(
            "g (float16[2,4,9,9] x) => (float16[2,6,7,7] y) { y = Conv (x, w, b) }",
            {"w": (CONV * 0.1).astype(np.float16), "b": BIAS.astype(np.float16)},
        )
        rendered(model, plan_for(model, target="generic", results=("y",)), "generic")

    def test_scale_that_float16_cannot_hold(self) -> None:
        model = model_of(
            "g (float16[3,16] x) => (float16[3,32] y) { y = MatMul (x, m) }",
            {"m": (MAT * 1e-5).astype(np.float16)},
        )
        with pytest.raises(GraphError, match="leaves the range of float16"):
            render_qdq(model, plan_for(model, target="generic"), TARGETS["generic"])
