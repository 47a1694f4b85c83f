"""The samples that go with saved statistics: those kept in their file, or those they were gathered from."""

from __future__ import annotations

from typing import Any

from calib.model import Model
from calib.saved.kept import require_kept
from calib.saved.store import Statistics
from onnxslim_ptq.recipes.data import DataConfig
from onnxslim_ptq.samples import Samples, open_samples

__all__ = ["recorded_samples"]


def recorded_samples(
    source: Model,
    statistics: Statistics,
    data: DataConfig,
    calib: Any = None,
    evaluation: Any = None,
    *,
    samples: int | None = None,
    stacked: bool = False,
    threads: int = 0,
) -> Samples:
    """``evaluation`` measures, else what calibrate held out, else the kept calibration samples.

    Raises:
        CalibrationError: the statistics are of another model, or ``calib`` are not the samples they are of; or no
            samples were kept and none are given.
    """
    statistics.require(source)

    def opened(hold_out: bool, calib: Any = calib) -> Samples:
        return open_samples(
            source, data, calib, samples=samples, stacked=stacked, threads=threads, hold_out=hold_out
        )

    if calib is None:
        judged, held_out = statistics.kept.judged, statistics.kept.held_out
        if evaluation is None and not len(held_out):
            require_kept(statistics.kept, statistics.origin)
        prepared = list(statistics.prepared)
        if len(held_out):
            found = Samples(judged, held_out, "held-out", prepared)
        else:
            found = Samples(judged, judged, "calibration", prepared)
    else:
        found = _same(statistics, opened(True), opened(False))
    found.recorded = statistics
    if evaluation is not None:
        found.evaluation, found.measured_on = opened(False, evaluation).calibration, "eval"
    return found


def _same(statistics: Statistics, split: Samples, whole: Samples) -> Samples:
    """Whichever of the two the statistics are of: calibrate may hold samples out or not."""
    found = whole if whole.samples == statistics.samples else split
    statistics.require_data(found.shard)
    return found
