"""``convert SRC DST --from F --to F``: weight files of one tool as those of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxslim_ptq.commands.console import emit_json, say
from onnxslim_ptq.commands.options import Json, Quiet

__all__ = ["convert"]

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", show_default=False, help="A .safetensors file, a folder of them, or a description."
    ),
]
Out = Annotated[
    Path,
    typer.Argument(metavar="DST", show_default=False, help="A .safetensors file; for ascend_v1 a folder."),
]
From = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="FORMAT",
        show_default=False,
        help="ascend_v1, golden_stick, autogptq, autogptq_v2 or autoawq.",
    ),
]
To = Annotated[
    str, typer.Option("--to", metavar="FORMAT", show_default=False, help="golden_stick or ascend_v1.")
]


def convert(source: Source, out: Out, from_: From, to: To, json: Json = False, quiet: Quiet = False) -> None:
    """Convert between weight formats: AscendV1 and Golden Stick, AutoGPTQ and AutoAWQ to Golden Stick."""
    from onnxslim_ptq.export.interchange import convert as run

    files = [str(path) for path in run(source, out, from_, to)]
    if json:
        emit_json({"files": files, "exit_code": 0})
    elif not quiet:
        say(f"wrote {', '.join(files)}")
