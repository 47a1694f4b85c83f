"""``export QUANT OUT --target T``: a quantized model rendered for another runtime."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from onnxslim_ptq.commands import options as opt
from onnxslim_ptq.commands.console import emit_json, say

__all__ = ["export"]

Quant = Annotated[
    Path, typer.Argument(metavar="QUANT", show_default=False, help="A model that quantize wrote.")
]
Target = Annotated[
    str,
    typer.Option("--target", metavar="NAME", show_default=False, help=opt.TARGET_HELP),
]
Float = Annotated[
    Path | None,
    typer.Option(
        "--float",
        metavar="MODEL",
        show_default=False,
        help="The float model, for weights that the target wants with other scales.",
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME:1x3x224x224",
        show_default=False,
        help="The shape of an input with dynamic dimensions, for the comparison. Repeatable.",
    ),
]
Triton = Annotated[
    Path | None,
    typer.Option(
        "--triton",
        metavar="DIR",
        show_default=False,
        help="Also a Triton model repository there: DIR/<name>/config.pbtxt and 1/model.onnx.",
    ),
]


def export(
    quantized: Quant,
    out: opt.Out,
    target: Target,
    exact: Float = None,
    triton: Triton = None,
    shape: Shape = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Render QUANT for another target from the integers it holds, check it against QUANT, write OUT and its JSON."""
    from calib.readers import parse_shape
    from onnxslim_ptq.exporting import export as run

    shapes = dict(map(parse_shape, shape or ()))
    made = run(quantized, out, target, float_model=exact, triton=triton, shapes=shapes)
    files = [str(path) for path in made.paths.in_order()]
    if json:
        found = {"files": files, "agreement_db": made.agreement_db, "notes": made.notes, "exit_code": 0}
        emit_json({**found, "triton": str(made.triton) if made.triton else None})
    elif not quiet:
        if made.agreement_db is None:
            said = "has no float output to compare"
        elif math.isinf(made.agreement_db):
            said = f"agrees exactly with {quantized.name} on synthetic samples"
        else:
            said = f"agrees with {quantized.name} to {made.agreement_db:.1f} dB on synthetic samples"
        say(f"{made.paths.model} {said}")
        for note in made.notes:
            say(f"  {note}")
        if made.triton is not None:
            say(f"{made.triton}: Triton model repository entry")
