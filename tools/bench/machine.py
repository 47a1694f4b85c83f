"""Where and with what the figures were measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnxslim_ptq.cpu import int8_features

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("onnxruntime", "onnx", "numpy")


def stamp(command: str) -> dict[str, str]:
    """Machine, versions, date and command, each in words."""
    features = ", ".join(int8_features()) or "none"
    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, int8 features: {features}{load}",
        "versions": f"onnxslim_ptq {_version('onnxslim_ptq')} ({_commit()}), {packages}, "
        f"Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; what the platform module knows where there is no /proc."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source"


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit known"
    return f"commit {head.stdout.strip()}{' with changes' if dirty.stdout else ''}"
