"""`compare`: errors of outputs and layers, speed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calib.model import open_model
from calib.readers import from_iterable
from onnxslim_ptq import quantize
from onnxslim_ptq.analysis.compare import Comparison, compare_models
from onnxslim_ptq.analysis.layers import Locals, find_layers
from onnxslim_ptq.cli import main
from onnxslim_ptq.export import description
from tests.graph.models import feed_for
from tests.models import feeds_for, parse, weights_of
from tools import nets

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
MODEL, CALIB = str(DIGITS / "digits.onnx"), str(DIGITS / "calib")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("compare") / "m.onnx"
    assert main([MODEL, str(out), "--calib", CALIB, "--exclude", "*down*", "-q"]) == 0
    return str(out)


def test_a_person_reads_it(quantized: str, capsys: Captured) -> None:
    assert main(["compare", MODEL, quantized, "--calib", CALIB]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert text.startswith("measured on 8 held-out samples\n")
    assert "9 quantized layers, worst first" in text
    assert "x as fast" in text
    assert "int8 weights: 9, of which 0 get no integer kernel" in text
    assert "4 HardSigmoid: ONNX Runtime has no integer HardSigmoid on the CPU: /stem/" in text


def test_a_program_reads_it(quantized: str, capsys: Captured) -> None:
    assert main(["compare", MODEL, quantized, "--calib", CALIB, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    document = json.loads(Path(quantized).with_suffix(".json").read_text())
    assert found["sqnr_db"] == pytest.approx(
        document["metrics"]["sqnr_db"]
    )  # the same samples as quantize measured on
    layers = {layer["node"]: layer for layer in found["per_layer"]}
    assert len(layers) == 10
    first, last = layers["/stem/stem.0/Conv"], layers["/fc/Gemm"]
    assert first["local"]["sqnr_db"] == pytest.approx(first["cumulative"]["sqnr_db"], abs=0.01)
    assert last["local"]["sqnr_db"] > last["cumulative"]["sqnr_db"]
    assert last["cumulative"]["sqnr_db"] == pytest.approx(found["sqnr_db"], abs=1.0)
    assert layers["/down/down.0/Conv"]["local"] is None
    assert not layers["/down/down.0/Conv"]["quantized"]
    assert found["latency"]["speedup"] > 0
    assert found["per_output"]["logits"]["top1_agree"] == 1.0
    islands = {island["node"]: island for island in found["float_islands"]}
    assert islands["/block1/Add"]["reason"].startswith("its input '")
    assert (
        islands["/stem/stem.2/HardSigmoid"]["reason"] == "ONNX Runtime has no integer HardSigmoid on the CPU"
    )


def test_samples_and_eval(quantized: str, capsys: Captured) -> None:
    assert main(["compare", MODEL, quantized, "--eval", CALIB, "--samples", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["measured_on"]) == (3, "eval")


def test_a_model_equals_itself(capsys: Captured) -> None:
    assert main(["compare", MODEL, MODEL, "--calib", CALIB]) == 0
    assert "exact" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["no data", "swapped", "another model", "missing"])
def test_errors(case: str, quantized: str, tmp_path: Path, capsys: Captured) -> None:
    other = tmp_path / "other.onnx"
    model = onnx.load(MODEL)
    model.graph.node[-1].output[0] = model.graph.output[0].name = "renamed"
    onnx.save(model, other)
    args, message = {
        "no data": ([MODEL, quantized], "give the --calib that quantize got"),
        "swapped": ([quantized, MODEL, "--calib", CALIB], "give the float model first"),
        "another model": ([MODEL, str(other), "--calib", CALIB], "has no output 'logits'"),
        "missing": ([MODEL, "missing.onnx", "--calib", CALIB], "does not exist"),
    }[case]
    assert main(["compare", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def _run(float_text: str, quantized_text: str, feeds: list[dict[str, Any]]) -> Comparison:
    exact, seen = (open_model(onnx.parser.parse_model(t)) for t in (float_text, quantized_text))
    return compare_models(exact, seen, from_iterable(feeds, exact.inputs()), latency=False)


HEAD = '<ir_version: 8, opset_import: ["" : 13]> g (float[2,2] x) => (float[2,2] z) '
FLOAT = (
    HEAD
    + "<float[2,2] w = {1.0, 0.0, 0.0, 1.0}, float[2,2] v = {1.0, 0.0, 0.0, 1.0}> { y = MatMul(x, w) z = MatMul(y, v) }"
)
QUANT = HEAD + (
    "<float s = {1.0}, uint8 zp = {0}, float sw = {1.0}, int8 zw = {0}, "
    "int8[2,2] wq = {1, 0, 0, 1}, int8[2,2] vq = {1, 0, 0, 1}> "
    "{ xq = QuantizeLinear(x, s, zp) xd = DequantizeLinear(xq, s, zp) wd = DequantizeLinear(wq, sw, zw) "
    "y = MatMul(xd, wd) yq = QuantizeLinear(y, s, zp) yd = DequantizeLinear(yq, s, zp) "
    "vd = DequantizeLinear(vq, sw, zw) z = MatMul(yd, vd) }"
)


def test_local_and_cumulative_by_hand() -> None:
    """x = 1.25 is rounded to 1 by the first layer; the second would round exact input just so, but gets 1 already."""
    x = np.full((2, 2), 1.25, np.float32)
    found = _run(FLOAT, QUANT, [{"x": x}])
    expected = 10 * math.log10(1.25**2 / 0.25**2)
    first, second = found.layers
    assert first.local is not None
    assert second.local is not None
    errors = [first.local.sqnr, first.cumulative.sqnr, second.local.sqnr, second.cumulative.sqnr, found.sqnr]
    assert errors == [pytest.approx(expected)] * 5
    # now the first layer is at fault alone: its result is whole on exact input of the second
    found = _run(FLOAT.replace("w = {1.0, 0.0, 0.0, 1.0}", "w = {0.8, 0.0, 0.0, 0.8}"), QUANT, [{"x": x}])
    first, second = found.layers
    assert first.local is not None
    assert second.local is not None
    assert first.local.sqnr == math.inf  # round(1.25) * 1 = 1.25 * 0.8
    assert second.local.sqnr == math.inf
    found = _run(
        FLOAT, QUANT.replace("wq = {1, 0, 0, 1}", "wq = {2, 0, 0, 2}"), [{"x": np.ones((2, 2), np.float32)}]
    )
    first, second = found.layers
    assert first.local is not None
    assert second.local is not None
    assert first.local.sqnr == first.cumulative.sqnr == second.cumulative.sqnr == pytest.approx(0.0)
    assert second.local.sqnr == math.inf


def test_a_model_without_common_layers() -> None:
    renamed = QUANT.replace("y = MatMul", "other = MatMul").replace(
        "QuantizeLinear(y,", "QuantizeLinear(other,"
    )
    found = _run(
        FLOAT,
        renamed.replace(
            "z = MatMul(yd, vd)", "zz = MatMul(yd, vd) za = Neg(zz) zb = Abs(zz) z = Add(za, zb)"
        ),
        [{"x": np.ones((2, 2))}],
    )
    assert found.layers == []
    assert "errors of layers are not known" in found.notes[0]


def test_integer_outputs_count_equal_values() -> None:
    whole = [t.replace("(float[2,2] z)", "(int64[2] z)").replace(" z = MatMul", " last = MatMul").replace(
        " }", " z = ArgMax<axis = 1, keepdims = 0>(last) }") for t in (FLOAT, QUANT)]  # fmt: skip
    found = _run(*whole, [{"x": np.array([[1.25, 0], [0, 3.0]], np.float32)}])
    assert found.outputs[0].as_json() == {"equal": 1.0}
    assert found.sqnr is None


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small decoder, samples, and a recipe that smooths in two ways."""
    folder = tmp_path_factory.mktemp("smoothed")
    onnx.save(nets.decoder(layers=1), folder / "float.onnx")
    (folder / "samples").mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        tokens = {"input_ids": rng.integers(0, 256, (1, 9)), "position_ids": np.arange(9)[None]}
        past = {f"past_key_values.0.{kind}": np.zeros((1, 2, 0, 16), np.float32) for kind in ("key", "value")}
        mask = {"attention_mask": np.ones((1, 9), np.int64)}
        np.savez(folder / "samples" / f"{index:02}.npz", **tokens, **mask, **past)
    recipe = "steps:\n  - {type: kv_smooth}\n  - {type: outlier_suppression_plus}\n  - {type: quantize}\n"
    (folder / "recipe.yaml").write_text(recipe)
    return folder


