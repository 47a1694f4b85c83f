"""The samples that go with saved statistics: those kept in their file, or those they were gathered from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.errors import CalibrationError
from calib.model import Model
from calib.saved.kept import require_kept
from calib.saved.store import Statistics
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.samples import Samples, open_samples

__all__ = ["recorded_samples"]


def recorded_samples(source: Model, recipe: Recipe, asked: Asked) -> Samples:
    """The samples of ``asked.stats``: its evaluation data measure, else what calibrate held out, else the kept
    calibration samples.

    Raises:
        CalibrationError: the statistics are of another model or device, or the calibration data are not the samples
            they are of; an option asks to gather statistics; or no samples were kept and none are given.
    """
    assert asked.stats is not None
    statistics = asked.stats if isinstance(asked.stats, Statistics) else Statistics.load(Path(asked.stats))
    _require_no_sweep(statistics, asked)
    statistics.require(source)

    def opened(calib: Any, hold_out: bool) -> Samples:
        only = replace(asked, calib_data=calib, eval_data=None, hold_out=hold_out, shapes=None, ranges=None)
        return open_samples(source, recipe, only)

    if asked.calib_data is None:
        judged, held_out = statistics.kept.judged, statistics.kept.held_out
        if asked.eval_data is None and not len(held_out):
            require_kept(statistics.kept, statistics.origin)
        prepared = list(statistics.prepared)
        if len(held_out):
            found = Samples(judged, held_out, "held-out", prepared)
        else:
            found = Samples(judged, judged, "calibration", prepared)
    else:
        found = _same(statistics, opened(asked.calib_data, True), opened(asked.calib_data, False))
    found.recorded = statistics
    if asked.eval_data is not None:
        found.evaluation, found.measured_on = opened(asked.eval_data, False).calibration, "eval"
    return found


def _require_no_sweep(statistics: Statistics, asked: Asked) -> None:
    given = {"--workers": asked.workers, "--ray": asked.ray, "--resume": asked.resume}
    if odd := [name for name, value in given.items() if value is not None]:
        raise CalibrationError(f"{odd[0]} gathers statistics, and --stats has them; leave one out")
    if asked.device not in ("cpu", statistics.conditions.device):
        raise CalibrationError(
            f"{statistics.origin} were gathered on device {statistics.conditions.device}, not {asked.device}; "
            "leave --device out, or calibrate on that device"
        )


def _same(statistics: Statistics, split: Samples, whole: Samples) -> Samples:
    """Whichever of the two the statistics are of: calibrate may hold samples out or not."""
    found = whole if whole.samples == statistics.samples else split
    statistics.require_data(found.shard)
    return found
