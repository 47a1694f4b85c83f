"""Forms other than static W8A8: weight-only with blocks of 4 or 8 bits, and per-token activations."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from calib.provider import SessionOptions, create_session
from onnxslim_ptq import quantize
from onnxslim_ptq.core.choice import LayerChoice, PerTokenActivation
from onnxslim_ptq.core.dtypes import UINT8
from onnxslim_ptq.export.simulation import simulate
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.steps.placement import place
from tests.decoders import appending
from tests.decoders import feeds as decoder_feeds
from tests.graph.models import parse
from tests.models import outputs_of, quantized, sqnr_of, weights_of
from tests.steps.layers import apply_step, choose, workspace_of

WEIGHTS = weights_of(5, w1=(64, 128), b1=(128,), w2=(128, 64), w3=(32, 64), b3=(32,))
TOKENS = """g (float[N,T,64] x) => (float[N,T,32] y) {
    [up] h = MatMul (x, w1) [bias] a = Add (h, b1) [act] r = Relu (a)
    [down] d = MatMul (r, w2) [head] y = MatMul (d, w3t) }"""
ROWS = """g (float[N,64] x) => (float[N,32] y) {
    [up] h = MatMul (x, w1) [act] r = Relu (h) [down] d = MatMul (r, w2)
    [fc] y = Gemm <transB = 1> (d, w3, b3) }"""
PER_TOKEN = {
    "steps": [{"type": "quantize", "act": {"per": "token", "when": "dynamic"}, "bias_correction": False}]
}


def per_token(symmetric: bool) -> dict[str, Any]:
    act = {"per": "token", "when": "dynamic", "symmetric": symmetric}
    return {"steps": [{"type": "quantize", "act": act, "bias_correction": False}]}


def model(body: str = TOKENS, opset: int = 17) -> onnx.ModelProto:
    return parse(body, {**WEIGHTS, "w3t": np.ascontiguousarray(WEIGHTS["w3"].T)}, opset, 8)


def uneven(body: str = TOKENS, count: int = 12) -> list[dict[str, NDArray[np.float32]]]:
    """Rows whose magnitudes differ a hundredfold, which one scale for all serves badly."""
    draw = np.random.default_rng(0)
    shape = (2, 5, 64) if "T" in body.split("=>")[0] else (10, 64)
    return [
        {"x": (draw.normal(size=shape) * 10.0 ** draw.uniform(-1, 1, (*shape[:-1], 1))).astype(np.float32)}
        for _ in range(count)
    ]


def operators(proto: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that ONNX Runtime really runs."""
    path = folder / "optimized.onnx"
    create_session(proto.SerializeToString(), options=SessionOptions(write_optimized=path))
    return [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]


