"""A whole data set as it was asked for: sets of files, what they lack filled in, states fed back, mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.errors import CalibrationError
from calib.readers.feedback import Feedback, Run, resolve_feedback
from calib.readers.files import HowToRead, open_data
from calib.readers.fill import Filled, constant_feed, initial_state
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits, quoted
from calib.readers.mix import mix
from calib.types import Dataset, InputInfo

__all__ = ["FileSet", "Recurrence", "Wiring", "open_sets"]


@dataclass(frozen=True)
class FileSet:
    """Files of one kind, how to read them, and how many samples to take (None: all)."""

    path: Path
    how: HowToRead = field(default_factory=HowToRead)
    samples: int | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recurrence:
    """Which outputs feed which inputs (patterns), after how many samples a sequence ends, shapes of first states."""

    pairs: Mapping[str, str] = field(default_factory=dict)
    reset_every: int | None = None
    initial: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wiring:
    """The model as data sees it: its inputs and outputs, and what makes a function that runs given outputs of it."""

    inputs: Sequence[InputInfo]
    outputs: Sequence[str]
    start: Callable[[Sequence[str]], Callable[[], Run]]

    def fed(self, constants: Mapping[str, Any], recurrence: Recurrence) -> list[InputInfo]:
        """The inputs that samples themselves have to serve."""
        states = set(self.pairs(recurrence).values())
        both = next((name for name in constants if name in states), None)
        if both is not None:
            raise CalibrationError(f"data.constants.{both}: data.feedback feeds this input; leave one out")
        return [info for info in self.inputs if info.name not in states and info.name not in constants]

    def pairs(self, recurrence: Recurrence) -> dict[str, str]:
        names = [info.name for info in self.inputs]
        return resolve_feedback(recurrence.pairs, names, self.outputs)

    def complete(self, base: Dataset, constants: Mapping[str, Any], recurrence: Recurrence) -> Dataset:
        """``base``, which serves the inputs of `fed`, with constants and states: a sequence of its own."""
        extra = constant_feed(constants, self.inputs)
        pairs = self.pairs(recurrence)
        filled = Filled(base, extra) if extra else base
        if not pairs:
            return filled
        by_name = {info.name: info for info in self.inputs}
        odd = next((name for name in recurrence.initial if name not in pairs.values()), None)
        if odd is not None:
            raise CalibrationError(
                f"data.initial.{odd}: is not fed by data.feedback, which feeds {quoted(pairs.values())}"
            )
        initial = {
            name: initial_state(by_name[name], recurrence.initial.get(name)) for name in pairs.values()
        }
        return Feedback(filled, self.inputs, pairs, initial, self.start(list(pairs)), recurrence.reset_every)


def open_sets(
    sets: Sequence[FileSet],
    wiring: Wiring,
    recurrence: Recurrence,
    *,
    shuffle: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
    said: list[str] | None = None,
) -> Dataset:
    """The sets as one data set; each set is a sequence of its own when states are fed back.

    Raises:
        CalibrationError: as `open_data` does, or constants, feedback and shuffling do not fit.
    """
    if shuffle is not None and recurrence.pairs:
        raise CalibrationError(
            "data.shuffle: steps of a sequence are read in order; leave shuffle out beside feedback"
        )
    opened: list[tuple[Dataset, int | None]] = []
    for one in sets:
        fed = wiring.fed(one.constants, recurrence)
        # A shuffled set is chosen from all of it; otherwise nothing beyond the first samples is opened.
        limit = one.samples if shuffle is None else None
        base = open_data([one.path], fed, limit=limit, limits=limits, how=one.how, said=said)
        if said is not None and one.samples is not None:
            said += _taken(one.path, one.samples, len(base), shuffle)
        opened.append((wiring.complete(base, one.constants, recurrence), one.samples))
    return mix(opened, shuffle)


def _taken(path: Path, asked: int, found: int, shuffle: int | None) -> list[str]:
    """A line where a set gives other samples than all that were found, or fewer than were asked for."""
    if found < asked:
        return [f"{path}: {found} samples, although data.sets asks for {asked}"]
    if found > asked:
        return [f"{asked} of the {found} samples of {path}, chosen at random by seed {shuffle}"]
    return []
