"""`python -m tools.bench [main | ranges | quality | blockwise | calib | sensitivity | render]`: docs/benchmarks.md."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from tools.zoo import names

from . import blockwise, calib, sensitivity
from .compare import Bench, compare, quality, recipes
from .machine import ROOT, stamp
from .records import Results, Table, read_results, write_results
from .settings import MODELS, QUALITY, RANGE_MODELS, RECIPES
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
    options = _options(arguments)
    results = read_results(options.json)
    failed = False
    if options.what != "render":
        failed = not _measure(options, results)
    chosen = SECTIONS if options.what == "render" else (options.what,)
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
        help="main: against quantize_static; ranges, quality: our recipes; render: only write --json again as text",
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
    default = RANGE_MODELS if options.what == "ranges" else MODELS
    options.models = options.models.split(",") if options.models else list(default)
    unknown = [name for name in options.models if name not in names()]
    if unknown:
        parser.error(f"--models: no zoo case {unknown[0]!r}; known: {', '.join(names())}")
    if options.what == "render" and not options.json:
        parser.error("render needs --json, the results of an earlier run")
    known = {"ranges": RECIPES, "quality": QUALITY}.get(options.what, ())
    options.recipes = options.recipes.split(",") if options.recipes else list(known)
    shown = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "tools.bench", *shown])
    return options


def _measure(options: argparse.Namespace, results: Results) -> bool:
    """Fill in the section model by model; False when a float model could not be run."""
    marks, complete = stamp(options.command), True
    memory = options.memory * 1024 if options.memory else default_memory_mb()
    tables = results.setdefault(options.what, {})
    for model in options.models:
        try:
            tables[model] = _one(options, model, Limits(memory, options.timeout), marks)
        except JobError as error:
            complete = False
            print(f"{model}: {error}", file=sys.stderr)
            continue
        results[options.what] = tables = {name: tables[name] for name in names() if name in tables}
        write_results(options.json, results)
    return complete


def _one(options: argparse.Namespace, model: str, limits: Limits, marks: dict[str, str]) -> Table:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(model, Path(folder), limits, marks, options.rounds)
        if options.what == "ranges":
            return recipes(bench, options.recipes)
        if options.what == "quality":
            return quality(bench, options.recipes)
        return compare(bench, options.ours_only)


if __name__ == "__main__":
    sys.exit(main())