class TestWeightOnly:
    @pytest.mark.parametrize(
        ("recipe", "floor", "opset"),
        [("w8a16", 36, 17), ("w4a16-g32", 17, 21), ("w4a16-g64", 16, 21), ("w4a16-g128", 14, 21)],
    )
    def test_ready_recipes(self, recipe: str, floor: float, opset: int, tmp_path: Path) -> None:
        proto, feeds = model(), uneven()
        result = quantized(proto, feeds, recipe=recipe)
        assert sqnr_of(outputs_of(proto, feeds), outputs_of(result.model, feeds)) > floor
        assert result.model.opset_import[0].version == opset
        assert operators(result.model, tmp_path).count("MatMulNBits") == 3
        assert not result.plan.activations

    def test_without_data_codes_are_the_nearest(self) -> None:
        result = quantize(model(), "w4a16-g32", shapes={"x": (2, 5, 64)})
        assert {codes.rounder for codes in result.plan.weight_codes.values()} == {"rtn"}
        assert any("there is no calibration data" in note for note in result.notes)

    def test_needs_no_data(self) -> None:
        proto = model()
        result = quantize(proto, "w8a16", shapes={"x": (2, 5, 64)})
        with_data = quantized(proto, uneven(), recipe="w8a16")
        assert result.model.graph.initializer == with_data.model.graph.initializer

    def test_codes_are_packed_and_described(self, tmp_path: Path) -> None:
        result = quantized(model(), uneven(), recipe="w4a16-g32")
        paths = result.save(tmp_path)
        assert paths.model.name == "model_w4a16.onnx"
        stored = {t.name: t for t in onnx.load(paths.model).graph.initializer}["w1_quantized"]
        assert stored.data_type == onnx.TensorProto.UINT4
        assert len(stored.raw_data) == 64 * 128 // 2
        document = json.loads(paths.json.read_text())
        schema = resources.files("onnxslim_ptq.export").joinpath("weights.schema.json").read_text()
        jsonschema.validate(document, json.loads(schema))
        weight = document["weights"]["w1"]
        assert (weight["dtype"], weight["axis"], weight["block_size"]) == ("uint4", 0, 32)
        assert document["model_quant_type"] == "W4A16"
        assert document["activations"] == {}

    @pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g32"])
    def test_a_gemm_that_would_be_dequantized_at_every_run_stays_float(
        self, recipe: str, tmp_path: Path
    ) -> None:
        result = quantized(model(ROWS), uneven(ROWS), recipe=recipe)
        ops = operators(result.model, tmp_path)
        assert "DequantizeLinear" not in ops
        assert "DequantizeLinear" in [n.op_type for n in result.model.graph.node]

    @pytest.mark.parametrize("reduce_range", ["off", "on"])
    @pytest.mark.parametrize("dtype", ["int8", "uint4"])
    def test_asymmetric_weights_use_all_codes(self, dtype: str, reduce_range: str) -> None:
        """s = (max w - min w) / (codes - 1) per output channel, both with 0 among them."""
        step = {"type": "quantize", "weight": {"dtype": dtype, "symmetric": False}, "act": None}
        recipe = {"target": "generic", "steps": [step]}
        result = quantized(model(), uneven(), recipe=recipe, reduce_range=reduce_range)
        found = {codes.name: codes for codes in result.plan.weight_codes.values()}
        steps = {"int8": 255, "uint4": 15}[dtype]
        for name in ("w1", "w2"):  # [in, out]
            low, high = (np.minimum(WEIGHTS[name].min(axis=0), 0), np.maximum(WEIGHTS[name].max(axis=0), 0))
            wanted = ((high.astype(np.float64) - low) / steps).astype(np.float32)
            np.testing.assert_array_equal(found[name].params.scale.astype(np.float32), wanted)
            assert (np.ptp(found[name].codes.astype(int), axis=0) >= steps - 1).all()

    def test_float16(self) -> None:
        half = {k: v.astype(np.float16) for k, v in WEIGHTS.items()}
        body = "g (float16[N,T,64] x) => (float16[N,T,128] y) { [up] h = MatMul (x, w1) [b] y = Add (h, b1) }"
        proto = parse(body, half, 17, 8)
        feeds = [{"x": f["x"].astype(np.float16)} for f in uneven()]
        result = quantized(proto, feeds, recipe="w8a16")
        assert sqnr_of(outputs_of(proto, feeds), outputs_of(result.model, feeds)) > 38


@pytest.mark.parametrize(
    ("recipe", "floor", "kind"),
    [
        ("w4a8-dynamic", 14, "W4A8_DYNAMIC"),
        ("w8a8-c8", 28, "W8A8_C8"),
        ("w8a8-dynamic-fa3", 31, "W8A8_DYNAMIC"),
    ],
)
def test_schemes_of_decoders(recipe: str, floor: float, kind: str) -> None:
    proto, feeds = (model(), uneven()) if kind.startswith("W4") else (appending(), decoder_feeds(appending()))
    result = quantized(proto, feeds, recipe=recipe)
    assert result.metrics["sqnr_db"] > floor
    assert result.recipe.quant_type == kind
    assert len(result.plan.io) == (2 if kind.endswith("C8") else 0)
    assert len(result.plan.attention) == (3 if recipe.endswith("fa3") else 0)


