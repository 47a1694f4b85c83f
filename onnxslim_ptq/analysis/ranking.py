"""A ranking of layers by what they cost when they are quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import yaml

from calib.progress import Listener, Meter
from calib.types import Sample
from onnxslim_ptq.analysis.entries import Entry
from onnxslim_ptq.analysis.switchboard import Switchboard
from onnxslim_ptq.core.match import literal
from onnxslim_ptq.workspace import Workspace

__all__ = ["Analysis", "Ranked", "judging_samples", "rank", "rank_by_sqnr"]

T = TypeVar("T")
_PASSES = 8  # how often all candidates together may run the calibration samples
_FEWEST, _MOST = 4, 16


@dataclass(frozen=True)
class Ranked:
    """Layers ranked as one; the higher ``score``, the more they cost. ``sqnr_db``: of the outputs, these alone int8."""

    name: str
    nodes: tuple[str, ...]
    op: str
    score: float
    sqnr_db: float | None = None

    def as_json(self) -> dict[str, Any]:
        known = {} if self.sqnr_db is None else {"sqnr_db": self.sqnr_db}
        return {"name": self.name, "nodes": list(self.nodes), "op": self.op, "score": self.score, **known}


@dataclass
class Analysis:
    """A ranking, worst first, made on ``samples`` samples."""

    scope: str
    metric: str
    ranking: list[Ranked]
    samples: int
    notes: list[str] = field(default_factory=list)

    def exclude(self, top: int) -> list[str]:
        """Patterns for the layers of the first ``top`` entries."""
        nodes = dict.fromkeys(node for ranked in self.ranking[:top] for node in ranked.nodes)
        return [literal(node) for node in nodes]

    def snippet(self, top: int) -> str:
        """The YAML for a recipe's quantize step."""
        return yaml.safe_dump(
            {"exclude": self.exclude(top)}, sort_keys=False, allow_unicode=True, width=10_000
        )

    def as_json(self, top: int) -> dict[str, Any]:
        return {
            "scope": self.scope,
            "metric": self.metric,
            "samples": self.samples,
            "ranking": [ranked.as_json() for ranked in self.ranking],
            "exclude": self.exclude(top),
            "notes": self.notes,
        }


def judging_samples(workspace: Workspace, candidates: int) -> list[Sample]:
    """Calibration samples for that many candidates: 4 to 16, all candidates together 8 times all samples."""
    count = int(np.clip(_PASSES * workspace.samples / max(candidates, 1), _FEWEST, _MOST))
    return list(workspace.part(count).calibration)


def rank_by_sqnr(
    board: Switchboard, entries: Sequence[Entry], listener: Listener | None = None
) -> list[Ranked]:
    """Every entry quantized alone, worst first; the score is 10^(-dB/10)."""

    def one(entry: Entry) -> Ranked:
        sqnr = board.decibels(entry.nodes)
        return Ranked(entry.name, entry.nodes, entry.layers[0].op, float(10 ** (-sqnr / 10)), sqnr)

    return rank(entries, one, listener)


def rank(entries: Sequence[T], one: Callable[[T], Ranked], listener: Listener | None) -> list[Ranked]:
    """What ``one`` makes of every entry, worst first."""
    ranking, meter = [], Meter("ranking", len(entries), listener)
    for done, entry in enumerate(entries, 1):
        ranking.append(one(entry))
        meter.at(done)
    return sorted(ranking, key=lambda ranked: -ranked.score)
