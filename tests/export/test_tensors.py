"""The tensors for msModelSlim: formulas in numpy, the integers of the graph, files, modes, and the way back."""

from __future__ import annotations

import json
import stat
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from calib.model import open_model
from onnxslim_ptq import Result
from onnxslim_ptq.core.deq_scale import unpack
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.files import write_model
from onnxslim_ptq.export.read_weights import read_weight_files
from onnxslim_ptq.export.rebuild import rebuild
from onnxslim_ptq.export.tensors import TensorSet
from onnxslim_ptq.export.weight_files import WeightFiles, files_of
from tests.models import outputs_of, parse, quantized, session_of, sqnr_of, weights_of

WEIGHTS = weights_of(7, w1=(64, 128), b1=(128,), w2=(128, 64), w3=(32, 64), b3=(32,), g=(64,), n=(64,))
BODY = """g (float[N,T,64] x) => (float[N,T,64] z, float[M,32] y) {
    [norm] i = LayerNormalization (x, g, n)
    [up] h = MatMul (i, w1) [bias] a = Add (h, b1) [act] r = Relu (a)
    [down] z = MatMul (r, w2) [flat] f = Reshape (z, shape)
    [fc] y = Gemm <transB = 1> (f, w3, b3) }"""
LAYERS = ("up", "down", "fc")
STATIC = {"steps": [{"type": "quantize", "act": {"range": {"type": "minmax"}}, "bias_correction": False}]}
DYNAMIC = {"steps": [{"type": "quantize", "act": {"per": "token", "when": "dynamic"}}]}
WHOLE = {"steps": [{**STATIC["steps"][0], "added_bias": "int32"}]}
SMOOTHED = {"steps": [{"type": "iter_smooth", "groups": ["norm-linear"]}, *STATIC["steps"]]}


def model() -> onnx.ModelProto:
    return parse(BODY, {**WEIGHTS, "g": WEIGHTS["g"] + 1, "shape": np.array([-1, 64])}, 17, 8)


def feeds(count: int = 8) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    return [{"x": (draw.normal(size=(2, 5, 64)) + 0.5).astype(np.float32)} for _ in range(count)]


@cache
def done(recipe: str) -> Result:
    return quantized(model(), feeds(), recipe=json.loads(recipe))


def saved(folder: Path, recipe: Any = STATIC, **how: Any) -> tuple[Result, dict[str, Any], dict[str, Any]]:
    """The result, its tensors and its description."""
    result = done(json.dumps(recipe))
    result.save(folder / "m.onnx", weights=WeightFiles(**how))
    tensors: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        if "params" not in path.name:
            tensors |= load_file(path)
    (description,) = folder.glob("*description*.json")
    return result, tensors, json.loads(description.read_text())


@pytest.mark.parametrize("recipe", [STATIC, SMOOTHED], ids=["plain", "smoothed"])
def test_formulas(recipe: Any, tmp_path: Path) -> None:
    """deq = float32(s_x s_w) as bits; quant_bias = round(b / deq - z sum q); all other forms as documented."""
    _, tensors, kinds = saved(tmp_path, recipe)
    assert kinds.pop("model_quant_type") == "W8A8"
    assert set(kinds) == set(tensors)
    for layer, out in zip(LAYERS, (128, 64, 32), strict=True):
        t = {k.split(".")[1]: v for k, v in tensors.items() if k.startswith(f"{layer}.")}
        assert t["weight"].dtype == np.int8
        assert t["weight"].shape[0] == out
        assert np.abs(t["weight"].astype(int)).max(axis=1).tolist() == [127] * out
        assert (t["weight_scale"].shape, t["weight_scale"].dtype) == ((out, 1), np.float32)
        assert not t["weight_offset"].any()
        assert t["input_scale"].shape == t["input_offset"].shape == (1,)
        deq = t["input_scale"] * t["weight_scale"][:, 0]
        np.testing.assert_array_equal(t["deq_scale"], deq.view(np.int32).astype(np.int64))
        bias = t.get("bias", np.zeros(out))
        exact = bias / deq.astype(np.float64) - float(t["input_offset"][0]) * t["weight"].astype(int).sum(
            axis=1
        )
        np.testing.assert_array_equal(t["quant_bias"], np.rint(exact).astype(np.int32))
        assert {kinds[f"{layer}.{part}"] for part in t if part != "bias"} == {"W8A8"}
        assert kinds.get(f"{layer}.bias", "FLOAT") == "FLOAT"
    assert {name: kinds[name] for name in ("g", "n")} == {"g": "FLOAT", "n": "FLOAT"}


