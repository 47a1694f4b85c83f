"""``calibrate``: the statistics a recipe needs, gathered once and saved, so that quantizing needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from calib.errors import CalibrationError
from calib.progress import Listener
from calib.provider import SessionOptions
from calib.saved.identity import ModelRef, conditions
from calib.saved.kept import KEPT_BYTES, keep
from calib.saved.progress import Resume
from calib.saved.store import Statistics
from onnxslim_ptq import __version__
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.job import gathering, open_job
from onnxslim_ptq.pipeline import make_plan
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.recipes.data import without_folders

__all__ = ["calibrate", "calibrate_as"]


def calibrate(
    model: str | Path | onnx.ModelProto,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w8a8",
    calib_data: Any = None,
    *,
    target: str | None = None,
    device: str = "cpu",
    samples: int | None = None,
    stacked: bool = False,
    hold_out: bool = True,
    keep_bytes: int = KEPT_BYTES,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    nan: str = "error",
    reduce_range: str = "auto",
    allow_quantized: bool = False,
    threads: int = 0,
    workers: int | None = None,
    ray: str | None = None,
    resume: str | Path | Resume | None = None,
    blockwise: bool = False,
    listener: Listener | None = None,
) -> Statistics:
    """Gather every statistic that `quantize` with the same arguments would; ``save`` them, or give them as ``stats``.

    Up to 16 calibration and 16 held-out samples are kept with them, unless they take more than ``keep_bytes`` (0 keeps
    none): with those, `quantize` writes the same bytes as from the data. ``hold_out`` False: all samples calibrate.
    Raises what `quantize` raises, except VerificationError, and CalibrationError without data.
    """
    return calibrate_as(model, Asked.of(locals()), keep_bytes)


def calibrate_as(
    model: str | Path | onnx.ModelProto, asked: Asked, keep_bytes: int = KEPT_BYTES
) -> Statistics:
    """`calibrate`, with its arguments in one piece; raises the same."""
    if asked.calib_data is None and not Recipe.load(asked.recipe).data.sets:
        raise CalibrationError("calibrate needs samples; give them with --calib")
    job, data = open_job(model, asked)
    how = gathering(job.source, data, asked)
    record = Statistics(
        ModelRef.of(job.source),
        (data.shard,),
        conditions(job.device, how.options(SessionOptions(threads=job.threads))),
        made_with={
            "onnxslim_ptq": __version__,
            "recipe": without_folders(job.recipe.dump()),
            "target": job.target.name,
        },
    )
    make_plan(replace(job, gathering=how, record=record))
    record.prepared = tuple(data.notes)
    if keep_bytes:
        held_out = data.evaluation if data.measured_on == "held-out" else None
        record.kept = keep(data.calibration, held_out, keep_bytes)
    if how.resume is not None:
        how.resume.clear()
    return record
