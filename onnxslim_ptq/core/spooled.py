"""Weight codes that wait on the disk, for models larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from calib.types import Array
from onnxslim_ptq.core.spec import WeightCodes

__all__ = ["SpooledCodes"]


class SpooledCodes(dict[str, WeightCodes]):
    """A plan's weight codes; codes that are stored pass through ``keep``, which returns an equal array in a file."""

    def __init__(self, keep: Callable[[Array], Array]) -> None:
        super().__init__()
        self._keep = keep

    def __setitem__(self, key: str, value: WeightCodes) -> None:
        super().__setitem__(key, replace(value, codes=self._keep(value.codes)))
