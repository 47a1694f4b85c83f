"""squant_ptq against numpy oracles, on small networks of three kinds."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_ptq.errors import CalibrationError, DeviceError, GraphError
from onnxslim_ptq.frontends.squant_ptq import OnnxCalibrator, QuantConfig
from onnxslim_ptq.frontends.squant_ptq.structures import STRUCTURES, passes_without
from onnxslim_ptq.graph.optimize import ALL
from tests.frontends import oracles
from tests.graph.models import embedded, model_of
from tests.models import weights_of
from tools import nets

NETS = {
    "resnet": lambda: nets.resnet18(width=8, size=32, classes=10),
    "mobilenet": lambda: nets.mobilenet(width=8, size=32, classes=10),
    "bert": nets.bert,
}
LABEL_FREE = {"quant_mode": 1, "act_method": 1}
ALL_LAYERS = {"disable_first_layer": False, "disable_last_layer": False}
KEEP = {"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False}


def samples(proto: onnx.ModelProto, count: int = 4) -> list[list[Any]]:
    rng = np.random.default_rng(7)
    dims = [d.dim_value or 1 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    if proto.graph.input[0].name == "ids":
        return [[rng.integers(0, 128, dims)] for _ in range(count)]
    return [[rng.standard_normal(dims).astype(np.float32)] for _ in range(count)]


def convs(seed: int = 0) -> onnx.ModelProto:
    """Six Convs of different kinds without BatchNormalization: weights are found as they were."""
    shapes: dict[str, tuple[int, ...]] = {"w0": (8, 3, 3, 3)}
    shapes |= {f"w{i}": (8, 8, 3, 3) for i in range(1, 5)} | {"w5": (6, 8, 1, 1)}
    shapes |= {f"b{i}": (8,) for i in range(5)} | {"b5": (6,)}
    lines, source = [], "x"
    for i in range(6):
        pads = "" if i == 5 else "<pads = [1, 1, 1, 1]>"
        lines.append(f"[c{i}] y{i} = Conv {pads} ({source}, w{i}, b{i})")
        source = f"y{i}"
        if i % 2:
            lines.append(f"[r{i}] z{i} = Relu (y{i})")
            source = f"z{i}"
    body = f"g (float[1,3,8,8] x) => (float[1,6,8,8] {source}) {{ {' '.join(lines)} }}"
    return embedded(model_of(body, weights_of(seed, **shapes)))


def exported(
    proto: onnx.ModelProto, folder: Path, data: Any = None, **config: Any
) -> dict[str, dict[str, Any]]:
    onnx.save(proto, folder / "m.onnx")
    calibrator = OnnxCalibrator(str(folder / "m.onnx"), QuantConfig(**config), data)
    calibrator.run()
    calibrator.export_quant_onnx(str(folder / "q.onnx"))
    return oracles.layers(folder / "q.onnx")


def weights(proto: onnx.ModelProto) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sigma": 0},
        LABEL_FREE,
        {"quant_mode": 1, "act_method": 2},
        {**LABEL_FREE, "a_sym": True, "amp_num": 2},
    ],
    ids=["sigma", "minmax", "ema", "histogram", "symmetric, amp"],
)
def test_every_net_in_every_mode(net: str, config: dict[str, Any], tmp_path: Path) -> None:
    proto = NETS[net]()
    found = exported(proto, tmp_path, samples(proto), **config)
    plain = {"resnet": 21, "mobilenet": 24, "bert": 14}[net]
    assert len(found) == plain - 2 - config.get("amp_num", 0)
    assert onnx.load(tmp_path / "q.onnx").opset_import[0].version == 17


class TestActivations:
    @pytest.mark.parametrize("keep_minmax", [False, True])
    def test_data_free(self, keep_minmax: bool, tmp_path: Path) -> None:
        """Only the first sample counts."""
        proto, data = convs(), samples(convs())
        found = exported(proto, tmp_path, data, **ALL_LAYERS, sigma=0 if keep_minmax else 25)
        inner = oracles.values_in(proto, {"x": data[0][0]}, [f["source"] for f in found.values()])
        assert len(found) == 6
        for layer in found.values():
            x = inner[layer["source"]]
            ends = (float(x.min()), float(x.max())) if keep_minmax else oracles.sigma(x)
            scale, zero = oracles.numbers(*ends)
            assert layer["scale"] == pytest.approx(scale, rel=1e-5)
            assert abs(layer["offset"] - zero) <= int(
                ends[0] == -ends[1]
            )  # then -lo / s is 127.5, up to rounding

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_moving_average(self, symmetric: bool, tmp_path: Path) -> None:
        proto, data = convs(), samples(convs(), 6)
        found = exported(proto, tmp_path, data, **ALL_LAYERS, **LABEL_FREE, a_sym=symmetric)
        names = [f["source"] for f in found.values()]
        inner = [oracles.values_in(proto, {"x": d[0]}, names) for d in data]
        for layer in found.values():
            scale, zero = oracles.numbers(*oracles.ema([v[layer["source"]] for v in inner]), symmetric)
            assert layer["scale"] == pytest.approx(scale, rel=1e-5)
            assert layer["offset"] == zero

    @pytest.mark.parametrize("mode", [{}, LABEL_FREE], ids=["data-free", "label-free"])
    def test_easy_quant_acts_in_both_modes(self, mode: dict[str, Any], tmp_path: Path) -> None:
        """The error of the chosen factor is that of the best of all thousand, up to the histogram's resolution."""
        proto, data = convs(), samples(convs(), 1)
        found = exported(
            proto, tmp_path, data, **ALL_LAYERS, **mode, keep_acc={**KEEP, "easy_quant": [True, 1000]}
        )
        inner = oracles.values_in(proto, {"x": data[0][0]}, [f["source"] for f in found.values()])
        for layer in found.values():
            x = inner[layer["source"]]
            lo, hi = oracles.ema([x]) if mode else oracles.sigma(x)
            errors = []
            for k in range(0, 1000, 5):
                r = 0.75 + k * 0.0005
                errors.append(((x - oracles.fake(x, *oracles.numbers(lo * r, hi * r))) ** 2).mean())
            chosen = ((x - oracles.fake(x, layer["scale"], layer["offset"])) ** 2).mean()
            assert chosen <= 1.25 * min(errors)


