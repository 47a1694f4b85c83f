"""Ascend graphs against a numpy oracle, written from CANN's formulas, independent of renderer and lowering."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.errors import GraphError
from calib.model import Model, open_model
from calib.types import Array, Feed, SampleId
from onnxslim_ptq import quantize
from onnxslim_ptq.analysis.verify import verify
from onnxslim_ptq.cli import main
from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.qmath import reciprocal_pair
from onnxslim_ptq.core.spec import PerTensor, QParams, QuantPlan, QuantSpec
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import VerificationError
from onnxslim_ptq.export.ascend import render_ascend
from onnxslim_ptq.export.lowering import lower_ascend
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.export.reading import read_quantized
from onnxslim_ptq.graph.graph import Graph
from tests.export.plans import plan_for
from tests.graph.models import embedded, feed_for, model_of, run
from tests.models import cnn, feeds_for, mlp, session_of, sqnr_of, weights_of

TARGET = TARGETS["ascend"]


def planned(model: Model) -> QuantPlan:
    """Every layer, with scales that their reciprocals tell."""
    plan = plan_for(model, target="ascend", per_channel=False)
    plan.params = {key: reciprocal_pair(params) for key, params in plan.params.items()}
    return plan


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


class Oracle:
    """Runs an Ascend graph node by node in int64 and float32."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.values: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        self.offsets: dict[str, int] = {}

    def run(self, feed: Feed) -> dict[str, Array]:
        self.values |= dict(feed)
        for node in self.proto.graph.node:
            self.values[node.output[0]] = self._step(node)
        return self.values

    def _step(self, node: onnx.NodeProto) -> Array:
        ins, attrs = [self.values[n] for n in node.input], attributes(node)
        if node.op_type == "AscendQuant":
            self.offsets[node.output[0]] = int(attrs["offset"])
            steps = ins[0].astype(np.float32) * np.float32(attrs["scale"])
            return np.clip(np.rint(steps) + attrs["offset"], -128, 127).astype(np.int8)
        if node.op_type in ("MatMul", "Gemm"):
            sums = (ins[0].astype(np.int64) - self.offsets[node.input[0]]) @ ins[1].astype(np.int64)
            return sums + ins[2] if len(ins) > 2 else sums
        if node.op_type == "Conv":
            sums = _conv(ins[0].astype(np.int64) - self.offsets[node.input[0]], ins[1], attrs)
            return sums + ins[2].reshape(-1, 1, 1) if len(ins) > 2 else sums
        if node.op_type == "AscendDequant":
            assert ins[1].dtype == np.uint64
            assert (ins[1] >> np.uint64(32) == 0).all()
            deq = ins[1].astype(np.uint32).view(np.float32)
            deq = deq.reshape(-1, 1, 1) if ins[0].ndim == 4 else deq
            return ins[0].astype(np.float32) * deq
        if node.op_type == "Add":
            return ins[0] + ins[1]
        if node.op_type == "Relu":
            return np.maximum(ins[0], 0)
        if node.op_type == "Transpose":
            return ins[0].T
        raise NotImplementedError(node.op_type)


def _conv(x: Array, w: Array, attrs: dict[str, Any]) -> Array:
    group, pads = attrs.get("group", 1), attrs.get("pads", [0, 0, 0, 0])
    x = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    parts = np.split(windows, group, axis=1)
    rows = np.split(w.astype(np.int64), group)
    return np.concatenate(
        [np.einsum("nchwij,ocij->nohw", p, r) for p, r in zip(parts, rows, strict=True)], axis=1
    )


CONVS = """g (float[1,3,6,6] x) => (float[1,8,6,6] y) {
    [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    [relu1] r1 = Relu (c1)
    [conv2] c2 = Conv <pads = [1, 1, 1, 1], group = 8> (r1, w2)
    [conv3] c3 = Conv <pads = [1, 0, 1, 0]> (r1, w3, b3)
    [add] y = Add (c2, c3)
}"""
ROWS = """g (float[5,6] x) => (float[5,4] y) {
    [gemm] h = Gemm <transB = 1> (x, w1, b1)
    [turned] t = Gemm <transA = 1> (h, w2, b2)
    [mm] m = MatMul (t, w3)
    [bias] y = Add (m, b3)
}"""


def convs() -> Model:
    return model_of(CONVS, weights_of(3, w1=(8, 3, 3, 3), b1=(8,), w2=(8, 1, 3, 3), w3=(8, 8, 3, 1), b3=(8,)))


