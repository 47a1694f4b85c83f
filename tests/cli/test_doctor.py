"""`doctor`: what it says of installations, sound and broken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onnxslim_ptq import doctor
from onnxslim_ptq.cli import main
from onnxslim_ptq.doctor import Facts, Provider, diagnose, usable

Captured = pytest.CaptureFixture[str]
CPU = Provider("CPUExecutionProvider", True)


def facts(
    builds: dict[str, str],
    runtime: str | None,
    error: str | None = None,
    numpy: str = "2.4.6",
    python: str = "3.11.7",
) -> Facts:
    return Facts(python, "Linux x86_64", {"numpy": numpy}, builds, runtime, error, [CPU] if runtime else [])


def test_here_it_works(capsys: Captured) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "CPUExecutionProvider" in text
    assert "processor: int8 instructions" in text
    assert "--device cpu works" in text


def test_json(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"]
    assert found["exit_code"] == 0
    assert {"name": "CPUExecutionProvider", "works": True, "reason": ""} in found["providers"]


BROKEN = "onnxruntime cannot be imported (import numpy failed); install exactly one"
GUTTED = "onnxruntime is installed but gutted (two of its distributions share one folder)"


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (facts({"onnxruntime": "1.31.1"}, "1.31.1"), []),
        (facts({"onnxruntime-cann": "1.24.4"}, "1.24.4", numpy="1.26.4"), []),
        (
            facts({"onnxruntime": "1.31.1", "onnxruntime-cann": "1.24.4"}, "1.31.1", numpy="1.26.4"),
            ["own the same folder", "pip uninstall -y onnxruntime onnxruntime-cann", "[cann]"],
        ),
        (
            facts({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}, "1.31.1"),
            ["own the same folder", "pip uninstall -y onnxruntime onnxruntime-gpu"],
        ),
        (
            facts({"onnxruntime-cann": "1.24.4"}, None, GUTTED, "1.26.4"),
            ["gutted", "pip uninstall -y onnxruntime-cann"],
        ),
        (facts({"onnxruntime-cann": "1.24.4"}, "1.31.1", numpy="1.26.4"), ["files of two builds are mixed"]),
        (
            facts({"onnxruntime-cann": "1.24.4"}, None, BROKEN),
            ["built against NumPy 1", "pip install 'numpy<2'"],
        ),
        (facts({"onnxruntime-cann": "1.24.4"}, None, BROKEN, python="3.13.1"), ["use Python 3.10 to 3.12"]),
        (facts({}, None, "onnxruntime cannot be imported"), ["no ONNX Runtime is installed"]),
        (facts({"onnxruntime": "1.31.1"}, None, "libgomp.so.1 is not found"), ["libgomp.so.1 is not found"]),
        (facts({"onnxruntime": "1.18.0"}, "1.18.0"), ["older than 1.20"]),
    ],
)
def test_problems_come_with_their_cure(found: Facts, parts: list[str]) -> None:
    problems = diagnose(found)
    assert len(problems) == bool(parts)
    for part in parts:
        assert part in problems[0]
    assert usable(found) is (found.runtime is not None)


@pytest.mark.parametrize("as_json", [False, True])
def test_unusable_is_exit_code_4(as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(doctor, "_ask_child", lambda provider: {"error": GUTTED})
    assert main(["doctor", *(["--json"] if as_json else [])]) == 4
    text = capsys.readouterr().out
    if as_json:
        assert json.loads(text)["exit_code"] == 4
    else:
        assert "problem: the folder of onnxruntime is gutted" in text
        assert "--device npu does not work: ONNX Runtime cannot be used" in text


def test_a_provider_that_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    reason = "the CANN toolkit is not found (libascendcl.so is missing); source its set_env.sh"

    def answer(provider: str) -> dict[str, Any]:
        if provider == "CANNExecutionProvider":
            return {"error": f"device 'npu:0' is not available: {reason}"}
        if provider == "QNNExecutionProvider":
            return {"error": "/build/x.cc:9 f(const A&) cannot start"}
        return {
            "version": "1.31.1",
            "providers": ["CANNExecutionProvider", "QNNExecutionProvider", "CPUExecutionProvider"],
        }

    monkeypatch.setattr(doctor, "_ask_child", answer)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"--device npu does not work: {reason}" in lines
    assert "--device cpu works" in lines
    cuda = next(line for line in lines if line.startswith("--device cuda"))
    assert "this onnxruntime has no CUDAExecutionProvider; " in cuda
    assert "pip install onnxruntime-gpu" in cuda
    assert any(
        line.split()[:2] == ["QNNExecutionProvider", "no"] and "cannot start" in line for line in lines
    )


@pytest.mark.parametrize("provider", ["CANNExecutionProvider", "CUDAExecutionProvider"])
def test_accelerators_are_tried_as_quantize_uses_them(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("calib.provider.require_device", asked.append)
    assert "error" not in doctor._child(provider)
    assert asked == [{"CANNExecutionProvider": "npu", "CUDAExecutionProvider": "cuda"}[provider]]


def test_a_provider_this_build_lacks_is_never_replaced() -> None:
    """ONNX Runtime itself would warn and run on the CPU."""
    answer = doctor._ask_child("CUDAExecutionProvider")
    assert "error" in answer
