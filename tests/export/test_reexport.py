"""`export`: the integers of a written model in the form of another target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.model import open_model
from onnxslim_ptq import exporting, quantize
from onnxslim_ptq.cli import main
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import GraphError, RecipeError, VerificationError
from onnxslim_ptq.export.reading import read_quantized
from onnxslim_ptq.export.retarget import retarget
from onnxslim_ptq.exporting import export
from tests.graph.models import embedded, model_of
from tests.models import cnn, feeds_for, mlp, outputs_of, sqnr_of, weights_of

SHAPES = {"x": (2, 3, 8, 8)}
SCHEMA = Path(__file__).parents[2] / "onnxslim_ptq" / "export" / "weights.schema.json"


def written(make: Any, target: str, folder: Path, **options: Any) -> Path:
    proto = make()
    onnx.save(proto, folder / "float.onnx")
    return (
        quantize(proto, calib_data=feeds_for(proto), target=target, **options).save(folder / "q.onnx").model
    )


def shapes(make: Any) -> Any:
    return SHAPES if make is cnn else None


@pytest.mark.parametrize("make", [cnn, mlp])
@pytest.mark.parametrize("source", ["cpu", "generic", "tensorrt", "ascend"])
@pytest.mark.parametrize("target", ["cpu", "openvino", "qoperator"])
def test_integers_stay(make: Any, source: str, target: str, tmp_path: Path) -> None:
    path = written(make, source, tmp_path)
    made = export(path, tmp_path / "o.onnx", target, shapes=shapes(make))
    assert made.agreement_db is not None
    assert (
        made.agreement_db > 45
    )  # a bias that was float becomes int32; a sum next to a half rounds otherwise
    old, new = (read_weights(p) for p in (path, made.paths.model))
    assert old.keys() == new.keys()
    for name, codes in old.items():
        np.testing.assert_array_equal(new[name], codes)
    import json

    jsonschema.validate(json.loads(made.paths.json.read_text()), json.loads(SCHEMA.read_text()))


def read_weights(path: Path) -> dict[str, Any]:
    """int8 initializers by name; without trailing numbers that renamed constants get."""
    proto = onnx.load(path)
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    return {n: a for n, a in arrays.items() if a.dtype == np.int8 and a.ndim > 1}


@pytest.mark.parametrize("make", [cnn, mlp])
def test_ascend_wants_the_float_model(make: Any, tmp_path: Path) -> None:
    path = written(make, "generic", tmp_path)
    with pytest.raises(GraphError, match=r"one scale for the whole weight of a .*--float"):
        export(path, tmp_path / "o.onnx", "ascend", shapes=shapes(make))
    made = export(
        path, tmp_path / "o.onnx", "ascend", shapes=shapes(make), float_model=tmp_path / "float.onnx"
    )
    assert made.agreement_db is not None
    assert made.agreement_db > 35
    # From the float weights: exactly what rounding them with one scale gives.
    model = onnx.load(tmp_path / "float.onnx")
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    name = "w4" if make is cnn else "w2"
    scale = np.float32(np.abs(floats[name]).max() / np.float64(127))
    codes = {t.name: numpy_helper.to_array(t) for t in onnx.load(made.paths.model).graph.initializer}
    np.testing.assert_array_equal(codes[f"{name}_quantized"], np.rint(floats[name] / scale).astype(np.int8))


def test_smoothed_weights_are_followed(tmp_path: Path) -> None:
    """The scales that smoothing put into the weights are found by comparison."""
    body = """g (float[4,16] x) => (float[4,16] y) {
        n = LayerNormalization <axis = -1> (x, g1, z1)
        [up] h = MatMul (n, w1)
        [down] y = MatMul (h, w2)
    }"""
    weights = weights_of(3, w1=(16, 32), w2=(32, 16))
    weights |= {"g1": np.geomspace(0.1, 30, 16).astype(np.float32), "z1": np.zeros(16, np.float32)}

    def make() -> onnx.ModelProto:
        return embedded(model_of(body, weights))

    path = written(make, "generic", tmp_path, recipe="w8a8-smoothquant")
    document = path.with_suffix(".json").read_text()
    assert '"smoothing": [{' in document
    made = export(path, tmp_path / "o.onnx", "ascend", float_model=tmp_path / "float.onnx")
    feeds = feeds_for(make(), 4)
    exact = outputs_of(make(), feeds)
    generic = export(made.paths.model, tmp_path / "g.onnx", "generic").paths.model
    assert sqnr_of(exact, outputs_of(onnx.load(generic), feeds)) > 30


def test_another_float_model_is_refused(tmp_path: Path) -> None:
    path = written(mlp, "generic", tmp_path)
    other = mlp()
    for tensor in other.graph.initializer:
        values = numpy_helper.to_array(tensor)
        noise = np.random.default_rng(9).standard_normal(values.shape).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(noise, tensor.name))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(GraphError, match=r"layer 'mm1' of .* does not hold the weight that was quantized"):
        export(path, tmp_path / "o.onnx", "ascend", float_model=tmp_path / "other.onnx")


def test_what_needs_other_ranges_is_refused(tmp_path: Path) -> None:
    path = written(mlp, "cpu", tmp_path)
    with pytest.raises(
        GraphError, match=r"has a zero point.*quantize the float model with --target tensorrt"
    ):
        export(path, tmp_path / "o.onnx", "tensorrt")
    assert not (tmp_path / "o.onnx").exists()


def test_weights_with_zero_points_have_no_form_on_tensorrt(tmp_path: Path) -> None:
    weight = {"dtype": "int4", "symmetric": False, "per": "group", "group_size": 16}
    recipe = {"steps": [{"type": "quantize", "act": None, "weight": weight}]}
    path = written(mlp, "generic", tmp_path, recipe=recipe)
    with pytest.raises(GraphError, match=r"node 'mm1': its weight has zero points, and target 'tensorrt'"):
        export(path, tmp_path / "o.onnx", "tensorrt")


def test_float_activations_have_no_form_on_ascend(tmp_path: Path) -> None:
    """Gemms whose weight is grouped along its last axis, or turned, are found in the float model all the same."""
    body = "g (float[2,16] x) => (float[2,8] y) { [a] h = Gemm <transB = 1> (x, v) [b] y = Gemm (h, w) }"
    proto = embedded(model_of(body, weights_of(1, v=(32, 16), w=(32, 8))))
    weight = {"dtype": "int4", "symmetric": False, "per": "group", "group_size": 16}
    recipe = {"steps": [{"type": "quantize", "act": None, "weight": weight}]}
    path = written(lambda: proto, "generic", tmp_path, recipe=recipe)
    with pytest.raises(GraphError, match=r"node 'a': AscendQuant needs one known scale"):
        export(path, tmp_path / "o.onnx", "ascend", float_model=tmp_path / "float.onnx")


def test_other_errors(tmp_path: Path) -> None:
    path = written(mlp, "qoperator", tmp_path)
    with pytest.raises(GraphError, match=r"computes in QLinearMatMul; give the QDQ form"):
        export(path, tmp_path / "o.onnx", "cpu")
    with pytest.raises(GraphError, match=r"holds no quantized layer"):
        export(tmp_path / "float.onnx", tmp_path / "o.onnx", "cpu")
    with pytest.raises(RecipeError, match=r"target 'gpu' is unknown"):
        export(path, tmp_path / "o.onnx", "gpu")
    with pytest.raises(RecipeError, match=r"Triton's ONNX Runtime backend cannot run target 'ascend'"):
        export(path, tmp_path / "o.onnx", "ascend", triton=tmp_path / "t")


def test_too_little_agreement_leaves_nothing(tmp_path: Path) -> None:
    path = written(mlp, "generic", tmp_path)
    with pytest.raises(VerificationError, match=r"agrees with .* dB only, below 90"):
        export(path, tmp_path / "o.onnx", "ascend", float_model=tmp_path / "float.onnx", min_agreement=90.0)
    assert not (tmp_path / "o.onnx").exists()


def test_the_float_model_tells_whether_another_answer_is_a_worse_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(mlp, "cpu", tmp_path)
    floats: dict[str, Any] = {"float_model": tmp_path / "float.onnx", "min_agreement": 80}
    made = export(path, tmp_path / "o.onnx", "ascend", **floats)
    assert made.agreement_db is not None
    assert made.agreement_db < 80
    assert "dB from the float model on these samples, the source " in made.notes[-1]
    monkeypatch.setattr(exporting, "_FURTHER_DB", -60.0)
    with pytest.raises(VerificationError, match="dB only, below 80"):
        export(path, tmp_path / "p.onnx", "ascend", **floats)
    assert not (tmp_path / "p.onnx").exists()


def test_the_float_model_is_an_input_too(tmp_path: Path) -> None:
    path, model = written(mlp, "generic", tmp_path), tmp_path / "float.onnx"
    before = model.read_bytes()
    with pytest.raises(GraphError, match=r"is the same file as the input"):
        export(path, model, "ascend", float_model=model)
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "onnxslim_ptq.weights", "model_quant_type": "../../up", "recipe": [], "seed": "x"}',
        '{"format": "onnxslim_ptq.weights", "model_quant_type": 3, "recipe": 4, "seed": true}',
        "[" * 100_000,
        "[]",
    ],
    ids=["a path", "types", "depth", "no object"],
)
def test_a_hostile_description_beside_the_model(text: str, tmp_path: Path) -> None:
    """It is read for what it tells of the model's making, and becomes part of a name."""
    import json

    path = written(mlp, "cpu", tmp_path)
    path.with_suffix(".json").write_text(text)
    made = export(path, tmp_path / "deep" / "er", "openvino")
    assert made.paths.model == tmp_path / "deep" / "er" / "q_w8a8.onnx"
    document = json.loads(made.paths.json.read_text())
    assert (document["recipe"], document["seed"]) == ({}, 0)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))


