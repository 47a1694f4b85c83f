"""Calibration samples from files, Python objects or thin air: bounded, validated, never unpickled."""

from __future__ import annotations

from calib.readers.digest import fingerprint
from calib.readers.feeds import from_iterable
from calib.readers.files import open_data
from calib.readers.generate import parse_range, parse_shape, synthetic
from calib.readers.limits import ReadLimits
from calib.readers.split import MeasuredOn, split_held_out, take

__all__ = [
    "MeasuredOn",
    "ReadLimits",
    "fingerprint",
    "from_iterable",
    "open_data",
    "parse_range",
    "parse_shape",
    "split_held_out",
    "synthetic",
    "take",
]
