"""Stateful models: outputs of one step are inputs of the next, so a sample is a step of a sequence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calib.errors import CalibrationError
from calib.readers.access import Selectable, read_at
from calib.readers.check import check_feed
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits, quoted
from calib.types import Array, Dataset, Feed, InputInfo, Sample, SampleId

__all__ = ["Feedback", "Run", "resolve_feedback"]

Run = Callable[[Feed, SampleId], Mapping[str, Array]]
"""Runs the model on one feed and gives the outputs that are fed back, by name."""

_KEPT_BYTES = 256 * 1024**2
_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"


def resolve_feedback(
    patterns: Mapping[str, str], inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, str]:
    """``{output: input}`` from patterns like ``{"present.*": "past_key_values.*"}``: what * matches is carried over.

    Raises:
        CalibrationError: a pattern matches no output, leads to no input, or to one that another output feeds.
    """
    pairs: dict[str, str] = {}
    for source, destination in patterns.items():
        place = f"data.feedback: {source!r} -> {destination!r}"
        if source.count("*") != destination.count("*"):
            raise CalibrationError(f"{place}: both sides need the same number of *")
        form = re.compile("(.*)".join(map(re.escape, source.split("*"))), re.DOTALL)
        found = {output: match for output in outputs if (match := form.fullmatch(output))}
        if not found:
            raise CalibrationError(f"{place}: matches no output; the outputs are {quoted(outputs)}")
        for output, match in found.items():
            pieces = destination.split("*")
            name = pieces[0] + "".join(a + b for a, b in zip(match.groups(), pieces[1:], strict=True))
            if name not in inputs:
                raise CalibrationError(
                    f"{place}: output {output!r} would feed {name!r}, which is no input; "
                    f"the inputs are {quoted(inputs)}"
                )
            if name in pairs.values():
                raise CalibrationError(f"{place}: input {name!r} is fed by two outputs; keep one")
            pairs[output] = name
    return pairs


@dataclass(frozen=True)
class _State:
    """What a step starts from; ``mask`` is the attention mask of all steps before."""

    arrays: Mapping[str, Array]
    mask: Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass
class Feedback(Selectable):
    """Consecutive samples of ``base`` as steps of one sequence, ``reset_every`` of them or all.

    The first step of a sequence starts from ``initial``; each other one from what ``pairs`` (output -> input) gave
    on the step before, for which ``start`` makes a function that runs the model. A step is run again in a later pass
    only when its states did not fit ``kept_bytes``. An attention_mask as long as input_ids knows the step's own tokens
    only: it is put behind those of the steps before, and position_ids that count from 0 are counted on.
    """

    base: Dataset
    inputs: Sequence[InputInfo]
    pairs: Mapping[str, str]
    initial: Mapping[str, Array]
    start: Callable[[], Run]
    reset_every: int | None = None
    kept_bytes: int = _KEPT_BYTES
    limits: ReadLimits = DEFAULT_LIMITS
    _kept: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _room: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._room = self.kept_bytes

    def __len__(self) -> int:
        return len(self.base)

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ascending ``positions``; the model runs on those before them in their sequence."""
        chosen, needed = set(positions), self._needed(positions)
        wanted = set(needed)
        run: Run | None = None
        state = _State(self.initial)
        for position, (ident, feed) in zip(needed, read_at(self.base, needed), strict=True):
            if self._starts(position):
                state = _State(self.initial)
            state = self._kept.get(position, state)
            full, mask = self._full(feed, state, ident)
            after = position + 1
            if after in wanted and not self._starts(after) and after not in self._kept:
                run = run or self.start()
                state = self._next(run(full, ident), mask, ident)
                self._keep(after, state)
            if position in chosen:
                yield ident, full

    def _starts(self, position: int) -> bool:
        return position == 0 or (self.reset_every is not None and position % self.reset_every == 0)

    def _needed(self, positions: Sequence[int]) -> list[int]:
        """The positions, and those before them back to a known state."""
        needed: list[int] = []
        for position in positions:
            first, done = position, needed[-1] if needed else -1
            while first > done + 1 and first not in self._kept and not self._starts(first):
                first -= 1
            needed += range(max(first, done + 1), position + 1)
        return needed

    def _full(self, feed: Feed, state: _State, ident: SampleId) -> tuple[dict[str, Array], Array | None]:
        full = {**feed, **state.arrays}
        mask, ids = feed.get(_MASK), feed.get(_IDS)
        own_only = mask is not None and ids is not None and mask.shape == ids.shape
        if mask is not None and own_only and state.mask is not None:
            places = feed.get(_POSITIONS)
            counts = places is not None and np.array_equal(places, _places(mask)[..., -places.shape[-1] :])
            mask = full[_MASK] = np.concatenate([state.mask, mask], axis=-1)
            if places is not None and counts:
                full[_POSITIONS] = _places(mask)[..., -places.shape[-1] :].astype(places.dtype)
        self.limits.check_bytes(state.nbytes, f"{ident}: its states", "set data.reset_every to start afresh")
        return check_feed(full, self.inputs, str(ident), "see data.initial"), mask

    def _next(self, outputs: Mapping[str, Array], mask: Array | None, ident: SampleId) -> _State:
        for output in self.pairs:
            if output not in outputs or not isinstance(outputs[output], np.ndarray):
                raise CalibrationError(f"{ident}: output {output!r} is no tensor; it cannot be fed back")
        return _State({name: outputs[output] for output, name in self.pairs.items()}, mask)

    def _keep(self, position: int, state: _State) -> None:
        if state.nbytes <= self._room:
            self._kept[position] = state
            self._room -= state.nbytes


def _places(mask: Array) -> Array:
    """Positions of tokens, masked ones not counted."""
    return np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
