"""The search over float layers, on a made-up prediction: noise that adds up."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from onnxslim_ptq.analysis.entries import Entry
from onnxslim_ptq.analysis.fallback import cheapest, fewest_in_order, prune
from onnxslim_ptq.analysis.goal import Goal
from onnxslim_ptq.analysis.trials import History, Trial, key_of, pareto
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.linears import Linear


def entry(name: str) -> Entry:
    return Entry((Linear(name, "MatMul", 0, 1, None, name, name, None, name, 1, 1, 1),))


class Noises:
    def __init__(self, **noise: float) -> None:
        self.noise = noise
        self.entries = sorted((entry(name) for name in noise), key=lambda e: -noise[e.name])

    def predict(self, floats: Collection[str]) -> float:
        left = sum(value for name, value in self.noise.items() if name not in floats)
        return float(-10 * np.log10(left)) if left else float("inf")


class TestSearch:
    @pytest.mark.parametrize(("bound", "count"), [(0.0, 0), (3.0, 1), (9.0, 2), (99.0, 4)])
    def test_fewest_in_order(self, bound: float, count: int) -> None:
        world = Noises(a=0.5, b=0.4, c=0.05, d=0.03)
        assert fewest_in_order(world.entries, world.predict, bound) == count

    def test_prune_drops_what_is_not_needed(self) -> None:
        world = Noises(a=0.5, b=0.4, c=0.05, d=0.03)
        macs = {"a": 1, "b": 1, "c": 100, "d": 1}
        kept = prune(world.entries, macs, world.predict, 9.0)
        assert {e.name for e in kept} == {"a", "b"}

    def test_the_cheaper_way_wins(self) -> None:
        """In order, the costly a goes first; by noise per multiply-accumulate, b and c do."""
        world = Noises(a=0.40, b=0.35, c=0.20)
        macs = {"a": 1000, "b": 1, "c": 1}
        chosen = cheapest(world.entries, world.noise, macs, world.predict, 3.5)
        assert {e.name for e in chosen} == {"b", "c"}

    def test_never_costlier_than_plain_order(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(30):
            world = Noises(**{f"n{i}": float(v) for i, v in enumerate(rng.exponential(0.05, 12))})
            macs = {name: int(v) for name, v in zip(world.noise, rng.integers(1, 100, 12), strict=True)}
            bound = float(rng.uniform(2, 12))
            plain = world.entries[: fewest_in_order(world.entries, world.predict, bound)]
            chosen = cheapest(world.entries, world.noise, macs, world.predict, bound)
            assert sum(macs[e.name] for e in chosen) <= sum(macs[e.name] for e in plain)
            assert world.predict([e.name for e in chosen]) >= bound


class TestGoal:
    @pytest.mark.parametrize("text", ["sqnr", "sqnr>30", "snr>=3", "sqnr>=x", "sqnr>=nan", "cosine>=2", ""])
    def test_bad(self, text: str) -> None:
        with pytest.raises(RecipeError, match="goal"):
            Goal.parse(text)

    def test_good(self) -> None:
        goal = Goal.parse(" cosine >= 0.99 ")
        assert str(goal) == "cosine>=0.99"
        assert goal.met({"cosine": 0.995})
        assert not goal.met({"cosine": 0.98})
        assert goal.met({"cosine": None})


def trial(label: str, sqnr: float | None, latency: float | None) -> Trial:
    return Trial(label, {"steps": []}, {"sqnr": sqnr}, 10, 3, 1, latency)


class TestTrials:
    def test_pareto(self) -> None:
        trials = [
            trial("a", 10, 0.5),
            trial("b", 12, 0.6),
            trial("c", 11, 0.7),
            trial("d", 9, 0.4),
            trial("e", None, 0.1),
        ]
        assert [t.label for t in pareto(trials, "sqnr")] == ["d", "a", "b"]

    def test_history_survives_a_kill(self, tmp_path: Path) -> None:
        path = tmp_path / "h.jsonl"
        first = History(path)
        key = key_of({"a": 1}, "s")
        first.add(key, trial("a", float("inf"), 0.5))
        with path.open("a") as file:
            file.write('{"key": "half')
        again = History(path)
        assert again.find(key) == trial("a", float("inf"), 0.5)
        assert again.find(key_of({"a": 2}, "s")) is None
        assert again.find(key_of({"a": 1}, "t")) is None
        assert again.resumed == 1

    def test_a_foreign_history_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "h.jsonl"
        path.write_text(json.dumps({"other": 1}) + "\n" + json.dumps({"key": "x"}) + "\n")
        with pytest.raises(RecipeError, match="line 1: not a trial"):
            History(path)