@pytest.mark.parametrize("opset", [20, 21, 23])
def test_int8_activations_of_a_new_opset(opset: int) -> None:
    """ONNX Runtime 1.31 on x86 does not load them from opset 21 on without an option, which a note names."""
    body = """g (float[N,T,64] x) => (float[N,T,128] y) { [up] h = MatMul (x, w1)  y = Add (h, b1) }"""
    result = quantized(model(body, opset), uneven(body), target="generic")
    assert result.metrics["sqnr_db"] > 30
    needs = [note for note in result.notes if "session.qdqisint8allowed" in note]
    assert len(needs) <= (opset >= 21)  # a newer ONNX Runtime may do without


class TestPerToken:
    @pytest.mark.parametrize("body", [TOKENS, ROWS], ids=["matmul", "gemm"])
    @pytest.mark.parametrize("opset", [13, 17, 20])
    def test_better_than_one_scale_and_integer_inside(self, body: str, opset: int, tmp_path: Path) -> None:
        proto, feeds = model(body, opset), uneven(body)
        exact = outputs_of(proto, feeds)
        token = quantized(proto, feeds, recipe="w8a8-dynamic")
        integer = [op for op in operators(token.model, tmp_path) if op in ("MatMulIntegerToFloat", "QGemm")]
        assert len(integer) == 3
        small = [np.abs(f["x"]).max(axis=-1) < 1 for f in feeds]  # rows that one scale rounds away
        errors = []
        for result in (token, quantized(proto, feeds)):
            seen = outputs_of(result.model, feeds)
            errors.append(
                sum(float(((y[0] - z[0])[s] ** 2).sum()) for y, z, s in zip(exact, seen, small, strict=True))
            )
        assert errors[0] < errors[1] / 10
        assert token.model.opset_import[0].version == opset

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_formula(self, symmetric: bool) -> None:
        """y = r * ((round(127 (x - c)/r) * s_w q_w) / 127) + c * sum(s_w q_w) + b, per row: r = max|x| and c = 0, or
        half the width and the middle of its values."""
        body = "g (float[N,64] x) => (float[N,32] y) { [fc] y = Gemm <transB = 1> (x, w3, b3) }"
        proto, feeds = model(body), uneven(ROWS)
        result = quantized(proto, feeds, recipe=per_token(symmetric))
        scale = np.abs(WEIGHTS["w3"]).max(axis=1, keepdims=True) / np.float32(127)
        weight = np.rint(WEIGHTS["w3"] / scale) * scale
        for feed, (seen,) in zip(feeds, outputs_of(result.model, feeds), strict=True):
            x = feed["x"] + 0.0
            high, low = x.max(axis=1, keepdims=True), x.min(axis=1, keepdims=True)
            half = np.float32(0.5)
            r, c = (
                (np.maximum(high, -low), 0 * high)
                if symmetric
                else ((high - low) * half, (high + low) * half)
            )
            codes = np.rint((x - c) / r * 127) / 127
            want = r * (codes @ weight.T) + c * weight.sum(axis=1) + WEIGHTS["b3"]
            np.testing.assert_allclose(seen, want, rtol=1e-4, atol=1e-4)

    def test_one_sided_rows_use_all_codes(self) -> None:
        """Values from 0 up, as behind a GELU: half of a symmetric grid would stay empty."""
        proto = model("g (float[N,64] x) => (float[N,128] y) { [up] y = MatMul (x, w1) }")
        feeds = [{"x": np.abs(f["x"])} for f in uneven(ROWS)]
        exact = outputs_of(proto, feeds)
        sqnr = [
            sqnr_of(exact, outputs_of(quantized(proto, feeds, recipe=per_token(symmetric)).model, feeds))
            for symmetric in (True, False)
        ]
        assert sqnr[1] > sqnr[0] + 1

    @pytest.mark.parametrize(
        ("body", "op"),
        [
            ("g (float[N,4,8,8] x) => (float[N,8,6,6] y) { [c] y = Conv (x, k) [m] z = MatMul (x, m) }", "c"),
            ("g (float[64,5] x) => (float[5,32] y) { [c] y = Gemm <transA = 1, transB = 1> (x, w3)"
             " [m] h = Transpose <perm = [1, 0]> (x) [l] z = MatMul (h, w1) }", "c"),
        ],
    )  # fmt: skip
    def test_a_layer_whose_rows_do_not_stay_rows_is_left_float(self, body: str, op: str) -> None:
        weights = {**WEIGHTS, "k": np.ones((8, 4, 3, 3), np.float32), "m": np.eye(8, dtype=np.float32)}
        proto = parse(body, weights, 17, 8)
        proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
        result = quantize(proto, "w8a8-dynamic")
        assert list(result.skipped) == [op]
        assert "per token needs a layer whose rows stay rows" in result.skipped[op]

    def test_a_row_of_zeros_is_zero(self) -> None:
        proto = model("g (float[N,64] x) => (float[N,128] y) { [up] y = MatMul (x, w1) }")
        result = quantized(proto, uneven(ROWS), recipe="w8a8-dynamic")
        x = np.zeros((3, 64), np.float32)
        x[1] = 1.0
        seen = outputs_of(result.model, [{"x": x}])[0][0]
        assert np.isfinite(seen).all()
        assert not seen[[0, 2]].any()
        assert seen[1].any()

    def test_readers_share_the_rows(self) -> None:
        body = "g (float[N,64] x) => (float[N,128] y) { [a] p = MatMul (x, w1) [b] q = MatMul (x, v1) y = Add (p, q) }"
        proto = parse(body, {"w1": WEIGHTS["w1"], "v1": WEIGHTS["w1"] * np.float32(0.5)}, 17, 8)
        ops = [n.op_type for n in quantized(proto, uneven(ROWS), recipe="w8a8-dynamic").model.graph.node]
        assert (ops.count("ReduceMax"), ops.count("QuantizeLinear"), ops.count("Mul")) == (1, 1, 6)

    def test_the_simulation_says_the_same(self) -> None:
        proto, feeds = model(), uneven()
        choice = LayerChoice(PerTokenActivation(UINT8, symmetric=False))
        workspace = workspace_of(proto, feeds)
        placement = place(workspace.graph, choose(workspace.graph, choice), workspace.target)
        plan, _ = apply_step(workspace, choice, placement)
        simulated = simulate(workspace.model(), plan)
        session = create_session(
            simulated.model.proto.SerializeToString(),
            simulated.model.weights,
            options=SessionOptions(simulate=True),
        )
        seen = [session.run(None, dict(f)) for f in feeds]
        want = outputs_of(quantized(proto, feeds, recipe=PER_TOKEN).model, feeds)
        assert sqnr_of(want, seen) > 60

    def test_mixed_with_static_layers(self, tmp_path: Path) -> None:
        recipe = {
            "steps": [
                {"type": "quantize", "act": {"range": {"type": "minmax"}}},
                {"type": "quantize", "include": ["down"], "act": {"per": "token", "when": "dynamic"}},
                {"type": "quantize", "include": ["head"], "act": None, "weight": {"dtype": "int4"}},
            ]
        }
        assert Recipe.load(recipe).quant_type == "W8A8_MIX"
        result = quantized(model(), uneven(), recipe=recipe)
        ops = operators(result.model, tmp_path)
        assert (ops.count("MatMulIntegerToFloat"), ops.count("MatMulNBits")) == (2, 1)
        document = json.loads(result.save(tmp_path / "out.onnx").json.read_text())
        assert {n: a["when"] for n, a in document["activations"].items()} == {"x": "static", "r": "dynamic"}
