"""int8 queries, keys and values: scales per head against numpy, places in the graph, weight files, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from calib.model import open_model
from onnxslim_ptq import quantize
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import GraphError, RecipeError
from onnxslim_ptq.export.files import write_model
from onnxslim_ptq.export.rebuild import rebuild
from onnxslim_ptq.export.weight_files import WeightFiles
from tests.models import outputs_of, parse, quantized, session_of, sqnr_of, weights_of

WEIGHTS = weights_of(9, wq=(24, 24), wk=(24, 8), wv=(24, 8), wo=(24, 24))
SHAPES = {"q4": np.array([0, 0, 6, 4]), "k4": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 24])}
SHAPES |= {"two": np.array([2]), "many": np.array([1, 1, 3, 1, 1]), "back": np.array([0, 6, -1, 4])}
# Six query heads, two key and value heads, as exporters write grouped attention.
GROUPED = """g (float[N,T,24] x) => (float[N,T,24] y) <float c = {0.5}> {
  ["/attn/to_q/MatMul"] a = MatMul (x, wq)  ["/attn/to_k/MatMul"] b = MatMul (x, wk)
  ["/attn/to_v/MatMul"] d = MatMul (x, wv)
  ar = Reshape (a, q4)  br = Reshape (b, k4)  dr = Reshape (d, k4)
  q = Transpose <perm = [0, 2, 1, 3]> (ar)  k = Transpose <perm = [0, 2, 1, 3]> (br)
  v = Transpose <perm = [0, 2, 1, 3]> (dr)
  ku = Unsqueeze (k, two)  ke = Expand (ku, many)  kr = Reshape (ke, back)
  vu = Unsqueeze (v, two)  ve = Expand (vu, many)  vr = Reshape (ve, back)
  kt = Transpose <perm = [0, 1, 3, 2]> (kr)
  ["/attn/MatMul"] s = MatMul (q, kt)  ["/attn/Mul"] t = Mul (s, c)  ["/attn/Softmax"] p = Softmax <axis = -1> (t)
  ["/attn/MatMul_1"] o = MatMul (p, vr)  ot = Transpose <perm = [0, 2, 1, 3]> (o)  f = Reshape (ot, flat)
  ["/attn/to_out/MatMul"] y = MatMul (f, wo) }"""
DYNAMIC = {"type": "quantize", "act": {"per": "token", "when": "dynamic"}, "bias_correction": False}


def model() -> onnx.ModelProto:
    proto = parse(GROUPED, {**WEIGHTS, **SHAPES}, 17, 8)
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"/shape/{node.op_type}_{index}"
    return proto


def feeds(count: int = 6) -> list[dict[str, Any]]:
    draw = np.random.default_rng(1)
    return [{"x": draw.normal(size=(2, 7, 24)).astype(np.float32)} for _ in range(count)]


def recipe(**step: Any) -> dict[str, Any]:
    return {"steps": [DYNAMIC, {"type": "attention", **step}]}


def test_scales_are_the_extremes_of_each_head() -> None:
    """With shares of 1: s = max |x| / 127 over batch, tokens and channels of a head, by the float model's values."""
    data = feeds()
    result = quantize(model(), recipe(query=1, key=1), data, eval_data=data[:1])
    exact = model()
    exact.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("q", "k", "v"))
    seen = [outputs_of(exact, data)[i][1:] for i in range(len(data))]
    for index, (role, heads) in enumerate({"q": 6, "k": 2, "v": 2}.items()):
        key, count = result.plan.attention[f"attn.fa_{role}"]
        assert count == heads
        largest = np.max([np.abs(values[index]).max(axis=(0, 2, 3)) for values in seen], axis=0)
        np.testing.assert_allclose(result.plan.params[key].scale, largest / 127, rtol=1e-6)
        assert not result.plan.params[key].zero_point.any()


def test_keys_and_values_are_quantized_before_they_are_repeated() -> None:
    result = quantized(model(), feeds(), recipe=recipe())
    quantizers = {n.input[0]: n for n in result.model.graph.node if n.op_type == "QuantizeLinear"}
    assert {"q", "k", "v"} <= set(quantizers)
    stored = {t.name: list(t.dims) for t in result.model.graph.initializer}
    assert [stored[quantizers[name].input[1]] for name in ("q", "k", "v")] == [[6], [2], [2]]
    assert all(onnx.helper.get_node_attr_value(quantizers[name], "axis") == 1 for name in ("q", "k", "v"))


def test_the_window_leaves_out_what_the_share_allows() -> None:
    """One value in 20,000 lies far away: a share of 0.9999 clips it, a share of 1 does not."""
    data = [{"x": np.random.default_rng(i).normal(size=(2, 400, 24)).astype(np.float32)} for i in range(6)]
    data[0]["x"][0, 0] *= 20
    narrow = quantized(model(), data, recipe=recipe(query=0.999, key=0.999), min_sqnr=0)
    wide = quantized(model(), data, recipe=recipe(query=1, key=1), min_sqnr=0)
    for role, clipped in (("q", True), ("k", True), ("v", False)):
        scales = [r.plan.params[r.plan.attention[f"attn.fa_{role}"][0]].scale for r in (narrow, wide)]
        assert (scales[0] < scales[1] / 2).all() if clipped else (scales[0] == scales[1]).all()


