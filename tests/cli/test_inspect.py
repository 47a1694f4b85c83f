"""`inspect`: on the small network, and on models that are odd."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from onnxslim_ptq.analysis.inspect import inspect_model
from onnxslim_ptq.cli import main
from onnxslim_ptq.graph.names import module_name
from tools.zoo import ZooUnavailable, load, native

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
MODEL = str(DIGITS / "digits.onnx")
Captured = pytest.CaptureFixture[str]


def test_a_person_reads_it(capsys: Captured) -> None:
    assert main(["inspect", MODEL]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert "opset ai.onnx 13; IR 7; made by pytorch" in text
    assert "input: image  float32 [batch, 1, 8, 8]" in text
    assert "layers that can be quantized: 10 (9 Conv, 1 Gemm)" in text
    assert "9 batchnorm" in text


def test_a_program_reads_it(capsys: Captured) -> None:
    assert main(["inspect", MODEL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["opsets"] == {"ai.onnx": 13}
    assert found["precision"] == "float32"
    assert found["operators"]["Conv"] == 9
    assert found["layers"][0] == {
        "node": "/stem/stem.0/Conv", "op": "Conv", "weight": "stem.0.weight", "module": "stem.0",
        "shape": [32, 1, 3, 3], "channels": 32,
    }  # fmt: skip
    assert found["bytes"] == Path(MODEL).stat().st_size
    assert not found["quantized_nodes"]


def test_names(capsys: Captured) -> None:
    assert main(["inspect", MODEL, "--names"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NODE", "OP", "MODULE", "WEIGHT", "SHAPE"]
    assert lines[2].split() == [
        "/block1/expand/expand.0/Conv", "Conv", "block1.expand.0", "block1.expand.0.weight", "64x32x1x1"
    ]  # fmt: skip


def test_groups(capsys: Captured) -> None:
    assert main(["inspect", MODEL, "--groups"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].split() == ["KIND", "SOURCE", "LAYERS", "CHANNELS", "SCALES", "SHIFT"]
    assert lines[1].split()[0] == "conv-conv"
    assert "groups absorb a scale" in text
    assert main(["inspect", MODEL, "--groups", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert len(groups) == len([line for line in lines if line.split()[0] in {g["kind"] for g in groups}])
    assert [bool(g["reason"]) for g in groups] == [g["kind"] == "unfused" for g in groups]
    assert len({layer for g in groups for layer in g["layers"]}) == sum(len(g["layers"]) for g in groups)
    assert main(["inspect", MODEL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] is None


@pytest.mark.parametrize(
    ("weight", "node", "module"),
    [
        ("encoder.layer.0.query.weight", "/encoder/layer.0/query/MatMul", "encoder.layer.0.query"),
        ("onnx::MatMul_1234", "/model/layers.3/self_attn/q_proj/MatMul", "model.layers.3.self_attn.q_proj"),
        ("onnx::Conv_99", "/block1/expand/expand.0/Conv", "block1.expand.0"),
        ("const_fold_opt__655", "model_1/conv1d;model_1/conv1d", "model_1.conv1d"),
        ("p2o.MatMul.2_weight", "p2o.MatMul.2", "p2o.MatMul.2"),
    ],
)
def test_module_names(weight: str, node: str, module: str) -> None:
    assert module_name(weight, node) == module


def test_external_data_float16_and_shared_weights(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[N,32] x) => (float16[N,32] y) <float16[32,32] w = {1}>
        { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }"""
    )
    weight = model.graph.initializer[0]
    del weight.int32_data[:]
    weight.raw_data = bytes(2 * 32 * 32)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    found = inspect_model(path)
    assert found.external == [str(tmp_path / "m.data")]
    assert found.precision == "float16"
    assert found.weights == {"float16": {"count": 1, "bytes": 2048}}
    assert [len(nodes) for nodes in found.shared_weights.values()] == [2]


def test_a_model_that_cannot_be_simplified_is_still_described(tmp_path: Path) -> None:
    """An operator that is not in ONNX, inputs that are no tensors, an opset from the future, no layer at all."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 99, "acme" : 1]> g (float[2] x, seq(float[2]) s) => (float[2] y) '
        "{ y = acme.Strange(x, s) }"
    )
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    found = inspect_model(path)
    assert found.operators == {"acme.Strange": 1}
    assert [i["type"] for i in found.inputs] == ["float32", "sequence"]
    assert found.layers == []
    assert main(["inspect", str(path), "-v"]) == 0


@pytest.mark.network
@pytest.mark.parametrize("name", native())
def test_real_models(name: str, capsys: Captured) -> None:
    try:
        path = load(name).model
    except ZooUnavailable as reason:
        pytest.skip(str(reason))
    for option in ([], ["--json"], ["--names"], ["--groups"], ["-v"]):
        assert main(["inspect", str(path), *option]) == 0
    found = inspect_model(path)
    assert found.layers or found.not_quantizable or found.quantized_nodes
    assert not [note for note in found.notes if "cannot be told" in note]
    assert ("int8" in name) is bool(found.quantized_nodes)
