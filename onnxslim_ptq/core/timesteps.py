"""Which time steps the rows of [T, ...] tensors belong to, as the metadata of a .safetensors file tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CalibratedSteps"]

_KEY = "onnxslim_ptq.timesteps"
_FROM, _ROWS = "static_from", "rows"


@dataclass(frozen=True)
class CalibratedSteps:
    """Row i is of step ``rows[i]``, ascending; activations are static from step ``threshold`` on, which is one of them.

    ValueError otherwise.
    """

    threshold: int
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = all(type(step) is int and step >= 0 for step in self.rows)
        if not whole or list(self.rows) != sorted(set(self.rows)) or self.threshold not in self.rows:
            raise ValueError("time steps are not ascending whole numbers, of which static_from is one")

    def metadata(self) -> dict[str, str]:
        """One entry, so that its order in the file does not depend on the writer."""
        return {_KEY: json.dumps({_FROM: self.threshold, _ROWS: list(self.rows)})}

    @staticmethod
    def read(metadata: Mapping[str, str]) -> CalibratedSteps | None:
        """What `metadata` wrote, None where there is nothing of it; ValueError for anything else under its key."""
        if _KEY not in metadata:
            return None
        try:
            told = json.loads(metadata[_KEY])
            threshold, rows = told[_FROM], tuple(told[_ROWS])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"metadata '{_KEY}' holds no {_FROM} and {_ROWS}") from None
        return CalibratedSteps(threshold, rows)
