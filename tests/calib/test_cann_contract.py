"""The real onnxruntime-cann wheels over a host library that stands in for the CANN toolkit (cann_host/ascendcl.cpp).

Contract, not proof: options, splitting, weights, shapes, caches, errors and moving tensors are the real provider's;
what an Ascend chip computes is not seen. The wheels live in environments of their own, kept in the cache folder.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "cann_host" / "ascendcl.cpp"
CACHE = Path.home() / ".cache" / "onnxslim_ptq" / "cann"
LIBRARIES = ("libascendcl.so", "libacl_op_compiler.so", "libfmk_onnx_parser.so")
PRELUDE = """
import json, logging, sys
import numpy as np, onnx
from calib.provider import SessionOptions, create_session, require_device
logging.basicConfig(stream=sys.stderr, format="%(message)s")
def model(body):
    return onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> ' + body)
def answer(**values):
    print("ANSWER" + json.dumps(values))
x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
relu = model("g (float[N,64] x) => (float[N,64] y) { y = Relu (x) }").SerializeToString()
"""


def _pip(python: Path | str, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--prefer-binary", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"onnxruntime-cann cannot be installed here: {last[:200]}")


@pytest.fixture(scope="session")
def environment() -> Path:
    """Python in a virtual environment with what `pip install onnxslim_ptq[cann]` brings."""
    if sys.platform != "linux" or sys.version_info >= (3, 13):
        pytest.skip("onnxruntime-cann has wheels for Linux and Python up to 3.12 only")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"] + config["options.extras_require"]["cann"]
    needs = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    key = hashlib.sha256(f"{sys.version} {needs}".encode()).hexdigest()[:12]
    folder = CACHE / f"venv-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        _pip(python, *needs)
        (folder / "complete").touch()
    return python


@pytest.fixture(scope="session", params=["newest", "1.23.2", "1.22.1"])
def wheel(request: pytest.FixtureRequest, environment: Path) -> Path | None:
    """The folder of an older release, None for the one in the environment."""
    if request.param == "newest":
        return None
    folder = CACHE / f"onnxruntime-cann-{request.param}-{sys.implementation.cache_tag}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _pip(environment, "--no-deps", "--target", str(folder), f"onnxruntime-cann=={request.param}")
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the host library needs g++")
    folder = tmp_path_factory.mktemp("cann_host")
    flags = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC"]
    subprocess.run([*flags, "-o", folder / LIBRARIES[0], SOURCE], check=True)
    for name in LIBRARIES[1:]:
        subprocess.run([*flags, "-o", folder / name, "-x", "c++", os.devnull], check=True)
    return folder


class Host:
    """Runs Python code with a wheel, the host library (unless taken away) and this project."""

    def __init__(self, python: Path, wheel: Path | None, libraries: Path, folder: Path) -> None:
        self.python, self.folder, self.log = python, folder, folder / "host.log"
        path = f"{ROOT}{os.pathsep}{wheel}" if wheel else str(ROOT)
        self.environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(libraries)}
        self.work = folder / "work"
        self.work.mkdir()

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "CANN_HOST_LOG": str(self.log), **settings}
        done = subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.work,
            check=False,
        )
        assert list(self.work.iterdir()) == [], "nothing is left in the user's folder"
        return done

    def answer(self, code: str, **settings: str) -> dict[str, Any]:
        done = self.run("-c", PRELUDE + code, **settings)
        lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
        assert lines, done.stderr
        found: dict[str, Any] = json.loads(lines[-1][6:])
        return {**found, "stderr": done.stderr}

    def error(self, code: str, **settings: str) -> str:
        """The text of the DeviceError that the code ends with."""
        done = self.run("-c", PRELUDE + code, **settings)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("calib.errors.DeviceError: "), done.stderr
        return last.removeprefix("calib.errors.DeviceError: ")

    def lines(self, start: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(start) for line in lines if line.startswith(start)]


@pytest.fixture
def host(environment: Path, wheel: Path | None, libraries: Path, tmp_path: Path) -> Iterator[Host]:
    return Host(environment, wheel, libraries, tmp_path)


def test_the_host_library_has_all_the_provider_calls(host: Host, libraries: Path) -> None:
    """Symbols are bound when they are first called: a missing one would end the process in the middle of a test."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    found = host.run("-c", "import onnxruntime; print(onnxruntime.__file__)").stdout.strip()
    provider = Path(found).parent / "capi" / "libonnxruntime_providers_cann.so"

    def symbols(which: str, path: Path) -> set[str]:
        listed = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True).stdout
        return {name for name in re.findall(r"\S+$", listed, re.M) if re.match(r"acl|_ZNK?2ge", name)}

    needed = symbols("--undefined-only", provider)
    assert len(needed) > 40
    assert needed <= symbols("--defined-only", libraries / LIBRARIES[0])


class TestWithoutTheToolkit:
    def test_the_device_is_refused(self, host: Host) -> None:
        for code in ("require_device('npu')", "create_session(relu, device='npu')"):
            error = host.error(code, LD_LIBRARY_PATH="")
            assert error.startswith(
                "device 'npu:0' is not available: the CANN toolkit is not found (libascendcl.so is missing); source"
            )

    def test_the_cpu_works(self, host: Host) -> None:
        found = host.answer(
            "answer(y=float(create_session(relu).run(None, {'x': x})[0].max()))", LD_LIBRARY_PATH=""
        )
        assert found["y"] == 1

    def test_doctor_and_the_command_line(self, host: Host) -> None:
        done = host.run("-m", "onnxslim_ptq", "doctor", "--json", LD_LIBRARY_PATH="")
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        provider = next(p for p in facts["providers"] if p["name"] == "CANNExecutionProvider")
        assert not provider["works"]
        assert "the CANN toolkit is not found (libascendcl.so is missing)" in provider["reason"]
        model = str(ROOT / "tools/digits/digits.onnx")
        done = host.run("-m", "onnxslim_ptq", model, "out.onnx", "--device", "npu", LD_LIBRARY_PATH="")
        assert done.returncode == 4
        assert "the CANN toolkit is not found" in done.stderr


