"""The weights JSON: matches its schema, holds only strict JSON, and says what the written model really contains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

from calib.model import Model, open_model
from calib.types import Range
from onnxslim_ptq.core.dtypes import INT8, INT32, UINT8
from onnxslim_ptq.core.qmath import channel_range, params_from_range, quantize, quantize_bias
from onnxslim_ptq.core.spec import (
    BiasCodes,
    PerChannel,
    PerTensor,
    QParams,
    QuantPlan,
    QuantSpec,
    Result,
    Slot,
    Use,
    WeightCodes,
)
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import VerificationError
from onnxslim_ptq.export import description
from onnxslim_ptq.export.description import Calibration, Context, Description, describe, write_description
from onnxslim_ptq.export.files import output_paths
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.graph.graph import Graph

SCHEMA = json.loads(Path(description.__file__).with_name("weights.schema.json").read_text())
ACT = QuantSpec(UINT8, PerTensor(), False)
WEIGHT = QuantSpec(INT8, PerChannel(1), True)
BIAS = QuantSpec(INT32, PerChannel(0), True)


def _model(channels: int = 40) -> Model:
    """Two Gemms that read the same x and weight w; the second has a bias b."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], "one"),
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], "two"),
    ]
    weights = {"w": rng.normal(size=(10, channels)), "b": rng.normal(size=channels)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 10])],
        [helper.make_tensor_value_info(n, 1, [1, channels]) for n in ("h", "y")],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    return open_model(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))


def _plan(graph: Graph) -> QuantPlan:
    plan = QuantPlan()
    reach = Range(np.float64(-1.0), np.float64(3.0))  # type: ignore[arg-type]
    plan.params["x@u8"] = params_from_range(reach, ACT)
    plan.ranges["x@u8"] = (reach, "mixed")
    plan.activations = {Use("one", 0): Slot(ACT, "x@u8"), Use("two", 0): Slot(ACT, "x@u8")}
    weight, bias = (graph.value(graph.node("two").inputs[port]) for port in (1, 2))
    params = params_from_range(channel_range(weight, 1), WEIGHT)
    plan.weights = {Use("one", 1): Slot(WEIGHT, "w@1"), Use("two", 1): Slot(WEIGHT, "w@1")}
    plan.weight_codes["w@1"] = WeightCodes(quantize(weight, params), params, "rtn")
    scale = plan.params["x@u8"].scale * params.scale
    plan.biases[Use("two", 2)] = Slot(BIAS, "two.bias")
    codes, clipped = quantize_bias(bias, scale)
    plan.bias_codes["two.bias"] = BiasCodes(codes, scale, "x@u8", "w@1", clipped)
    plan.skipped["relu"] = "no weight"
    return plan


def _context(metrics: Mapping[str, Any] | None = None, **more: Any) -> Context:
    return Context(
        source="m.onnx",
        source_sha256="0" * 64,
        quant_type="W8A8",
        target="cpu",
        tool={"onnxruntime": "1.0"},
        recipe={"version": 1, "steps": [{"type": "quantize"}]},
        calibration=Calibration(64, "cpu", "1" * 64),
        metrics=metrics
        or {
            "sqnr_db": 34.1,
            "cosine": 0.9998,
            "per_output": {"y": {"sqnr_db": 34.1}},
            "measured_on": "held-out",
        },
        **more,
    )


def _describe(channels: int = 40, **more: Any) -> tuple[Description, Model]:
    model = _model(channels)
    graph = Graph(model)
    plan = _plan(graph)
    written = render_qdq(model, plan, TARGETS["cpu"])
    return describe(plan, graph, written.proto, _context(**more)), written


def _read(made: Description) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document: dict[str, Any] = json.loads(made.json_bytes(), parse_constant=refuse)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    return document


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_tables() -> None:
    made, written = _describe()
    document = _read(made)
    assert list(document) == SCHEMA["required"], "keys in the order of the schema"
    weight = document["weights"]["w"]
    codes = {t.name: (written.weights.get(t.name), t) for t in written.proto.graph.initializer}
    array, tensor = codes[weight["quantized_name"]]
    array = numpy_helper.to_array(tensor) if array is None else array
    assert weight["sha256"] == hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    assert (weight["nodes"], weight["dtype"], weight["shape"], weight["axis"], weight["rounder"]) == (
        ["one", "two"],
        "int8",
        [10, 40],
        1,
        "rtn",
    )
    assert len(weight["scale"]) == len(weight["zero_point"]) == 40
    activation = document["activations"]["x"]
    assert activation == {
        "nodes": ["one", "two"],
        "dtype": "uint8",
        "when": "static",
        "axis": None,
        "scale": [float(np.float32(4 / 255))],
        "zero_point": [64],
        "range": [-1.0, 3.0],
        "method": "mixed",
    }
    assert document["biases"] == {
        "b": {"nodes": ["two"], "scale_from": ["x", "w"], "dtype": "int32", "clipped": 0}
    }
    assert document["skipped"] == {"relu": "no weight"}
    calibration = {"samples": 64, "device": "cpu", "sha256": "1" * 64, "prepared": []}
    assert document["calibration"] == calibration


