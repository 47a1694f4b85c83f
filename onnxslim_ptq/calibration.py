"""``calibrate``: the statistics a recipe needs, gathered once and saved, so that quantizing needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from calib.model import open_model
from calib.provider import SessionOptions
from calib.runner import Listener
from calib.saved.identity import ModelRef, conditions
from calib.saved.kept import KEPT_BYTES, keep
from calib.saved.progress import Resume
from calib.saved.store import Statistics
from onnxslim_ptq import __version__
from onnxslim_ptq.asked import checked, gathering
from onnxslim_ptq.pipeline import Job, make_plan
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.recipes.data import without_folders
from onnxslim_ptq.samples import open_samples

__all__ = ["calibrate"]


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
    Raises what `quantize` raises, except VerificationError.
    """
    asked = checked(recipe, target, device, nan, reduce_range, include, exclude)
    source = open_model(model)
    data = open_samples(
        source,
        asked.recipe.data,
        calib_data,
        samples=samples,
        stacked=stacked,
        threads=threads,
        hold_out=hold_out,
    )
    how = gathering(source, data, workers, ray, resume, blockwise)
    record = Statistics(
        ModelRef.of(source),
        (data.shard,),
        conditions(device, how.options(SessionOptions(threads=threads))),
        made_with={
            "onnxslim_ptq": __version__,
            "recipe": without_folders(asked.recipe.dump()),
            "target": asked.target.name,
        },
    )
    make_plan(
        Job(
            source,
            asked.recipe,
            asked.target,
            data.calibration,
            data.evaluation,
            device,
            threads,
            nan,
            asked.reduce_range,
            allow_quantized,
            listener=listener,
            gathering=how,
            record=record,
        )
    )
    record.prepared = tuple(data.notes)
    if keep_bytes:
        record.kept = keep(
            data.calibration, data.evaluation if data.measured_on == "held-out" else None, keep_bytes
        )
    if how.resume is not None:
        how.resume.clear()
    return record
