"""`python -m tools.bench WHAT`.

WHAT: main, ranges, quality, outliers, blockwise, calib, sensitivity, layers, session, render.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from tools.zoo import names

from . import blockwise, calib, layers, sensitivity, session
from .compare import Bench, compare, outliers, quality, recipes
from .machine import ROOT, stamp
from .records import Results, Table, read_results, write_results
from .settings import MODELS, OUTLIER_MODELS, QUALITY, RANGE_MODELS, RECIPES
from .spawn import JobError, Limits, default_memory_mb
from .tables import SECTIONS, refresh, section


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 2 when an argument is wrong or a float model cannot be had."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["blockwise"]:  # limits of its own, and a table that only says whether they were kept
        return blockwise.main(given[1:])
    if given[:1] == ["calib"]:
        return calib.main(given[1:])
    if given[:1] == ["sensitivity"]:
        return sensitivity.main(given[1:])
    if given[:1] == ["layers"]:
        return layers.main(given[1:])
    if given[:1] == ["session"]:
        return session.main(given[1:])
    options = _options(arguments)
    results = read_results(options.json)
    failed = False
    chosen = SECTIONS if options.what == "render" else (options.what, *options.then)
    if options.what != "render":
        complete = [_measure(options, results, what) for what in chosen]
        failed = not all(complete)
    for name in chosen:
        if results.get(name):
            text = section(name, results[name])
            refresh(options.out, name, text)
            print(text)
    return 2 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        default="main",
        choices=[*SECTIONS, "render"],
        help="main: against quantize_static; ranges, quality: our recipes (quality without --models: outliers too); "
        "outliers: models with outlier channels; render: only write --json again as text",
    )
    parser.add_argument("--models", help=f"comma-separated zoo names (default: {','.join(MODELS)})")
    parser.add_argument("--recipes", help="ranges, quality: comma-separated recipes")
    parser.add_argument("--ours-only", action="store_true", help="main: without quantize_static")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="Markdown file to refresh"
    )
    parser.add_argument("--json", type=Path, help="results file: models that are not run keep what it holds")
    parser.add_argument("--rounds", type=int, default=15, help="main: rounds of latency")
    parser.add_argument(
        "--memory", type=float, help="GB that one run may take (default: 3/4 of what is free)"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    options = parser.parse_args(arguments)
    options.then = ("outliers",) if options.what == "quality" and not options.models else ()
    known_models = OUTLIER_MODELS if options.what == "outliers" else tuple(names())
    default = {"ranges": RANGE_MODELS, "outliers": OUTLIER_MODELS}.get(options.what, MODELS)
    options.models = options.models.split(",") if options.models else list(default)
    unknown = [name for name in options.models if name not in known_models]
    if unknown:
        parser.error(f"--models: no zoo case {unknown[0]!r}; known: {', '.join(known_models)}")
    if options.what == "render" and not options.json:
        parser.error("render needs --json, the results of an earlier run")
    options.recipes = options.recipes.split(",") if options.recipes else None
    shown = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "tools.bench", *shown])
    return options


def _measure(options: argparse.Namespace, results: Results, what: str) -> bool:
    """Fill in the section model by model; False when a float model could not be run."""
    marks, complete = stamp(options.command), True
    memory = options.memory * 1024 if options.memory else default_memory_mb()
    tables = results.setdefault(what, {})
    for model in options.models if what == options.what else OUTLIER_MODELS:
        try:
            tables[model] = _one(options, what, model, Limits(memory, options.timeout), marks)
        except JobError as error:
            complete = False
            print(f"{model}: {error}", file=sys.stderr)
            continue
        order = dict.fromkeys([*names(), *OUTLIER_MODELS])
        results[what] = tables = {name: tables[name] for name in order if name in tables}
        write_results(options.json, results)
    return complete


def _one(options: argparse.Namespace, what: str, model: str, limits: Limits, marks: dict[str, str]) -> Table:
    if what == "outliers":
        return outliers(model, limits, marks)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(model, Path(folder), limits, marks, options.rounds)
        if what == "ranges":
            return recipes(bench, options.recipes or RECIPES)
        if what == "quality":
            return quality(bench, options.recipes or QUALITY.get(model, QUALITY["rec"]))
        return compare(bench, options.ours_only)


if __name__ == "__main__":
    sys.exit(main())
