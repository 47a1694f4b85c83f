"""``tune``: the recipe, and the fewest multiply-accumulates in float, that reach a goal."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from calib.progress import Listener
from onnxslim_ptq import __version__
from onnxslim_ptq.analysis.goal import OWN, Goal
from onnxslim_ptq.analysis.latency import measure_latency
from onnxslim_ptq.analysis.trials import History, Trial, key_of, pareto
from onnxslim_ptq.api import Result, quantize_as
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.errors import GraphError, QuantizationError, RecipeError, VerificationError
from onnxslim_ptq.export.renderers import RENDERERS
from onnxslim_ptq.job import Job, open_job
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.recipes.data import without_folders
from onnxslim_ptq.samples import Samples
from onnxslim_ptq.tuning.changes import CHANGES
from onnxslim_ptq.tuning.field import Field, macs_by_layer, slack

__all__ = ["Tuned", "tune", "tune_as"]

Evaluator = Callable[[str], float]
_DECIDING = ("samples", "stacked", "seed", "threads", "target", "device", "reduce_range", "min_sqnr")
_GAIN = 0.1  # dB, or per cent of what is missing to 1, that a change of the recipe has to gain


@dataclass
class Tuned:
    """The best trial and its result; ``met``: it reaches the goal; ``front``: accuracy against latency."""

    goal: Goal
    met: bool
    best: Trial
    recipe: Recipe
    result: Result
    trials: list[Trial]
    resumed: int
    notes: list[str] = field(default_factory=list)

    @property
    def front(self) -> list[Trial]:
        return pareto(self.trials, self.goal.metric)


def tune(
    model: str | Path | onnx.ModelProto,
    goal: str | Goal,
    calib_data: Any = None,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w8a8",
    evaluator: Evaluator | None = None,
    max_time: float | None = None,
    history: Path | None = None,
    target: str | None = None,
    device: str = "cpu",
    eval_data: Any = None,
    samples: int | None = None,
    stacked: bool = False,
    reduce_range: str = "auto",
    threads: int = 0,
    seed: int = 0,
    listener: Listener | None = None,
) -> Tuned:
    """Search ranges, smoothing and rounding, then the fewest multiply-accumulates in float, until ``goal`` is met.

    Every trial is quantized, verified and measured as `quantize` does; which layers to leave float is predicted in one
    `Switchboard` session and then tried. ``evaluator`` takes the path of a written model and returns the ``metric`` of
    the goal, more being better. After ``max_time`` seconds no trial is begun. ``history`` is a file that a later run
    with the same model, data and options resumes from. Raises what `quantize` raises.
    """
    asked = Asked.of(locals())
    return tune_as(model, goal, asked, evaluator=evaluator, max_time=max_time, history=history)


def tune_as(
    model: str | Path | onnx.ModelProto,
    goal: str | Goal,
    asked: Asked,
    *,
    evaluator: Evaluator | None = None,
    max_time: float | None = None,
    history: Path | None = None,
) -> Tuned:
    """`tune`, with the arguments that it shares with `quantize` in one piece; raises the same."""
    wanted = goal if isinstance(goal, Goal) else Goal.parse(goal)
    if (evaluator is None) == (wanted.metric == OWN):
        raise RecipeError(f"goal '{wanted}': metric is what an evaluator returns; give both or neither")
    job, data = open_job(model, asked)
    asked = replace(
        asked, target=job.target.name, include=(), exclude=(), min_sqnr=0.0
    )  # the job's recipe has them
    end = None if max_time is None else time.monotonic() + max_time
    return _Tuner(model, asked, job, data, wanted, evaluator, History(history), end).run()


class _OutOfTime(Exception):
    """No further trial may begin."""


class _Tuner:
    """One search; ``setting`` is everything that decides a trial's result beside its recipe."""

    def __init__(
        self,
        model: str | Path | onnx.ModelProto,
        asked: Asked,
        job: Job,
        data: Samples,
        goal: Goal,
        evaluator: Evaluator | None,
        history: History,
        end: float | None,
    ) -> None:
        self.model, self.asked, self.job, self.goal = model, asked, job, goal
        self.evaluator, self.history, self.end = evaluator, history, end
        options = {name: getattr(asked, name) for name in _DECIDING}
        own = [str(getattr(evaluator, key, "")) for key in ("__module__", "__qualname__")]
        measured = len(data.evaluation), data.measured_on
        parts = [job.source.sha256, data.sha256, measured, options, own, __version__]
        self.setting = json.dumps(parts, sort_keys=True, default=str)
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self.kept: tuple[Trial, Result] | None = None
        self.macs: dict[str, int] = {}

    def run(self) -> Tuned:
        best: Trial | None = None
        try:
            best = self._better_recipe()
            if not self.goal.met(best.measures):
                best = self._fewer_layers(best)
        except _OutOfTime:
            self.notes.append("the time was up before the search was through")
            if not self.trials:
                raise RecipeError("--max-time is too short for a single trial; give more") from None
        best = self._best()
        result = self._result_of(best)
        met = self.goal.met(best.measures)
        return Tuned(
            self.goal,
            met,
            best,
            Recipe.load(dict(best.recipe)),
            result,
            self.trials,
            self.history.resumed,
            self.notes,
        )

    def _best(self) -> Trial:
        """Of the trials that meet the goal the one with fewest float MACs; else the nearest to it."""
        met = [t for t in self.trials if self.goal.met(t.measures)]
        if met:
            return min(met, key=lambda t: (t.float_macs, -self.value(t)))
        return max(self.trials, key=lambda t: (self.value(t), -t.float_macs))

    def value(self, trial: Trial) -> float:
        found = trial.measures.get(self.goal.metric)
        if found is None:
            return float("inf")
        return float("-inf") if math.isnan(found) else found  # an evaluator may return NaN

    # ---- trials

    def trial(self, label: str, recipe: Recipe) -> Trial | None:
        """Quantize, verify and measure, or find it in the history; None when it cannot be made."""
        plain = recipe.dump()
        key = key_of(without_folders(plain), self.setting)
        known = self.history.find(key)
        if known is not None:
            self.trials.append(known)
            return known
        if self.end is not None and time.monotonic() >= self.end:
            raise _OutOfTime
        try:
            result = quantize_as(self.model, replace(self.asked, recipe=recipe))
        except (VerificationError, GraphError) as error:
            if not self.trials:
                raise
            self.notes.append(f"{label}: {error}")
            return None
        trial = self._measured(label, plain, result)
        self.history.add(key, trial)
        self.trials.append(trial)
        if self.kept is None or self._best() is trial:
            self.kept = trial, result
        return trial

    def _measured(self, label: str, plain: dict[str, Any], result: Result) -> Trial:
        metrics = result.metrics
        measures = {
            "sqnr": metrics["sqnr_db"],
            "cosine": metrics["cosine"],
            "top1_agree": metrics["top1_agree"],
        }
        if self.evaluator is not None:
            measures[OWN] = self._own(result)
        if not self.macs:
            self.macs = macs_by_layer(result.graph.to_model(), result.graph, self.job)
        integer = {use.node for use in result.plan.weights}
        floats = [node for node in self.macs if node not in integer]
        feed = next(iter(self.job.evaluation))[1]
        latency = None  # of a form that this machine cannot run
        if RENDERERS[self.job.target.exporter].lower is None:
            speed = measure_latency(result.source, result.quantized, feed, self.job.threads)
            latency = speed.quantized_ms / speed.exact_ms
        total = sum(self.macs.values())
        return Trial(label, plain, measures, total, sum(self.macs[n] for n in floats), len(floats), latency)

    def _own(self, result: Result) -> float:
        assert self.evaluator is not None
        with tempfile.TemporaryDirectory(prefix="onnxslim-ptq-") as folder:
            path = result.save(Path(folder) / "model.onnx").model
            try:
                return float(self.evaluator(str(path)))
            except QuantizationError:
                raise
            except Exception as error:  # the user's code: say whose it is
                raise RecipeError(f"the evaluator failed: {type(error).__name__}: {error}") from error

    def _result_of(self, best: Trial) -> Result:
        if self.kept is not None and self.kept[0] is best:
            return self.kept[1]
        return quantize_as(self.model, replace(self.asked, recipe=best.recipe))

    # ---- first: ranges, smoothing, rounding

    def _better_recipe(self) -> Trial:
        best = self.trial("the recipe", self.job.recipe)
        assert best is not None
        if best.measures.get(self.goal.metric) is None:
            raise RecipeError(
                f"goal '{self.goal}': no output of the model can be judged by {self.goal.metric}; choose another metric"
            )
        for label, change in CHANGES.items():
            if self.goal.met(best.measures):
                break
            changed = change(best.recipe)
            if changed is None:
                continue
            made = self.trial(label, Recipe.load(changed))
            if made is not None and self.value(made) > self.value(best) + slack(self.goal, _GAIN):
                best = made
        return best

    # ---- then: float layers

    def _fewer_layers(self, base: Trial) -> Trial | None:
        if self.end is not None and time.monotonic() >= self.end:
            raise _OutOfTime
        field_ = Field(self, base)
        if self.goal.metric == OWN:
            return field_.bisect_for_real()
        return field_.search()
