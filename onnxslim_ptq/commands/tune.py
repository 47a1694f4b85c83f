"""``tune MODEL OUT --goal …``: the recipe and the fewest float layers that reach a goal."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxslim_ptq.commands import options as opt
from onnxslim_ptq.commands.console import Bars, columns, db, emit_json, program, say, warn
from onnxslim_ptq.commands.given import asked_by
from onnxslim_ptq.commands.preflight import require_place, require_samples, warn_without_data
from onnxslim_ptq.commands.session import with_session
from onnxslim_ptq.errors import QuantizationError

if TYPE_CHECKING:
    from onnxslim_ptq.analysis.trials import Trial
    from onnxslim_ptq.tuning import Tuned

__all__ = ["GOAL_MISSED", "load_evaluator", "tune"]

GOAL_MISSED = 5
GoalText = Annotated[
    str,
    typer.Option(
        "--goal",
        metavar="METRIC>=NUMBER",
        show_default=False,
        help="sqnr (dB), cosine, top1_agree, or metric: what --evaluator returns.",
    ),
]
Eval = Annotated[
    Path | None,
    typer.Option(
        "--eval", metavar="PATH", show_default=False, help="Samples that measure; default: some of --calib."
    ),
]
EvaluatorName = Annotated[
    str | None,
    typer.Option(
        "--evaluator",
        metavar="MODULE:FUNCTION",
        show_default=False,
        help="Your own code: takes the path of an ONNX file, returns a number, more is better.",
    ),
]
MaxTime = Annotated[
    float | None,
    typer.Option(
        "--max-time", metavar="SECONDS", min=0, show_default=False, help="Begin no trial after this time."
    ),
]
HistoryFile = Annotated[
    Path | None,
    typer.Option(
        "--history",
        metavar="FILE",
        show_default="OUT.tune.jsonl",
        help="Trials made; the same command resumes.",
    ),
]


def tune(
    model: opt.Model,
    out: opt.Out,
    goal: GoalText,
    calib: opt.Calib = None,
    evaluation: Eval = None,
    evaluator: EvaluatorName = None,
    max_time: MaxTime = None,
    history: HistoryFile = None,
    recipe: opt.Recipe = "w8a8",
    target: opt.Target = None,
    device: opt.Device = "cpu",
    samples: opt.Samples = None,
    stacked: opt.Stacked = False,
    preprocess: opt.Preprocess = None,
    tokenizer: opt.Tokenizer = None,
    reduce_range: opt.ReduceRange = "auto",
    threads: opt.Threads = 0,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> int:
    """Find the recipe and the fewest float layers that reach a goal; write the model, its JSON and the recipe.

    Exit code 5 when the goal was missed: the best result is then in OUT.best.
    """
    given = with_session(dict(locals()))
    import yaml

    from onnxslim_ptq.analysis.goal import Goal
    from onnxslim_ptq.recipe import Recipe
    from onnxslim_ptq.tuning import tune_as

    require_samples(stacked, calib, evaluation)
    wanted = Goal.parse(goal)
    asked = asked_by(given)
    own = load_evaluator(evaluator) if evaluator else None
    require_place(model, out, asked.device, Recipe.load(asked.recipe).quant_type)
    warn_without_data(model, asked)
    trials = history or out.with_name(f"{out.name}.tune.jsonl")
    with Bars(json) as bars:
        asked = replace(asked, listener=bars)
        found = tune_as(model, wanted, asked, evaluator=own, max_time=max_time, history=trials)
        place = out if found.met else out.with_name(f"{out.name}.best")
        paths = found.result.save(place)
        written = paths.model.with_name(paths.model.name.removesuffix(".onnx") + ".recipe.yaml")
        _write(written, yaml.safe_dump(found.recipe.dump(), sort_keys=False, allow_unicode=True))
    if json:
        emit_json(_as_json(found, paths.model, written))
    else:
        _show(found, paths.model, written, model)
    return 0 if found.met else GOAL_MISSED


def load_evaluator(text: str) -> Callable[[str], float]:
    """What ``module:function`` names, the working folder included; QuantizationError when there is none."""
    module, colon, name = text.partition(":")
    if not (colon and module and name):
        raise QuantizationError(f"--evaluator '{text}': write MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the user's module may fail in any way
        raise QuantizationError(f"--evaluator: module '{module}' cannot be imported: {error}") from None
    function = getattr(found, name, None)
    if not callable(function):
        raise QuantizationError(f"--evaluator: module '{module}' has no function '{name}'")
    return function  # type: ignore[no-any-return]


def _write(path: Path, text: str) -> None:
    from onnxslim_ptq.export.files import create

    temporary = path.with_name(f".{path.name}.part")
    with create(temporary) as file:
        file.write(text.encode())
    temporary.replace(path)


def _as_json(found: Tuned, written: Path, recipe: Path) -> dict[str, Any]:
    return {
        "goal": str(found.goal),
        "met": found.met,
        "model": str(written),
        "recipe": str(recipe),
        "best": _trial(found.best),
        "trials": [_trial(trial) for trial in found.trials],
        "pareto": [trial.label for trial in found.front],
        "resumed": found.resumed,
        "notes": found.notes,
        "exit_code": 0 if found.met else GOAL_MISSED,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "label": trial.label,
        **trial.measures,
        "int8_macs": trial.int8_share,
        "float_layers": trial.float_layers,
        "latency": trial.latency,
    }


def _show(found: Tuned, written: Path, recipe: Path, model: Path) -> None:
    metric, front = found.goal.metric, found.front
    rows: list[tuple[object, ...]] = [("", "TRIAL", metric.upper(), "INT8 MACS", "FLOAT LAYERS", "LATENCY")]
    for trial in found.trials:
        value = trial.measures.get(metric)
        shown = db(value) if metric == "sqnr" else "n/a" if value is None else f"{value:.5f}"
        mark = ("*" if trial in front else "") + (">" if trial is found.best else "")
        speed = "n/a" if trial.latency is None else f"{trial.latency:.2f} x float"
        rows.append((mark, trial.label, shown, f"{trial.int8_share:.1%}", trial.float_layers, speed))
    for line in columns(rows, right=frozenset({2, 3, 4, 5}), indent=""):
        say(line)
    say("* no other trial is both faster and nearer to float; > chosen")
    if found.resumed:
        say(f"{found.resumed} trials came from the history of an earlier run")
    for text in found.notes:
        warn(text)
    say(f"goal {found.goal} {'met' if found.met else 'MISSED; this is the best'}: wrote {written}")
    say(f"recipe: {recipe}")
    say(f"next: {program()} compare {model} {written} --calib SAMPLES  (error of each layer, speed)")
