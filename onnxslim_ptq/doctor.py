"""Finds out what really works here: ONNX Runtime, its providers, the processor; and how to cure what does not.

ONNX Runtime is tried in child processes: a broken build writes pages to the terminal, some providers print, leave files
behind or crash, and a list of providers only says what was compiled in. (`python -m onnxslim_ptq.doctor PROVIDER` is
such a child.)
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from calib.devices import ACCELERATORS
from onnxslim_ptq import __version__
from onnxslim_ptq.cpu import int8_features, saturates

__all__ = ["Facts", "Provider", "collect_facts", "devices", "diagnose", "usable"]

_BUILDS = (
    "onnxruntime",
    "onnxruntime-cann",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-training",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-qnn",
    "ort-nightly",
)
_PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "pydantic", "safetensors", "typer", "rich")
_OLDEST = (1, 20)
_CPU = "CPUExecutionProvider"
_REMOTE = "AzureExecutionProvider"  # calls a web service; there is nothing to try
_MARK = "onnxslim-ptq-doctor:"
_SECONDS = 330  # more than a device gets for its first compilation
_KINDS = {row.provider: kind for kind, row in ACCELERATORS.items()}


@dataclass(frozen=True)
class Provider:
    """An execution provider of the installed build, and whether a tiny model really ran on it."""

    name: str
    works: bool
    reason: str = ""


@dataclass
class Facts:
    """What is installed and what happened when it was tried; ``error`` says why ONNX Runtime cannot be used."""

    python: str
    machine: str
    packages: dict[str, str | None]
    builds: dict[str, str]
    runtime: str | None = None
    error: str | None = None
    providers: list[Provider] = field(default_factory=list)
    int8_features: list[str] = field(default_factory=list)
    reduce_range: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "devices": devices(self),
            "problems": diagnose(self),
            "usable": usable(self),
        }


def collect_facts() -> Facts:
    """Look, and try: takes a second or two."""
    facts = Facts(
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        packages={"onnxslim_ptq": __version__, **{name: _version(name) for name in _PACKAGES}},
        builds={name: v for name in _BUILDS if (v := _version(name)) is not None},
        int8_features=int8_features(),
        reduce_range=saturates(),
    )
    answer = _ask_child("")
    facts.error = answer.get("error")
    facts.runtime = answer.get("version")
    for name in answer.get("providers", ()):
        if name == _REMOTE:
            facts.providers.append(Provider(name, False, "calls a web service; not used here"))
        else:
            error = _ask_child(name).get("error")
            facts.providers.append(Provider(name, error is None, _explained(error or "")))
    return facts


def usable(facts: Facts) -> bool:
    """Whether quantization can run here: on the CPU, which every command needs."""
    return any(p.name == _CPU and p.works for p in facts.providers)


def devices(facts: Facts) -> dict[str, str]:
    """For every ``--device`` why it cannot be used here; empty when it can."""
    if facts.error:
        return dict.fromkeys(("cpu", *ACCELERATORS), "ONNX Runtime cannot be used")
    known = {p.name: p for p in facts.providers}
    reasons = {}
    for kind, provider, install in (
        ("cpu", _CPU, "reinstall it"),
        *((kind, row.provider, row.install) for kind, row in ACCELERATORS.items()),
    ):
        found = known.get(provider)
        missing = f"this onnxruntime has no {provider}; {install}"
        reasons[kind] = missing if found is None else "" if found.works else found.reason
    return reasons


def diagnose(facts: Facts) -> list[str]:
    """One line per problem: what is wrong and the cure."""
    found = []
    names = list(facts.builds)
    reinstall = f"pip uninstall -y {' '.join(names)} && pip install 'onnxslim_ptq[cpu]'"
    choice = "" if "onnxruntime-cann" not in names else " (or 'onnxslim_ptq[cann]' for an Ascend NPU)"
    numpy = facts.packages.get("numpy") or "0"
    if len(names) > 1:
        found.append(
            f"{' and '.join(names)} are installed together: they own the same folder, the last one "
            f"installed wins and removing either breaks the other; cure: {reinstall}{choice}"
        )
    elif not names and facts.error:
        found.append(
            "no ONNX Runtime is installed; cure: pip install 'onnxslim_ptq[cpu]', or 'onnxslim_ptq[cann]' "
            "for an Ascend NPU"
        )
    elif facts.error and "gutted" in facts.error:
        found.append(
            "the folder of onnxruntime is gutted: another build that shared it was uninstalled; "
            f"cure: {reinstall}{choice}"
        )
    elif facts.runtime and not facts.runtime.startswith(facts.builds.get(names[0], "").split("+")[0]):
        found.append(
            f"onnxruntime says {facts.runtime}, but {names[0]} {facts.builds[names[0]]} is installed: "
            f"files of two builds are mixed; cure: {reinstall}{choice}"
        )
    if "onnxruntime-cann" in names and int(numpy.split(".")[0]) >= 2:
        found.append(_numpy_cure(facts, numpy))
    elif facts.error and not found:
        found.append(f"{facts.error}; cure: {reinstall}{choice}")
    if facts.runtime and _numbers(facts.runtime) < _OLDEST:
        found.append(
            f"onnxruntime {facts.runtime} is older than 1.20; cure: pip install -U 'onnxslim_ptq[cpu]'"
        )
    return found


def _numpy_cure(facts: Facts, numpy: str) -> str:
    what = f"onnxruntime-cann is built against NumPy 1 and cannot be imported with numpy {numpy}"
    if _numbers(facts.python) >= (3, 13):
        return f"{what}, and NumPy 1 does not exist for Python {facts.python}; cure: use Python 3.10 to 3.12"
    return f"{what}; cure: pip install 'numpy<2' 'ml_dtypes<0.6'"


def _numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = [*version.split("."), "0", "0"]
    return int(major) if major.isdigit() else 0, int(minor) if minor.isdigit() else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _explained(error: str) -> str:
    """The reason without the place in ONNX Runtime's sources."""
    error = re.sub(r"^\S+\.(cc|h):[0-9]+ .*\) (?=\w)", "", error)
    return re.sub(r"^device '[^']*' (is not available: )?", "", error)[:300]