@pytest.mark.parametrize("recipe", [STATIC, WHOLE], ids=["float", "int32"])
def test_integers_of_the_files_are_those_of_the_graph(recipe: Any, tmp_path: Path) -> None:
    """y = (sum q_x q_w + quant_bias) deq, layer after layer, against ONNX Runtime's answers and its own codes."""
    result, tensors, _ = saved(tmp_path, recipe)
    proto = result.model
    quantizers = {n.input[0]: n.output[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    ends = {"up": ("i", "a"), "down": ("r", "z"), "fc": ("f", "y")}
    wanted = [name for pair in ends.values() for name in pair] + [quantizers[x] for x, _ in ends.values()]
    have = {o.name for o in proto.graph.output}
    for name in wanted:
        if name not in have:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = session_of(proto)
    for feed in feeds(3):
        seen = dict(zip(wanted, session.run(wanted, dict(feed)), strict=True))
        for layer, (source, target) in ends.items():
            codes = seen[quantizers[source]].astype(np.int64) - 128  # the graph has uint8, the files int8
            s, z = tensors[f"{layer}.input_scale"][0], tensors[f"{layer}.input_offset"][0]
            own = np.clip(np.rint(seen[source] / s) + z, -128, 127)
            np.testing.assert_array_equal(own, codes)
            sums = codes @ tensors[f"{layer}.weight"].T.astype(np.int64) + tensors[f"{layer}.quant_bias"]
            real = sums * unpack(tensors[f"{layer}.deq_scale"]).astype(np.float64)
            # A float bias is rounded to a step of deq in the files; integers themselves agree exactly.
            left = layer == "up" and recipe is STATIC
            step = 0.5 * unpack(tensors[f"{layer}.deq_scale"]).max() if left else 0.0
            assert np.abs(real - seen[target]).max() <= 1e-5 * np.abs(seen[target]).max() + step * 1.001


def test_the_accumulators_equal_those_of_an_integer_matmul(tmp_path: Path) -> None:
    """MatMulInteger with the graph's own uint8 codes and zero point is sum q_x q_w + quant_bias, bias aside."""
    result, tensors, _ = saved(tmp_path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    draw = np.random.default_rng(1)
    for layer, weight in (("up", "w1_quantized"), ("down", "w2_quantized")):
        codes = draw.integers(0, 256, (4, stored[weight].shape[0]), np.uint8)
        zero = int(tensors[f"{layer}.input_offset"][0]) + 128
        graph = (codes.astype(np.int64) - zero) @ stored[weight].astype(np.int64)
        bias = tensors.get(f"{layer}.bias", np.zeros(len(tensors[f"{layer}.weight"])))
        files = (codes.astype(np.int64) - 128) @ tensors[f"{layer}.weight"].T.astype(np.int64)
        files = files + tensors[f"{layer}.quant_bias"] - np.rint(bias / unpack(tensors[f"{layer}.deq_scale"]))
        assert np.abs(files - graph).max() <= (1 if bias.any() else 0)  # ties of the bias


@pytest.mark.parametrize(
    "recipe", [STATIC, WHOLE, SMOOTHED, DYNAMIC, "w8a16"], ids=["w8a8", "whole", "smooth", "token", "w8a16"]
)
@pytest.mark.parametrize("target", ["cpu", "generic"])
def test_the_files_rebuild_the_graph(recipe: Any, target: str, tmp_path: Path) -> None:
    result, _, _ = saved(tmp_path, recipe)
    (description,) = tmp_path.glob("*description*.json")
    again = rebuild(open_model(model()), description, TARGETS[target])
    write_model(again, tmp_path / "again.onnx")
    seen = outputs_of(onnx.load(tmp_path / "again.onnx"), feeds(4))
    assert sqnr_of(outputs_of(result.model, feeds(4)), seen) > (90 if target == "cpu" else 60)


def test_dynamic_layers_have_weights_alone(tmp_path: Path) -> None:
    _, tensors, kinds = saved(tmp_path, DYNAMIC)
    assert kinds["model_quant_type"] == "W8A8_DYNAMIC"
    parts = {name.split(".")[1] for name in tensors if name.startswith("up.")}
    assert parts == {"weight", "weight_scale", "weight_offset", "bias"}


def test_names_and_modes(tmp_path: Path) -> None:
    saved(tmp_path / "new")
    files = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").iterdir()}
    assert files["quant_model_weight_w8a8.safetensors"] == 0o400
    assert files["quant_model_description_w8a8.json"] == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    saved(tmp_path / "new")  # over what stands there, read-only or not


def test_shards(tmp_path: Path) -> None:
    _, tensors, _ = saved(tmp_path, part_bytes=10_000)
    index = json.loads((tmp_path / "quant_model_weight_w8a8.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 1
    assert files == [f"quant_model_weight_w8a8-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file in files:
        held = load_file(tmp_path / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(held)
        assert len(held) == 1 or sum(v.nbytes for v in held.values()) < 10_000


def test_one_shard_has_a_number_too(tmp_path: Path) -> None:
    saved(tmp_path, part_bytes=2**30)
    assert (tmp_path / "quant_model_weight_w8a8-00001-of-00001.safetensors").is_file()


def test_save_types(tmp_path: Path) -> None:
    saved(tmp_path / "v1", save_type=("ascendV1", "numpy"))
    document = json.loads((tmp_path / "v1" / "quant_model_description.json").read_text())
    assert list(document)[:2] == ["model_quant_type", "version"]
    assert document["version"] == "1.0.0"
    assert not list((tmp_path / "v1").glob("*.npz"))
    done(json.dumps(STATIC)).save(tmp_path / "np", weights=WeightFiles(("numpy",)))
    kinds = {p.stem for p in (tmp_path / "np").glob("*.npz")}
    assert kinds == {
        "deq_scale", "input_offset", "input_scale", "quant_bias", "quant_weight", "weight_offset", "weight_scale"
    }  # fmt: skip
    with np.load(tmp_path / "np" / "quant_weight.npz", allow_pickle=False) as arrays:
        assert set(arrays) == set(LAYERS)


def test_a_layer_called_file(tmp_path: Path) -> None:
    """numpy.savez takes its target under that name."""
    made = TensorSet("W8A8")
    for part in ("weight", "weight_scale"):
        made.add(f"file.{part}", np.ones((2, 2), np.int8), "W8A8")
    for name, write in files_of(made, WeightFiles(("numpy",))).items():
        write(tmp_path / name)
    with np.load(tmp_path / "quant_weight.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["file"], np.ones((2, 2)))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"save_type": ("pth",)}, "save_type: 'pth' is unknown; use safe_tensor, numpy, ascendV1"),
        ({"save_type": ()}, "save_type: is empty"),
        ({"safetensors_name": "../x.safetensors"}, "safetensors_name: '../x.safetensors' is no file name"),
        ({"json_name": "x.txt"}, "json_name: 'x.txt' is no file name ending in .json"),
        ({"part_bytes": 0}, "part_file_size: must be at least 1"),
    ],
)
def test_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WeightFiles(**how)


def test_other_forms_of_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    result = quantized(model(), feeds(), recipe="w4a16-g32")
    with pytest.raises(GraphError, match="layer 'up': these files hold symmetric int8 weights"):
        result.save(tmp_path / "new" / "m.onnx", weights=WeightFiles())
    assert not (tmp_path / "new").exists()


class TestRebuildRefuses:
    def test_another_model(self, tmp_path: Path) -> None:
        saved(tmp_path)
        other = parse(
            BODY, {**WEIGHTS, "w1": WEIGHTS["w1"], "g": WEIGHTS["g"][:1], "shape": np.array([-1, 64])}, 17, 8
        )
        with pytest.raises(
            GraphError, match=r"'norm' has shape \[1\] in the model and shape \[64\] in the files"
        ):
            rebuild(open_model(other), tmp_path / "quant_model_description_w8a8.json", TARGETS["cpu"])

    def test_a_file_that_lacks_tensors(self, tmp_path: Path) -> None:
        saved(tmp_path, part_bytes=10_000)
        next(tmp_path.glob("quant_model_weight_w8a8-00001*")).unlink()
        with pytest.raises(GraphError, match=r"which no \.safetensors beside it holds"):
            read_weight_files(tmp_path / "quant_model_description_w8a8.json")

    def test_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("[1]")
        with pytest.raises(GraphError, match="has no model_quant_type"):
            read_weight_files(tmp_path / "a.json")
        with pytest.raises(GraphError, match="cannot be read"):
            read_weight_files(tmp_path / "b.json")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"up.weight": np.zeros((128, 64), np.float32)}, "'up.weight' is float32 .* in the files, not int8"),
            ({"up.weight": np.zeros((1, 64), np.int8)}, r"is int8 \[64, 1\] in the files, not int8 \[64, 128\]"),
            ({"up.weight_scale": np.zeros((128, 1), np.float32)}, "'up.weight_scale' is not above 0"),
            ({"up.weight_scale": np.ones((3, 1), np.float32)}, r"'up.weight_scale' has shape \[3, 1\], not 128"),
            ({"up.weight_offset": np.ones((128, 1), np.float32)}, "'up' has asymmetric weights"),
            ({"up.input_scale": np.full(1, np.nan, np.float32)}, "'up.input_scale' has shape"),
            ({"up.input_offset": np.full(1, 300, np.float32)}, "'up' has input_scale .* and input_offset 300"),
        ],
    )  # fmt: skip
    def test_damaged_tensors(self, change: dict[str, Any], says: str, tmp_path: Path) -> None:
        _, tensors, _ = saved(tmp_path)
        path = tmp_path / "quant_model_weight_w8a8.safetensors"
        path.unlink()
        save_file({**tensors, **change}, path)
        with pytest.raises(GraphError, match=says) as caught:
            rebuild(open_model(model()), tmp_path / "quant_model_description_w8a8.json", TARGETS["cpu"])
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("kind", "says"),
        [("W4A4", "'up' has the kind W4A4; a graph can be made of W8A8, "),
         (3, "'up.weight' the kind 3, which is no text")],
    )  # fmt: skip
    def test_damaged_descriptions(self, kind: object, says: str, tmp_path: Path) -> None:
        _, _, document = saved(tmp_path)
        path = tmp_path / "quant_model_description_w8a8.json"
        path.write_text(json.dumps({**document, "up.weight": kind}))
        with pytest.raises(GraphError, match=says):
            rebuild(open_model(model()), path, TARGETS["cpu"])


class TestSeveralSaves:
    def test_each_description_has_its_own_tensors(self, tmp_path: Path) -> None:
        _, _, document = saved(tmp_path, SMOOTHED)
        own = load_file(tmp_path / "quant_model_weight_w8a8.safetensors")
        done(json.dumps(DYNAMIC)).save(tmp_path / "m.onnx", weights=WeightFiles())
        other = load_file(tmp_path / "quant_model_weight_w8a8_dynamic.safetensors")
        assert not np.array_equal(own["g"], other["g"])  # smoothing is in the norm
        tensors, kinds = read_weight_files(tmp_path / "quant_model_description_w8a8.json")
        assert kinds == {name: kind for name, kind in document.items() if name in own}
        np.testing.assert_array_equal(tensors["g"], own["g"])

    def test_names_that_do_not_tell(self, tmp_path: Path) -> None:
        for recipe, name in ((STATIC, "a"), (DYNAMIC, "b")):
            files = WeightFiles(safetensors_name=f"{name}.safetensors", json_name=f"{name}.json")
            done(json.dumps(recipe)).save(tmp_path / "m.onnx", weights=files)
        with pytest.raises(
            GraphError, match=r"is in 'a\.safetensors' and in 'b\.safetensors'; keep one save"
        ):
            read_weight_files(tmp_path / "b.json")
