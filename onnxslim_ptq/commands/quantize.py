"""``quantize MODEL OUT``: the main job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxslim_ptq.commands import options as opt
from onnxslim_ptq.commands.console import Bars, warn
from onnxslim_ptq.commands.given import asked_by
from onnxslim_ptq.commands.preflight import require_page, require_place, require_samples, warn_without_data
from onnxslim_ptq.commands.session import asked_files, with_session
from onnxslim_ptq.errors import QuantizationError

if TYPE_CHECKING:
    from onnxslim_ptq.api import Result
    from onnxslim_ptq.asked import Asked
    from onnxslim_ptq.commands.samples import Again
    from onnxslim_ptq.commands.summary import Summary
    from onnxslim_ptq.commands.worst import Look
    from onnxslim_ptq.export.weight_files import WeightFiles

__all__ = ["quantize"]

_DOUBTFUL_DB = 12.0
_LOOKED_AT = 8  # samples that tell about layers

Eval = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="PATH",
        show_default=False,
        help="Samples that measure the result; default: some of --calib.",
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME:1x3x224x224",
        show_default=False,
        help="Without --calib: the shape of an input. Repeatable.",
    ),
]
Range = Annotated[
    list[str] | None,
    typer.Option(
        "--range",
        metavar="NAME:LOW,HIGH",
        show_default=False,
        help="Without --calib: the values of an input. Repeatable.",
    ),
]
MinSqnr = Annotated[float, typer.Option("--min-sqnr", metavar="DB", help="Fail below this SQNR; 0 = never.")]
External = Annotated[bool, typer.Option("--external-data", help="Weights to OUT.data (always above 2 GB).")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; run no sample, write nothing.")
]
Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats", metavar="FILE", show_default=False, help="What calibrate wrote; then no data is needed."
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        show_default=False,
        help="A page that shows what became of every layer.",
    ),
]
Weights = Annotated[
    bool,
    typer.Option("--weights", help="Also safetensors and their description, as msModelSlim writes them."),
]


def quantize(
    model: opt.Model,
    out: opt.Out,
    recipe: opt.Recipe = "w8a8",
    calib: opt.Calib = None,
    evaluation: Eval = None,
    samples: opt.Samples = None,
    stacked: opt.Stacked = False,
    preprocess: opt.Preprocess = None,
    tokenizer: opt.Tokenizer = None,
    stats: Stats = None,
    workers: opt.Workers = None,
    ray: opt.Ray = None,
    resume: opt.Resume = None,
    blockwise: opt.Blockwise = False,
    shape: Shape = None,
    value_range: Range = None,
    device: opt.Device = "cpu",
    target: opt.Target = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    nan: opt.Nan = "error",
    reduce_range: opt.ReduceRange = "auto",
    min_sqnr: MinSqnr = 6.0,
    allow_quantized: opt.AllowQuantized = False,
    external_data: External = False,
    seed: opt.Seed = 0,
    threads: opt.Threads = 0,
    dry_run: DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    report: Report = None,
    weights: Weights = False,
) -> None:
    """Quantize MODEL, verify the result against it, write OUT and its weights JSON."""
    given = dict(locals())  # every parameter by name: from here on they travel together
    _check_values(min_sqnr)
    _check_combinations(given)
    given = with_session(given)
    asked = asked_by(given)
    if dry_run:
        from onnxslim_ptq.commands.dry_run import show_plan

        show_plan(model, out, asked, external=external_data, as_json=json, verbose=verbose)
    else:
        from onnxslim_ptq.commands.samples import Again

        files = asked_files(given)
        _run(model, out, asked, _Wanted(Again.of(given), files, external_data, report, json, quiet, verbose))


@dataclass(frozen=True)
class _Wanted:
    """What is written beside the model, and what is told; ``again`` for the commands that it suggests."""

    again: Again
    files: WeightFiles | None
    external: bool
    report: Path | None
    json: bool
    quiet: bool
    verbose: bool


def _check_values(min_sqnr: float) -> None:
    if not (math.isfinite(min_sqnr) and min_sqnr >= 0):
        raise QuantizationError(f"--min-sqnr {min_sqnr}: give a number of dB, 0 or more")


def _check_combinations(given: Mapping[str, Any]) -> None:
    """Refuse options that would otherwise be ignored in silence."""
    if given["quiet"] and given["verbose"]:
        raise QuantizationError("-q and -v exclude each other; leave one out")
    if given["calib"] and (given["shape"] or given["value_range"]):
        raise QuantizationError("--shape and --range describe synthetic samples; leave them out with --calib")
    if given["stats"] and (given["shape"] or given["value_range"]):
        raise QuantizationError("--shape and --range describe synthetic samples; leave them out with --stats")
    if given["stats"] and given["samples"] and not given["calib"]:
        raise QuantizationError("--samples limits --calib; leave it out with --stats alone")
    if given["report"] and given["dry_run"]:
        raise QuantizationError("--report shows a result, and --dry-run makes none; leave one out")
    if given["report"]:
        require_page(given["report"])
    require_samples(given["stacked"], given["calib"], given["evaluation"])


def _run(model: Path, out: Path, asked: Asked, wanted: _Wanted) -> None:
    from onnxslim_ptq.api import quantize_as
    from onnxslim_ptq.commands.summary import Summary
    from onnxslim_ptq.commands.worst import look_closer, worst_layers
    from onnxslim_ptq.recipe import Recipe

    require_place(model, out, asked.device, Recipe.load(asked.recipe).quant_type)
    warn_without_data(model, asked)
    report = wanted.report
    with Bars(wanted.quiet) as bars:
        result = quantize_as(model, replace(asked, listener=bars))
        sqnr = result.metrics["sqnr_db"]
        doubtful = sqnr is not None and sqnr < _DOUBTFUL_DB
        # Comparing layers runs the whole model, for which there is no room block-wise.
        silent = wanted.quiet or wanted.json
        count = 0 if result.blockwise else _LOOKED_AT if doubtful or report else 0 if silent else 1
        look = look_closer(result, asked, count, latency=report is not None) if count else None
        facts = _facts(result, look, asked.threads) if report is not None else None
        # Last: an interruption before leaves nothing at OUT.
        paths = result.save(out, external_data=wanted.external, weights=wanted.files)
    summary = Summary(result, paths, asked, wanted.again, look.worst() if look is not None else [])
    if report is not None:
        summary.warnings += _write_report(facts, summary, report)
    if doubtful:
        advice = "" if result.blockwise else worst_layers(look, result.source.path, out)
        summary.warnings.append(f"output '{summary.worst_output}' reaches only {sqnr:.1f} dB SQNR. {advice}")
    for text in summary.warnings:
        warn(text)
    if wanted.json:
        summary.show_json()
    elif not wanted.quiet:
        summary.show(wanted.verbose)


def _facts(result: Result, look: Look | None, threads: int) -> dict[str, Any] | None:
    if look is None:
        return None
    from onnxslim_ptq.reporting import gather_facts

    return gather_facts(result, look.comparison, look.samples, nbytes=(0, 0), threads=threads)


def _write_report(facts: dict[str, Any] | None, summary: Summary, path: Path) -> list[str]:
    """Write the page; the warnings where there is nothing to write."""
    if facts is None:
        return [
            "no report was written: its layers could not be compared (in blocks there is no room for that)"
        ]
    from onnxslim_ptq.reporting import write_report

    write_report({**facts, "bytes": list(summary.nbytes), "next": summary.improve()}, path)
    return []
