"""The trials of a tuning run: what was tried, what it measured, kept in a file that an interrupted run resumes from."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnxslim_ptq.errors import RecipeError

__all__ = ["History", "Trial", "key_of", "pareto"]

_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Trial:
    """One quantized and verified model: its recipe, what it measured, its multiply-accumulates and its speed.

    ``measures`` holds sqnr, cosine, top1_agree and metric, where known; ``float_macs`` are of float layers.
    """

    label: str
    recipe: Mapping[str, Any]
    measures: Mapping[str, float | None]
    macs: int
    float_macs: int
    float_layers: int
    latency: float | None

    @property
    def int8_share(self) -> float:
        return 1 - self.float_macs / self.macs if self.macs else 0.0


def key_of(recipe: Mapping[str, Any], setting: str) -> str:
    """The fingerprint of a trial: its recipe, and everything else that decides its result."""
    text = json.dumps([recipe, setting], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class History:
    """Trials by key, one JSON line each in ``path``; None keeps them in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Trial] = {}
        self.resumed = 0
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError(f"history '{path}' is above {_MOST_BYTES >> 20} MiB; delete it to begin afresh")
        lines = path.read_text("utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = _trial(entry["trial"])
            except (ValueError, KeyError, TypeError):
                if number == len(lines):  # killed while it was being written
                    break
                raise RecipeError(
                    f"history '{path}', line {number}: not a trial; delete the file to begin afresh"
                ) from None

    def find(self, key: str) -> Trial | None:
        found = self._known.get(key)
        self.resumed += found is not None
        return found

    def add(self, key: str, trial: Trial) -> None:
        self._known[key] = trial
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "trial": _plain(trial)}, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _plain(trial: Trial) -> dict[str, Any]:
    measures = {k: str(v) if v is not None and not math.isfinite(v) else v for k, v in trial.measures.items()}
    return {**asdict(trial), "measures": measures}


def _trial(data: dict[str, Any]) -> Trial:
    measures = {str(k): None if v is None else float(v) for k, v in data["measures"].items()}
    counts = {name: int(data[name]) for name in ("macs", "float_macs", "float_layers")}
    latency = None if data["latency"] is None else float(data["latency"])
    return Trial(str(data["label"]), dict(data["recipe"]), measures, **counts, latency=latency)


def pareto(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The trials that no other beats in both ``metric`` (more is better) and latency, fastest first."""
    known = [t for t in trials if t.latency is not None and t.measures.get(metric) is not None]
    known.sort(key=lambda t: (t.latency, -(t.measures[metric] or 0.0)))
    front: list[Trial] = []
    for trial in known:
        if not front or (trial.measures[metric] or 0.0) > (front[-1].measures[metric] or 0.0):
            front.append(trial)
    return front
