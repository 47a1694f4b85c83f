"""``merge-stats A B -o C``: statistics of several parts of the data become those of all of it."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Annotated

import typer

from onnxslim_ptq.commands.calibrate import say_statistics, show_statistics
from onnxslim_ptq.commands.options import Json, Quiet
from onnxslim_ptq.errors import QuantizationError

__all__ = ["merge_stats"]

Parts = Annotated[
    list[Path], typer.Argument(metavar="STATS…", show_default=False, help="Two or more files of calibrate.")
]
Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="FILE", show_default=False, help="The file to write.")
]


def merge_stats(parts: Parts, out: Out, json: Json = False, quiet: Quiet = False) -> None:
    """Merge statistics of different samples of one model, gathered with the same recipe and options."""
    from calib.saved.container import require_place
    from calib.saved.store import Statistics

    if len(parts) < 2:
        raise QuantizationError("merge-stats needs two or more files")
    require_place(out, parts)
    merged = reduce(Statistics.merged, (Statistics.load(path) for path in parts))
    merged.save(out)
    if json:
        show_statistics(merged, out)
    elif not quiet:
        say_statistics(merged, out)
