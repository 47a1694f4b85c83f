"""Files of arrays opened defensively: an .npz as named streams, whose headers are read before their data."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from calib.errors import CalibrationError
from calib.readers.limits import ReadLimits, label
from calib.readers.npy import Header, read_header

__all__ = ["UNNAMED", "Member", "is_npz", "open_members"]

UNNAMED = ""
"""The name of the one array of an .npy file."""

_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    IndexError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Member:
    """One array of an open file: its header, and the stream that stands at its first data byte."""

    header: Header
    stream: IO[bytes]
    where: str


def is_npz(path: Path) -> bool:
    """Whether the path is read as an archive of named arrays (by its suffix)."""
    return path.suffix.lower() == ".npz"


@contextmanager
def open_members(path: Path, limits: ReadLimits) -> Iterator[dict[str, Member]]:
    """Open an .npy or .npz file and give its arrays by name, headers read, data not.

    Raises:
        CalibrationError: the file cannot be read, is damaged, or is not what its suffix says.
    """
    where = label(path)
    with ExitStack() as stack:
        try:
            _check_regular(path)
            if is_npz(path):
                members = _open_zip(stack.enter_context(zipfile.ZipFile(path)), stack, where, limits)
            else:
                stream = stack.enter_context(path.open("rb"))
                header = read_header(stream, where)
                _check_size(header, os.fstat(stream.fileno()).st_size, where)
                members = {UNNAMED: Member(header, stream, where)}
        except _BROKEN as error:
            raise _unreadable(where, error) from None
        try:
            yield members
        except _BROKEN as error:
            raise _unreadable(where, error) from None


def _unreadable(where: str, error: BaseException) -> CalibrationError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    cure = (
        "check that it exists and may be read" if isinstance(error, OSError) else "save it again with numpy"
    )
    return CalibrationError(f"{where}: cannot be read ({' '.join(str(reason).split())}); {cure}")


def _check_regular(path: Path) -> None:
    # Before opening: opening a pipe or a device would block or never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise CalibrationError(f"{label(path)}: not a regular file; pass .npy or .npz files")


def _check_size(header: Header, size: int, where: str) -> None:
    expected = header.offset + header.nbytes
    if size != expected:
        raise CalibrationError(
            f"{where}: the array's header promises {expected} bytes, there are {size}; save the array again"
        )


def _open_zip(
    archive: zipfile.ZipFile, stack: ExitStack, where: str, limits: ReadLimits
) -> dict[str, Member]:
    infos = archive.infolist()
    if not infos or len(infos) > limits.max_arrays:
        raise CalibrationError(
            f"{where}: holds {len(infos)} arrays, not 1 to {limits.max_arrays}; save one array per input"
        )
    members: dict[str, Member] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if name == info.filename or name in members:
            raise CalibrationError(
                f"{where}: member {info.filename!r} is no array or repeated; use numpy.savez"
            )
        place = f"{where}: array {name!r}"
        # Only what numpy writes: the other methods decompress without a bound on their output.
        if info.flag_bits & _ENCRYPTED or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise CalibrationError(
                f"{place} is encrypted or unusually compressed; use numpy.savez_compressed"
            )
        stream = stack.enter_context(archive.open(info))
        header = read_header(stream, place)
        _check_size(header, info.file_size, place)
        members[name] = Member(header, stream, place)
    return members
