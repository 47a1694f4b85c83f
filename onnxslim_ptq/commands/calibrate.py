"""``calibrate MODEL STATS``: gathers what a recipe needs to know about the data, for ``quantize --stats``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxslim_ptq.commands import options as opt
from onnxslim_ptq.commands.console import Bars, emit_json, program, say, size, warn
from onnxslim_ptq.commands.given import asked_by
from onnxslim_ptq.commands.session import with_session

if TYPE_CHECKING:
    from calib.saved.store import Statistics

__all__ = ["calibrate", "say_statistics", "show_statistics"]

Out = Annotated[Path, typer.Argument(metavar="STATS", show_default=False, help="The file to write.")]
NoHoldOut = Annotated[
    bool,
    typer.Option(
        "--no-hold-out", help="Every sample calibrates; the result is then measured with quantize --eval."
    ),
]
Keep = Annotated[
    float,
    typer.Option(
        "--keep-samples",
        metavar="MIB",
        min=0,
        help="Keep up to 32 samples in STATS when they fit; 0 keeps none, then quantize needs --calib.",
    ),
]


def calibrate(
    model: opt.Model,
    out: Out,
    recipe: opt.Recipe = "w8a8",
    calib: opt.Calib = None,
    samples: opt.Samples = None,
    stacked: opt.Stacked = False,
    preprocess: opt.Preprocess = None,
    tokenizer: opt.Tokenizer = None,
    no_hold_out: NoHoldOut = False,
    keep_samples: Keep = 64.0,
    workers: opt.Workers = None,
    ray: opt.Ray = None,
    resume: opt.Resume = None,
    blockwise: opt.Blockwise = False,
    device: opt.Device = "cpu",
    target: opt.Target = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    nan: opt.Nan = "error",
    reduce_range: opt.ReduceRange = "auto",
    allow_quantized: opt.AllowQuantized = False,
    threads: opt.Threads = 0,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Gather the statistics that quantize needs with the same options, and save them: quantize --stats STATS."""
    given = with_session({**locals(), "hold_out": not no_hold_out})
    from calib.saved.container import require_place
    from onnxslim_ptq.calibration import calibrate_as
    from onnxslim_ptq.export.check import source_files

    asked = asked_by(given)
    if model.is_file():  # else opening it says what is wrong
        require_place(out, source_files(model))
    with Bars(quiet) as bars:
        found = calibrate_as(model, replace(asked, listener=bars), int(keep_samples * 2**20))
        found.save(out)
    if not any(found.sweeps.values()):
        warn(
            f"'{out}' holds no statistics, because no layer of the model is quantized by them; "
            f"{program()} quantize --dry-run says why"
        )
    if found.kept.reason:
        warn(
            f"no samples are kept in '{out}': {found.kept.reason}; quantize --stats will need --calib as well"
        )
    if json:
        show_statistics(found, out)
    elif not quiet:
        say_statistics(found, out)
        again = "" if found.kept.judged else " --calib SAMPLES"
        say(
            f"next: {program()} quantize {shlex.quote(str(model))} OUT --stats {shlex.quote(str(out))}{again}  "
            "(with the same recipe and target)"
        )


def say_statistics(found: Statistics, out: Path) -> None:
    """What was written, in three lines for a person."""
    probes = [probe for states in found.sweeps.values() for probe in states]
    say(f"wrote {out}  {size(out.stat().st_size)}")
    say(
        f"{len(probes)} statistics of {len({p.tensor for p in probes})} tensors, from {found.samples} samples"
        + (f" in {len(found.data)} parts" if len(found.data) > 1 else "")
    )
    say(f"kept: {len(found.kept.judged)} of these samples and {len(found.kept.held_out)} held-out ones")


def show_statistics(found: Statistics, out: Path) -> None:
    """What a statistics file holds, as JSON."""
    emit_json(
        {
            "file": str(out),
            "bytes": out.stat().st_size,
            "model": found.model.model_dump(),
            "data": [shard.model_dump() for shard in found.data],
            "samples": found.samples,
            "conditions": found.conditions.model_dump(),
            "made_with": found.made_with,
            "statistics": [
                {"graph": graph, "tensor": p.tensor, "kind": p.kind, "axis": p.axis}
                for graph, states in found.sweeps.items()
                for p in states
            ],
            "kept": {"judged": len(found.kept.judged), "held_out": len(found.kept.held_out)},
            "exit_code": 0,
        }
    )