def rows() -> Model:
    body = ROWS.replace("float[5,4] y", "float[5,4] y").replace("float[5,6] x", "float[5,6] x")
    return model_of(body, weights_of(4, w1=(5, 6), b1=(5,), w2=(5, 6), b2=(6,), w3=(6, 4), b3=(4,)))


@pytest.mark.parametrize("make", [convs, rows])
@pytest.mark.parametrize("fuse_add", [True, False])
def test_lowered_integers_are_those_of_the_oracle(make: Any, fuse_add: bool) -> None:
    """Every code and every accumulator, bit for bit; outputs too, since both multiply the same two numbers."""
    model = make()
    ascend = render_ascend(model, planned(model), TARGET, fuse_add=fuse_add)
    proto, lowered = embedded(ascend), embedded(lower_ascend(ascend))
    for seed in range(3):
        feed = feed_for(proto, seed)
        expected = Oracle(proto).run(feed)
        names = [
            n.output[0] for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul", "AscendQuant")
        ]
        tapped = onnx.ModelProto.FromString(lowered.SerializeToString())
        tapped.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
        answer, *integers = run(tapped, feed)
        for name, seen in zip(names, integers, strict=True):
            exact = expected[name].astype(np.int64) + (128 if expected[name].dtype == np.int8 else 0)
            np.testing.assert_array_equal(seen, exact, err_msg=name)
        np.testing.assert_array_equal(answer, expected["y"])


@pytest.mark.parametrize("make", [convs, rows])
def test_integers_are_those_of_the_qdq_form(make: Any) -> None:
    model = make()
    plan = planned(model)
    ascend, qdq = (embedded(f(model, plan, TARGET)) for f in (render_ascend, render_qdq))
    stored = [{t.name: numpy_helper.to_array(t) for t in p.graph.initializer} for p in (ascend, qdq)]
    for node in ascend.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            for name in node.input[1:]:
                other = stored[1][name]
                turned = node.name == "gemm" and other.ndim == 2
                np.testing.assert_array_equal(stored[0][name], other.T if turned else other)
    lowered = embedded(lower_ascend(render_ascend(model, plan, TARGET)))
    first = next(n.output[0] for n in ascend.graph.node if n.op_type == "AscendQuant")
    for seed in range(3):
        codes = []
        for proto in (lowered, qdq):
            tapped = onnx.ModelProto.FromString(proto.SerializeToString())
            tapped.graph.output.append(onnx.ValueInfoProto(name=first))
            codes.append(run(tapped, feed_for(qdq, seed))[-1].astype(np.int64))
        np.testing.assert_array_equal(codes[0] - 128, codes[1])


def test_scales_survive_their_reciprocal() -> None:
    scales = np.random.default_rng(0).uniform(1e-6, 50, 100_000)
    spec = QuantSpec(INT8, PerTensor(), False)
    params = reciprocal_pair(QParams(spec, scales, np.zeros(scales.shape, np.int64)))
    inverse = np.float32(1) / params.scale.astype(np.float32)
    np.testing.assert_array_equal(np.float32(1) / inverse, params.scale)
    np.testing.assert_allclose(params.scale, scales, rtol=2e-7)


