"""Runs one job in a fresh process, so that its time and peak memory are its own, under limits."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import ROOT

_POLL_S = 0.1


@dataclass(frozen=True)
class Limits:
    """What one job may use before it is stopped."""

    memory_mb: float
    seconds: float


class JobError(Exception):
    """A job that failed, in one line; `memory` when it was stopped for using too much."""

    def __init__(self, text: str, memory: bool = False) -> None:
        super().__init__(text)
        self.memory = memory


def default_memory_mb() -> float:
    """Three quarters of what is available now; 8 GB where that is unknown."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) / 1024 * 0.75
    except (OSError, KeyError, ValueError):
        return 8192.0


def run_job(job: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """What `tools.bench.worker` answers; JobError when it fails, dies or exceeds a limit."""
    with tempfile.TemporaryDirectory(prefix="bench-job-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "tools.bench.worker", json.dumps(job), str(answer)]
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            try:
                _watch(process, limits)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if not answer.exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            raise JobError(
                f"died with exit code {process.returncode}: {lines[-1][:160] if lines else 'no message'}"
            )
        reply: dict[str, Any] = json.loads(answer.read_text("utf-8"))
    if "error" in reply:
        raise JobError(reply["error"])
    return reply


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> None:
    started = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - started > limits.seconds:
            raise JobError(f"stopped after {limits.seconds:.0f} s")
        if _resident_mb(process.pid) > limits.memory_mb:
            raise JobError(f"stopped at {limits.memory_mb / 1024:.1f} GB of memory", memory=True)
        time.sleep(_POLL_S)


def _resident_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)
