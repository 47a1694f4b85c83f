"""Sessions on accelerators: a recording stand-in for ONNX Runtime in the child process, with and without faults."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calib import provider
from calib.devices.child import ChildSession
from calib.errors import DeviceError, GraphError
from calib.model import open_model
from calib.provider import Optimize, SessionOptions, create_session, require_device
from calib.readers import from_iterable
from calib.runner import collect
from calib.types import Probe
from onnxslim_ptq.cli import main
from tests.models import cnn, feeds_for, mlp, outputs_of, parse, weights_of

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).parent / "recording"
CANN, CUDA, CPU = "CANNExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
OPTIONS = {
    "device_id": "0",
    "enable_cann_graph": "1",
    "enable_cann_subgraph": "1",
    "dump_graphs": "0",
    "dump_om_model": "0",
    "op_select_impl_mode": "high_precision",
    "precision_mode": "must_keep_origin_dtype",
}
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)


class Recorder:
    """What the sessions of child processes were asked for."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._monkeypatch = path, monkeypatch

    def fault(self, name: str) -> None:
        self._monkeypatch.setenv("FAULT", name)

    def sessions(self, name: str = CANN) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [s for s in map(json.loads, lines) if s["provider"] == name]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("RECORDING", str(tmp_path / "recording.jsonl"))
    monkeypatch.setenv("FAULT", "")
    real = provider.runtime()
    here = types.SimpleNamespace(**{**vars(real), "get_available_providers": lambda: [CANN, CUDA, CPU]})
    monkeypatch.setattr(provider, "runtime", lambda: here)
    provider._prove.cache_clear()
    return Recorder(tmp_path / "recording.jsonl", monkeypatch)


def session_on(device: str = "npu", proto: onnx.ModelProto | None = None, **options: Any) -> ChildSession:
    model = open_model(proto or mlp())
    return create_session(
        model.proto.SerializeToString(), model.weights, device=device, options=SessionOptions(**options)
    )


