"""Ascend's model compilers, where they are installed: ATC compiles a model, AOE also tunes it on the device.

    atc --framework=5 --model=MODEL.onnx --output=NAME --soc_version=SOC [--input_shape=x:1,3,224,224]
    aoe --framework=5 --model=MODEL.onnx --output=NAME --job_type=2      [--input_shape=x:1,3,224,224]

Framework 5 is ONNX, job type 2 tunes operators; the result is NAME.om. Source: CANN's documents of both tools. Nothing
here ran on an NPU: the tests stand in an executable that records how it was called.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from calib.errors import DeviceError

__all__ = ["Compiler", "find_compiler"]

_ENVIRONMENT = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH")
_TOOLKIT = "source CANN's set_env.sh"
_SECONDS = {"atc": 1800.0, "aoe": 6 * 3600.0}
_READ_BACK, _LONGEST = 1 << 16, 300
_CODE = re.compile(r"\bE\w?\d{4,5}\b")  # how CANN marks the line that says why


@dataclass(frozen=True)
class Compiler:
    """A tool that is there, the chip to compile for (None: the tool asks the device) and the shapes of inputs."""

    tool: str
    soc: str | None
    shapes: str | None = None
    seconds: float = 1800.0

    def compile(self, model: Path, out: Path) -> None:
        """Write ``model`` as ``out`` (.om), working in a folder that is removed afterwards.

        Raises:
            DeviceError: the tool fails, takes longer than ``seconds`` (it is ended with all it started), or makes no
                file; one line with what it said.
        """
        with tempfile.TemporaryDirectory(prefix="onnxslim-ptq-npu-") as folder:
            said = Path(folder) / "said.txt"
            code = self._run(self._command(model), Path(folder), said)
            made = next(iter(sorted(Path(folder).rglob("compiled*.om"))), None)
            if code != 0 or made is None:
                what = "made no model" if code == 0 else f"failed ({code})"
                raise self._failed(f"{what}: {_reason(said)}")
            shutil.copyfile(made, out)

    def _command(self, model: Path) -> list[str]:
        kind = "--job_type=2" if self.soc is None else f"--soc_version={self.soc}"
        shapes = [] if self.shapes is None else [f"--input_shape={self.shapes}"]
        return [self.tool, "--framework=5", f"--model={model.absolute()}", "--output=compiled", kind, *shapes]

    def _run(self, command: list[str], folder: Path, said: Path) -> int:
        with said.open("wb") as log:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # it starts others, which have to end with it
                )
            except OSError as error:
                raise self._failed(f"cannot be run: {error.strerror}") from None
            try:
                return process.wait(self.seconds)
            except BaseException as error:  # an interruption, too, ends all that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise self._failed(f"took longer than {self.seconds:g} s") from None
                raise

    def _failed(self, what: str) -> DeviceError:
        return DeviceError(
            f"{self.tool} {what}; nothing was written: mend that, or set graph_optimize_level=0 to write the model "
            "without compiling it"
        )


def find_compiler(method: str, shapes: str | None) -> Compiler | str:
    """The tool ``method`` (atc or aoe) with what it needs to know, or why it cannot be used here."""
    tool = shutil.which(method)
    if tool is None:
        return f"{method} not found"
    if not any(os.environ.get(name) for name in _ENVIRONMENT):
        return f"{tool} found, but CANN's environment is not set: {_TOOLKIT}"
    soc = None
    if method == "atc":
        soc = _soc()
        if soc is None:
            return f"{tool} found, but the chip is not known: CANN's Python module acl names none; {_TOOLKIT}"
    return Compiler(tool, soc, shapes, _SECONDS[method])


def _soc() -> str | None:
    """The chip's name, as Ascend310P3; None when CANN's module is not there or sees no chip."""
    try:
        name = importlib.import_module("acl").get_soc_name()
    except Exception:  # a foreign module over a driver: it may fail in any way
        return None
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) else None


def _reason(said: Path) -> str:
    """The line of the tool's output that says why, else its last one."""
    with said.open("rb") as file:
        file.seek(max(said.stat().st_size - _READ_BACK, 0))
        text = file.read().decode("utf-8", "replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    found = next((line for line in lines if _CODE.search(line)), lines[-1] if lines else "it said nothing")
    return "".join(c if c.isprintable() else "?" for c in found)[:_LONGEST]
