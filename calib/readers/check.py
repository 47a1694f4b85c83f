"""One rule for what a sample must look like, whatever it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from calib.errors import CalibrationError
from calib.readers.limits import quoted
from calib.types import Array, InputInfo

__all__ = ["check_feed", "numbers_of"]


def check_feed(
    feed: Mapping[str, Array], inputs: Sequence[InputInfo], where: str, first_axis_cure: str
) -> dict[str, Array]:
    """Return the feed in the model's input order, cast where nothing is lost, native-endian and contiguous.

    Accepted casts: an integer to one that holds all its values, a float to a wider one, float64 to float32
    (numpy's default dtype to the models' usual one) unless a value overflows. Everything else must match.

    Raises:
        CalibrationError: an input is missing, an array unknown, or a rank, dimension or dtype does not fit.
    """
    _check_names(feed, inputs, where)
    result: dict[str, Array] = {}
    for info in inputs:
        place = f"{where}: input {info.name!r}"
        _check_shape(feed[info.name], info, place, first_axis_cure)
        result[info.name] = _contiguous(_cast(feed[info.name], info.dtype, place))
    return result


def numbers_of(value: object, dtype: np.dtype[np.generic]) -> tuple[Array, Array]:
    """Nested lists as numpy reads them, and the same as ``dtype``; whether that lost anything is the caller's to judge.

    Raises ValueError, TypeError or OverflowError for what is no array of numbers.
    """
    exact = np.asarray(value)
    with np.errstate(over="ignore", invalid="ignore"):
        return exact, exact.astype(dtype)


def _check_names(feed: Mapping[str, Array], inputs: Sequence[InputInfo], where: str) -> None:
    names = [info.name for info in inputs]
    unknown = [name for name in feed if name not in names]
    missing = [name for name in names if name not in feed]
    if unknown and missing:
        raise CalibrationError(
            f"{where}: array {unknown[0]!r} is no input of the model, and input {missing[0]!r} is missing; "
            f"name the arrays like the model's inputs: {quoted(names)}"
        )
    if unknown:
        raise CalibrationError(
            f"{where}: array {unknown[0]!r} is not an input of the model, whose inputs are {quoted(names)}; "
            "rename it or leave it out"
        )
    if missing:
        raise CalibrationError(
            f"{where}: input {missing[0]!r} is missing, the sample has {quoted(feed)}; "
            f"give one array per model input: {quoted(names)}"
        )


def _check_shape(array: Array, info: InputInfo, place: str, first_axis_cure: str) -> None:
    if info.shape is None:
        return
    declared = "[" + ", ".join("?" if size is None else str(size) for size in info.shape) + "]"
    if array.ndim != len(info.shape):
        cure = (
            "add the missing first axis with x[None]" if array.ndim == len(info.shape) - 1 else "reshape it"
        )
        raise CalibrationError(
            f"{place} has shape {list(array.shape)}, rank {array.ndim}, but the model wants rank "
            f"{len(info.shape)}: {declared}; {cure}"
        )
    for axis, (size, wanted) in enumerate(zip(array.shape, info.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted:
            cure = first_axis_cure if axis == 0 else "resize or pad it as the model's preprocessing does"
            raise CalibrationError(
                f"{place} has shape {list(array.shape)}, but the model wants {declared}: "
                f"axis {axis} is {size} instead of {wanted}; {cure}"
            )


def _cast(array: Array, wanted: np.dtype[np.generic], place: str) -> Array:
    found = array.dtype
    if found.newbyteorder("=") == wanted:
        return array.astype(wanted, copy=False)
    if wanted.kind == "O":
        return _strings(array, place)
    if _raw_of(found, wanted):
        return _contiguous(array).view(wanted)
    if found == np.float64 and wanted == np.float32:
        return _narrow(array, wanted, place)
    same_family = found.kind == wanted.kind or {found.kind, wanted.kind} == {"i", "u"}
    if same_family and found.kind in "iuf" and np.can_cast(found, wanted, "safe"):
        return array.astype(wanted)
    raise CalibrationError(
        f"{place} has dtype {found}, but the model wants {wanted}; {_cast_cure(found, wanted)}"
    )


def _raw_of(found: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> bool:
    # .npy has no name for bfloat16 and float8: numpy stores them as void of their size.
    return found.type is np.void and wanted.kind == "V" and found.itemsize == wanted.itemsize


def _cast_cure(found: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> str:
    if found.kind in "iu" and (wanted.kind == "f" or "float" in wanted.name):
        return (
            f"apply the model's preprocessing and save the result, e.g. (x / 255).astype('{wanted.name}') "
            "if it was trained on 0..1"
        )
    return f"convert it where you save it, e.g. x.astype('{wanted.name}')"


def _narrow(array: Array, wanted: np.dtype[np.generic], place: str) -> Array:
    with np.errstate(over="ignore"):
        result = array.astype(wanted)
    if np.isinf(result).sum() != np.isinf(array).sum():
        raise CalibrationError(f"{place} has float64 values beyond {wanted}'s range; clip or rescale them")
    return result


def _strings(array: Array, place: str) -> Array:
    if array.dtype.kind == "U":
        return array.astype(object)
    if array.dtype.kind == "O" and all(isinstance(item, str) for item in array.flat):
        return array
    raise CalibrationError(
        f"{place} has dtype {array.dtype}, but the model wants strings; save x.astype(str)"
    )


def _contiguous(array: Array) -> Array:
    # Not numpy.ascontiguousarray: it turns a 0-d array into a 1-d one.
    return array if array.flags.c_contiguous else array.copy(order="C")
