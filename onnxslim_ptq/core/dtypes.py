"""Integer types a tensor can be quantized to, as values that carry their limits."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

__all__ = ["INT4", "INT8", "INT16", "INT32", "UINT4", "UINT8", "UINT16", "IntType", "int_type"]


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
    def bits(self) -> int:
        return (self.highest - self.lowest).bit_length()

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The numpy type that holds codes; 4-bit codes lie in bytes until they are written."""
        return np.dtype({"int4": "int8", "uint4": "uint8"}.get(self.name, self.name))

    @property
    def stored_dtype(self) -> np.dtype[np.generic]:
        """The type of the codes in a file: `dtype`, or for 4 bits a type of ml_dtypes, which onnx packs."""
        return np.dtype(getattr(ml_dtypes, self.name)) if self.bits < 8 else self.dtype

    def __str__(self) -> str:
        return self.name


INT4 = IntType("int4", -8, 7)
UINT4 = IntType("uint4", 0, 15)
INT8 = IntType("int8", -128, 127)
UINT8 = IntType("uint8", 0, 255)
INT16 = IntType("int16", -(2**15), 2**15 - 1)
UINT16 = IntType("uint16", 0, 2**16 - 1)
INT32 = IntType("int32", -(2**31), 2**31 - 1)
_BY_NAME = {t.name: t for t in (INT4, UINT4, INT8, UINT8, INT16, UINT16, INT32)}


def int_type(name: str) -> IntType:
    """The type of that name; raises ValueError naming the accepted ones."""
    if name not in _BY_NAME:
        raise ValueError(f"integer type '{name}' is unknown; use one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
