"""From a command's parameters to what the API takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim_ptq.asked import Asked

__all__ = ["asked_by"]


def asked_by(given: Mapping[str, Any]) -> Asked:
    """What the parameters ``given`` (a command's ``locals()``) ask for; those that are the command's own are passed
    over. The recipe is loaded, and so are statistics: both are used again when the result is looked at."""
    from calib.readers import parse_range, parse_shape
    from calib.saved.store import Statistics
    from onnxslim_ptq.asked import Asked
    from onnxslim_ptq.commands.preflight import require_device_name
    from onnxslim_ptq.commands.samples import with_data

    require_device_name(given.get("device", "cpu"))

    stats = given.get("stats")
    return Asked.of(
        given,
        recipe=with_data(given["recipe"], given["preprocess"], given["tokenizer"]),
        calib_data=given["calib"] or None,
        eval_data=given.get("evaluation"),
        stats=Statistics.load(stats) if stats else None,
        shapes=dict(map(parse_shape, given.get("shape") or ())),
        ranges=dict(map(parse_range, given.get("value_range") or ())),
        include=given.get("include") or (),
        exclude=given.get("exclude") or (),
    )
