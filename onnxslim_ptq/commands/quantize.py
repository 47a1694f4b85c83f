"""``quantize MODEL OUT``: the main job."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxslim_ptq.commands.console import Bars, warn
from onnxslim_ptq.commands.later import refuse
from onnxslim_ptq.commands.options import Calib, Json, Quiet, Samples, Seed, Stacked, Threads, Verbose
from onnxslim_ptq.errors import QuantizationError

__all__ = ["quantize"]

_DEVICE = re.compile(r"cpu|cuda|npu(:[0-9]{1,3})?", re.ASCII)
_DOUBTFUL_DB = 12.0
_TO_COME = ("stats", "workers", "blockwise", "report", "weights")
_LATER = {"hidden": True, "show_default": False}

Model = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="The float ONNX model.")]
Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", show_default=False, help="The file to write (ends in .onnx), or a folder."),
]
Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A ready recipe or a YAML file.")]
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
Device = Annotated[str, typer.Option("--device", metavar="cpu|npu[:ID]|cuda", help="Where calibration runs.")]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="NAME",
        show_default="the recipe's",
        help="cpu, generic, tensorrt, openvino or ascend.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        show_default=False,
        help="Layers to quantize: glob, re:… or op:Conv. Repeatable.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", show_default=False, help="Layers to leave float. Repeatable."
    ),
]
Nan = Annotated[
    str, typer.Option("--nan", metavar="error|ignore|exclude-layer", help="When a value is NaN or Inf.")
]
ReduceRange = Annotated[
    str,
    typer.Option(
        "--reduce-range",
        metavar="auto|on|off",
        help="7-bit weights; auto: on processors whose int8 products saturate.",
    ),
]
MinSqnr = Annotated[float, typer.Option("--min-sqnr", metavar="DB", help="Fail below this SQNR; 0 = never.")]
AllowQuantized = Annotated[
    bool, typer.Option("--allow-quantized", help="Take a model that is partly int8 already.")
]
External = Annotated[bool, typer.Option("--external-data", help="Weights to OUT.data (always above 2 GB).")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; run no sample, write nothing.")
]
Stats = Annotated[Path | None, typer.Option("--stats", **_LATER)]
Workers = Annotated[int | None, typer.Option("--workers", **_LATER)]
Blockwise = Annotated[bool, typer.Option("--blockwise", **_LATER)]
Report = Annotated[Path | None, typer.Option("--report", **_LATER)]
Weights = Annotated[bool, typer.Option("--weights", **_LATER)]


def quantize(
    model: Model,
    out: Out,
    recipe: Recipe = "w8a8",
    calib: Calib = None,
    evaluation: Eval = None,
    samples: Samples = None,
    stacked: Stacked = False,
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
    stats: Stats = None,
    workers: Workers = None,
    blockwise: Blockwise = False,
    report: Report = None,
    weights: Weights = False,
) -> None:
    """Quantize MODEL, verify the result against it, write OUT and its weights JSON."""
    given = dict(locals())  # every parameter by name: from here on they travel together
    refuse({f"--{name}": given[name] for name in _TO_COME})
    _check_values(device, min_sqnr)
    _check_combinations(given)
    settings = _settings(given)
    if dry_run:
        from onnxslim_ptq.commands.dry_run import show_plan

        show_plan(model, out, settings, external=external_data, as_json=json, verbose=verbose)
    else:
        _run(model, out, settings, external_data, json, quiet, verbose)


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``onnxslim_ptq.quantize``."""
    from calib.readers import parse_range, parse_shape

    same = (
        "recipe",
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
        "calib_data": given["calib"] or None,
        "eval_data": given["evaluation"],
        "shapes": dict(map(parse_shape, given["shape"] or ())),
        "ranges": dict(map(parse_range, given["value_range"] or ())),
        "include": given["include"] or (),
        "exclude": given["exclude"] or (),
    }


def _check_values(device: str, min_sqnr: float) -> None:
    if not _DEVICE.fullmatch(device):
        raise QuantizationError(f"--device {device}: use cpu, npu, npu:ID or cuda")
    if not (math.isfinite(min_sqnr) and min_sqnr >= 0):
        raise QuantizationError(f"--min-sqnr {min_sqnr}: give a number of dB, 0 or more")


def _check_combinations(given: Mapping[str, Any]) -> None:
    """Refuse options that would otherwise be ignored in silence."""
    if given["quiet"] and given["verbose"]:
        raise QuantizationError("-q and -v exclude each other; leave one out")
    if given["calib"] and (given["shape"] or given["value_range"]):
        raise QuantizationError("--shape and --range describe synthetic samples; leave them out with --calib")
    if given["stacked"] and not (given["calib"] or given["evaluation"]):
        raise QuantizationError("--stacked describes the files of --calib or --eval; give one of them")


def _run(
    model: Path,
    out: Path,
    settings: dict[str, Any],
    external: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from onnxslim_ptq.api import QUANT_TYPE
    from onnxslim_ptq.api import quantize as run
    from onnxslim_ptq.commands.summary import Summary
    from onnxslim_ptq.commands.worst import worst_layers

    _preflight(model, out, settings["device"], QUANT_TYPE)
    if settings["calib_data"] is None and model.is_file():
        warn(
            "no --calib: activation ranges come from synthetic samples (random numbers), not from real data; "
            "accuracy on real inputs is unknown"
        )
    with Bars(quiet) as bars:
        result = run(model, **settings, listener=bars)
        sqnr = result.metrics["sqnr_db"]
        doubtful = sqnr is not None and sqnr < _DOUBTFUL_DB
        advice = worst_layers(result, out, settings) if doubtful else ""
        paths = result.save(out, external_data=external)  # last: an interruption before leaves nothing at OUT
    summary = Summary(result, paths, settings)
    if doubtful:
        summary.warnings.append(f"output '{summary.worst_output}' reaches only {sqnr:.1f} dB SQNR. {advice}")
    for text in summary.warnings:
        warn(text)
    if as_json:
        summary.show_json()
    elif not quiet:
        summary.show(verbose)


def _preflight(model: Path, out: Path, device: str, quant_type: str) -> None:
    """Refuse before the long work what would be refused after it: the device, the input as OUT, no access to OUT."""
    from calib.provider import require_device
    from onnxslim_ptq.export.check import source_files
    from onnxslim_ptq.export.files import AtomicFiles, output_paths

    require_device(device)
    if model.is_file():  # else opening it says what is wrong
        with AtomicFiles(output_paths(out, model.stem, quant_type), source_files(model)):
            pass