def test_integers_outside_layers_have_no_form_on_ascend() -> None:
    """Such as an int8 KV cache: DequantizeLinear at an input of the graph."""
    body = """g (int8[2,4] k, float[2,4] x) => (float[2,4] y, float[2,4] z) {
        [q] c = QuantizeLinear (x, s, p) [d] r = DequantizeLinear (c, s, p)
        [wd] v = DequantizeLinear (w, s, p) [mm] y = MatMul (r, v)
        [cache] z = DequantizeLinear (k, s, p)
    }"""
    stored = {"s": np.float32(0.1), "p": np.int8(0), "w": np.ones((4, 4), np.int8)}
    reading = read_quantized(model_of(body, stored))
    with pytest.raises(
        GraphError, match=r"node 'cache': DequantizeLinear that belongs to no layer has no form"
    ):
        retarget(reading, TARGETS["ascend"])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"s": np.ones(3, np.float32), "p": np.zeros(3, np.int8)}, "3 scales along axis 1 of"),
        ({"s": np.ones(1, np.float32), "p": np.zeros(1, np.float16)}, "integer type 'float16' is unknown"),
    ],
    ids=["count", "type"],
)
def test_graphs_that_contradict_themselves(stored: dict[str, Any], message: str) -> None:
    body = "[wd] v = DequantizeLinear (w, s, p) [mm] y = MatMul (x, v)"
    model = model_of(
        f"g (float[2,4] x) => (float[2,4] y) {{ {body} }}", {**stored, "w": np.ones((4, 4), np.int8)}
    )
    with pytest.raises(GraphError, match=f"node 'wd': {message}"):
        read_quantized(model)