class TestWhatIsAskedFor:
    def test_npu(self, recorder: Recorder) -> None:
        with session_on("npu", threads=2) as session:
            found = session.run(None, {"x": X})
            np.testing.assert_allclose(found[0], outputs_of(mlp(), [{"x": X}])[0][0], rtol=1e-5)
            assert session.get_providers() == [CANN]
            assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
                ("x", "tensor(float)", ["N", 16])
            ]
            assert [o.name for o in session.get_outputs()] == ["y"]
        for made in recorder.sessions():
            assert made["options"] == OPTIONS
            assert made["level"] == "ORT_ENABLE_BASIC"
            assert made["threads"] == 2
            assert (
                made["source"] == "bytes"
            )  # never a path: external data would reach the compiler as a reference
            assert made["keywords"] == {"disabled_optimizers": [], "enable_fallback": 0}

    def test_the_number_is_always_passed(self, recorder: Recorder) -> None:
        session_on("npu:3").close()
        assert [s["options"]["device_id"] for s in recorder.sessions()] == ["3"]

    def test_cuda(self, recorder: Recorder) -> None:
        with session_on("cuda:1") as session:
            for rows in (1, 2, 3):
                session.run(None, {"x": np.ones((rows, 16), np.float32)})
        made = recorder.sessions(CUDA)
        assert len(made) == 1, "one session serves every shape"
        assert made[0]["options"] == {
            "device_id": "1",
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        assert made[0]["level"] == "ORT_ENABLE_ALL"
        assert made[0]["inputs"] == {"x": ["N", 16]}

    def test_no_optimization_stays_none(self, recorder: Recorder) -> None:
        session_on(optimize=Optimize.OFF).close()
        assert recorder.sessions()[0]["level"] == "ORT_DISABLE_ALL"

    def test_builds_before_1_24(self, recorder: Recorder) -> None:
        """They do not know how to split graphs, nor tell who took which node: a profile of the first run does."""
        recorder.fault("old")
        with session_on() as session:
            session.run(None, {"x": X})
        made = recorder.sessions()
        assert made[0]["options"] == {k: v for k, v in OPTIONS.items() if k != "enable_cann_subgraph"}
        assert made[0]["profiling"]

    def test_builds_that_renamed_the_precision(self, recorder: Recorder) -> None:
        recorder.fault("renamed")
        with session_on() as session:
            session.run(None, {"x": X})
        expected = {k: v for k, v in OPTIONS.items() if k != "precision_mode"} | {
            "precision_mode_v2": "origin"
        }
        assert recorder.sessions()[0]["options"] == expected

    def test_each_session_has_a_process_and_an_empty_folder(self, recorder: Recorder, tmp_path: Path) -> None:
        with session_on() as one, session_on() as other:
            one.run(None, {"x": X})
            other.run(None, {"x": X})
        made = recorder.sessions()
        assert len({s["process"] for s in made} | {os.getpid()}) == 3
        folders = {s["folder"] for s in made}
        assert len(folders) == 2
        assert all(s["files"] == ["log"] for s in made)
        assert not any(Path(folder).exists() for folder in folders), "removed at the end"


class TestShapes:
    def test_every_shape_has_its_own_session(self, recorder: Recorder) -> None:
        proto = cnn()
        feeds = [f for size in (8, 12, 8, 12) for f in feeds_for(proto, 1, {"H": size, "W": size})]
        with session_on(proto=proto) as session:
            found = [session.run(["y"], feed) for feed in feeds]
        for y, z in zip(outputs_of(proto, feeds), found, strict=True):
            np.testing.assert_allclose(z[0], y[0], rtol=1e-4, atol=1e-6)
        shapes = [s["inputs"]["x"] for s in recorder.sessions()]
        assert shapes == [
            ["N", 3, "H", "W"],
            [3, 3, 8, 8],
            [3, 3, 12, 12],
        ]  # the first asks if the device is there

    def test_many_shapes_are_bounded_and_reported(
        self, recorder: Recorder, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "calib"), session_on() as session:
            for rows in (*range(1, 11), 1, 10):
                session.run(None, {"x": np.ones((rows, 16), np.float32)})
        assert len(recorder.sessions()) == 1 + 10 + 1, "the first shape was dropped, the last was kept"
        assert len(caplog.records) == 1
        assert "more than 8 input shapes; the model is compiled anew for each" in caplog.text

    def test_a_declared_size_is_never_changed(self, recorder: Recorder) -> None:
        proto = parse("g (float[2,4] x) => (float[2,4] y) { y = Relu (x) }", {})
        with session_on(proto=proto) as session:
            with pytest.raises(RuntimeError, match="invalid dimensions"):
                session.run(None, {"x": np.ones((3, 4), np.float32)})
            session.run(None, {"x": np.ones((2, 4), np.float32)})
        assert len(recorder.sessions()) == 1, "the session that was opened first has the right shape"


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "text"),
        [
            (
                "load",
                r"device 'npu:0' is not available: the CANN toolkit is not found \(libascendcl.so is missing\); source",
            ),
            (
                "silent",
                "'npu:0' is not available: ONNX Runtime put the session on CPUExecutionProvider without an error",
            ),
            (
                "ignored",
                "the provider ignores precision_mode=must_keep_origin_dtype, so its statistics would be wrong",
            ),
            ("exit", r"'npu:0' ended its process \(exit code 7\): driver: assertion failed"),
        ],
    )
    def test_at_once(self, recorder: Recorder, fault: str, text: str) -> None:
        recorder.fault(fault)
        with pytest.raises(DeviceError, match=text) as caught:
            session_on()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("fault", "text"),
        [
            (
                "first_run",
                "'npu:0' failed at its first run: CANN's graph compiler refuses the model .*--device cpu",
            ),
            ("wrong", "'npu:0' computes something else than the CPU: output 'y' differs by 0.05 of its norm"),
        ],
    )
    def test_at_the_first_run(self, recorder: Recorder, fault: str, text: str) -> None:
        recorder.fault(fault)
        with session_on() as session, pytest.raises(DeviceError, match=text):
            session.run(None, {"x": X})

    def test_later(self, recorder: Recorder) -> None:
        recorder.fault("second_run")
        with session_on() as session:
            session.run(None, {"x": X})
            with pytest.raises(DeviceError, match="device 'npu:0' failed: CANN's graph compiler refuses"):
                session.run(None, {"x": X})

    def test_a_device_that_fails_is_not_the_samples_fault(self, recorder: Recorder) -> None:
        recorder.fault("first_run")
        with pytest.raises(DeviceError, match="failed at its first run"):
            collect(
                open_model(mlp()),
                [Probe("y", "minmax")],
                from_iterable([{"x": X}], open_model(mlp()).inputs()),
                device="npu",
            )

    def test_nodes_left_to_the_cpu_are_named(
        self, recorder: Recorder, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorder.fault("partly")
        with caplog.at_level(logging.WARNING, "calib"), session_on() as session:
            session.run(None, {"x": X})
            session.run(None, {"x": X})
        assert len(caplog.records) == 1
        assert "device 'npu:0': 5 nodes run on the CPU instead (3 Gemm" in caplog.text

    @pytest.mark.slow
    def test_no_answer(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        recorder.fault("hang")
        monkeypatch.setattr(provider, "_PROOF_SECONDS", 2)
        monkeypatch.setattr("calib.devices.child._SECONDS_TO_END", 0.1)
        with pytest.raises(DeviceError, match="device 'npu:0' does not answer"):
            require_device("npu")

    def test_after_the_end(self, recorder: Recorder) -> None:
        session = session_on()
        os.kill(session._process.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"ended its process \(exit code -9\)"):
                session.run(None, {"x": X})

    @pytest.mark.slow
    def test_the_child_ends_with_a_killed_parent(self, recorder: Recorder) -> None:
        code = (
            "import sys, types; from calib import provider; from tests.models import mlp\n"
            f"provider.runtime = lambda: types.SimpleNamespace(get_available_providers=lambda: ['{CANN}'])\n"
            "session = provider.create_session(mlp().SerializeToString(), device='npu')\n"
            "print(session._process.pid, session._folder, flush=True); sys.stdin.read()\n"
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{STAND_IN}"}
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        ) as parent:
            assert parent.stdout is not None
            child, folder = parent.stdout.readline().split()
            assert Path(folder).is_dir()
            parent.kill()
        assert _within_seconds(10, lambda: not Path(folder).exists())
        assert _within_seconds(10, lambda: not _runs(int(child)))


def _within_seconds(seconds: float, happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not happened():
        time.sleep(0.05)
    return happened()


def _runs(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


class TestWhatTheUserGave:
    def test_a_sample_that_does_not_fit_names_itself(self, recorder: Recorder) -> None:
        good, bad = {"x": X}, {"x": np.ones((2, 9), np.float32)}
        with session_on() as session:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="invalid dimensions"):
                    session.run(None, bad)
                session.run(None, good)

    def test_a_model_that_does_not_load(self, recorder: Recorder) -> None:
        broken = parse("g (float[2,4] x) => (float[2,4] y) { y = Nonsense (x) }", {})
        with pytest.raises(GraphError, match=r"ONNX Runtime .* cannot load the model: "):
            session_on(proto=broken)

    def test_strings(self, recorder: Recorder) -> None:
        with session_on() as session:
            with pytest.raises(DeviceError, match="takes numbers only, but 'x' has the type"):
                session.run(None, {"x": np.array([["a"]])})
            session.run(None, {"x": X})

    def test_a_path_with_weights_beside_it(self, recorder: Recorder, tmp_path: Path) -> None:
        onnx.save(mlp(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
        with create_session(tmp_path / "m.onnx", device="npu") as session:
            found = session.run(None, {"x": X})
        np.testing.assert_allclose(found[0], outputs_of(mlp(), [{"x": X}])[0][0], rtol=1e-5)
        assert recorder.sessions()[0]["source"] == "bytes"

    def test_more_than_one_protobuf_holds(self, recorder: Recorder) -> None:
        weight = np.broadcast_to(np.float32(0), (2**15, 2**14))  # 2 GiB that nobody has
        proto = parse(
            "g (float[1,4] x, float[2,2] w) => (float[1,4] y, float[2,2] v) { y = Relu(x) v = Relu (w) }", {}
        )
        with pytest.raises(
            DeviceError, match=r"takes models of up to 2 GiB in one piece, and this one has 2.0 GiB"
        ):
            create_session(proto.SerializeToString(), {"w": weight}, device="npu")

    @pytest.mark.parametrize("device", ["npu", "cuda"])
    def test_statistics_are_those_of_the_cpu(self, recorder: Recorder, device: str) -> None:
        model = open_model(cnn())
        data = from_iterable(feeds_for(cnn(), 4), model.inputs())
        probes = [Probe(name, kind) for name in ("c1", "r2", "y") for kind in ("minmax", "histogram")]
        options = SessionOptions(optimize=Optimize.BASIC, threads=1)
        on_cpu = collect(model, probes, data, options=options)
        on_device = collect(model, probes, data, options=options, device=device)
        for probe in probes:
            for name, value in on_cpu[probe].state().items():
                np.testing.assert_array_equal(on_device[probe].state()[name], value)


class TestReducedOnTheDevice:
    KINDS = (("minmax", None), ("series", None), ("channel", 1), ("channel", -1), ("mean", 1))

    @pytest.mark.parametrize("opset", [12, 17, 18])
    def test_statistics_are_those_of_the_cpu(self, recorder: Recorder, opset: int) -> None:
        proto = parse(
            "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { h = Conv (x, w, b) r = Relu (h) y = Conv (r, u) }",
            weights_of(0, w=(8, 3, 1, 1), b=(8,), u=(4, 8, 1, 1)),
            opset,
        )
        model, feeds = open_model(proto), feeds_for(proto, 5)
        data = from_iterable(feeds, model.inputs())
        probes = [Probe(name, kind, axis) for name in ("r", "y") for kind, axis in self.KINDS]
        options = SessionOptions(optimize=Optimize.BASIC, threads=1)
        on_cpu = collect(model, probes, data, options=options)
        on_device = collect(model, probes, data, options=options, device="npu")
        for probe in probes:
            here, there = on_cpu[probe], on_device[probe]
            fields = {"minmax": "lo hi count", "series": "lo hi sum square n", "mean": "mean"}
            for name in fields.get(probe.kind, "lo hi sum abs_sum mean_peak count").split():
                seen, exact = getattr(there, name), getattr(here, name)
                if name in ("lo", "hi", "count", "n"):
                    np.testing.assert_array_equal(seen, exact)
                else:  # the device adds in float32
                    np.testing.assert_allclose(seen, exact, rtol=1e-5, atol=1e-4)

    def test_whole_tensors_leave_it_once(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[list[str]] = []
        real = ChildSession.run

        def run(self: ChildSession, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            asked.append(list(outputs))
            return real(self, outputs, feed)

        monkeypatch.setattr(ChildSession, "run", run)
        model = open_model(cnn())
        data = from_iterable(feeds_for(cnn(), 4), model.inputs())
        collect(model, [Probe("c1", "minmax")], data, device="npu")
        assert ["c1" in names for names in asked] == [True, False, False, False]

    def test_nan_and_inf_are_counted_and_named(self, recorder: Recorder) -> None:
        model, feeds = open_model(cnn()), feeds_for(cnn(), 4)
        for index, bad in ((2, np.nan), (3, np.inf)):
            feeds[index]["x"][0, 0, 0, 0] = bad
        data = from_iterable(feeds, model.inputs())
        probe = Probe("c1", "minmax")
        stats = collect(model, [probe], data, device="npu")[probe]
        exact = collect(model, [probe], data)[probe]
        assert stats.state()["nan"] == exact.state()["nan"] > 0
        assert stats.state()["bad_index"] == 2


class TestRequireDevice:
    def test_a_matrix_product_is_computed_once(self, recorder: Recorder) -> None:
        assert require_device("npu:1") == require_device("npu:1") == CANN
        made = recorder.sessions()
        assert [s["options"]["device_id"] for s in made] == ["1"]
        assert set(made[0]["inputs"]) == {"x", "w"}

    def test_not_there(self, recorder: Recorder) -> None:
        recorder.fault("load")
        for _ in range(2):  # a failure is not remembered: the device may be there the next time
            with pytest.raises(DeviceError, match="the CANN toolkit is not found"):
                require_device("npu")
        recorder.fault("")
        assert require_device("npu") == CANN


def test_the_main_job(recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = ROOT / "tools" / "digits"
    arguments = [str(digits / "digits.onnx"), str(tmp_path / "m.onnx"), "--calib", str(digits / "calib")]
    assert main([*arguments, "--samples", "16", "--device", "npu"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["calibration"]["device"] == "npu"
    assert recorder.sessions()
    recorder.fault("wrong")
    provider._prove.cache_clear()
    other = [*arguments[:1], str(tmp_path / "other.onnx"), *arguments[2:]]
    assert main([*other, "--device", "npu"]) == 4
    assert "device 'npu:0' computes something else than the CPU" in capsys.readouterr().err
    assert not (tmp_path / "other.onnx").exists()
