"""post_training_quant: the modes, and a regression test for each defect of the original (docs/msmodelslim-onnx.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from onnxslim_ptq.errors import CalibrationError, GraphError
from onnxslim_ptq.frontends.post_training_quant import (
    QuantConfig,
    preprocess_func_coco,
    preprocess_func_imagenet,
    run_quantize,
)
from tests.frontends import oracles
from tests.frontends.test_squant_ptq import NETS, convs, samples
from tests.graph.models import embedded, model_of
from tests.models import weights_of
from tools import nets


def quantized(proto: onnx.ModelProto, folder: Path, **config: Any) -> dict[str, dict[str, Any]]:
    onnx.save(proto, folder / "m.onnx")
    run_quantize(str(folder / "m.onnx"), str(folder / "q.onnx"), QuantConfig(**config))
    return oracles.layers(folder / "q.onnx")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "config", [{}, {"quant_mode": 0}, {"amp_num": 2}], ids=["label-free", "data-free", "amp"]
)
def test_every_net_in_every_mode(net: str, config: dict[str, Any], tmp_path: Path) -> None:
    proto = NETS[net]()
    found = quantized(proto, tmp_path, calib_data=samples(proto), **config)
    assert len(found) == {"resnet": 21, "mobilenet": 24, "bert": 14}[net] - config.get("amp_num", 0)


def test_minmax_is_over_all_samples(tmp_path: Path) -> None:
    proto, data = convs(), samples(convs())
    found = quantized(proto, tmp_path, calib_data=data)
    names = [f["source"] for f in found.values()]
    inner = [oracles.values_in(proto, {"x": d[0]}, names) for d in data]
    for layer in found.values():
        x = np.concatenate([v[layer["source"]].ravel() for v in inner])
        scale, zero = oracles.numbers(float(x.min()), float(x.max()))
        assert layer["scale"] == pytest.approx(scale, rel=1e-5)
        assert layer["offset"] == zero


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_amp_num_ranks_by_the_norm(dtype: Any, tmp_path: Path) -> None:
    """The norm grows with the number of elements, the mean does not: a wide layer of small errors comes first."""
    body = """g (float[1,4,16,16] x) => (float[1,64,16,16] a, float[1,1,1,1] b) {
        [wide] a = Conv (x, w)
        [pool] p = GlobalAveragePool (x)
        [small] b = Conv (p, v)
    }"""
    weights = weights_of(1, w=(64, 4, 1, 1), v=(1, 4, 1, 1))
    weights["v"] *= 60
    if dtype is np.float16:
        body = body.replace("float[", "float16[")
    proto = embedded(model_of(body, {name: w.astype(dtype) for name, w in weights.items()}))
    x = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32).astype(dtype)
    assert set(quantized(proto, tmp_path, calib_data=[[x]], amp_num=1)) == {"small"}


class TestDefects:
    """Of the original, by the numbers of the document."""

    def test_1_calib_method_matters(self, tmp_path: Path) -> None:
        """One value in 590000 is an outlier: percentile 99.999 cuts it, and so does entropy."""
        body = "g (float[1,1,256,768] x) => (float[1,2,256,768] y) { [c] y = Conv (x, w) }"
        proto = embedded(model_of(body, weights_of(1, w=(2, 1, 1, 1))))
        rng = np.random.default_rng(0)
        data = [[rng.standard_normal((1, 1, 256, 768), np.float32)] for _ in range(3)]
        data[0][0][0, 0, 0, 0] = 40.0
        found = [quantized(proto, tmp_path, calib_data=data, calib_method=m)["c"]["scale"] for m in (0, 1, 2)]
        assert found[0] == pytest.approx((40 - min(float(x.min()) for (x,) in data)) / 255, rel=1e-5)
        assert found[1] < found[0] / 3
        assert found[2] < found[0] / 3
        assert found[1] != found[2]

    def test_2_opset_13_squeeze_survives(self, tmp_path: Path) -> None:
        body = """g (float[1,3,8,8] x) => (float[4,8,8] y) {
            [c] h = Conv <pads = [1, 1, 1, 1]> (x, w)
            [s] y = Squeeze (h, axes)
        }"""
        weights = {**weights_of(1, w=(4, 3, 3, 3)), "axes": np.asarray([0], np.int64)}
        assert set(quantized(embedded(model_of(body, weights, 13)), tmp_path)) == {"c"}

    def test_3_excluding_everything_quantizes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(GraphError, match="no layer can be quantized"):
            quantized(convs(), tmp_path, exclude_nodes=[f"c{i}" for i in range(6)])
        assert not (tmp_path / "q.onnx").exists()

    def test_4_nodes_are_in_order(self, tmp_path: Path) -> None:
        quantized(nets.bert(), tmp_path)
        proto = onnx.load(tmp_path / "q.onnx")
        made = {t.name for t in proto.graph.initializer} | {i.name for i in proto.graph.input}
        for node in proto.graph.node:
            assert set(node.input) <= made | {""}
            made.update(node.output)

    def test_5_data_free_matmul_has_scales_per_column(self, tmp_path: Path) -> None:
        body = "g (float[2,6] x) => (float[2,4] y) { [m] y = MatMul (x, w) }"
        proto = embedded(model_of(body, weights_of(1, w=(6, 4))))
        layer = quantized(proto, tmp_path, quant_mode=0)["m"]
        assert layer["deq"].shape == (4,)
        w = numpy_helper.to_array(proto.graph.initializer[0])
        s = layer["deq"].astype(np.uint32).view(np.float32) / layer["scale"]
        np.testing.assert_allclose(s, np.abs(w).max(axis=0) / 127, rtol=1e-5)

    def test_6_a_layer_at_a_graph_input_is_the_same_every_time(self, tmp_path: Path) -> None:
        proto, data = convs(), samples(convs(), 1)
        scales = {quantized(proto, tmp_path, calib_data=data, quant_mode=0)["c0"]["scale"] for _ in range(5)}
        assert len(scales) == 1
        assert scales.pop() == pytest.approx(oracles.numbers(*oracles.sigma(data[0][0]))[0], rel=1e-5)

    def test_7_odd_calib_data_is_refused(self) -> None:
        with pytest.raises(TypeError, match="calib_data must be list, not tuple"):
            QuantConfig(calib_data=())

    @pytest.mark.parametrize("fails", [False, True])
    def test_no_other_file_is_left(
        self, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = tmp_path / "cwd"
        here.mkdir()
        monkeypatch.chdir(here)
        names = [f"c{i}" for i in range(6)] if fails else []
        try:
            quantized(convs(), tmp_path, exclude_nodes=names)
        except GraphError:
            assert fails
        assert not list(here.iterdir())
        left = {p.name for p in tmp_path.iterdir()} - {"cwd", "m.onnx"}
        assert left == (set() if fails else {"q.onnx", "q.json"})


class TestArguments:
    def test_nodes(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert set(quantized(convs(), tmp_path, quantize_nodes=["c1", "c2", "c3"], exclude_nodes=["c2"])) == {
            "c1",
            "c3",
        }
        with pytest.raises(ValueError, match="quantize_nodes names no layer"):
            quantized(convs(), tmp_path, quantize_nodes=["r1"])
        assert "'r1' is no layer" in caplog.text

    def test_depthwise(self, tmp_path: Path) -> None:
        proto = NETS["mobilenet"]()
        grouped = {
            n.name for n in proto.graph.node if any(a.name == "group" and a.i > 1 for a in n.attribute)
        }
        found = quantized(proto, tmp_path, is_quant_depthwise_conv=False)
        assert len(grouped) == 7
        assert not grouped & set(found)
        assert len(found) == 17

    def test_per_tensor(self, tmp_path: Path) -> None:
        found = quantized(convs(), tmp_path, is_per_channel=False)
        assert {layer["deq"].size for layer in found.values()} == {1}

    def test_samples(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        good = samples(convs(), 1)[0]
        one = quantized(convs(), tmp_path, calib_data=[good])
        bare = quantized(convs(), tmp_path, calib_data=[good[0], [np.zeros((2, 2), np.float32)]])
        assert "calib_data[1]: input 'x' has shape" in caplog.text
        assert {n: f["scale"] for n, f in one.items()} == {n: f["scale"] for n, f in bare.items()}

    @pytest.mark.parametrize(
        ("given", "error", "text"),
        [
            ({"calib_method": 3}, ValueError, "calib_method must be one of 0, 1, 2"),
            ({"quant_mode": "0"}, TypeError, "quant_mode must be int, not str."),
            ({"is_per_channel": 1}, TypeError, "is_per_channel must be bool, not int."),
            ({"exclude_nodes": "conv"}, TypeError, "exclude_nodes must be list or tuple, not str."),
            ({"amp_num": -2}, ValueError, "amp_num = -2 is smaller than 0."),
            ({"input_shape": [["a"]]}, TypeError, "a size in input_shape must be int, not str."),
            ({"input_shape": [[0]]}, ValueError, "a size in input_shape = 0 is smaller than 1."),
        ],
    )
    def test_bad_ones(self, given: dict[str, Any], error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            QuantConfig(**given)

    def test_what_cannot_act_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        signed = quantized(convs(), tmp_path)
        assert not caplog.records
        unsigned = quantized(convs(), tmp_path, is_signed_quant=False)
        assert "is_signed_quant=False: AscendQuant makes int8 codes" in caplog.text
        assert {n: f["offset"] for n, f in signed.items()} == {n: f["offset"] for n, f in unsigned.items()}

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="quant_config must be QuantConfig, not dict"):
            run_quantize("m.onnx", "q.onnx", {})  # type: ignore[arg-type]


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        rng = np.random.default_rng(0)
        for index, suffix in enumerate(("png", "jpg", "png")):
            Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(tmp_path / f"{index}.{suffix}")
        (tmp_path / "notes.txt").write_text("x")
        return tmp_path

    def test_like_opencv(self, folder: Path) -> None:
        cv2 = pytest.importorskip("cv2")
        batches = preprocess_func_imagenet(str(folder), 20, 24, 2)
        assert [b.shape for b in batches] == [(2, 3, 20, 24)]
        assert batches[0].dtype == np.float32
        picture = cv2.cvtColor(cv2.imread(str(folder / "0.png")), cv2.COLOR_BGR2RGB)
        resized = cv2.resize(picture, (24, 20)).astype(np.float32)
        mean, std = np.asarray([0.485, 0.456, 0.406]) * 255, np.asarray([0.229, 0.224, 0.225]) * 255
        expected = ((resized - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(batches[0][0], expected, atol=0.02)  # cv2 rounds to whole numbers
        whole = preprocess_func_coco(str(folder), 20, 24)
        assert len(whole) == 3
        np.testing.assert_allclose(whole[0][0], resized.transpose(2, 0, 1) / 255, atol=0.004)

    def test_too_few(self, folder: Path) -> None:
        with pytest.raises(
            ValueError, match="The number of calibrated images is smaller than the batch size"
        ):
            preprocess_func_imagenet(str(folder), 8, 8, 4)
        with pytest.raises(ValueError, match="is not a folder"):
            preprocess_func_coco(str(folder / "0.png"))

    def test_hostile_files(self, folder: Path) -> None:
        (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])
        with pytest.raises(CalibrationError, match=r"0\.png: cannot be read as an image"):
            preprocess_func_imagenet(str(folder))
        Image.new("1", (20_000, 20_000)).save(folder / "0.png")
        with pytest.raises(CalibrationError, match="pixels"):
            preprocess_func_coco(str(folder))