def test_scales_survive_exactly() -> None:
    made, written = _describe()
    stored = next(t for t in written.proto.graph.initializer if t.name == "w_scale")
    np.testing.assert_array_equal(
        np.float32(_read(made)["weights"]["w"]["scale"]), numpy_helper.to_array(stored)
    )


def test_names_that_repeat_and_results() -> None:
    graph = Graph(_model())
    plan = _plan(graph)
    other = QuantSpec(INT8, PerTensor(), True)
    plan.params["x@s8"] = params_from_range(Range(np.float64(-1), np.float64(1)), other)  # type: ignore[arg-type]
    plan.activations[Use("two", 0)] = Slot(other, "x@s8")
    plan.activations[Result("h")] = Slot(ACT, "x@u8")
    old = plan.weight_codes["w@1"]
    plan.weight_codes["w@None"] = WeightCodes(old.codes, old.params, "rtn", "w", "w_other")
    plan.weights[Use("two", 1)] = Slot(WEIGHT, "w@None")
    document = _read(describe(plan, graph, onnx.ModelProto(), _context()))
    assert {n: (a["nodes"], a["dtype"], a["method"]) for n, a in document["activations"].items()} == {
        "x": (["one"], "uint8", "mixed"),
        "x#2": (["two"], "int8", None),
        "h": ([], "uint8", "mixed"),
    }
    assert document["activations"]["x#2"]["range"] == pytest.approx([-128 / 127, 1.0])
    assert {n: (w["nodes"], w["quantized_name"]) for n, w in document["weights"].items()} == {
        "w": (["one"], None),
        "w#2": (["two"], "w_other"),
    }


@pytest.mark.parametrize(("channels", "inline"), [(4096, True), (4097, False)])
def test_long_arrays_are_references(tmp_path: Path, channels: int, inline: bool) -> None:
    made, _ = _describe(channels)
    weight = _read(made)["weights"]["w"]
    paths = output_paths(tmp_path / "q.onnx", "m", "w8a8")
    written = write_description(made, paths)
    if inline:
        assert written == [paths.json]
        assert len(weight["scale"]) == channels
        return
    assert written == [paths.params, paths.json]
    assert paths.params is not None
    arrays = load_file(paths.params)
    scale, zero = arrays[weight["scale"]["ref"]], arrays[weight["zero_point"]["ref"]]
    assert (scale.shape, scale.dtype, zero.dtype) == ((channels,), np.float32, np.int8)
    assert sorted(arrays) == ["weights/w/scale", "weights/w/zero_point"]


def test_metrics_that_are_not_finite() -> None:
    made, _ = _describe(
        metrics={
            "sqnr_db": float("inf"),
            "cosine": np.float32(1.0),
            "measured_on": "synthetic",
            "per_output": {"y": {"sqnr_db": np.float64("nan")}, "h": {"sqnr_db": None}},
        }
    )
    assert _read(made)["metrics"] == {
        "sqnr_db": None,
        "cosine": 1.0,
        "measured_on": "synthetic",
        "per_output": {"y": {"sqnr_db": None}, "h": {"sqnr_db": None}},
        "not_finite": {"/sqnr_db": "inf", "/per_output/y/sqnr_db": "nan"},
    }


def test_a_scale_that_is_not_finite_is_an_error() -> None:
    graph = Graph(_model())
    plan = _plan(graph)
    plan.params["x@u8"] = QParams(ACT, np.asarray(np.nan), np.asarray(0))
    with pytest.raises(VerificationError, match="'activations/x/scale' holds NaN"):
        describe(plan, graph, onnx.ModelProto(), _context())


def test_smoothing_and_io_changes() -> None:
    made, _ = _describe(
        smoothing=[{"step": "iter_smooth", "group": ["norm", "q"], "scale": np.arange(1.0, 5000.0)}],
        io_changes=[{"name": "kv", "dtype": "int8", "scale": np.ones(2)}],
    )
    document = _read(made)
    assert document["smoothing"][0]["scale"] == {"ref": "smoothing/0/scale"}
    assert made.arrays["smoothing/0/scale"].dtype == np.float32
    assert document["io_changes"] == [{"name": "kv", "dtype": "int8", "scale": [1.0, 1.0]}]


def test_same_bytes_twice_and_one_entry_a_line(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written.append(write_description(_describe(5000)[0], output_paths(tmp_path / name, "m", "w8a8")))
    assert [p.read_bytes() for p in written[0]] == [p.read_bytes() for p in written[1]]
    text = _describe()[0].json_bytes().decode()
    assert any(line.startswith('  "w": {"nodes": ["one", "two"]') for line in text.splitlines())
    assert text.endswith("}\n")


def test_names_in_any_language() -> None:
    made = Description({"names": {"größe\udcff": "重"}})
    assert json.loads(made.json_bytes()) == made.document
    assert "重".encode() in made.json_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"version": 2},
        {"weights": {"w": {}}},
        {"seed": "0"},
        {"source": {"file": "m", "sha256": "0"}},
        {"activations": {"x": {"when": "sometimes"}}},
        {"skipped": {"node": None}},
    ],
)
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    document = {**_read(_describe()[0]), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(document)