class TestWeights:
    def test_nearest_per_channel_and_deq(self, tmp_path: Path) -> None:
        proto = convs()
        stored = weights(proto)
        for name, layer in exported(proto, tmp_path, samples(proto), **ALL_LAYERS, **LABEL_FREE).items():
            w, b = stored[f"w{name[1]}"], stored[f"b{name[1]}"]
            s = np.abs(w).reshape(len(w), -1).max(axis=1) / np.float64(127)
            s = s.astype(np.float32)
            np.testing.assert_array_equal(layer["codes"], np.rint(w / s[:, None, None, None]))
            deq = np.float32(layer["scale"]) * s
            np.testing.assert_allclose(layer["deq"].astype(np.uint32).view(np.float32), deq, rtol=2e-7)
            assert (layer["deq"] >> np.uint64(32) == 0).all()
            np.testing.assert_allclose(layer["bias"], np.rint(b / deq.astype(np.float64)), atol=1)

    def test_gemm_and_matmul_have_one_scale(self, tmp_path: Path) -> None:
        found = exported(nets.bert(), tmp_path, samples(nets.bert()), **ALL_LAYERS, **LABEL_FREE)
        assert {layer["deq"].size for layer in found.values() if layer["op"] != "Conv"} == {1}

    @pytest.mark.parametrize("mode", [{}, {**LABEL_FREE, "keep_acc": {**KEEP, "round_opt": True}}])
    def test_flips(self, mode: dict[str, Any], tmp_path: Path) -> None:
        """By one at most; per kernel |sum| < 1, per channel <= 1/2; some codes do move."""
        proto = convs()
        stored, moved = weights(proto), 0
        for name, layer in exported(proto, tmp_path, samples(proto), **ALL_LAYERS, **mode).items():
            w = stored[f"w{name[1]}"].astype(np.float64)
            s = (np.abs(w).reshape(len(w), -1).max(axis=1) / 127).astype(np.float32).astype(np.float64)
            error = w / s[:, None, None, None] - layer["codes"]
            assert np.abs(error).max() < 1
            assert np.abs(error.sum(axis=(2, 3))).max() < 1
            assert np.abs(error.sum(axis=(1, 2, 3))).max() <= 0.5 + 1e-6
            moved += int((layer["codes"] != np.rint(w / s[:, None, None, None])).sum())
        assert moved > 50

    @pytest.mark.parametrize("mode", [{}, LABEL_FREE], ids=["data-free", "label-free"])
    def test_admm_fits_the_scale(self, mode: dict[str, Any], tmp_path: Path) -> None:
        proto = convs()
        stored = weights(proto)
        keep = {**KEEP, "admm": [True, 20]}
        for name, layer in exported(
            proto, tmp_path, samples(proto), **ALL_LAYERS, **mode, keep_acc=keep
        ).items():
            deq = layer["deq"].astype(np.uint32).view(np.float32)
            for channel, w in enumerate(stored[f"w{name[1]}"]):
                assert deq[channel] / layer["scale"] == pytest.approx(
                    oracles.least_squares_scale(w, 20), rel=1e-4
                )


