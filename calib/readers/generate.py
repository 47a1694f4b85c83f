"""Samples without data: drawn from the declared shapes and dtypes of the model's inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from calib.errors import CalibrationError
from calib.readers.access import Selectable
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits, quoted
from calib.types import Array, Dataset, Feed, InputInfo, Sample, SampleId

__all__ = ["parse_range", "parse_shape", "synthetic"]

_SHAPE = re.compile(r"[0-9]{1,18}(x[0-9]{1,18})*", re.ASCII)


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse ``name:1x3x224x224`` into (name, dimensions); the name may itself contain colons.

    Raises:
        CalibrationError: the text has another form.
    """
    name, colon, sizes = text.rpartition(":")
    if not colon or not name or not _SHAPE.fullmatch(sizes):
        raise CalibrationError(f"--shape {text!r}: expected NAME:DIMxDIMx..., e.g. --shape name:1x3x224x224")
    return name, tuple(int(size) for size in sizes.split("x"))


def parse_range(text: str) -> tuple[str, tuple[float, float]]:
    """Parse ``name:0,1`` into (name, (lowest, highest)); the name may itself contain colons.

    Raises:
        CalibrationError: the text has another form, or the bounds are not finite and ascending.
    """
    name, _, bounds = text.rpartition(":")
    try:
        low, high = (float(bound) for bound in bounds.split(","))
    except ValueError:
        low = high = math.nan
    if not name or not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise CalibrationError(
            f"--range {text!r}: expected NAME:LOW,HIGH with LOW <= HIGH, e.g. --range name:0,1"
        )
    return name, (low, high)


def synthetic(
    inputs: Sequence[InputInfo],
    *,
    count: int = 8,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> Dataset:
    """Draw ``count`` samples: floats N(0, 1) or uniform in a range, integers 0, 1 or in a range, bools.

    Sample i depends on (seed, i) only, so any pass over any part of the data gives the same bytes. A dynamic
    first dimension is 1 unless ``shapes`` says otherwise; other dynamic dimensions must be given.

    Raises:
        CalibrationError: a shape is unknown or does not fit, a range does not fit its dtype, or a dtype has
            no distribution here.
    """
    shapes, ranges = shapes or {}, ranges or {}
    names = [info.name for info in inputs]
    for option, given in (("--shape", shapes), ("--range", ranges)):
        for name in given:
            if name not in names:
                raise CalibrationError(
                    f"{option} {name}: no such input; the model's inputs are {quoted(names)}"
                )
    if count < 1:
        raise CalibrationError(f"--samples {count}: must be at least 1")
    if seed < 0:
        raise CalibrationError(f"--seed {seed}: must be at least 0")
    limits.check_count(count, "synthetic data")
    plans = tuple(_plan(info, shapes.get(info.name), ranges.get(info.name)) for info in inputs)
    nbytes = sum(
        math.prod(plan.shape) * max(8, plan.dtype.itemsize) for plan in plans
    )  # drawn as 8 bytes, then cast
    limits.check_bytes(nbytes, "synthetic data", "choose smaller dimensions with --shape")
    return _SyntheticDataset(plans, count, seed)


@dataclass(frozen=True)
class _Plan:
    """One input to draw: ``family`` is 'f' (float), 'i' (integer) or 'b' (bool)."""

    name: str
    dtype: np.dtype[np.generic]
    family: str
    shape: tuple[int, ...]
    bounds: tuple[float, float] | None

    def draw(self, rng: np.random.Generator) -> Array:
        if self.family == "b":
            return rng.integers(0, 2, self.shape).astype(self.dtype)
        if self.family == "i":
            low, high = self.bounds or (0, 1)
            wide = np.uint64 if self.dtype.kind == "u" else np.int64
            return rng.integers(int(low), int(high), self.shape, dtype=wide, endpoint=True).astype(self.dtype)
        if self.bounds is None:
            return np.asarray(rng.standard_normal(self.shape)).astype(self.dtype)
        return np.asarray(rng.uniform(*self.bounds, self.shape)).astype(self.dtype)


@dataclass(frozen=True)
class _SyntheticDataset(Selectable):
    plans: tuple[_Plan, ...]
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ``positions``; each is drawn from its own generator."""
        for position in positions:
            rng = np.random.default_rng((self.seed, position))
            feed: Feed = {plan.name: plan.draw(rng) for plan in self.plans}
            yield SampleId(position, f"synthetic {position}"), feed


def _plan(info: InputInfo, given: tuple[int, ...] | None, bounds: tuple[float, float] | None) -> _Plan:
    family = _family(info.dtype)
    if not family:
        raise CalibrationError(
            f"input {info.name!r} has dtype {info.dtype}, which cannot be drawn; pass --calib DATA"
        )
    if bounds is not None:
        _check_bounds(info, family, bounds)
    return _Plan(info.name, info.dtype, family, _shape(info, given), bounds)


def _family(dtype: np.dtype[np.generic]) -> str:
    if dtype.kind == "V":  # ml_dtypes: bfloat16, float8_*, int4, ...
        return "f" if "float" in dtype.name else "i" if "int" in dtype.name else ""
    return {"f": "f", "i": "i", "u": "i", "b": "b"}.get(dtype.kind, "")


def _check_bounds(info: InputInfo, family: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    place = f"--range {info.name}:{low:g},{high:g}"
    if family == "b":
        raise CalibrationError(f"{place}: input {info.name!r} is bool and has no range; leave the option out")
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise CalibrationError(f"{place}: bounds must be finite with LOW <= HIGH")
    find: Any = ml_dtypes.iinfo if family == "i" else ml_dtypes.finfo
    limits = find(info.dtype)
    whole = family == "f" or (float(low).is_integer() and float(high).is_integer())
    if not whole or low < float(limits.min) or high > float(limits.max):
        raise CalibrationError(
            f"{place}: not values of {info.dtype}; choose {'bounds' if family == 'f' else 'whole numbers'} within "
            f"{limits.min}..{limits.max}"
        )


def _shape(info: InputInfo, given: tuple[int, ...] | None) -> tuple[int, ...]:
    if given is not None:
        _check_given(info, given)
        return given
    if info.shape is None:
        raise CalibrationError(f"input {info.name!r} declares no shape; pass --shape {info.name}:1x3x224x224")
    shape = tuple(
        1 if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(info.shape)
    )
    fixed = tuple(size for size in shape if isinstance(size, int))
    if len(fixed) < len(shape):
        declared = "x".join("?" if size is None else str(size) for size in info.shape)
        example = [size if isinstance(size, int) else 224 for size in shape]
        raise CalibrationError(
            f"input {info.name!r} has dynamic dimensions ({declared}); "
            f"pass their sizes, e.g. --shape {info.name}:{'x'.join(map(str, example))} "
            f"(in Python shapes={{{info.name!r}: {tuple(example)}}})"
        )
    return fixed


def _check_given(info: InputInfo, given: tuple[int, ...]) -> None:
    text = f"--shape {info.name}:{'x'.join(str(size) for size in given)}"
    if any(size < 0 for size in given):
        raise CalibrationError(f"{text}: dimensions must not be negative")
    if info.shape is None:
        return
    fits = len(given) == len(info.shape) and all(
        size == wanted for size, wanted in zip(given, info.shape, strict=True) if isinstance(wanted, int)
    )
    if not fits:
        declared = "x".join("?" if size is None else str(size) for size in info.shape)
        raise CalibrationError(f"{text}: the model declares {declared}; keep its rank and fixed dimensions")
