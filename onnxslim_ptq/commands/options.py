"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Calib", "Json", "Quiet", "Samples", "Seed", "Stacked", "Threads", "Verbose"]

Calib = Annotated[
    list[Path] | None,
    typer.Option(
        "--calib",
        metavar="PATH",
        show_default=False,
        help="Samples: a folder of .npz or .npy files (one sample each), or such a file. Repeatable.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", min=1, show_default=False, help="Use the first N samples only."),
]
Stacked = Annotated[bool, typer.Option("--stacked", help="The first axis of each array runs over samples.")]
Threads = Annotated[
    int, typer.Option("--threads", metavar="N", min=0, help="Threads; 0 = ONNX Runtime decides.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Nothing but one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No summary, only warnings and errors.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Every detail; a traceback for unexpected errors.")
]