def test_structure_of_each_form(tmp_path: Path) -> None:
    """TensorRT: symmetric int8, zero points 0, no int32 behind DequantizeLinear. QOperator: QLinear layers."""
    proto = onnx.load(written(cnn, "tensorrt", tmp_path))
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
            assert node.input[0] not in values or values[node.input[0]].dtype == np.int8
            axes = {a.name: a.i for a in node.attribute}
            reader = next((n for n in proto.graph.node if node.output[0] in n.input), None)
            if axes:
                assert reader is not None
                assert axes["axis"] == {"Conv": 0, "Gemm": 1}[reader.op_type]
    ops = [n.op_type for n in onnx.load(written(cnn, "qoperator", tmp_path)).graph.node]
    assert ops.count("QLinearConv") == 3
    assert "Conv" not in ops
    assert "Relu" not in ops


def test_reading_is_the_plan_that_was_written() -> None:
    proto = cnn()
    result = quantize(proto, calib_data=feeds_for(proto), target="cpu")
    reading = read_quantized(open_model(result.model))
    assert {u.node for u in reading.plan.weights} == {u.node for u in result.plan.weights}
    # A value that layers alone read is read back as quantized for each of them: the same graph.
    shared = {s for s in reading.plan.activations if not hasattr(s, "node")}
    assert shared < {s for s in result.plan.activations if not hasattr(s, "node")}
    for use, slot in result.plan.weights.items():
        ours = reading.plan.weight_codes[reading.plan.weights[use].params]
        np.testing.assert_array_equal(ours.codes, result.plan.weight_codes[slot.params].codes)


