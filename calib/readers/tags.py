"""Entries of a sample that say what the sample is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calib.errors import CalibrationError
from calib.types import Array, Feed, InputInfo

__all__ = ["TAGS", "split_tags"]

TAGS = ("timestep_idx",)
"""The names that become `SampleId.tags`."""


def split_tags(
    arrays: Feed, inputs: Sequence[InputInfo], where: str
) -> tuple[dict[str, Array], Mapping[str, int]]:
    """The arrays that are fed, and the tags: one that is an input of the model is fed as well.

    Raises:
        CalibrationError: a tag that is no input is not one integer.
    """
    fed, tags = dict(arrays), {}
    names = {info.name for info in inputs}
    for name in TAGS:
        if name in fed:
            value = fed[name] if name in names else fed.pop(name)
            if value.size != 1 or value.dtype.kind not in "iu":
                if name in names:
                    continue
                raise CalibrationError(
                    f"{where}: '{name}' is {value.dtype} {list(value.shape)}, a tag is one integer; "
                    f"save numpy.array(3) under that name"
                )
            tags[name] = int(value.reshape(-1)[0])
    return fed, tags
