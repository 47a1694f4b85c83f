"""A bounded reservoir of the rows a layer multiplies with its weight: tokens of a MatMul, patches of a Conv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from calib.stats.options import options_of
from calib.types import Array, Probe, SampleId, Stats

__all__ = ["Patch", "RowStats"]

_SPATIAL = 3  # Conv1d to Conv3d
_SEED = 0x5EED


@dataclass(frozen=True)
class Patch:
    """The window of a convolution, one entry per spatial axis (outermost first); empty for MatMul and Gemm."""

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def options(self) -> tuple[tuple[str, float], ...]:
        """The window as probe options ``k0, s0, d0, b0, e0, k1, …``."""
        axes = zip(self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True)
        return tuple(
            (f"{key}{i}", float(v))
            for i, values in enumerate(axes)
            for key, v in zip("ksdbe", values, strict=True)
        )

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> Patch:
        """The inverse of `options`; a kernel of 0 means "no such axis"."""
        rank = sum(1 for i in range(_SPATIAL) if options.get(f"k{i}", 0) > 0)
        return cls(*(tuple(int(options[f"{key}{i}"]) for i in range(rank)) for key in "ksdbe"))

    def places(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many windows fit along each spatial axis."""
        axes = zip(sizes, self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True)
        return tuple(max(0, (n + b + e - d * (k - 1) - 1) // s + 1) for n, k, s, d, b, e in axes)


_DEFAULTS = {"rows": 256.0, "each": 8.0} | {f"{key}{i}": 0.0 for i in range(_SPATIAL) for key in "ksdbe"}


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
        return [
            self._patch(x[draw.integers(len(x))], [int(draw.integers(n)) for n in places])
            for _ in range(self.each)
        ]

    def _patch(self, image: Array, place: list[int]) -> NDArray[np.float32]:
        p = self.patch
        where = [
            i * s - b + np.arange(k) * d
            for i, k, s, d, b in zip(place, p.kernel, p.strides, p.dilations, p.begin, strict=True)
        ]
        inside = [(w >= 0) & (w < n) for w, n in zip(where, image.shape[1:], strict=True)]
        window = np.zeros((image.shape[0], *p.kernel), np.float32)
        channels = np.arange(image.shape[0])
        source = np.ix_(channels, *[w[ok] for w, ok in zip(where, inside, strict=True)])
        window[np.ix_(channels, *[np.flatnonzero(ok) for ok in inside])] = image[source]
        return window.reshape(-1)

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
