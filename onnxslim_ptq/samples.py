"""The samples of a run: opened as the recipe's data section says, and split into those that calibrate and measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from calib.errors import CalibrationError
from calib.model import Model
from calib.readers import from_iterable, split_held_out, synthetic, take
from calib.readers.compose import FileSet, Recurrence, Wiring, open_sets
from calib.readers.files import HowToRead, kind_of
from calib.saved.identity import Shard
from calib.saved.store import Statistics
from calib.stateful import Steps
from calib.types import Dataset
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.recipes.data import DataConfig, PreprocessConfig, SetConfig

__all__ = ["Samples", "measured_samples", "open_samples"]

_SYNTHETIC = 8


@dataclass
class Samples:
    """Calibration and evaluation samples, where a measurement on the latter comes from, and how they were made."""

    calibration: Dataset
    evaluation: Dataset
    measured_on: str
    notes: list[str] = field(default_factory=list)
    recorded: Statistics | None = None
    synthetic: bool = False

    @property
    def samples(self) -> int:
        """How many samples the statistics are of: those of an earlier run may be of more than were kept."""
        return self.recorded.samples if self.recorded is not None else len(self.calibration)

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the samples that the statistics are of."""
        return self.recorded.data_sha256 if self.recorded is not None else self.shard.sha256

    @cached_property
    def shard(self) -> Shard:
        """The identity of the calibration samples; reads all of them, once."""
        return Shard.of(self.calibration)


def open_samples(source: Model, recipe: Recipe, asked: Asked) -> Samples:
    """Open the paths or feeds asked for; without any the sets of the recipe's data section, without those synthetic
    samples. ``hold_out``: some calibration samples measure when there are no others, none that alone has its value of
    the recipe's tag.

    Raises CalibrationError as the readers do, or when options describe samples that are not drawn.
    """
    opener = _Opener(source, recipe.data, asked)
    calib, shapes, ranges = asked.calib_data, asked.shapes, asked.ranges
    sets = recipe.data.sets if calib is None else ()
    if (shapes or ranges) and (sets or calib is not None):
        raise CalibrationError("--shape and --range describe synthetic samples; leave them out beside data")
    if sets:
        everything = opener.sets(sets)
    elif calib is not None:
        everything = opener.any(calib)
    else:
        count = asked.samples or _SYNTHETIC
        drawn = synthetic(opener.fed, count=count, shapes=shapes, ranges=ranges, seed=asked.seed)
        everything = opener.complete(drawn)
    real = sets or calib is not None
    if real and asked.samples is not None:
        everything = take(everything, asked.samples)
    if asked.eval_data is not None:
        return Samples(everything, opener.any(asked.eval_data), "eval", opener.notes, synthetic=not real)
    if not real:
        return Samples(everything, everything, "synthetic", opener.notes, synthetic=True)
    if not asked.hold_out:
        return Samples(everything, everything, "calibration", opener.notes)
    return Samples(*split_held_out(everything, recipe.tag), opener.notes)


def measured_samples(source: Model, recipe: Recipe, asked: Asked) -> tuple[Dataset, str]:
    """The samples a result is measured on, and what they are called: --eval, or what quantize holds out."""
    if asked.eval_data is not None:
        opened = _Opener(source, recipe.data, asked).any(asked.eval_data)
        return (take(opened, asked.samples) if asked.samples else opened), "eval"
    found = open_samples(source, recipe, asked)
    return found.evaluation, found.measured_on


class _Opener:
    """Opens files and feeds for one model by one data section; ``notes`` gets a line for each thing decided."""

    def __init__(self, source: Model, data: DataConfig, asked: Asked) -> None:
        self._data, self._stacked = data, asked.stacked or data.stacked
        outputs = [output.name for output in source.proto.graph.output]
        self._wiring = Wiring(source.inputs(), outputs, partial(Steps, source, threads=asked.threads))
        self._recurrence = Recurrence(data.feedback, data.reset_every, data.initial)
        self.fed = self._wiring.fed(data.constants, self._recurrence)
        self.notes: list[str] = []
        pairs = self._wiring.pairs(self._recurrence)
        if pairs:
            first, *others = (f"'{output}' -> '{name}'" for output, name in pairs.items())
            more = f" and {len(others)} more" if others else ""
            every = f"afresh every {data.reset_every} samples" if data.reset_every else "one sequence per set"
            self.notes.append(f"states of the float model fed back: {first}{more}; {every}")

    def sets(self, sets: Sequence[SetConfig]) -> Dataset:
        """The sets, mixed as the data section says."""
        asked = [self._set(one) for one in sets]
        opened = open_sets(asked, self._wiring, self._recurrence, shuffle=self._data.shuffle, said=self.notes)
        kinds = {kind_of(one.path) for one in asked}
        for key, kind in (("preprocess", "images"), ("text", "text")):
            if getattr(self._data, key) is not None and kind not in kinds:
                self.notes.append(f"data.{key} was not used: the files hold {' and '.join(sorted(kinds))}")
        return opened

    def any(self, data: Any) -> Dataset:
        """Paths as sets without a section of their own, everything else as feeds."""
        if isinstance(data, str | Path):
            data = [data]
        if isinstance(data, list | tuple) and data and all(isinstance(item, str | Path) for item in data):
            return self.sets([SetConfig.model_construct(path=str(item)) for item in data])
        feeds: Iterable[Any] | Callable[[], Iterable[Any]] = data
        return self.complete(from_iterable(feeds, self.fed))

    def complete(self, base: Dataset) -> Dataset:
        """With constants and states."""
        return self._wiring.complete(base, self._data.constants, self._recurrence)

    def _set(self, one: SetConfig) -> FileSet:
        preprocess = one.preprocess or self._data.preprocess
        text = one.text or self._data.text
        how = HowToRead(
            self._stacked if one.stacked is None else one.stacked,
            preprocess.build() if preprocess else None,
            _given(preprocess),
            text.build() if text else None,
        )
        return FileSet(Path(one.path), how, one.samples, {**self._data.constants, **one.constants})


def _given(preprocess: PreprocessConfig | None) -> frozenset[str]:
    return preprocess.given if preprocess else frozenset()