class TestWhichLayers:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_roll_back_ranks_by_the_mean_squared_error(self, seed: int, tmp_path: Path) -> None:
        proto, data = convs(seed), samples(convs(seed))
        everything = exported(proto, tmp_path, data, **ALL_LAYERS, **LABEL_FREE)
        stored = weights(proto)
        names = [n for i in range(6) for n in (everything[f"c{i}"]["source"], f"y{i}")]
        inner = oracles.values_in(proto, {"x": data[0][0]}, names)
        score = {}
        for name, layer in everything.items():
            deq = layer["deq"].astype(np.uint32).view(np.float32)
            w = layer["codes"] * (deq / np.float32(layer["scale"]))[:, None, None, None]
            x = oracles.fake(inner[layer["source"]], layer["scale"], layer["offset"]).astype(np.float32)
            node = next(n for n in proto.graph.node if n.name == name)
            graph = onnx.helper.make_graph(
                [node],
                "one",
                [onnx.helper.make_tensor_value_info(node.input[0], 1, x.shape)],
                [onnx.helper.make_tensor_value_info(node.output[0], 1, None)],
                [
                    numpy_helper.from_array(w.astype(np.float32), node.input[1]),
                    numpy_helper.from_array(stored[node.input[2]], node.input[2]),
                ],
            )
            one = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=8)
            y = oracles.values_in(one, {node.input[0]: x}, [node.output[0]])[node.output[0]]
            score[name] = float(((y - inner[f"y{name[1]}"]) ** 2).mean())
        for count in (1, 3, 5):
            worst = sorted(score, key=lambda n: -score[n])[:count]
            kept = exported(proto, tmp_path, data, **ALL_LAYERS, **LABEL_FREE, amp_num=count)
            assert set(kept) == set(score) - set(worst)

    def test_first_last_and_names(self, tmp_path: Path) -> None:
        proto, data = convs(), samples(convs())
        assert set(exported(proto, tmp_path, data)) == {"c1", "c2", "c3", "c4"}
        found = exported(proto, tmp_path, data, disable_first_layer=False, disable_names=["c2", "unknown"])
        assert set(found) == {"c0", "c1", "c3", "c4"}
        onlyconv = exported(NETS["resnet"](), tmp_path, None, **ALL_LAYERS, quant_param_ops=["Conv"])
        assert {layer["op"] for layer in onlyconv.values()} == {"Conv"}

    def test_first_and_last_are_those_of_the_execution(self, tmp_path: Path) -> None:
        """Simplifications add nodes at the end of the list: merged products, and the pooler as Gemm."""
        found = exported(nets.bert(), tmp_path, samples(nets.bert()), **LABEL_FREE, graph_optimize_level=2)
        assert len(found) == 8
        assert {"layer0.q", "classifier"}.isdisjoint(found)
        assert {"layer1.q", "pooler"} <= set(found)

    def test_operators_that_the_model_has_not(self, tmp_path: Path) -> None:
        """Not: everything."""
        for ops in (["Gemm"], []):
            with pytest.raises(GraphError, match="no layer can be quantized among"):
                exported(convs(), tmp_path, None, quant_param_ops=ops)
        assert not (tmp_path / "q.onnx").exists()

    def test_unknown_names_are_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        exported(convs(), tmp_path, None, disable_names=["c2", "c9"])
        assert "disable_names: 'c9' is no layer" in caplog.text
        assert "'c2' is no layer" not in caplog.text

    def test_a_dead_input_stays_float(self, tmp_path: Path) -> None:
        data = [[np.zeros((1, 3, 8, 8), np.float32)]]
        assert "c0" not in exported(convs(), tmp_path, data, **ALL_LAYERS, sigma=0)

    def test_nothing_left(self, tmp_path: Path) -> None:
        with pytest.raises(GraphError, match="disable_names exclude all 6; switch one off"):
            exported(convs(), tmp_path, None, disable_names=[f"c{i}" for i in range(6)])


