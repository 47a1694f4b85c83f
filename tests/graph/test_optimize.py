"""Exact simplifications: each acts where it may, leaves alone what it must, and never changes an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx
import pytest

from calib.model import open_model
from calib.types import Array
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize import optimize
from tests.graph.models import embedded, parse, same_outputs

RNG = np.random.default_rng(0)
CONV = RNG.standard_normal((6, 4, 3, 3), dtype=np.float32)
BIAS = RNG.standard_normal(6, dtype=np.float32)
CHANNELS = RNG.uniform(0.5, 2, 6).astype(np.float32)
BN = {"gamma": CHANNELS, "beta": BIAS, "mean": CHANNELS - 1, "var": CHANNELS}
INPUT = "float[N,4,9,9] x"


def optimized(
    body: str, weights: Mapping[str, Array], ops: str, *, opset: int = 17, rtol: float = 1e-5, ir: int = 8
) -> Graph:
    """The graph after ``optimize``: its operators must be ``ops`` and its outputs those of before."""
    model = open_model(parse(body, weights, opset, ir))
    graph = Graph(model)
    optimize(graph)
    result = graph.to_model()
    assert [n.op_type for n in result.proto.graph.node] == ops.split()
    same_outputs(model, result, rtol=rtol, atol=rtol)
    onnx.checker.check_model(embedded(result), full_check=True)
    assert sum(optimize(graph).values()) == 0, "a second run finds nothing to do"
    return graph


class TestBatchNormalization:
    BODY = f"""g ({INPUT}) => (float[N,6,7,7] y) {{
        c = Conv (x, w%s) y = BatchNormalization%s (c, gamma, beta, mean, var) }}"""

    @pytest.mark.parametrize("epsilon", ["", "<epsilon = 0.1>"])
    @pytest.mark.parametrize("bias", ["", ", b"])
    def test_conv(self, bias: str, epsilon: str) -> None:
        graph = optimized(self.BODY % (bias, epsilon), {"w": CONV, "b": BIAS, **BN}, "Conv", rtol=1e-4)
        assert graph.nodes[0].outputs[0].name == "y"

    @pytest.mark.parametrize(("group", "shape"), [(1, (4, 6, 3, 3)), (2, (4, 3, 3, 3)), (4, (4, 2, 3, 3))])
    def test_conv_transpose(self, group: int, shape: tuple[int, ...]) -> None:
        channels = shape[1] * group
        body = f"""g ({INPUT}) => (float[N,{channels},11,11] y) {{
            c = ConvTranspose <group = {group}> (x, w) y = BatchNormalization (c, gamma, beta, mean, var) }}"""
        params = {k: RNG.uniform(0.5, 2, channels).astype(np.float32) for k in BN}
        optimized(
            body, {"w": RNG.standard_normal(shape, dtype=np.float32), **params}, "ConvTranspose", rtol=1e-4
        )

    @pytest.mark.parametrize(("transposed", "shape"), [(0, (4, 6)), (1, (6, 4))])
    def test_gemm(self, transposed: int, shape: tuple[int, ...]) -> None:
        body = f"""g (float[N,4] x) => (float[N,6] y) {{
            c = Gemm <transB = {transposed}, alpha = 0.5, beta = 2.0> (x, w, b)
            y = BatchNormalization (c, gamma, beta, mean, var) }}"""
        weight = RNG.standard_normal(shape, dtype=np.float32)
        optimized(body, {"w": weight, "b": BIAS[None], **BN}, "Gemm", rtol=1e-4)

    @pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 3, 3, 3)])
    def test_other_ranks(self, shape: tuple[int, ...]) -> None:
        sides = ",9" * (len(shape) - 2)
        body = (
            f"g (float[N,4{sides}] x) => (float[N,6{sides.replace('9', '7')}] y) {{ c = Conv (x, w) "
            "y = BatchNormalization (c, gamma, beta, mean, var) }"
        )
        optimized(body, {"w": RNG.standard_normal(shape, dtype=np.float32), **BN}, "Conv", rtol=1e-4)

    def test_old_opset(self) -> None:
        optimized(self.BODY % ("", ""), {"w": CONV, **BN}, "Conv", opset=9, rtol=1e-4)

    @pytest.mark.parametrize(("name", "value"), [("var", -1.0), ("mean", np.nan), ("gamma", np.inf)])
    def test_parameters_that_are_no_numbers_stay(self, name: str, value: float) -> None:
        broken = BN[name].copy()
        broken[2] = value
        optimized(self.BODY % ("", ""), {"w": CONV, **BN, name: broken}, "Conv BatchNormalization")

    def test_zero_gamma_is_a_constant_channel(self) -> None:
        gamma = CHANNELS.copy()
        gamma[1] = 0
        optimized(self.BODY % ("", ""), {"w": CONV, **BN, "gamma": gamma}, "Conv", rtol=1e-4)

    def test_training_mode_stays(self) -> None:
        body = f"""g ({INPUT}) => (float[N,6,7,7] y) {{ c = Conv (x, w)
            y, m, v = BatchNormalization <training_mode = 1> (c, gamma, beta, mean, var) }}"""
        graph = Graph(open_model(parse(body, {"w": CONV, **BN})))
        assert sum(optimize(graph).values()) == 0

    def test_no_layer_before_stays(self) -> None:
        body = "g (float[N,6,7,7] x) => (float[N,6,7,7] y) { y = BatchNormalization (x, gamma, beta, mean, var) }"
        optimized(body, BN, "BatchNormalization")

    def test_unknown_domain_stays(self) -> None:
        body = (self.BODY % ("", "")).replace("= Batch", "= local.Batch")
        graph = Graph(open_model(parse(body, {"w": CONV, **BN})))
        assert sum(optimize(graph).values()) == 0

    def test_float16_keeps_its_digits(self) -> None:
        half = {k: v.astype(np.float16) for k, v in {"w": CONV, **BN}.items()}
        body = (self.BODY % ("", "")).replace("float[", "float16[")
        optimized(body, half, "Conv", rtol=2e-2)
        tiny = {**half, "gamma": (CHANNELS * 1e-4).astype(np.float16), "w": (CONV * 1e-2).astype(np.float16)}
        optimized(body, tiny, "Conv BatchNormalization", rtol=2e-2)


class TestReaders:
    WEIGHTS: ClassVar = {"w": CONV, "k": CHANNELS.reshape(6, 1, 1)}

    def test_two_readers_stay(self) -> None:
        body = f"g ({INPUT}) => (float[N,6,7,7] y, float[N,6,7,7] z) {{ c = Conv (x, w) y = Mul (c, k) z = Relu (c) }}"
        optimized(body, self.WEIGHTS, "Conv Mul Relu")

    def test_layer_that_is_an_output_stays(self) -> None:
        body = f"g ({INPUT}) => (float[N,6,7,7] y, float[N,6,7,7] c) {{ c = Conv (x, w) y = Mul (c, k) }}"
        optimized(body, self.WEIGHTS, "Conv Mul")

    def test_layer_read_by_a_subgraph_stays(self) -> None:
        body = f"""g ({INPUT}, bool t) => (float[N,6,7,7] y, float[N,6,7,7] z) {{ c = Conv (x, w) y = Mul (c, k)
            z = If (t) <then_branch = a () => (float[N,6,7,7] p) {{ p = Relu (c) }},
                        else_branch = b () => (float[N,6,7,7] q) {{ q = Neg (c) }}> }}"""
        optimized(body, self.WEIGHTS, "Conv Mul If")

    def test_shared_weight_is_copied(self) -> None:
        body = f"""g ({INPUT}) => (float[N,6,7,7] y, float[N,6,7,7] z, float[N,6,7,7] u) {{
            c = Conv (x, w) y = Mul (c, k) d = Conv (x, w) z = Add (d, k) u = Conv (x, w) }}"""
        graph = optimized(body, self.WEIGHTS, "Conv Conv Conv")
        names = [n.inputs[1].name for n in graph.nodes]
        assert names[0] != names[1]
        assert len(set(names)) == 3 or names[1] == names[2]

    def test_weight_that_is_an_output_is_copied(self) -> None:
        body = f"g ({INPUT}) => (float[N,6,7,7] y, float[6,4,3,3] w) {{ c = Conv (x, w) y = Mul (c, k) }}"
        optimized(body, self.WEIGHTS, "Conv")

    def test_weight_read_by_a_subgraph_is_copied(self) -> None:
        body = f"""g ({INPUT}, bool t) => (float[N,6,7,7] y, float[6,4,3,3] z) {{ c = Conv (x, w) y = Mul (c, k)
            z = If (t) <then_branch = a () => (float[6,4,3,3] p) {{ p = Relu (w) }},
                        else_branch = b () => (float[6,4,3,3] q) {{ q = Neg (w) }}> }}"""
        optimized(body, self.WEIGHTS, "Conv If")


class TestAffine:
    BODY = f"g ({INPUT}) => (float[N,6,7,7] y) {{ c = Conv (x, w, b) y = %s }}"

    @pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
    @pytest.mark.parametrize(
        "node",
        ["Mul (c, k)", "Mul (k, c)", "Add (c, k)", "Add (k, c)", "Sub (c, k)", "Sub (k, c)", "Div (c, k)"],
    )
    def test_acts(self, node: str, shape: tuple[int, ...]) -> None:
        weights = {"w": CONV, "b": BIAS, "k": CHANNELS.reshape(shape)}
        optimized(self.BODY % node, weights, "Conv", rtol=1e-4)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
    def test_scalars(self, shape: tuple[int, ...]) -> None:
        weights = {"w": CONV, "b": BIAS, "k": np.full(shape, 3, np.float32)}
        optimized(self.BODY % "Mul (c, k)", weights, "Conv", rtol=1e-4)

    def test_batchnorm_as_mul_and_add(self) -> None:
        body = f"g ({INPUT}) => (float[N,6,7,7] y) {{ c = Conv (x, w) m = Mul (c, k) y = Add (m, k) }}"
        optimized(body, {"w": CONV, "k": CHANNELS.reshape(6, 1, 1)}, "Conv", rtol=1e-4)

    @pytest.mark.parametrize(
        ("node", "constant"),
        [
            ("Div (k, c)", CHANNELS.reshape(6, 1, 1)),
            ("Mul (c, k)", np.float32(np.nan).reshape(1)),
            ("Mul (c, k)", np.float32(np.inf).reshape(1)),
            ("Div (c, k)", np.array([1, 2, 0, 4, 5, 6], np.float32).reshape(6, 1, 1)),
            ("Mul (c, k)", np.ones((6, 7, 7), np.float32)),
            ("Mul (c, k)", np.ones((6, 7, 1), np.float32)),
            ("Mul (c, k)", np.arange(7, dtype=np.float32)),
            ("Add (c, k)", np.arange(14, dtype=np.float32).reshape(2, 1, 1, 7)[:1]),
            ("Mul (c, c)", np.float32(1)),
        ],
    )
    def test_stays(self, node: str, constant: Array) -> None:
        graph = Graph(open_model(parse(self.BODY % node, {"w": CONV, "b": BIAS, "k": constant})))
        before = len(graph.nodes)
        optimize(graph)
        assert len(graph.nodes) == before

    def test_a_constant_of_higher_rank_stays(self) -> None:
        body = f"g ({INPUT}) => (float[1,N,6,7,7] y) {{ c = Conv (x, w) y = Mul (c, k) }}"
        optimized(body, {"w": CONV, "k": np.full((1, 1, 1, 1, 1), 2, np.float32)}, "Conv Mul")

    def test_last_axis_is_no_channel_axis(self) -> None:
        body = "g (float[N,4,9,8] x) => (float[N,6,7,6] y) { c = Conv (x, w) y = Mul (c, k) }"
        optimized(body, {"w": CONV, "k": CHANNELS}, "Conv Mul")  # [C] broadcasts along the width

    def test_computed_weight_stays(self) -> None:
        body = f"g ({INPUT}, float[6,4,3,3] w) => (float[N,6,7,7] y) {{ c = Conv (x, w) y = Mul (c, k) }}"
        optimized(body, {"k": np.float32(2)}, "Conv Mul")

    def test_computed_bias_stays(self) -> None:
        body = f"g ({INPUT}, float[6] b) => (float[N,6,7,7] y) {{ c = Conv (x, w, b) y = Mul (c, k) }}"
        optimized(body, {"w": CONV, "k": np.float32(2)}, "Conv Mul")

    def test_gemm(self) -> None:
        body = "g (float[N,4] x) => (float[N,6] y) { c = Gemm (x, w, b) m = Mul (c, k) y = Sub (m, k) }"
        optimized(body, {"w": CONV[:, :, 0, 0].T.copy(), "b": BIAS, "k": CHANNELS}, "Gemm", rtol=1e-4)

    def test_overflow_of_float16_stays(self) -> None:
        body = (self.BODY % "Mul (c, k)").replace("float[", "float16[")
        weights = {
            k: v.astype(np.float16) for k, v in {"w": CONV * 100, "b": BIAS, "k": np.float32(1000)}.items()
        }
        graph = Graph(open_model(parse(body, weights)))
        assert sum(optimize(graph).values()) == 0


class TestGemm:
    @pytest.mark.parametrize("attrs", ["alpha = 0.5", "beta = 3.0", "alpha = 2.0, beta = 0.0, transA = 1"])
    @pytest.mark.parametrize("bias", [BIAS, BIAS[None], np.float32(2), np.full((1, 1), 2, np.float32)])
    def test_plain_form(self, attrs: str, bias: Array) -> None:
        side = "4,3" if "transA" in attrs else "3,4"
        body = f"g (float[{side}] x) => (float[3,6] y) {{ y = Gemm <{attrs}> (x, w, b) }}"
        graph = optimized(body, {"w": CONV[:, :, 0, 0].T.copy(), "b": bias}, "Gemm")
        node = graph.nodes[0]
        assert set(node.attrs) <= {"transA"}
        value = graph.value(node.inputs[2])
        assert value is not None
        assert value.shape == (6,)

    def test_without_bias(self) -> None:
        body = "g (float[3,4] x) => (float[3,6] y) { y = Gemm <alpha = 0.25, transB = 1> (x, w) }"
        graph = optimized(body, {"w": CONV[:, :, 0, 0].copy()}, "Gemm")
        assert dict(graph.nodes[0].attrs) == {"transB": 1}

    @pytest.mark.parametrize("bias", [np.ones((3, 6), np.float32), np.ones((3, 1), np.float32)])
    def test_bias_that_varies_by_row_stays(self, bias: Array) -> None:
        body = "g (float[3,4] x) => (float[3,6] y) { y = Gemm <alpha = 0.5> (x, w, b) }"
        graph = Graph(open_model(parse(body, {"w": CONV[:, :, 0, 0].T.copy(), "b": bias})))
        assert sum(optimize(graph).values()) == 0

    def test_shared_bias_is_copied(self) -> None:
        body = """g (float[3,4] x) => (float[3,6] y, float[3,6] z) {
            y = Gemm <beta = 0.5> (x, w, b) z = Gemm <beta = 4.0> (x, w, b) }"""
        optimized(body, {"w": CONV[:, :, 0, 0].T.copy(), "b": BIAS}, "Gemm Gemm")


class TestPad:
    """Pad with zeros before Conv."""

    PADS = np.array([0, 0, 1, 2, 0, 0, 3, 0])

    def body(self, pad: str, conv: str = "", outputs: str = "float[N,6,H,W] y", more: str = "") -> str:
        return f"g ({INPUT}) => ({outputs}) {{ p = Pad{pad} y = Conv{conv} (p, w) {more} }}"

    @pytest.mark.parametrize(
        "conv", ["", "<pads = [1, 1, 0, 2]>", '<auto_pad = "VALID">', "<strides = [2, 2]>"]
    )
    @pytest.mark.parametrize("value", ["", ", zero"])
    def test_becomes_part_of_the_conv(self, conv: str, value: str) -> None:
        weights = {"w": CONV, "pads": self.PADS, "zero": np.float32(0)}
        graph = optimized(self.body(f"(x, pads{value})", conv), weights, "Conv")
        own = [1, 1, 0, 2] if "pads" in conv else [0] * 4
        assert graph.nodes[0].attrs["pads"] == [a + b for a, b in zip([1, 2, 3, 0], own, strict=True)]

    def test_old_opset(self) -> None:
        body = self.body("<pads = [0, 0, 1, 2, 0, 0, 3, 0]> (x)")
        optimized(body, {"w": CONV}, "Conv", opset=9)

    def test_every_conv_that_reads_it(self) -> None:
        body = self.body("(x, pads)", "", "float[N,6,H,W] y, float[N,6,H,W] z", "z = Conv (p, v)")
        optimized(body, {"w": CONV, "v": 2 * CONV, "pads": self.PADS}, "Conv Conv")

    def test_other_readers_keep_it(self) -> None:
        body = self.body("(x, pads)", "", "float[N,6,H,W] y, float[N,4,H,W] z", "z = Relu (p)")
        optimized(body, {"w": CONV, "pads": self.PADS}, "Pad Conv Relu")

    def test_an_output_stays(self) -> None:
        body = self.body("(x, pads)", "", "float[N,6,H,W] y, float[N,4,H,W] p")
        optimized(body, {"w": CONV, "pads": self.PADS}, "Pad Conv")

    @pytest.mark.parametrize(
        ("pad", "conv", "pads"),
        [
            ("(x, pads, one)", "", PADS),
            ('<mode = "reflect"> (x, pads)', "", PADS),
            ("(x, pads)", '<auto_pad = "SAME_UPPER">', PADS),
            ("(x, pads)", "", np.array([0, 0, 1, -1, 0, 0, 1, 1])),
            ("(x, pads)", "<group = 2>", np.array([0, 2, 0, 0, 0, 2, 0, 0])),
            ("(x, pads, , axes)", "", np.array([1, 1])),
        ],
        ids=["value", "mode", "auto_pad", "crop", "channels", "axes"],
    )
    def test_stays(self, pad: str, conv: str, pads: Array) -> None:
        weights = {"w": CONV, "pads": pads, "one": np.float32(1), "axes": np.array([3])}
        optimized(self.body(pad, conv), weights, "Pad Conv", opset=18)
