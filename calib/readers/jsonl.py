"""A line of JSON as a sample: a text, or numbers under the names of the model's inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from calib.errors import CalibrationError
from calib.readers.check import numbers_of
from calib.readers.limits import quoted
from calib.readers.tags import TAGS
from calib.types import Array, Feed, InputInfo

__all__ = ["JSONL", "parse_row"]

JSONL = ".jsonl"
_TEXTS = ("text", "prompt")


def parse_row(line: str, inputs: Sequence[InputInfo], where: str) -> str | Feed:
    """The text of a row (a JSON string, or under ``text`` or ``prompt``), or the arrays of its numbers.

    Beside a text other keys are ignored. Numbers get the dtype their input declares; a missing leading axis is added.

    Raises:
        CalibrationError: not JSON, neither text nor inputs, or values that are no array of that dtype.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        raise CalibrationError(f"{where}: not a line of JSON ({reason}); write one object per line") from None
    if isinstance(row, str):
        return row
    names = [info.name for info in inputs]
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where}: is {type(row).__name__}, not an object with 'text' or {quoted(names)}"
        )
    text = next((row[key] for key in _TEXTS if key in row and key not in names), None)
    if text is not None:
        if not isinstance(text, str):
            raise CalibrationError(f"{where}: its text is {type(text).__name__}; give a string")
        return text
    if not any(name in row for name in names):
        raise CalibrationError(
            f"{where}: has neither 'text' nor 'prompt' nor an input of the model, {quoted(names)}; "
            f"its keys are {quoted(row)}"
        )
    by_name = {info.name: info for info in inputs}
    arrays: dict[str, Array] = {}
    for name, value in row.items():
        info = by_name.get(name) or (InputInfo(name, np.dtype(np.int64), ()) if name in TAGS else None)
        if info is None:
            raise CalibrationError(
                f"{where}: {name!r} is no input of the model, whose inputs are {quoted(names)}; leave it out"
            )
        arrays[name] = _numbers(value, info, f"{where}: {name!r}")
    return arrays


def _numbers(value: Any, info: InputInfo, place: str) -> Array:
    cure = f"give {'whole ' if info.dtype.kind in 'iu' else ''}numbers in lists of equal length"
    try:
        exact, array = numbers_of(value, info.dtype)
    except (ValueError, TypeError, OverflowError):
        raise CalibrationError(f"{place} are no values of {info.dtype}; {cure}") from None
    integral = info.dtype.kind in "iub"
    allowed = "biu" if integral else "biuf"
    if exact.dtype.kind not in allowed and exact.size:
        raise CalibrationError(f"{place} are no values of {info.dtype}; {cure}")
    lost = integral and not np.array_equal(array, exact)
    if lost or (info.dtype.kind == "f" and np.isinf(array).sum() != np.isinf(exact).sum()):
        raise CalibrationError(f"{place} are beyond {info.dtype}; {cure}")
    missing_axis = info.shape is not None and array.ndim == len(info.shape) - 1
    return array[None] if missing_axis else array
