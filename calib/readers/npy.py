"""The .npy format read defensively: the header is judged before a byte of data is allocated.

``numpy.load`` is not used: it reads a version 2 header of up to 4 GiB before it looks at it, and trusts the
shape in the header for its allocation.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import IO

import numpy as np

from calib.errors import CalibrationError
from calib.readers.limits import size_text
from calib.types import Array

__all__ = ["Header", "read_array", "read_end", "read_header"]

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # numpy's own bound: literal_eval must not be fed more than that
_MAX_RANK = 32  # numpy 1.26
_NO_ARRAY = 1 << 63  # bytes
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Header:
    """What a .npy header declares; ``offset`` is where the data starts in the stream."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data: product(shape) * itemsize, exact however large."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], where: str) -> Header:
    """Read the header of a .npy stream and leave the stream at the first data byte.

    Raises:
        CalibrationError: not a .npy stream, or it holds Python objects, fields or an impossible shape.
    """
    prefix = stream.read(len(_MAGIC) + 2)
    if len(prefix) < len(_MAGIC) + 2 or not prefix.startswith(_MAGIC):
        raise CalibrationError(f"{where}: not a .npy array; write it with numpy.save or numpy.savez")
    version = (prefix[-2], prefix[-1])
    if version not in ((1, 0), (2, 0)):
        raise CalibrationError(
            f"{where}: .npy version {version[0]}.{version[1]} is not supported; save a plain array"
        )
    length_bytes = stream.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > _MAX_HEADER:
        raise CalibrationError(
            f"{where}: .npy header of {length} bytes, at most {_MAX_HEADER} are read; save it again"
        )
    text = stream.read(length)
    shape, fortran, dtype = _parse(io.BytesIO(length_bytes + text), version, where)
    _check(shape, dtype, where)
    return Header(dtype, shape, fortran, len(prefix) + len(length_bytes) + length)


def _parse(
    header: IO[bytes], version: tuple[int, int], where: str
) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(header)
    except (
        Exception
    ) as error:  # the text is hostile: numpy lets tokenizer, recursion and memory errors through
        raise CalibrationError(
            f"{where}: damaged .npy header ({type(error).__name__}); save the array again"
        ) from None
    return tuple(int(size) for size in shape), bool(fortran), dtype


def _check(shape: tuple[int, ...], dtype: np.dtype[np.generic], where: str) -> None:
    if dtype.hasobject:
        raise CalibrationError(
            f"{where}: holds Python objects, which are never unpickled; save a plain array of numbers"
        )
    if dtype.names is not None or dtype.subdtype is not None or dtype.itemsize == 0:
        raise CalibrationError(
            f"{where}: has the structured or empty dtype {dtype}; save one plain array per input"
        )
    possible = len(shape) <= _MAX_RANK and all(size >= 0 for size in shape)
    if not possible or math.prod(shape) * dtype.itemsize >= _NO_ARRAY:
        raise CalibrationError(f"{where}: its header declares an impossible shape; save the array again")


def read_array(stream: IO[bytes], dtype: np.dtype[np.generic], shape: tuple[int, ...], where: str) -> Array:
    """Read the next ``product(shape)`` elements in C order and nothing beyond them.

    Raises:
        CalibrationError: the stream ends before the array does.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    data = np.empty(nbytes, np.uint8)
    done = 0
    while done < nbytes:
        chunk = stream.read(min(_CHUNK, nbytes - done))
        if not chunk:
            raise CalibrationError(
                f"{where}: its header promises {size_text(nbytes)}, it has {size_text(done)}; save it again"
            )
        data[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
    array: Array = np.ndarray(shape, dtype, data)
    return array


def read_end(stream: IO[bytes], where: str) -> None:
    """Check that the stream ends here; in a zip this also checks the member's CRC.

    Raises:
        CalibrationError: there are bytes after the array.
    """
    if stream.read(1):
        raise CalibrationError(f"{where}: has data after its array; save one array per .npy, or an .npz")
