"""ATC and AOE where they are: executables on PATH that record how they were called, as there is no NPU here."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path

import onnx
import pytest

from onnxslim_ptq.errors import DeviceError
from onnxslim_ptq.frontends.squant_ptq import OnnxCalibrator, QuantConfig
from onnxslim_ptq.frontends.squant_ptq.npu_compiler import Compiler
from tests.frontends.test_squant_ptq import convs

GOOD = 'cp "$(echo "$2" | sed s/--model=//)" model_it_got && echo compiled > compiled_linux_x86_64.om'
BAD = 'echo "ATC run failed"; printf "E10001: Value [x]\\033 for --soc_version is invalid.\\n" >&2; echo tail; exit 255'


class Fake:
    """Executables in a folder at the front of PATH; each notes its working folder and arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "called.txt"

    def install(self, name: str, does: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\n{{ pwd; printf "%s\\n" "$@"; }} > {self.record}\n{does}\n')
        path.chmod(0o755)

    @property
    def called(self) -> list[str]:
        return self.record.read_text().splitlines()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend")
    acl = types.ModuleType("acl")
    acl.get_soc_name = lambda: "Ascend310P3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acl", acl)
    return Fake(folder)


def calibrated(folder: Path, **config: object) -> OnnxCalibrator:
    onnx.save(convs(), folder / "m.onnx")
    made = OnnxCalibrator(str(folder / "m.onnx"), QuantConfig(graph_optimize_level=1, **config))  # type: ignore[arg-type]
    made.run()
    return made


@pytest.mark.parametrize(("method", "kind"), [("atc", "--soc_version=Ascend310P3"), ("aoe", "--job_type=2")])
def test_it_compiles_what_is_exported(method: str, kind: str, fake: Fake, tmp_path: Path) -> None:
    fake.install(method, GOOD)
    paths = calibrated(tmp_path, om_method=method, input_shape=[[1, 3, 8, 8]]).export_quant_onnx(
        tmp_path / "q.onnx"
    )
    folder, *arguments = fake.called
    assert [a for a in arguments if not a.startswith("--model=")] == [
        "--framework=5",
        "--output=compiled",
        kind,
        "--input_shape=x:1,3,8,8",
    ]
    assert not Path(folder).exists(), "its working folder is its own, and gone"
    assert (tmp_path / "q.om").read_text() == "compiled\n"
    assert paths.others == (tmp_path / "q.om",)
    assert {p.name for p in tmp_path.iterdir()} == {"bin", "m.onnx", "q.onnx", "q.json", "q.om"}


def test_shapes_of_ones_own(fake: Fake, tmp_path: Path) -> None:
    fake.install("atc", GOOD)
    calibrated(tmp_path, om_method="atc", atc_input_shape="x:1,3,8,8 ; $(x)").export_quant_onnx(
        tmp_path / "q.onnx"
    )
    assert fake.called[-1] == "--input_shape=x:1,3,8,8 ; $(x)", "one argument, no shell"


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (
            BAD,
            r"atc failed \(255\): E10001: Value \[x\]\? for --soc_version is invalid\.; nothing was written",
        ),
        ("exit 3", r"atc failed \(3\): it said nothing"),
        ("echo done", "atc made no model: done"),
    ],
    ids=["code", "silent", "no file"],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    does: str, message: str, fake: Fake, tmp_path: Path
) -> None:
    fake.install("atc", does)
    calibrator = calibrated(tmp_path, om_method="atc")
    with pytest.raises(DeviceError, match=message) as raised:
        calibrator.export_quant_onnx(tmp_path / "q.onnx")
    assert "\n" not in str(raised.value)
    assert {p.name for p in tmp_path.iterdir()} == {"bin", "m.onnx"}


def test_it_ends_in_time_with_all_it_started(fake: Fake, tmp_path: Path) -> None:
    fake.install("atc", f"sleep 60 & echo $! > {tmp_path / 'child'}; wait")
    with pytest.raises(DeviceError, match=r"atc took longer than 1 s"):
        Compiler(str(fake.folder / "atc"), "x", seconds=1).compile(tmp_path / "m.onnx", tmp_path / "q.om")
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    for _ in range(100):
        state = (child / "stat").read_text().split()[2] if child.exists() else "gone"
        if state in ("gone", "Z"):
            return
        time.sleep(0.05)
    pytest.fail(f"the process it started is in state {state}")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("environment", "CANN's environment is not set"),
        ("chip", "the chip is not known"),
        ("tool", "atc not found"),
    ],
)
def test_what_is_missing_is_told(
    missing: str,
    message: str,
    fake: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The model is written without it."""
    if missing == "tool":
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    else:
        fake.install("atc", BAD)
    if missing == "environment":
        monkeypatch.delenv("ASCEND_HOME_PATH")
    if missing == "chip":
        monkeypatch.setitem(sys.modules, "acl", None)
    calibrated(tmp_path, om_method="atc").export_quant_onnx(tmp_path / "q.onnx")
    assert message in caplog.text
    assert not (tmp_path / "q.om").exists()
    assert not fake.record.exists()
