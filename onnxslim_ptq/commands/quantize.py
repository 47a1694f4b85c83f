"""``quantize MODEL OUT``: the main job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calib import devices
from onnxslim_ptq.commands.console import Bars, warn
from onnxslim_ptq.commands.options import (
    AllowQuantized,
    Calib,
    Device,
    Exclude,
    Include,
    Json,
    Nan,
    Preprocess,
    Quiet,
    Ray,
    Recipe,
    ReduceRange,
    Resume,
    Samples,
    Seed,
    Stacked,
    Target,
    Threads,
    Tokenizer,
    Verbose,
    Workers,
)
from onnxslim_ptq.commands.preflight import require_page, require_place, require_samples
from onnxslim_ptq.commands.session import asked_files, with_session
from onnxslim_ptq.errors import DeviceError, QuantizationError

if TYPE_CHECKING:
    from onnxslim_ptq.api import Result
    from onnxslim_ptq.commands.samples import Again
    from onnxslim_ptq.commands.summary import Summary
    from onnxslim_ptq.commands.worst import Look
    from onnxslim_ptq.export.weight_files import WeightFiles

__all__ = ["quantize"]

_DOUBTFUL_DB = 12.0
_LOOKED_AT = 8  # samples that tell about layers

Model = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="The float ONNX model.")]
Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", show_default=False, help="The file to write (ends in .onnx), or a folder."),
]
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
Blockwise = Annotated[
    bool, typer.Option("--blockwise", help="Run the model in blocks, as is done where memory is short.")
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
    model: Model,
    out: Out,
    recipe: Recipe = "w8a8",
    calib: Calib = None,
    evaluation: Eval = None,
    samples: Samples = None,
    stacked: Stacked = False,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    stats: Stats = None,
    workers: Workers = None,
    ray: Ray = None,
    resume: Resume = None,
    blockwise: Blockwise = False,
    shape: Shape = None,
    value_range: Range = None,
    device: Device = "cpu",
    target: Target = None,
    include: Include = None,
    exclude: Exclude = None,
    nan: Nan = "error",
    reduce_range: ReduceRange = "auto",
    min_sqnr: MinSqnr = 6.0,
    allow_quantized: AllowQuantized = False,
    external_data: External = False,
    seed: Seed = 0,
    threads: Threads = 0,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    report: Report = None,
    weights: Weights = False,
) -> None:
    """Quantize MODEL, verify the result against it, write OUT and its weights JSON."""
    given = dict(locals())  # every parameter by name: from here on they travel together
    _check_values(device, min_sqnr)
    _check_combinations(given)
    given = with_session(given)
    settings = _settings(given)
    if dry_run:
        from onnxslim_ptq.commands.dry_run import show_plan

        show_plan(model, out, settings, external=external_data, as_json=json, verbose=verbose)
    else:
        from onnxslim_ptq.commands.samples import Again

        again = Again.of(given)
        files = asked_files(given)
        _run(model, out, settings, again, external_data, files, report, json, quiet, verbose)


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``onnxslim_ptq.quantize``."""
    from calib.readers import parse_range, parse_shape
    from calib.saved.store import Statistics
    from onnxslim_ptq.commands.samples import with_data

    same = (
        "workers",
        "ray",
        "resume",
        "blockwise",
        "target",
        "device",
        "samples",
        "stacked",
        "nan",
        "reduce_range",
        "min_sqnr",
        "threads",
        "seed",
    )
    return {
        **{name: given[name] for name in (*same, "allow_quantized")},
        "recipe": with_data(given["recipe"], given["preprocess"], given["tokenizer"]),
        "calib_data": given["calib"] or None,
        "eval_data": given["evaluation"],
        "stats": Statistics.load(given["stats"]) if given["stats"] else None,
        "shapes": dict(map(parse_shape, given["shape"] or ())),
        "ranges": dict(map(parse_range, given["value_range"] or ())),
        "include": given["include"] or (),
        "exclude": given["exclude"] or (),
    }


def _check_values(device: str, min_sqnr: float) -> None:
    try:
        devices.Device.parse(device)
    except DeviceError as error:  # a misspelt device is a wrong argument, not one that is absent
        raise QuantizationError(f"--device: {error}") from None
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


def _run(
    model: Path,
    out: Path,
    settings: dict[str, Any],
    again: Again,
    external: bool,
    files: WeightFiles | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from onnxslim_ptq.api import quantize as run
    from onnxslim_ptq.commands.summary import Summary
    from onnxslim_ptq.commands.worst import look_closer, worst_layers

    recipe = settings["recipe"]  # loaded by `_settings`
    require_place(model, out, settings["device"], recipe.quant_type)
    data_free = settings["calib_data"] is None and not recipe.data.sets and settings["stats"] is None
    if data_free and model.is_file() and recipe.needs_ranges:
        warn(
            "no --calib: activation ranges come from synthetic samples (random numbers), not from real data; "
            "accuracy on real inputs is unknown"
        )
    with Bars(quiet) as bars:
        result = run(model, **settings, listener=bars)
        sqnr = result.metrics["sqnr_db"]
        doubtful = sqnr is not None and sqnr < _DOUBTFUL_DB
        # Comparing layers runs the whole model, for which there is no room block-wise.
        wanted = 0 if result.blockwise else _LOOKED_AT if doubtful or report else 0 if quiet or as_json else 1
        look = look_closer(result, settings, wanted, latency=report is not None) if wanted else None
        facts = _facts(result, look, settings) if report is not None else None
        # Last: an interruption before leaves nothing at OUT.
        paths = result.save(out, external_data=external, weights=files)
    summary = Summary(result, paths, settings, again, look.worst() if look is not None else [])
    if report is not None:
        summary.warnings += _write_report(facts, summary, report)
    if doubtful:
        advice = "" if result.blockwise else worst_layers(look, result.source.path, out)
        summary.warnings.append(f"output '{summary.worst_output}' reaches only {sqnr:.1f} dB SQNR. {advice}")
    for text in summary.warnings:
        warn(text)
    if as_json:
        summary.show_json()
    elif not quiet:
        summary.show(verbose)


def _facts(result: Result, look: Look | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    if look is None:
        return None
    from onnxslim_ptq.reporting import gather_facts

    return gather_facts(result, look.comparison, look.samples, nbytes=(0, 0), threads=settings["threads"])


def _write_report(facts: dict[str, Any] | None, summary: Summary, path: Path) -> list[str]:
    """Write the page; the warnings where there is nothing to write."""
    if facts is None:
        return [
            "no report was written: its layers could not be compared (in blocks there is no room for that)"
        ]
    from onnxslim_ptq.reporting import write_report

    write_report({**facts, "bytes": list(summary.nbytes), "next": summary.tune()}, path)
    return []
