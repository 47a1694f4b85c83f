"""The one seam to ONNX Runtime: devices, errors, and weights that are shared, not copied."""

from __future__ import annotations

import gc
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.errors import DeviceError, GraphError
from calib.model import open_model
from calib.provider import Optimize, SessionOptions, create_session, require_device, runtime
from tests.graph.models import parse
from tests.models import feeds_for, mlp, outputs_of, weights_of


class TestDevices:
    def test_cpu(self) -> None:
        assert require_device("cpu") == "CPUExecutionProvider"

    @pytest.mark.parametrize(
        ("device", "text"),
        [
            ("tpu", r"device 'tpu' is unknown; use cpu, npu\[:ID\] or cuda\[:ID\]"),
            ("npu", r"device 'npu' is not available: .*CPUExecutionProvider; .*'onnxslim_ptq\[cann\]'"),
            ("npu:3", "device 'npu:3' is not available"),
            ("cuda", "device 'cuda' is not available: .*; .*pip install onnxruntime-gpu"),
            ("cuda:1", "device 'cuda:1' is not available"),
        ],
    )
    def test_others(self, device: str, text: str) -> None:
        with pytest.raises(DeviceError, match=text):
            require_device(device)

    @pytest.mark.parametrize(
        "device", ["", "cpu:0", "npu:", "npu:x", "npu:-1", "npu:1:2", "NPU", " npu", "npu:99999"]
    )
    def test_what_is_no_device(self, device: str) -> None:
        with pytest.raises(DeviceError, match=f"device '{device}' is unknown"):
            create_session(mlp().SerializeToString(), device=device)

    def test_never_a_silent_fallback(self) -> None:
        with pytest.raises(DeviceError):
            create_session(mlp().SerializeToString(), device="npu")


class TestRuntime:
    def test_it_is_onnxruntime(self) -> None:
        assert runtime() is importlib.import_module("onnxruntime")

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(
            DeviceError,
            match=r"onnxruntime cannot be imported \(.*\); install exactly one: .*\[cpu\].*\[cann\]",
        ):
            runtime()

    def test_gutted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
        with pytest.raises(DeviceError, match=r"two of its distributions share one folder.*pip uninstall"):
            runtime()


class TestSessions:
    def test_a_skeleton_with_its_weights(self) -> None:
        model = open_model(mlp())
        feeds = feeds_for(mlp(), 2)
        session = create_session(model.proto.SerializeToString(), model.weights)
        for feed, want in zip(feeds, outputs_of(mlp(), feeds), strict=True):
            np.testing.assert_array_equal(session.run(None, dict(feed))[0], want[0])

    def test_weights_live_as_long_as_the_session(self) -> None:
        """They are shared, so the session must keep them."""
        model = open_model(mlp())
        session = create_session(
            model.proto.SerializeToString(),
            {k: np.array(v) for k, v in model.weights.items()},
            options=SessionOptions(optimize=Optimize.OFF),
        )
        del model
        gc.collect()
        feeds = feeds_for(mlp(), 1)
        np.testing.assert_allclose(
            session.run(None, dict(feeds[0]))[0], outputs_of(mlp(), feeds)[0][0], rtol=1e-6
        )

    def test_weights_that_nothing_reads(self) -> None:
        proto = mlp()
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((64, 64), np.float32), "unused"))
        model = open_model(proto)
        assert "unused" in model.weights
        create_session(model.proto.SerializeToString(), model.weights)

    def test_weights_that_only_a_subgraph_or_an_output_reads(self) -> None:
        body = """g (float[N,16] x, bool c) => (float[N,16] y, float[16,16] v) { h = Relu (x)
            y = If (c) <then_branch = t () => (float[N,16] p) { p = MatMul (h, w) },
                        else_branch = e () => (float[N,16] r) { r = Neg (h) }> }"""
        model = open_model(parse(body, weights_of(1, w=(16, 16), v=(16, 16))))
        assert set(model.weights) == {"w", "v"}
        session = create_session(model.proto.SerializeToString(), model.weights)
        y, v = session.run(None, {"x": np.ones((2, 16), np.float32), "c": np.asarray(True)})
        np.testing.assert_allclose(y, np.ones((2, 16)) @ model.weights["w"], rtol=1e-5)
        np.testing.assert_array_equal(v, model.weights["v"])

    def test_a_path(self, tmp_path: Path) -> None:
        onnx.save(mlp(), tmp_path / "m.onnx")
        assert create_session(tmp_path / "m.onnx").get_outputs()[0].name == "y"

    def test_what_does_not_load_is_one_line(self, capfd: pytest.CaptureFixture[str]) -> None:
        for broken in (b"not a model", mlp().SerializeToString()[:500]):
            with pytest.raises(
                GraphError, match=r"ONNX Runtime \d+\.\d+.* cannot load the model: "
            ) as caught:
                create_session(broken)
            assert "\n" not in str(caught.value)
        assert capfd.readouterr().err == "", "the message is in the error, not on stderr as well"

    def test_optimizations(self, tmp_path: Path) -> None:
        nodes = {}
        for level in (Optimize.OFF, Optimize.BASIC, Optimize.ALL):
            path = tmp_path / f"{level}.onnx"
            create_session(
                mlp().SerializeToString(), options=SessionOptions(optimize=level, write_optimized=path)
            )
            nodes[level] = [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]
        assert nodes[Optimize.OFF] == [n.op_type for n in mlp().graph.node]
        assert len(nodes[Optimize.BASIC]) < len(nodes[Optimize.OFF])
        assert len(nodes[Optimize.ALL]) <= len(nodes[Optimize.BASIC])

    def test_a_simulation_keeps_float_weights_float(self, tmp_path: Path) -> None:
        """ONNX Runtime quantizes a float weight behind a quantized activation by itself unless told not to."""
        body = """g (float[N,8,4,4] x) => (float[N,8,4,4] y) <float s = {0.02}, uint8 z = {128}>
            { q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) c = Conv (d, w) o = QuantizeLinear (c, s, z)
              y = DequantizeLinear (o, s, z) }"""
        proto = parse(body, weights_of(1, w=(8, 8, 1, 1)))
        for simulate in (True, False):
            path = tmp_path / f"{simulate}.onnx"
            create_session(
                proto.SerializeToString(), options=SessionOptions(simulate=simulate, write_optimized=path)
            )
            types_ = {
                t.data_type
                for t in onnx.load(path, load_external_data=False).graph.initializer
                if len(t.dims) == 4
            }
            assert (onnx.TensorProto.INT8 in types_) is not simulate
