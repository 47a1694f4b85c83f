"""The command line itself: which command runs, errors nobody expected, signals, what `--help` costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from onnxslim_ptq import __version__
from onnxslim_ptq.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "tools" / "digits"
MODEL, CALIB = str(DIGITS / "digits.onnx"), str(DIGITS / "calib")
COMMAND = [sys.executable, "-m", "onnxslim_ptq"]
Captured = pytest.CaptureFixture[str]
_TOO_LONG = 300.0  # seconds; a process that hangs is killed then, and the test fails


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"onnxslim_ptq {__version__}\n"


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in (
        "quantize",
        "inspect",
        "calibrate",
        "merge-stats",
        "compare",
        "analyze",
        "recipes",
        "doctor",
        "tune",
        "convert",
    ):
        assert name in result.output


def test_without_arguments_it_helps_and_fails(capsys: Captured) -> None:
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().out


def test_a_misspelt_command(capsys: Captured) -> None:
    assert main(["quantise", MODEL, "out.onnx"]) == 2
    assert "did you mean 'quantize'?" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["-v"], ["--json"]])
def test_an_unexpected_error(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\ndefect")

    monkeypatch.setattr("onnxslim_ptq.api.quantize_as", broken)
    assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, *more]) == 1
    text, errors = capsys.readouterr()
    assert "ZeroDivisionError: a defect" in errors.splitlines()[-1]
    assert ("Traceback" in errors) is (more == ["-v"])
    if more == ["--json"]:
        assert json.loads(text)["exit_code"] == 1
    if not more:
        assert "run with -v for the traceback" in errors


def test_expected_errors_have_no_traceback(capsys: Captured) -> None:
    assert main(["inspect", "missing.onnx"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_recipes(capsys: Captured) -> None:
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.startswith("w8a8 ")
    assert main(["recipes", "show", "w8a8"]) == 0
    assert "type: quantize" in capsys.readouterr().out
    assert main(["recipes", "list", "--json"]) == 0
    assert "w8a8" in json.loads(capsys.readouterr().out)["recipes"]
    assert main(["recipes", "show", "w8a8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["version"] == 1


@pytest.mark.parametrize("args", [["show"], ["show", "w8a9"], ["delete", "w8a8"], ["list", "w8a8"]])
def test_recipes_errors(args: list[str]) -> None:
    assert main(["recipes", *args]) == 2


def test_help_is_quick() -> None:
    """It loads neither numpy nor onnx nor ONNX Runtime."""
    code = (
        "import sys; from onnxslim_ptq.cli import main; main(['quantize', '--help']); "
        "sys.exit(bool({'numpy', 'onnx', 'onnxruntime', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


def test_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    done = subprocess.run(
        [*COMMAND, MODEL, str(out), "--calib", CALIB, "--json"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["files"]["model"] == str(out)
    assert done.stderr == b""  # no progress bar without a terminal
    failed = subprocess.run(
        [*COMMAND, MODEL, str(MODEL), "--calib", CALIB], cwd=ROOT, capture_output=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith(b"error: ")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "inspect", MODEL], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="terminals and signals of POSIX")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_leaves_nothing(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    """The progress bar on a terminal tells when calibration has begun."""
    import pty

    data = tmp_path / "many.npz"
    np.savez(data, image=np.random.default_rng(0).random((200_000, 1, 8, 8), np.float32))
    out = tmp_path / "made" / "m.onnx"
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, MODEL, str(out), "--calib", str(data), "--stacked"],
        cwd=ROOT,
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, which is killed as a whole
        preexec_fn=partial(signal.signal, sent, signal.SIG_DFL),  # a job in the background ignores SIGINT
    )
    os.close(theirs)
    watchdog = threading.Timer(_TOO_LONG, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        seen = b""
        while text := _read(terminal):  # nothing once the process is gone
            begun = b"calibrating" in seen
            seen += text
            if not begun and b"calibrating" in seen:
                process.send_signal(sent)
        assert b"calibrating" in seen
        assert process.wait() == code
    finally:
        watchdog.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(terminal)
    assert not out.parent.exists()


def _read(terminal: int) -> bytes:
    """What was written to the terminal; nothing when nobody holds it open any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux
        return b""