class TestOptions:
    def test_what_reaches_the_compiler(self, host: Host) -> None:
        code = """
with create_session(relu, device="npu") as session:
    same = [bool((session.run(None, {"x": v})[0] == v.clip(0)).all()) for v in (x, x[:1], x)]
answer(same=same)"""
        assert host.answer(code)["same"] == [True, True, True]
        assert set(host.lines("initialize ")) == {
            "ge.exec.precision_mode=must_keep_origin_dtype",
            "ge.opSelectImplmode=high_precision",
            "ge.socVersion=Ascend910B3",
        }
        assert host.lines("build ") == ["input_shape=x:2,64", "input_shape=x:1,64"], "compiled once per shape"
        assert host.lines("load ") == ["from memory", "from memory"], (
            "no compiled model of another run is taken"
        )
        assert host.lines("save ") == []
        assert len(host.lines("run")) == 3
        assert set(host.lines("device ")) == {"0"}

    def test_the_number_of_the_device(self, host: Host) -> None:
        assert host.answer("require_device('npu:2'); answer()", CANN_HOST_DEVICES="4")
        assert set(host.lines("device ")) == {"2"}

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            ("2", "device 'npu:5' is not available: NPU 5 does not exist: this host has 2, numbered from 0"),
            ("0", "device 'npu:5' is not available: this host has no NPU that CANN can see"),
        ],
    )
    def test_a_device_that_does_not_exist(self, host: Host, count: str, text: str) -> None:
        assert host.error("require_device('npu:5')", CANN_HOST_DEVICES=count).startswith(text)

    def test_the_weights_are_in_the_compiled_model(self, host: Host, tmp_path: Path) -> None:
        """A reference to external data would be looked up in the child's folder, where nothing is."""
        code = """
from calib.model import open_model
proto = model("g (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }")
proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32) * 3, "w"))
onnx.save(proto, sys.argv[1], save_as_external_data=True, location="m.data", size_threshold=0)
opened = open_model(sys.argv[1])
assert "w" in opened.weights
create_session(opened.proto.SerializeToString(), opened.weights, device="npu").run(None, {"x": x})"""
        source, compiled = tmp_path / "m.onnx", tmp_path / "compiled.onnx"
        done = host.run("-c", PRELUDE + code, str(source), CANN_HOST_ONNX=str(compiled))
        assert "computes something else than the CPU: output 'y'" in done.stderr  # the host knows no weights
        (weight,) = onnx.load(compiled, load_external_data=False).graph.initializer
        assert weight.data_location == onnx.TensorProto.DEFAULT
        assert onnx.numpy_helper.to_array(weight)[5, 5] == 3


class TestPlacement:
    def test_nothing_runs_there(self, host: Host) -> None:
        body = "g (float[N,64] x, float[64] s) => (float[N,64] y) { y = LayerNormalization (x, s) }"
        code = f"""
session = create_session(model("{body}").SerializeToString(), device="npu")
session.run(None, {{"x": x, "s": x[0]}})"""
        assert "would compute nothing: its provider takes none of the model's operators" in host.error(code)

    def test_what_stays_on_the_cpu_is_said(self, host: Host) -> None:
        body = (
            "g (float[N,64] x, float[64] s) => (float[N,64] y) { r = Relu (x) y = LayerNormalization (r, s) }"
        )
        code = f"""
session = create_session(model("{body}").SerializeToString(), device="npu")
session.run(None, {{"x": x, "s": x[0]}})
answer()"""
        assert (
            "device 'npu:0': 1 nodes run on the CPU instead (1 LayerNormalization)"
            in host.answer(code)["stderr"]
        )


class TestFaults:
    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            (
                {"CANN_HOST_WRONG": "1"},
                "device 'npu:0' computes something else than the CPU: output 'y' differs by",
            ),
            (
                {"CANN_HOST_FAIL": "parse"},
                "device 'npu:0' failed at its first run: CANN's graph compiler refuses",
            ),
            ({"CANN_HOST_FAIL": "run"}, "device 'npu:0' failed at its first run: "),
        ],
    )
    def test_a_device_that_fails(self, host: Host, settings: dict[str, str], text: str) -> None:
        for code in ("require_device('npu')", "create_session(relu, device='npu').run(None, {'x': x})"):
            assert host.error(code, **settings).startswith(text)


class TestCalibration:
    def test_statistics_are_those_of_the_cpu(self, host: Host) -> None:
        code = """
from calib import Probe, collect
from calib.model import open_model
from calib.readers import from_iterable
opened = open_model(onnx.ModelProto.FromString(relu))
data = from_iterable([{"x": x}, {"x": x[:1] * 3}, {"x": x * 2}], opened.inputs())
probes = [Probe("y", "minmax"), Probe("y", "histogram")]
def states(device):
    found = collect(opened, probes, data, device=device)
    return [{n: v.tolist() for n, v in found[p].state().items()} for p in probes]
answer(cpu=states("cpu"), npu=states("npu"))"""
        found = host.answer(code)
        assert found["cpu"] == found["npu"]
        assert len(found["cpu"][0]) > 0
        assert len(host.lines("run")) == 3

    def test_doctor(self, host: Host) -> None:
        done = host.run("-m", "onnxslim_ptq", "doctor")
        assert done.returncode == 0, done.stderr
        assert re.search(r"CANNExecutionProvider +works", done.stdout)
        assert "--device npu works" in done.stdout
