"""The samples a result is measured on: those of --eval, or the part of --calib that quantize holds out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.readers import open_data, split_held_out, take

if TYPE_CHECKING:
    from calib.types import Dataset, InputInfo

__all__ = ["measured_samples"]


def measured_samples(
    inputs: Sequence[InputInfo],
    calib: Sequence[Path],
    evaluation: Path | None,
    samples: int | None,
    stacked: bool,
) -> tuple[Dataset, str]:
    """The data set and what it is called in results; CalibrationError when it cannot be opened."""
    if evaluation is not None:
        data = open_data([evaluation], inputs, stacked=stacked)
        return (take(data, samples) if samples else data), "eval"
    data = open_data(calib, inputs, stacked=stacked)
    _, held_out, measured_on = split_held_out(take(data, samples) if samples else data)
    return held_out, measured_on