def _ask_child(provider: str) -> dict[str, Any]:
    """What the child answers; ``error`` when it does not."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))),
    }
    with tempfile.TemporaryDirectory(
        prefix="onnxslim-ptq-"
    ) as folder:  # some providers leave files where they run
        try:
            done = subprocess.run(
                [sys.executable, "-m", "onnxslim_ptq.doctor", provider],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {_SECONDS} seconds"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"it ends the process (exit code {done.returncode}): {last[:200]}"}
    answer: dict[str, Any] = json.loads(lines[-1][len(_MARK) :])
    missing = re.search(r"(\S+): cannot open shared object file", done.stderr)
    if "error" in answer and missing:  # ONNX Runtime logs the true reason and raises another
        answer["error"] = f"{missing[1]} is not found: {answer['error']}"
    return answer


def _child(provider: str) -> dict[str, Any]:
    from calib.errors import DeviceError
    from calib.provider import require_device, runtime

    try:
        ort = runtime()
        if provider in _KINDS:
            require_device(_KINDS[provider])
        elif provider:
            _try_provider(ort, provider)
    except DeviceError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a provider raises is the reason that the user needs
        return {"error": " ".join(str(error).split())[:1000] or type(error).__name__}
    return {"version": ort.__version__, "providers": ort.get_available_providers()}


def _try_provider(ort: Any, provider: str) -> None:
    """Multiply two matrices on ``provider`` alone; RuntimeError when another one steps in."""
    import numpy as np
    import onnx

    model = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["" : 13]> '
        "tiny (float[4,4] x, float[4,4] w) => (float[4,4] y) { y = MatMul(x, w) }"
    )
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if provider != _CPU:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), settings, providers=[provider], enable_fallback=0
    )
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"the session runs on {session.get_providers()[0]} instead")
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    if not np.allclose(session.run(None, {"x": x, "w": x})[0], x @ x, rtol=1e-2):
        raise RuntimeError("a matrix product has wrong values")


if __name__ == "__main__":
    sys.stdout.write(f"{_MARK}{json.dumps(_child(sys.argv[1] if len(sys.argv) > 1 else ''))}\n")