class TestGraph:
    def test_form(self) -> None:
        model = convs()
        plan = planned(model)
        proto = render_ascend(model, plan, TARGET).proto
        assert proto.ir_version == 8
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17)]
        ops = [n.op_type for n in proto.graph.node]
        assert ops.count("AscendQuant") == 2  # conv2 and conv3 read r1: one AscendQuant for both
        assert ops.count("AscendDequant") == 3
        quant = attributes(next(n for n in proto.graph.node if n.op_type == "AscendQuant"))
        params = plan.params["x"]
        assert isinstance(quant["offset"], float)
        assert quant == {
            "scale": pytest.approx(1 / float(params.scale), rel=1e-7),
            "offset": float(params.zero_point),
            "quant_bit": 8,
        }

    def test_an_add_is_fused_by_its_edge_and_only_where_it_is_constant(self) -> None:
        body = """g (float[2,4] x) => (float[2,4] y, float[2,4] z) {
            [mm] m = MatMul (x, w)
            [relu] r = Relu (x)
            [bias] y = Add (b, m)
            [mm2] n = MatMul (r, w)
            [join] z = Add (n, r)
        }"""
        model = model_of(body, weights_of(5, w=(4, 4), b=(4,)))
        nodes = {n.name: n for n in render_ascend(model, planned(model), TARGET).proto.graph.node}
        assert nodes["bias"].input[0] == "b_quantized"
        assert "mm_AscendDequant" not in nodes
        assert nodes["mm2_AscendDequant"].output[0] == "n"
        assert nodes["join"].input[0] == "n"

    def test_the_same_weight_is_stored_once(self) -> None:
        body = "g (float[2,4] x) => (float[2,4] y) { [a] h = MatMul (x, w) [b] y = MatMul (h, w) }"
        model = model_of(body, weights_of(5, w=(4, 4)))
        proto = render_ascend(model, planned(model), TARGET).proto
        assert len({n.input[1] for n in proto.graph.node if n.op_type == "MatMul"}) == 1

    def test_weights_without_activation_are_refused(self) -> None:
        model = rows()
        plan = plan_for(model, target="ascend", per_channel=False, weight_only=True)
        with pytest.raises(GraphError, match=r"node 'gemm': AscendQuant needs one known scale"):
            render_ascend(model, plan, TARGET)

    def test_unknown_readers_of_codes_are_named(self) -> None:
        body = "[q] a = AscendQuant <scale = 2.0, offset = 0.0> (x) [r] y = Relu (a)"
        with pytest.raises(GraphError, match=r"node 'r': Relu reads codes of AscendQuant"):
            lower_ascend(model_of(f"g (float[2,4] x) => (float[2,4] y) {{ {body} }}"))


QUANT, MM = "[q] a = AscendQuant <scale = 2.0, offset = 0.0> (x)", "[mm] m = MatMul (a, w)"
HOSTILE = {
    "no scale": ("[q] a = AscendQuant (x)", "node 'q': AscendQuant has scale 0"),
    "scale of zero": ("[q] a = AscendQuant <scale = 0.0> (x)", "has scale 0 and offset 0, no positive scale"),
    "offset": ("[q] a = AscendQuant <scale = 1.0, offset = 300.0> (x)", "offset 300"),
    "text": ('[q] a = AscendQuant <scale = "1"> (x)', "has no number as scale"),
    "int4": ("[q] a = AscendQuant <scale = 1.0, quant_bit = 4> (x)", "has quant_bit = 4, only 8"),
    "two inputs": ("[q] a = AscendQuant <scale = 1.0> (x, x)", "has 2 inputs"),
    "float weight": (f"{QUANT} [mm] m = MatMul (a, f)", "has a weight of type float32"),
    "computed weight": (
        f"{QUANT} [mm] m = MatMul (a, x)",
        "only Conv, Gemm and MatMul with constant weights",
    ),
    "alpha": (f"{QUANT} [g] m = Gemm <alpha = 0.5> (a, w) [d] y = AscendDequant (m, deq)", "has alpha = 0.5"),
    "relu": (f"{QUANT} {MM} [d] y = AscendDequant <relu_flag = 1> (m, deq)", "has relu_flag = 1, only 0"),
    "shift": (f"{QUANT} {MM} [d] y = AscendDequant (m, shifted)", "without shift and offset"),
    "negative": (f"{QUANT} {MM} [d] y = AscendDequant (m, minus)", "not a finite number above 0"),
    "no scales": (f"{QUANT} {MM} [d] y = AscendDequant (m)", "has 1 inputs"),
}
STORED = {
    "w": np.ones((4, 4), np.int8),
    "f": np.ones((4, 4), np.float32),
    "deq": np.asarray([0x3F800000], np.uint64),
    "shifted": np.asarray([0x13F800000], np.uint64),
    "minus": np.asarray([0xBF800000], np.uint64),
}


@pytest.mark.parametrize("run_pass", [lower_ascend, read_quantized])
@pytest.mark.parametrize(("body", "message"), HOSTILE.values(), ids=HOSTILE)
def test_files_of_others_are_refused_in_one_line(body: str, message: str, run_pass: Any) -> None:
    """What the operators can do beyond the forms written here is never passed over in silence."""
    body += "" if "AscendDequant" in body or "MatMul" in body else f" {MM}"
    body += "" if "AscendDequant" in body else " [d] y = AscendDequant (m, deq)"
    model = model_of(f"g (float[2,4] x) => (float[2,4] y) {{ {body} }}", STORED)
    with pytest.raises(GraphError, match=re.escape(message)):
        run_pass(model)


