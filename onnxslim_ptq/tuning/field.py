"""Which layers to leave float: predicted in one session, then tried for real."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

from calib.model import Model
from calib.provider import SessionOptions, create_session
from calib.readers import spread
from calib.runner import run_session, tap
from onnxslim_ptq.analysis.entries import Entry, entries_of, macs_of
from onnxslim_ptq.analysis.fallback import cheapest, fewest_in_order
from onnxslim_ptq.analysis.goal import Goal
from onnxslim_ptq.analysis.metrics import first_top1, worst_sqnr
from onnxslim_ptq.analysis.ranking import rank_by_sqnr
from onnxslim_ptq.analysis.switchboard import Switchboard
from onnxslim_ptq.analysis.trials import Trial
from onnxslim_ptq.core.match import literal
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.job import Job
from onnxslim_ptq.pipeline import Planned, make_plan
from onnxslim_ptq.recipe import Recipe

__all__ = ["Field", "macs_by_layer", "slack"]

_ROUNDS = 6  # sets of float layers that are quantized for real, beside those of plain order
_JUDGES = 16


def slack(goal: Goal, amount: float) -> float:
    """``amount`` dB, or a tenth of that share of the distance between the bound and 1."""
    return amount if goal.metric == "sqnr" else abs(1 - goal.bound) * amount / 10


class Tuner(Protocol):
    """What makes trials."""

    job: Job
    goal: Goal
    macs: dict[str, int]

    def trial(self, label: str, recipe: Recipe) -> Trial | None: ...
    def value(self, trial: Trial) -> float: ...


class Field:
    """The search over float layers of one recipe."""

    def __init__(self, tuner: Tuner, base: Trial) -> None:
        self.tuner, self.base, self.goal = tuner, base, tuner.goal
        self.recipe = Recipe.load(dict(base.recipe))
        job = tuner.job
        planned = make_plan(_with_recipe(job, self.recipe))
        entries = entries_of([layer for layer, _ in planned.placement.layers.values()])
        self.board = _judging(planned, job)
        ranking = rank_by_sqnr(self.board, entries, job.listener)
        by_name = {entry.name: entry for entry in entries}
        self.order = [by_name[ranked.name] for ranked in ranking]
        self.noise = {ranked.name: ranked.score for ranked in ranking}
        self.by_name = by_name
        if not tuner.macs:
            tuner.macs = macs_by_layer(planned.workspace.model(), planned.workspace.graph, job)
        self.macs = {e.name: sum(tuner.macs.get(node, 0) for node in e.nodes) for e in entries}
        self.predicted: dict[frozenset[str], float] = {}
        self.tried: dict[frozenset[str], Trial | None] = {}

    def predict(self, floats: Collection[str]) -> float:
        key = frozenset(floats)
        if key not in self.predicted:
            off = {node for name in key for node in self.by_name[name].nodes}
            errors = self.board.outputs([node for node in self.board.layers if node not in off])
            cosines = [e.cosine for e in errors if e.cosine is not None]
            found = {
                "sqnr": worst_sqnr(errors),
                "cosine": min(cosines) if cosines else None,
                "top1_agree": first_top1(errors),
            }[self.goal.metric]
            self.predicted[key] = float("inf") if found is None else found
        return self.predicted[key]

    def attempt(self, chosen: Sequence[Entry]) -> Trial | None:
        key = frozenset(entry.name for entry in chosen)
        if key not in self.tried:
            excluded = [literal(node) for entry in self.order if entry.name in key for node in entry.nodes]
            label = f"{self.base.label}, {len(excluded)} layers float"
            self.tried[key] = self.tuner.trial(label, self.recipe.with_patterns(exclude=excluded))
        return self.tried[key]

    def search(self) -> Trial | None:
        """Predict, try for real, correct the prediction by what was seen, until nothing new is proposed."""
        offset = self.predict(()) - self.tuner.value(self.base)  # how much predictions flatter
        misses, bound = 0, self.goal.bound
        best: Trial | None = None
        for _ in range(_ROUNDS):
            margin = slack(self.goal, 0.1 * misses)
            chosen = cheapest(self.order, self.noise, self.macs, self.predict, bound + offset + margin)
            key = frozenset(entry.name for entry in chosen)
            if key in self.tried and (best is not None or len(key) == len(self.order)):
                break
            made = self.attempt(chosen)
            if made is None:
                misses += 1
                continue
            flattered = self.predict(key) - self.tuner.value(made)
            if self.goal.met(made.measures):
                offset = flattered  # with room to spare, the next proposal leaves less in float
                if best is None or made.float_macs < best.float_macs:
                    best = made
            else:
                offset = max(offset, flattered)
                misses += 1
        return self._plain(offset, best)

    def _plain(self, offset: float, best: Trial | None) -> Trial | None:
        """Plain sensitivity order, where it promises less in float than what was found."""
        count = fewest_in_order(self.order, self.predict, self.goal.bound + offset)
        for more in range(3):
            chosen = self.order[: count + more]
            cost = sum(self.macs[entry.name] for entry in chosen)
            if best is not None and cost >= best.float_macs:
                break
            made = self.attempt(chosen)
            if made is not None and self.goal.met(made.measures):
                return made
        return best

    def bisect_for_real(self) -> Trial | None:
        """For a metric that only the written model shows: bisection over the order, every step quantized."""
        met: list[Trial] = []

        def real(floats: Collection[str]) -> float:
            made = self.attempt([self.by_name[name] for name in floats]) if floats else self.base
            if made is not None and self.goal.met(made.measures):
                met.append(made)
            return float("-inf") if made is None else self.tuner.value(made)

        fewest_in_order(self.order, real, self.goal.bound)
        return min(met, key=lambda t: t.float_macs) if met else None


def _with_recipe(job: Job, recipe: Recipe) -> Job:
    return replace(job, recipe=recipe)


def _judging(planned: Planned, job: Job) -> Switchboard:
    samples = list(spread(job.evaluation, _JUDGES))
    return Switchboard(planned.workspace, planned.placement, planned.plan, samples)


def macs_by_layer(model: Model, graph: Any, job: Job) -> dict[str, int]:
    """Multiply-accumulates by layer, of one evaluation sample; layers inside subgraphs are not counted."""
    layers = find_linears(graph)[0]
    names = list(dict.fromkeys(layer.output_name for layer in layers))
    if not names:
        return {}
    options = SessionOptions(threads=job.threads)
    session = create_session(tap(model, names).SerializeToString(), model.weights, options=options)
    sample, feed = next(iter(job.evaluation))
    return macs_of(layers, dict(zip(names, run_session(session, names, feed, sample), strict=True)))
