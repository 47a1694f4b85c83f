"""Errors of a model's outputs against the float model, pooled over samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.types import Array
from onnxslim_ptq.core.qmath import sqnr_db

_AT_ONCE = 1 << 20  # elements: logits of a language model are large, and are compared in float64
__all__ = ["Output", "OutputError", "first_top1", "leaves", "worst_sqnr"]

Output = Any  # an array, a list or dict of outputs (sequence and map types), or a number in one


def leaves(output: Output) -> list[Array]:
    """The tensors of an output, in order."""
    if isinstance(output, np.ndarray):
        return [output]
    if isinstance(output, dict):
        return [leaf for value in output.values() for leaf in leaves(value)]
    if isinstance(output, list):
        return [leaf for value in output for leaf in leaves(value)]
    return [np.asarray(output)]  # a number in a map


@dataclass
class OutputError:
    """What is known of one output after any number of samples.

    Float outputs: SQNR = 10 log10(Σ y² / Σ (y - ŷ)²) in dB, cosine = Σ y ŷ / sqrt(Σ y² Σ ŷ²), largest |y - ŷ|, all in
    float64 over all elements of all samples. Integer and bool outputs: the fraction that is equal. ``top1``: the
    share of rows along the last axis (of two values or more) whose largest value is at the same place.
    """

    name: str
    signal: float = 0.0
    noise: float = 0.0
    seen: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    equal: int = 0
    count: int = 0
    agreeing: int = 0
    rows: int = 0
    is_float: bool = True
    faults: list[str] = field(default_factory=list)

    def add(self, exact: Output, seen: Output, sample: str) -> None:
        """Take in one sample's outputs; a changed shape or a new NaN or Inf is a fault."""
        ys, zs = leaves(exact), leaves(seen)
        if len(ys) != len(zs):
            self.faults.append(f"{sample}: output '{self.name}' has {len(zs)} tensors, float {len(ys)}")
            return
        for y, z in zip(ys, zs, strict=True):
            self._add(y, z, sample)

    def _add(self, exact: Array, seen: Array, sample: str) -> None:
        if exact.shape != seen.shape:
            self.faults.append(
                f"{sample}: output '{self.name}' has shape {list(seen.shape)}, float {list(exact.shape)}"
            )
            return
        self.count += exact.size
        if exact.dtype.kind != "f":
            self.is_float = False
            self.equal += int(np.count_nonzero(exact == seen))
            return
        if exact.ndim > 1 and exact.shape[-1] > 1 and exact.size:
            same = exact.argmax(axis=-1) == seen.argmax(axis=-1)
            self.rows, self.agreeing = self.rows + same.size, self.agreeing + int(np.count_nonzero(same))
        for start in range(0, exact.size, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            y, z = (v.reshape(-1)[part].astype(np.float64) for v in (exact, seen))
            known = np.isfinite(y)
            if not np.isfinite(z[known]).all():
                self.faults.append(
                    f"{sample}: output '{self.name}' has NaN or Inf where the float model has none"
                )
                return
            self._pool(y[known], z[known])

    def _pool(self, y: NDArray[np.float64], z: NDArray[np.float64]) -> None:
        self.signal += float(y @ y)
        self.seen += float(z @ z)
        self.product += float(y @ z)
        difference = y - z
        self.noise += float(difference @ difference)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))

    @property
    def sqnr(self) -> float | None:
        """SQNR in dB, inf when nothing differs, None for an output without signal or not of float type."""
        return sqnr_db(self.signal, self.noise) if self.is_float else None

    @property
    def cosine(self) -> float | None:
        scale = np.sqrt(self.signal * self.seen)
        return float(self.product / scale) if self.is_float and scale > 0 else None

    @property
    def top1(self) -> float | None:
        return self.agreeing / self.rows if self.rows else None

    def as_json(self) -> dict[str, object]:
        """The measurements with their units in the names."""
        if not self.is_float:
            return {"equal": self.equal / self.count if self.count else None}
        return {"sqnr_db": self.sqnr, "cosine": self.cosine, "max_abs_error": self.largest}


def worst_sqnr(errors: list[OutputError]) -> float | None:
    """The smallest SQNR of all float outputs that carry a signal: the headline."""
    known = [e.sqnr for e in errors if e.sqnr is not None]
    return min(known) if known else None


def first_top1(errors: list[OutputError]) -> float | None:
    """Top-1 agreement of the first float output that has rows: the scores or logits; caches come after them."""
    return next((e.top1 for e in errors if e.is_float and e.rows), None)