def test_a_value_that_attention_reads_thrice_survives_optimization() -> None:
    """ONNX Runtime folds a scale that is a single number into the products behind it and loses the other readers."""
    body = """g (float[2,3,8] x) => (float[2,3,8] y) {
        [qkv] v = MatMul (x, w)
        d = Div (v, two) unread = Div (v, two)
        t = Transpose <perm = [0, 2, 1]> (v)
        s = MatMul (d, t) p = Softmax (s) y = MatMul (p, v)
    }"""
    model = model_of(body, {**weights_of(1, w=(8, 8)), "two": np.float32(2)})
    lowered = embedded(lower_ascend(render_ascend(model, planned(model), TARGET)))
    feed = feed_for(embedded(model))
    (plain,), (optimized,) = run(lowered, feed), run(lowered, feed, optimize=True)
    np.testing.assert_allclose(optimized, plain, rtol=1e-4, atol=1e-5)


def test_a_wrong_form_is_caught() -> None:
    """A scale off by a tenth: the lowered graph is far from the QDQ form, and verification says so."""
    body = "g (float[16,64] x) => (float[16,96] y) { [mm] y = MatMul (x, w) }"
    model = model_of(body, weights_of(5, w=(64, 96)))
    plan = planned(model)
    ascend = render_ascend(model, plan, TARGET)
    twin = render_qdq(model, plan, TARGET)
    data = [(SampleId(0), feed_for(embedded(model)))]
    assert verify(model, lower_ascend(ascend), data, twin=twin).sqnr is not None
    for node in ascend.proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.f *= 1.1
    with pytest.raises(VerificationError, match=r"output 'y': .* dB in the form of the target, .* dB as QDQ"):
        verify(model, lower_ascend(ascend), data, twin=twin)


class TestWhole:
    """`quantize --target ascend`: verified by the lowered graph, as close as the QDQ form."""

    @pytest.mark.parametrize("make", [cnn, mlp])
    def test_end_to_end(self, make: Any, tmp_path: Any) -> None:
        proto = make()
        feeds = feeds_for(proto)
        result = quantize(proto, calib_data=feeds, target="ascend")
        same = {"steps": [{"type": "quantize", "weight": {"per": "tensor"}}]} if make is mlp else "w8a8"
        qdq = quantize(proto, same, calib_data=feeds, target="generic")
        assert result.metrics["sqnr_db"] > 40
        assert result.metrics["sqnr_db"] > qdq.metrics["sqnr_db"] - 2
        path = result.save(tmp_path / "m.onnx").model
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.onnx"]
        lowered = session_of(embedded(lower_ascend(open_model(path))))
        exact = [session_of(proto).run(None, f) for f in feeds]
        assert sqnr_of(exact, [lowered.run(None, f) for f in feeds]) > 40

    def test_compare_and_inspect_take_it(self, tmp_path: Any, capsys: Any) -> None:
        out, samples = str(tmp_path / "m.onnx"), "tools/digits/calib"
        digits = "tools/digits/digits.onnx"
        assert main([digits, out, "--calib", samples, "--target", "ascend", "-q"]) == 0
        assert main(["compare", digits, out, "--calib", samples, "--json"]) == 0
        assert '"sqnr_db"' in capsys.readouterr().out
        assert main(["inspect", out]) == 0
        assert "AscendQuant" in capsys.readouterr().out

    def test_float16(self) -> None:
        weights = {k: v.astype(np.float16) for k, v in weights_of(2, w=(16, 8), b=(8,)).items()}
        body = "g (float16[4,16] x) => (float16[4,8] y) { [mm] y = Gemm (x, w, b) }"
        proto = embedded(model_of(body, weights))
        result = quantize(proto, calib_data=feeds_for(proto), target="ascend")
        ops = [n.op_type for n in result.quantized.proto.graph.node]
        assert ops == ["Cast", "AscendQuant", "Gemm", "AscendDequant", "Cast"]
        assert result.metrics["sqnr_db"] > 30

    def test_newer_opsets_come_down(self) -> None:
        body = """g (float[2,8] x) => (float[2,8] y) {
            [mm] m = MatMul (x, w)
            [act] a = Gelu (m)
            [out] y = MatMul (a, w)
        }"""
        proto = embedded(model_of(body, weights_of(6, w=(8, 8)), opset=20))
        proto.ir_version = 9
        result = quantize(proto, calib_data=feeds_for(proto), target="ascend")
        assert Graph(result.quantized).opset == 17
        assert "Gelu" not in {n.op_type for n in result.quantized.proto.graph.node}
        assert result.metrics["sqnr_db"] > 30