@pytest.mark.parametrize("opset", [17, 21, 23])
def test_one_key_head_for_all_queries(opset: int, tmp_path: Path) -> None:
    """Its scale is repeated along the channels: from opset 21 on ONNX Runtime cannot load int8 with a single one."""
    one = {"k4": np.array([0, 0, 1, 8]), "q4": np.array([0, 0, 3, 8]), "back": np.array([0, 3, -1, 8])}
    proto = parse(GROUPED, {**WEIGHTS, **SHAPES, **one}, opset, 10)
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"/shape/{node.op_type}_{index}"
    result = quantized(proto, feeds(), recipe=recipe())
    assert result.metrics["sqnr_db"] > 25
    assert not [note for note in result.notes if "session option" in note]
    result.save(tmp_path / "m.onnx", weights=WeightFiles())
    session_of(onnx.load(tmp_path / "m.onnx"))  # as a user opens it
    tensors = load_file(tmp_path / "quant_model_weight_w8a8_dynamic.safetensors")
    assert [tensors[f"attn.fa_{role}.scale"].shape for role in "qkv"] == [(3, 1), (1, 1), (1, 1)]
    description = tmp_path / "quant_model_description_w8a8_dynamic.json"
    write_model(rebuild(open_model(proto), description, TARGETS["cpu"]), tmp_path / "again.onnx")
    again = outputs_of(onnx.load(tmp_path / "again.onnx"), feeds())
    assert sqnr_of(outputs_of(result.model, feeds()), again) > 90


def test_files_and_the_way_back(tmp_path: Path) -> None:
    result = quantized(model(), feeds(), recipe=recipe())
    result.save(tmp_path / "m.onnx", weights=WeightFiles())
    tensors = load_file(tmp_path / "quant_model_weight_w8a8_dynamic.safetensors")
    document = json.loads((tmp_path / "quant_model_description_w8a8_dynamic.json").read_text())
    assert list(document)[:2] == ["model_quant_type", "fa_quant_type"]
    assert document["fa_quant_type"] == document["attn.fa_k.scale"] == "FAQuant"
    for role, heads in {"q": 6, "k": 2, "v": 2}.items():
        assert tensors[f"attn.fa_{role}.scale"].shape == (heads, 1)
        assert tensors[f"attn.fa_{role}.offset"].dtype == np.int8
    description = tmp_path / "quant_model_description_w8a8_dynamic.json"
    write_model(rebuild(open_model(model()), description, TARGETS["cpu"]), tmp_path / "again.onnx")
    again = outputs_of(onnx.load(tmp_path / "again.onnx"), feeds())
    assert sqnr_of(outputs_of(result.model, feeds()), again) > 90


@pytest.mark.parametrize(
    ("op", "opset", "domain"),
    [
        ("Attention <q_num_heads = 4, kv_num_heads = 2>", 23, ""),
        ("com.microsoft.MultiHeadAttention <num_heads = 4>", 17, "ms"),
    ],
)
def test_one_node_has_scales_per_head_on_its_last_axis(op: str, opset: int, domain: str) -> None:
    width = 16 if domain else 8
    body = f"""g (float[N,T,16] x) => (float[N,T,16] y) {{ q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
      o = {op} (q, k, v) y = MatMul (o, wo) }}"""
    proto = parse(body, weights_of(3, wq=(16, 16), wk=(16, width), wv=(16, width), wo=(16, 16)), opset, 10)
    data = [{"x": np.random.default_rng(i).normal(size=(2, 5, 16)).astype(np.float32)} for i in range(6)]
    result = quantized(proto, data, recipe=recipe())
    (key, heads) = next(found for name, found in result.plan.attention.items() if name.endswith("fa_k"))
    scale = result.plan.params[key].scale.reshape(heads, -1)
    assert scale.shape == (width // 4, 4)
    assert (scale == scale[:, :1]).all()
    assert result.metrics["sqnr_db"] > 25


class TestRefused:
    def test_a_model_without_attention(self) -> None:
        proto = parse(
            "g (float[N,24] x) => (float[N,24] y) { y = MatMul (x, wq) }", {"wq": WEIGHTS["wq"]}, 17, 8
        )
        with pytest.raises(GraphError, match="has no attention that can be quantized; leave the step out"):
            quantized(proto, [{"x": np.ones((2, 24), np.float32)}] * 8, recipe=recipe())

    def test_a_pattern_that_matches_none(self) -> None:
        with pytest.raises(
            RecipeError, match=r"attention: pattern 'atn' matches no attention; nearest: '/attn/MatMul'"
        ):
            quantized(model(), feeds(), recipe=recipe(include=["atn"]))

    @pytest.mark.parametrize("target", ["ascend", "tensorrt"])
    def test_a_target_without_scales_per_head(self, target: str) -> None:
        static = {
            "steps": [{"type": "quantize", "act": {"range": {"type": "minmax"}}}, {"type": "attention"}]
        }
        with pytest.raises(RecipeError, match=f"int8 attention is not available for target '{target}'"):
            quantized(model(), feeds(), recipe=static, target=target)

    def test_a_share_that_is_none(self) -> None:
        with pytest.raises(RecipeError, match=r"steps\[1\].query: expected a number from 0.5 to 1, got 2"):
            quantized(model(), feeds(), recipe=recipe(query=2))


def test_one_attention_may_be_left_out() -> None:
    with_none = quantized(model(), feeds(), recipe=recipe(exclude=["attn"]))
    assert with_none.plan.attention == {}