class TestExport:
    def test_fuse_add_and_external(self, tmp_path: Path) -> None:
        proto = nets.bert()
        onnx.save(proto, tmp_path / "m.onnx")
        calibrator = OnnxCalibrator(str(tmp_path / "m.onnx"), QuantConfig(**LABEL_FREE), samples(proto))
        calibrator.run()
        for fuse in (True, False):
            calibrator.export_quant_onnx(str(tmp_path / "q.onnx"), fuse_add=fuse, use_external=fuse)
            nodes = onnx.load(tmp_path / "q.onnx").graph.node
            first = next(n for n in nodes if n.name == "layer0.up")
            reader = next(n for n in nodes if first.output[0] in n.input)
            assert reader.op_type == ("Add" if fuse else "AscendDequant")
        assert (tmp_path / "q.onnx.data").exists()

    def test_before_run(self, tmp_path: Path) -> None:
        onnx.save(convs(), tmp_path / "m.onnx")
        calibrator = OnnxCalibrator(str(tmp_path / "m.onnx"), QuantConfig())
        with pytest.raises(TypeError, match=r"call run\(\) first"):
            calibrator.export_quant_onnx(str(tmp_path / "q.onnx"))

    def test_dynamic_shapes(self, tmp_path: Path) -> None:
        body = """g (float[N,3,H,W] x) => (float[N,4,H,W] y) {
            [a] h = Conv <pads = [1, 1, 1, 1]> (x, w)
            [b] y = Conv (h, v)
        }"""
        proto = embedded(model_of(body, weights_of(1, w=(8, 3, 3, 3), v=(4, 8, 1, 1))))
        with pytest.raises(ValueError, match=r"Invalid input shape: input 'x' has .*; give input_shape"):
            exported(proto, tmp_path, **ALL_LAYERS)
        config = {**ALL_LAYERS, "is_dynamic_shape": True, "input_shape": [[1, 3, 12, 12]]}
        assert len(exported(proto, tmp_path, **config)) == 2
        with pytest.raises(ValueError, match="Invalid input shape: 2 shapes are given"):
            exported(proto, tmp_path, **{**config, "input_shape": [[1, 3, 8, 8], [1]]})
        given = [[np.zeros((1, 3, 12, 12), np.float32)]]
        with pytest.raises(
            ValueError, match=r"Invalid input shape: \[1, 3\] for input 'x'"
        ):  # with samples, too
            exported(proto, tmp_path, given, **{**config, "input_shape": [[1, 3]]})

    def test_nothing_left_to_quantize_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert not exported(convs(), tmp_path, amp_num=100)
        assert "the written model computes in float" in caplog.text

    def test_models_without_a_layer_say_why(self, tmp_path: Path) -> None:
        proto = embedded(
            model_of("g (float[2,4] x, float[4,3] w) => (float[2,3] y) { [m] y = MatMul (x, w) }")
        )
        with pytest.raises(GraphError, match=r"no layer can be quantized among .* \(first: 'm': "):
            exported(proto, tmp_path)
        onnx.save(convs(), tmp_path / "m.onnx")
        calibrator = OnnxCalibrator(str(tmp_path / "m.onnx"), QuantConfig())
        calibrator.run()
        calibrator.export_quant_onnx(str(tmp_path / "q.onnx"))
        with pytest.raises(GraphError, match=r"is already quantized .*; give the float model"):
            OnnxCalibrator(str(tmp_path / "q.onnx"), QuantConfig()).run()

    def test_a_sample_too_large_to_draw(self, tmp_path: Path) -> None:
        body = "g (float[N,3,H,W] x) => (float[N,4,H,W] y) { [a] y = Conv (x, w) }"
        proto = embedded(model_of(body, weights_of(1, w=(4, 3, 1, 1))))
        config = {**ALL_LAYERS, "is_dynamic_shape": True, "input_shape": [[1, 3, 10**6, 10**6]]}
        with pytest.raises(
            CalibrationError, match=r"input 'x': one sample takes .*; give a smaller input_shape"
        ):
            exported(proto, tmp_path, **config)

    def test_two_runs_give_the_same_bytes(self, tmp_path: Path) -> None:
        texts = []
        for _ in range(2):
            exported(convs(), tmp_path)
            texts.append((tmp_path / "q.onnx").read_bytes())
        assert texts[0] == texts[1]


