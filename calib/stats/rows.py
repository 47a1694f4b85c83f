"""A bounded reservoir of the rows a layer multiplies with its weight: tokens of a MatMul, patches of a Conv."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats.options import options_of
from calib.stats.patch import PATCH_OPTIONS, Patch
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["RowStats"]

_SEED = 0x5EED
_DEFAULTS = {"rows": 256.0, "each": 8.0, **PATCH_OPTIONS}


class RowStats:
    """At most ``rows`` rows, float32 [rows, K]: K = last axis, or channels x window for a Conv (C-order [C, *window]).

    Each sample offers ``each`` rows at places drawn from (seed, sample index); every offered row has a random
    priority from the same draw and the ``rows`` smallest priorities are kept. A sample's draw does not depend on the
    others, so merging is exact in any order. State: ``rows`` float32 [n, K], ``priority`` float64 [n], the options.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        self.options = options_of(probe, _DEFAULTS) if probe is not None else dict(_DEFAULTS)
        self.patch = Patch.from_options(self.options)
        self.limit, self.each = int(self.options["rows"]), int(self.options["each"])
        self.priority: NDArray[np.float64] = np.zeros(0)
        self._rows: list[NDArray[np.float32]] = []

    @property
    def rows(self) -> NDArray[np.float32]:
        """The kept rows in order of priority, float32 [n, K]; CalibrationError when none was seen."""
        if not self._rows:
            raise CalibrationError("no row was seen")
        return np.stack(self._rows)

    def update(self, x: Array, sample: SampleId) -> None:
        """Take in one tensor of one sample."""
        if x.size == 0 or x.ndim == 0:
            return
        draw = np.random.default_rng((_SEED, sample.index))
        found = self._patches(x, draw) if self.patch.kernel else self._lines(x, draw)
        if found:
            self._keep(draw.random(len(found)), found)

    def _lines(self, x: Array, draw: np.random.Generator) -> list[NDArray[np.float32]]:
        flat = x.reshape(-1, x.shape[-1])
        return [np.asarray(flat[i], np.float32).copy() for i in draw.integers(0, len(flat), self.each)]

    def _patches(self, x: Array, draw: np.random.Generator) -> list[NDArray[np.float32]]:
        sizes = x.shape[2:]
        places = self.patch.places(sizes)
        if len(sizes) != len(self.patch.kernel) or not all(places):
            return []
        drawn = [(draw.integers(len(x)), *(int(draw.integers(n)) for n in places)) for _ in range(self.each)]
        image, *where = np.asarray(drawn, np.int64).T
        return list(np.asarray(self.patch.take(x, image, np.stack(where, axis=1)), np.float32))

    def _keep(self, priority: NDArray[np.float64], rows: list[NDArray[np.float32]]) -> None:
        everything = np.concatenate([self.priority, priority])
        pool = self._rows + rows
        order = np.argsort(everything, kind="stable")[: self.limit]
        self.priority, self._rows = everything[order], [pool[i] for i in order]

    def merge(self, other: Stats) -> None:
        """Add what ``other`` has seen; TypeError for another statistic, CalibrationError for other options."""
        if not isinstance(other, RowStats):
            raise TypeError(f"cannot merge {type(other).__name__} into RowStats")
        if other.options != self.options:
            raise CalibrationError("cannot merge reservoirs with different windows or sizes")
        self._keep(other.priority, other._rows)

    def state(self) -> dict[str, Array]:
        """Return the arrays described in the class docstring."""
        options: dict[str, Array] = {f"option.{k}": np.array(v) for k, v in sorted(self.options.items())}
        kept: dict[str, Array] = {"rows": self.rows, "priority": self.priority} if self._rows else {}
        return {**options, **kept}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> RowStats:
        """Rebuild from what `state` returned; KeyError when an array is missing."""
        new = cls()
        new.options = {k: float(state[f"option.{k}"]) for k in _DEFAULTS}
        new.patch = Patch.from_options(new.options)
        new.limit, new.each = int(new.options["rows"]), int(new.options["each"])
        if "rows" in state:
            new.priority = state["priority"].astype(np.float64)
            new._rows = [np.asarray(r, np.float32) for r in state["rows"]]
        return new
