"""Calibration samples from files, Python objects or thin air: bounded, validated, never unpickled."""

from __future__ import annotations

from calib.readers.digest import fingerprint
from calib.readers.feeds import from_iterable
from calib.readers.files import HowToRead, open_data
from calib.readers.generate import parse_range, parse_shape, synthetic
from calib.readers.limits import ReadLimits
from calib.readers.split import JUDGED, MeasuredOn, split_held_out, spread, subset, take
from calib.readers.text import TextSettings

__all__ = [
    "JUDGED",
    "HowToRead",
    "MeasuredOn",
    "ReadLimits",
    "TextSettings",
    "fingerprint",
    "from_iterable",
    "open_data",
    "parse_range",
    "parse_shape",
    "split_held_out",
    "spread",
    "subset",
    "synthetic",
    "take",
]