class TestSmoothed:
    """Smoothing rescales values between layers on purpose: that is no error of any layer."""

    def arguments(self, command: str, smoothed: Path) -> list[str]:
        models = [str(smoothed / name) for name in ("float.onnx", "int8.onnx")]
        return [
            command,
            *models,
            "--calib",
            str(smoothed / "samples"),
            "--recipe",
            str(smoothed / "recipe.yaml"),
        ]

    def test_layers_are_compared_with_the_smoothed_float_model(
        self, smoothed: Path, capsys: Captured
    ) -> None:
        assert main(self.arguments("quantize", smoothed)) == 0
        text = capsys.readouterr().out
        assert "norm-linear" in text
        worst = next(line for line in text.splitlines() if line.startswith("worst layers alone"))
        told = {float(word) for word in re.findall(r"(-?[\d.]+) dB", worst)}
        assert min(told) > 15

        assert main([*self.arguments("compare", smoothed), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        local = [layer["local"]["sqnr_db"] for layer in found["per_layer"] if layer["local"]]
        assert len(local) == 8
        assert min(local) > 15
        assert found["notes"] == []

        exact, seen = (open_model(smoothed / name) for name in ("float.onnx", "int8.onnx"))
        feeds = [dict(np.load(path)) for path in sorted((smoothed / "samples").iterdir())[:2]]
        plain = compare_models(exact, seen, from_iterable(feeds, exact.inputs()), latency=False)
        assert min(la.local.sqnr for la in plain.layers if la.local and la.local.sqnr is not None) < 5

    def test_scales_of_many_channels_lie_in_their_own_file(
        self, smoothed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(description, "INLINE", 8)
        assert main([*self.arguments("quantize", smoothed), "-q"]) == 0
        scale = json.loads((smoothed / "int8.json").read_text())["smoothing"][0]["scale"]
        assert scale == {"ref": "smoothing/0/scale"}
        assert main([*self.arguments("compare", smoothed), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert min(layer["local"]["sqnr_db"] for layer in found["per_layer"] if layer["local"]) > 15
        assert found["notes"] == []

        (smoothed / "int8.params.safetensors").unlink()
        assert main(self.arguments("compare", smoothed)) == 0
        assert "int8.params.safetensors' cannot be read" in capsys.readouterr().err

    def test_scales_of_another_model_are_not_used(self, smoothed: Path, capsys: Captured) -> None:
        assert main([*self.arguments("quantize", smoothed), "-q"]) == 0
        path = smoothed / "int8.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"source": {"file": "x", "sha256": "0" * 64}}))
        assert main(self.arguments("compare", smoothed)) == 0
        assert "errors of smoothed layers mislead" in capsys.readouterr().err
        document["smoothing"][0]["group"] = ["nobody"]
        path.write_text(json.dumps(document))
        assert main(self.arguments("compare", smoothed)) == 0
        assert "errors of smoothed layers mislead" in capsys.readouterr().err


@pytest.mark.parametrize("make", [nets.bert, lambda: nets.mobilenet(width=8, size=32)])
def test_layers_of_an_ascend_model(make: Any, tmp_path: Path, capsys: Captured) -> None:
    """Also those whose Add is an integer one; what this CPU does with the weights says nothing of the device."""
    proto = make()
    onnx.save(proto, tmp_path / "float.onnx")
    result = quantize(proto, "w8a8-minmax", [feed_for(proto, s) for s in range(4)], target="ascend")
    result.save(tmp_path / "q.onnx")
    layers = sum(n.op_type == "AscendDequant" for n in onnx.load(tmp_path / "q.onnx").graph.node)
    source = open_model(proto)
    data = from_iterable([feed_for(proto, 9)], source.inputs())
    found = compare_models(source, open_model(tmp_path / "q.onnx"), data)
    quantized = [la for la in found.layers if la.quantized]
    assert len(quantized) == layers
    assert all(la.local is not None and (la.local.sqnr or 0) > 20 for la in quantized)
    assert found.latency is None
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", **feed_for(proto, 9))
    files = [str(tmp_path / n) for n in ("float.onnx", "q.onnx", "data")]
    assert main(["compare", *files[:2], "--eval", files[2]]) == 0
    text = capsys.readouterr().out
    assert f"int8 weights: {found.integer_weights}\n" in text


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a8-pdmix"])
def test_layers_with_activations_per_token_have_errors_of_their_own(recipe: str) -> None:
    """What gives the rows their scale back belongs to the layer: of one layer, local error = error of the output."""
    proto = parse("g (float[B,6] x) => (float[B,5] y) { y = MatMul (x, w) }", weights_of(1, w=(6, 5)), 17, 8)
    feeds = feeds_for(proto, 12, {"B": 3})
    result = quantize(proto, recipe, feeds, target="generic")
    samples = list(from_iterable(feeds, result.source.inputs()))
    found = compare_models(result.source, result.quantized, samples, latency=False)
    (layer,) = found.layers
    assert layer.local is not None
    assert layer.local.sqnr == pytest.approx(found.outputs[0].sqnr, abs=0.01)
    assert found.notes == []


def test_layers_without_an_error_of_their_own_are_counted() -> None:
    """A layer behind an input that only the quantized model has."""
    proto = parse("g (float[B,6] x) => (float[B,5] y) { y = MatMul (x, w) }", weights_of(1, w=(6, 5)), 17, 8)
    feeds = feeds_for(proto, 12, {"B": 3})
    result = quantize(proto, "w8a8-minmax", feeds, target="generic")
    changed = onnx.ModelProto()
    changed.CopyFrom(result.model)
    first = next(n for n in changed.graph.node if n.op_type == "QuantizeLinear")
    changed.graph.node.insert(0, onnx.helper.make_node("Add", [first.input[0], "more"], ["sum"]))
    changed.graph.node[1].input[0] = "sum"
    changed.graph.input.append(onnx.helper.make_tensor_value_info("more", 1, [1]))
    layers = find_layers(open_model(proto), open_model(changed))
    Locals(open_model(changed), layers, open_model(proto))
    assert [(layer.quantized, layer.local) for layer in layers] == [(True, None)]