class TestArguments:
    def test_order_and_defaults(self) -> None:
        parameters = inspect.signature(QuantConfig).parameters
        assert len(parameters) == 28
        assert list(parameters)[:7] == [
            "w_bit",
            "a_bit",
            "w_signed",
            "a_signed",
            "w_sym",
            "a_sym",
            "input_shape",
        ]
        config = QuantConfig()
        assert (config.sigma, config.om_method, config.quant_param_ops) == (
            25,
            "aoe",
            ["Conv", "Gemm", "MatMul"],
        )

    @pytest.mark.parametrize(
        ("given", "error", "text"),
        [
            ({"w_bit": 4}, TypeError, "w_bit must be 8, please check it."),
            ({"a_bit": 8.5}, TypeError, "a_bit must be 8"),
            ({"w_signed": 1}, TypeError, "w_signed must be bool, not int."),
            ({"amp_num": True}, TypeError, "amp_num must be int, not bool."),
            ({"amp_num": -1}, ValueError, "amp_num = -1 is smaller than 0."),
            ({"device_id": 8}, ValueError, "device_id = 8 is larger than 7."),
            ({"sigma": 3}, ValueError, "sigma must be one of 0, 25, not 3."),
            ({"sigma": "25"}, TypeError, "sigma must be int, not str."),
            ({"act_method": 3}, ValueError, "act_method must be one of 0, 1, 2"),
            ({"squant_mode": "x"}, ValueError, "squant_mode must be one of"),
            ({"keep_acc": {"admm": [False, 1]}}, ValueError, "easy_quant should be in keep_accuracy"),
            ({"keep_acc": {**KEEP, "admm": True}}, TypeError, r"keep_acc\['admm'\] must be \[bool, int\]"),
            ({"keep_acc": {**KEEP, "x": 1}}, ValueError, "keep_acc: x is unknown"),
            ({"quant_param_ops": ["LSTM"]}, ValueError, "an item of quant_param_ops must be one of"),
            ({"disable_names": [1]}, TypeError, "an item of disable_names must be str, not int."),
            ({"shut_down_structures": ["X"]}, ValueError, "shut_down_structures: X is unknown"),
            ({"is_dynamic_shape": True}, ValueError, "is_dynamic_shape needs input_shape"),
            ({"input_shape": [3]}, TypeError, "an item of input_shape must be list or tuple"),
            ({"input_shape": [[0]]}, ValueError, "a size in input_shape = 0 is smaller than 1."),
            ({"om_method": "x"}, ValueError, "om_method must be one of aoe, atc"),
        ],
    )
    def test_bad_ones(self, given: dict[str, Any], error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            QuantConfig(**given)

    def test_the_calibrator(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        onnx.save(convs(), path)
        with pytest.raises(TypeError, match=r"cfg must be QuantConfig, not dict\."):
            OnnxCalibrator(str(path), {})  # type: ignore[arg-type]
        x = np.zeros((1, 3, 8, 8), np.float32)
        for data, text in (
            (x, "calib_data must be a list of samples"),
            ([x], r"calib_data\[0\] must be a list"),
            ([[x], [x, x]], r"calib_data\[1\] has 2 arrays, the model has 1 inputs: x"),
            ([[x[:, :, 1:]]], r"input 'x' has shape \[1, 3, 8, 8\], not \[1, 3, 7, 8\]"),
            ([[x.astype(np.float64)]], "input 'x' is float32, the array is float64"),
        ):
            with pytest.raises(ValueError, match=text):
                OnnxCalibrator(str(path), QuantConfig(), data)  # type: ignore[arg-type]
        (tmp_path / "junk.onnx").write_bytes(b"junk")
        with pytest.raises(GraphError, match=r"junk\.onnx"):
            OnnxCalibrator(str(tmp_path / "junk.onnx"), QuantConfig())
        calibrator = OnnxCalibrator(str(path), QuantConfig(act_method=1))
        with pytest.raises(ValueError, match="set quant_mode=1"):
            calibrator.run()

    def test_what_needs_an_npu_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "m.onnx"
        onnx.save(convs(), path)
        with pytest.raises(
            DeviceError, match=r"use_onnx=False calibrates on an Ascend NPU: .*leave use_onnx at True"
        ):
            OnnxCalibrator(str(path), QuantConfig(use_onnx=False, device_id=1))
        OnnxCalibrator(str(path), QuantConfig(graph_optimize_level=1, om_method="atc")).run()
        assert "latencies are not measured (atc not found)" in caplog.text

    def test_structures(self) -> None:
        assert len(STRUCTURES) == 48
        assert "batchnorm" not in passes_without(["FuseBatchNormOptimization"])
        assert "batchnorm" in passes_without(["FastClipOptimization"])
        assert "clip" in passes_without([], more=True)
        assert "clip" not in passes_without(["FastClipOptimization"], more=True)
        known = {name for names in STRUCTURES.values() for name in names}
        assert known <= {*ALL}

    def test_optimized_graphs(self, tmp_path: Path) -> None:
        """Three products of one value become one; switched off by name they stay three."""
        data = samples(nets.bert())
        config = {**ALL_LAYERS, **LABEL_FREE, "graph_optimize_level": 2}
        assert len(exported(nets.bert(), tmp_path, data, **config)) == 10
        off = ["CombineMatmulOptimization"]
        assert len(exported(nets.bert(), tmp_path, data, **config, shut_down_structures=off)) == 14


class TestPaths:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a b.onnx", "Input path contains invalid characters"),
            ("m.pb", "must end in .onnx"),
            ("missing.onnx", "is not a file"),
            ("link.onnx", "is a link"),
            ("open.onnx", "writable by everybody"),
            ("x" * 260 + ".onnx", "too long"),
        ],
    )
    def test_models(self, name: str, text: str, tmp_path: Path) -> None:
        onnx.save(convs(), tmp_path / "m.onnx")
        (tmp_path / "link.onnx").symlink_to(tmp_path / "m.onnx")
        (tmp_path / "open.onnx").write_bytes(b"")
        (tmp_path / "open.onnx").chmod(0o666)
        with pytest.raises(ValueError, match=text):
            OnnxCalibrator(str(tmp_path / name), QuantConfig())

    def test_results(self, tmp_path: Path) -> None:
        onnx.save(convs(), tmp_path / "m.onnx")
        calibrator = OnnxCalibrator(str(tmp_path / "m.onnx"), QuantConfig())
        calibrator.run()
        with pytest.raises(ValueError, match="does not exist; create it first"):
            calibrator.export_quant_onnx(str(tmp_path / "no" / "q.onnx"))
        with pytest.raises(TypeError, match="output path must be str, not int"):
            calibrator.export_quant_onnx(3)  # type: ignore[arg-type]