class TestTriton:
    def test_repository(self, tmp_path: Path) -> None:
        path = written(mlp, "cpu", tmp_path)
        made = export(path, tmp_path / "m x.onnx", "cpu", triton=tmp_path / "repo")
        assert made.triton == tmp_path / "repo" / "m_x"
        assert sorted(p.relative_to(made.triton).as_posix() for p in made.triton.rglob("*")) == [
            "1",
            "1/model.onnx",
            "config.pbtxt",
        ]
        assert (made.triton / "config.pbtxt").read_text() == (
            'name: "m_x"\nbackend: "onnxruntime"\ndefault_model_filename: "model.onnx"\nmax_batch_size: 8\n'
            'input [\n  {\n    name: "x"\n    data_type: TYPE_FP32\n    dims: [ 16 ]\n  }\n]\n'
            'output [\n  {\n    name: "y"\n    data_type: TYPE_FP32\n    dims: [ 4 ]\n  }\n]\ndynamic_batching { }\n'
        )
        onnx.checker.check_model(made.triton / "1" / "model.onnx", full_check=True)
        (tmp_path / "n").mkdir()
        with pytest.raises(GraphError, match=r"exists already"):
            export(path, tmp_path / "n" / "m x.onnx", "cpu", triton=tmp_path / "repo")
        (tmp_path / "file").touch()
        with pytest.raises(GraphError, match=r"file' cannot be written .*; choose another --triton folder"):
            export(path, tmp_path / "n" / "m x.onnx", "cpu", triton=tmp_path / "file")
        with pytest.raises(GraphError, match="is the same file as the input"):
            export(path, path, "cpu", triton=tmp_path / "repo")
        assert not list((tmp_path / "n").iterdir()), "nothing is written when half of it cannot be"
        assert [p.name for p in (tmp_path / "repo").iterdir()] == ["m_x"]

    def test_fixed_shapes_are_not_batched(self, tmp_path: Path) -> None:
        body = """g (float[4,M] x, int64[M] s) => (float[4,8] y, float z) {
            [mm] y = MatMul (x, w)
            z = ReduceSum <keepdims = 0> (y)
        }"""

        def make() -> onnx.ModelProto:
            return embedded(model_of(body, weights_of(1, w=(16, 8))))

        from onnxslim_ptq.export.triton import triton_config

        text = triton_config(open_model(make()), "m")
        assert "max_batch_size: 0" in text
        assert "dynamic_batching" not in text
        assert 'name: "s"\n    data_type: TYPE_INT64\n    dims: [ -1 ]' in text
        # Triton: "cannot have empty reshape for non-batching model"; its backend takes [ 1 ] for a scalar.
        assert 'name: "z"\n    data_type: TYPE_FP32\n    dims: [ 1 ]\n  }' in text
        batched = "g (float[N,16] x, int64[N] s) => (float[N,8] y) { y = MatMul (x, w) }"
        text = triton_config(model_of(batched, weights_of(1, w=(16, 8))), "m")
        assert 'name: "s"\n    data_type: TYPE_INT64\n    dims: [ 1 ]\n    reshape { shape: [ ] }' in text


def test_command(tmp_path: Path, capsys: Any) -> None:
    path = written(cnn, "cpu", tmp_path)
    out = str(tmp_path / "o.onnx")
    assert main(["export", str(path), out]) == 2
    assert "Missing option '--target'" in capsys.readouterr().err
    assert main(["export", str(path), out, "--target", "openvino", "--shape", "x:1x3x8x8"]) == 0
    assert "agrees with q.onnx to " in capsys.readouterr().out
    assert main(["export", str(path), out, "--target", "openvino", "--shape", "x:1x3x8x8", "--json"]) == 0
    assert '"agreement_db"' in capsys.readouterr().out
