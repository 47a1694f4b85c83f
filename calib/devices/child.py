"""A session on an accelerator, in a child process with a fresh working folder.

Why a process: CANN's precision is one setting per process, its compiled models are looked up in the working folder
whatever their weights were, and a driver that fails may print pages, leave files behind or end its process.
(`python -m calib.devices.child FD FOLDER` is the child's side.)
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.devices.channel import receive, send
from calib.devices.table import Device
from calib.errors import DeviceError, GraphError
from calib.types import Array, Feed

if TYPE_CHECKING:
    from calib.provider import SessionOptions

__all__ = ["ChildSession", "Port", "serve"]

_log = logging.getLogger("calib")
_LOG_TAIL = 1 << 14
_SECONDS_TO_END = 5
_PREFIX = "onnxslim-ptq-"


@dataclass(frozen=True)
class Port:
    """An input or output of a session, with the fields ONNX Runtime's own description has."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class ChildSession:
    """A ``CheckedSession`` in a child process; ``run`` is that of ``onnxruntime.InferenceSession``.

    Raises DeviceError when the device is not there, fails, computes something else than the CPU or ends its process
    (``seconds``: or does not answer within them), GraphError when ONNX Runtime refuses the model, RuntimeError when a
    sample does not fit the model. ``close`` (or the end of the object) ends the child and removes its folder.
    """

    def __init__(
        self,
        model: bytes,
        weights: Mapping[str, Array],
        device: Device,
        options: SessionOptions,
        *,
        seconds: float | None = None,
    ) -> None:
        if os.name != "posix":
            raise DeviceError(f"device '{device}' needs Linux: a socket is passed to a child process")
        most = device.accelerator.most_bytes
        size = len(model) + sum(w.nbytes for w in weights.values())
        if most is not None and size > most:
            raise DeviceError(
                f"device '{device}' takes models of up to {most / 2**30:.0f} GiB in one piece, and this one has "
                f"{size / 2**30:.1f} GiB; run it block by block, or use --device cpu"
            )
        self._device, self._lock = device, threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(seconds)
        with theirs:
            self._process = _start(self._folder, theirs)
        self._end = weakref.finalize(self, _finish, self._channel, self._process, self._folder)
        header = {"device": str(device), "options": {**asdict(options), "write_optimized": None}}
        try:
            answer, _ = self._ask(header, {"": np.frombuffer(model, np.uint8), **weights})
        except BaseException:
            self.close()
            raise
        self._inputs = [Port(*port) for port in answer["inputs"]]
        self._outputs = [Port(*port) for port in answer["outputs"]]

    def get_inputs(self) -> list[Port]:
        return list(self._inputs)

    def get_outputs(self) -> list[Port]:
        return list(self._outputs)

    def get_providers(self) -> list[str]:
        return [self._device.provider]

    def run(self, outputs: Sequence[str] | None, feed: Feed) -> list[Array]:
        """The values of ``outputs`` (None: all), in order."""
        names = [o.name for o in self._outputs] if outputs is None else list(outputs)
        _, arrays = self._ask({"outputs": names}, feed)
        return [arrays[name] for name in names]

    def close(self) -> None:
        self._end()

    def __enter__(self) -> ChildSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(
        self, header: Mapping[str, Any], arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        with self._lock:
            try:
                send(self._channel, header, arrays)
                answer, found = receive(self._channel)
            except TypeError as error:
                raise DeviceError(
                    f"device '{self._device}' takes numbers only, but {error}; use --device cpu"
                ) from None
            except TimeoutError:
                self.close()
                raise DeviceError(
                    f"device '{self._device}' does not answer; is another process using it, or the driver hanging?"
                ) from None
            except (EOFError, OSError):
                raise self._ended() from None
            except BaseException:  # Ctrl-C between question and answer: the next answer would be this one's
                self.close()
                raise
        for note in answer["notes"]:
            _log.warning("%s", note)
        if "error" in answer:
            raise self._error(answer)
        return answer, found

    def _error(self, answer: Mapping[str, str]) -> Exception:
        text = answer["text"]
        if answer["error"] == "failure":
            reason = self._device.accelerator.explain(text, self._said())
            return DeviceError(f"device '{self._device}' {answer['what']}: {reason}")
        return {"device": DeviceError, "graph": GraphError, "sample": RuntimeError}[answer["error"]](text)

    def _ended(self) -> DeviceError:
        try:
            code: int | None = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            code = None
        last = (self._said().strip().splitlines() or ["no message"])[-1]
        reason = self._device.accelerator.explain(last, "")
        self.close()
        return DeviceError(f"device '{self._device}' ended its process (exit code {code}): {reason}")

    def _said(self) -> str:
        """The end of what the child, ONNX Runtime and the driver printed."""
        try:
            data = (self._folder / "log").read_bytes()[-_LOG_TAIL:]
        except OSError:
            return ""
        return data.decode(errors="replace")


def _start(folder: Path, channel: socket.socket) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "calib.devices.child", str(channel.fileno()), str(folder)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[channel.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )


def _finish(channel: socket.socket, process: subprocess.Popen[bytes], folder: Path) -> None:
    channel.close()  # which the child takes as the end
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def serve(channel: socket.socket) -> None:
    """The child: opens the session that the first message describes, then runs what the others ask."""
    from calib.devices.checked import CheckedSession
    from calib.provider import SessionOptions

    session: CheckedSession | None = None
    while True:
        try:
            header, arrays = receive(channel)
        except EOFError:
            return
        found: dict[str, Array] = {}
        try:
            if session is None:
                model = arrays.pop("").tobytes()
                device = Device.parse(header["device"])
                session = CheckedSession(model, arrays, device, SessionOptions(**header["options"]))
                answer = {"inputs": session.inputs, "outputs": session.outputs}
            else:
                answer = {}
                names = header["outputs"]
                found = dict(zip(names, session.run(names, arrays), strict=True))
        except Exception as error:
            answer = _described(error)
        notes = session.notes.copy() if session is not None else []
        if session is not None:
            session.notes.clear()
        try:
            send(channel, {**answer, "notes": notes}, found)
        except TypeError as error:  # an output of strings
            send(channel, {**_described(error), "notes": notes}, {})


def _described(error: Exception) -> dict[str, Any]:
    from calib.devices.checked import DeviceFailure

    text = " ".join(str(error).split())[:2000] or type(error).__name__
    if isinstance(error, DeviceFailure):
        return {"error": "failure", "what": error.what, "text": text}
    kind = (
        "device" if isinstance(error, DeviceError) else "graph" if isinstance(error, GraphError) else "sample"
    )
    return {"error": kind, "text": text}


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        serve(parent)
    if Path(sys.argv[2]).name.startswith(_PREFIX):  # when the parent was killed nobody else removes it
        shutil.rmtree(sys.argv[2], ignore_errors=True)
