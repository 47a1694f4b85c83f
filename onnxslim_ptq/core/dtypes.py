"""Integer types a tensor can be quantized to, as values that carry their limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["INT8", "INT32", "UINT8", "IntType", "int_type"]


@dataclass(frozen=True)
class IntType:
    """An integer type: its ONNX/numpy name and the codes it can hold."""

    name: str
    lowest: int
    highest: int

    @property
    def signed(self) -> bool:
        return self.lowest < 0

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(self.name)

    def __str__(self) -> str:
        return self.name


INT8 = IntType("int8", -128, 127)
UINT8 = IntType("uint8", 0, 255)
INT32 = IntType("int32", -(2**31), 2**31 - 1)
_BY_NAME = {t.name: t for t in (INT8, UINT8, INT32)}


def int_type(name: str) -> IntType:
    """The type of that name; raises ValueError naming the accepted ones."""
    if name not in _BY_NAME:
        raise ValueError(f"integer type '{name}' is unknown; use one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
