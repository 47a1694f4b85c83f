"""Where a model's external data lies, and that it lies inside the model's own folder.

onnx refuses every link and so every model of a Hugging Face cache; following links freely would let a
downloaded model read any file. One layout of links is followed, and only with both ends in the same cache::

    models--org--name/snapshots/<revision>/model.onnx_data  ->  models--org--name/blobs/<hash>
"""

from __future__ import annotations

import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
from onnx import TensorProto

from calib.errors import GraphError
from calib.types import Array

__all__ = ["ExternalSpan", "read", "read_tensor", "resolve"]

_KEYS = frozenset({"location", "offset", "length", "checksum", "basepath"})
_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")
_DAMAGED = "the model is damaged, export it again"
_BESIDE = "put the data file beside the model and use its name"
_MAX_LOCATION = 4096
_MAX_RANK = 32
_MAX_BYTES = 1 << 40  # of one tensor: a sparse file can claim any size
_PACKED_BITS = {
    "INT2": 2,
    "UINT2": 2,
    "INT4": 4,
    "UINT4": 4,
    "FLOAT4E2M1": 4,
    "FLOAT6E2M3": 6,
    "FLOAT6E3M2": 6,
}
# Windows has no O_NOFOLLOW and no O_NONBLOCK; the inode comparison still holds there.
_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)


@dataclass(frozen=True)
class ExternalSpan:
    """Bytes ``offset .. offset + length`` of a checked file; ``identity`` is its (device, inode)."""

    path: Path
    offset: int
    length: int
    identity: tuple[int, int]


@dataclass(frozen=True)
class _Found:
    """A canonical path inside the model's folder or cache, and its status when it was judged."""

    path: Path
    status: os.stat_result


def resolve(model_path: Path, tensor: TensorProto) -> ExternalSpan:
    """Find the bytes of an external tensor, contained in the folder of ``model_path`` as given.

    Raises:
        GraphError: the entries are malformed, the file is missing, outside, a link or no regular file, or it
            is too short for the tensor's dtype and shape.
    """
    place = f"{_text(str(model_path))}: tensor {tensor.name!r}"
    entries = _entries(tensor, place)
    parts = _parts(entries.get("location", ""), place)
    needed = _needed_bytes(tensor, place)
    offset = _number(entries, "offset", place) or 0
    length = _number(entries, "length", place)
    if length is not None and length != needed:
        _fail(place, f"length {length} is not the {needed} bytes of its dtype and shape", _DAMAGED)
    found = _contained(model_path, parts, place)
    status = _proven(found, place)
    end = offset + needed
    if end > status.st_size:
        name = _text(found.path.name)
        _fail(
            place,
            f"ends at byte {end} of {name}, which has {status.st_size}",
            "the file is incomplete, get it again",
        )
    return ExternalSpan(found.path, offset, needed, (status.st_dev, status.st_ino))


def read(span: ExternalSpan, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
    """Map the span as a read-only array of ``dtype`` and ``shape``; any offset is fine, nothing is copied.

    A dtype packed below a byte (int4, ...) is read as uint8 of shape (span.length,).

    Raises:
        GraphError: the file was replaced or shortened since `resolve`, or the span has another size.
    """
    place = f"{_text(str(span.path))}: bytes {span.offset} to {span.offset + span.length}"
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != span.length:
        _fail(place, f"are no {dtype} array of shape {shape}", _DAMAGED)
    with os.fdopen(_open(span.path, place), "rb") as stream:
        status = os.fstat(stream.fileno())
        if (status.st_dev, status.st_ino) != span.identity or status.st_size < span.offset + span.length:
            _fail(place, "the file changed while the model was open", "start again")
        if span.length == 0:
            raw = np.empty(0, np.uint8)
            raw.flags.writeable = False
        else:
            raw = np.memmap(stream, np.uint8, "r", span.offset, (span.length,))
    array: Array = np.ndarray(shape, dtype, raw)
    return array


def read_tensor(model_path: Path, tensor: TensorProto) -> Array:
    """Map an external tensor's values, little-endian, read-only; types below a byte come packed in uint8 [n].

    Raises:
        GraphError: as `resolve` and `read`.
    """
    span = resolve(model_path, tensor)
    if TensorProto.DataType.Name(tensor.data_type) in _PACKED_BITS:
        return read(span, np.dtype(np.uint8), (span.length,))
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return read(span, dtype.newbyteorder("<"), tuple(tensor.dims))


def _fail(place: str, what: str, cure: str) -> NoReturn:
    raise GraphError(f"{place}: external data {what}; {cure}")


def _text(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _entries(tensor: TensorProto, place: str) -> dict[str, str]:
    if tensor.data_location != TensorProto.EXTERNAL:
        _fail(place, "is absent, the values are inside the model", "read them from the tensor")
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS or entry.key in entries:
            kind = "repeats" if entry.key in entries else "has the unknown"
            _fail(
                place,
                f"{kind} attribute {entry.key[:40]!r}",
                f"only {', '.join(sorted(_KEYS))} once each are allowed",
            )
        entries[entry.key] = entry.value
    return entries


def _parts(location: str, place: str) -> tuple[str, ...]:
    """The components of a location that names something below the model's folder, however it is read."""
    shown = repr(location[:200])
    if len(location) > _MAX_LOCATION or "\0" in location or "\\" in location or _DRIVE.match(location):
        _fail(place, f"location {shown} is no plain relative path", _BESIDE)
    parts = location.split("/")
    if location.startswith("/") or ".." in parts:
        _fail(place, f"location {shown} leaves the model's folder", _BESIDE)
    named = tuple(part for part in parts if part not in ("", "."))
    if not named or parts[-1] in ("", "."):
        _fail(place, f"location {shown} names no file", "export the model again")
    return named


def _number(entries: dict[str, str], key: str, place: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) >= 1 << 63:
        _fail(
            place,
            f"{key} {text[:40]!r} is no number of bytes",
            "it must be a whole number from 0, export it again",
        )
    return int(text)


def _needed_bytes(tensor: TensorProto, place: str) -> int:
    """ceil(product(dims) * bits / 8): what the tensor's dtype and shape take."""
    try:
        name = TensorProto.DataType.Name(tensor.data_type)
        bits = (
            _PACKED_BITS.get(name)
            or 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        )
    except (KeyError, ValueError, TypeError):
        name, bits = str(tensor.data_type), 0
    if not bits or name in ("STRING", "UNDEFINED"):
        _fail(place, f"cannot have the data type {name}", "update onnx or export the model again")
    if len(tensor.dims) > _MAX_RANK or any(size < 0 for size in tensor.dims):
        _fail(place, f"has the impossible shape {list(tensor.dims[:8])}", _DAMAGED)
    needed: int = (math.prod(tensor.dims) * bits + 7) // 8
    if needed > _MAX_BYTES:
        _fail(place, f"takes more than {_MAX_BYTES} bytes", _DAMAGED)
    return needed


def _contained(model_path: Path, parts: tuple[str, ...], place: str) -> _Found:
    """Find ``parts`` below the model's folder; no link is followed but a cache's snapshot link."""
    folder = Path(os.path.realpath(model_path.absolute().parent))
    path = folder
    for part in parts[:-1]:
        path = path / part
        if not stat.S_ISDIR(_lstat(path, model_path, place).st_mode):
            _fail(place, f"folder {_text(part)} is a link or no folder", "replace it with a real folder")
    path = path / parts[-1]
    status = _lstat(path, model_path, place)
    if stat.S_ISLNK(status.st_mode):
        blob = _snapshot_blob(path, folder)
        if blob is None:
            _fail(
                place, f"file {_text(parts[-1])} is a link", "replace it with a copy of the file it points to"
            )
        return _Found(blob, _lstat(blob, model_path, place))
    if status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
        _fail(
            place, f"file {_text(parts[-1])} is a hard link to another file", "replace it with a copy of it"
        )
    return _Found(path, status)


def _snapshot_blob(link: Path, folder: Path) -> Path | None:
    """The blob a snapshot link names, or None when the link is not of that layout or leaves its own cache."""
    blobs = _blobs_of(folder)
    if blobs is None:
        return None
    target = Path(os.path.join(link.parent, os.readlink(link)))
    if target.name in ("", ".", "..") or os.path.realpath(target.parent) != str(blobs):
        return None
    return blobs / target.name


def _blobs_of(folder: Path) -> Path | None:
    """``<cache>/models--*/blobs`` for a folder at or below ``<cache>/models--*/snapshots/<revision>``."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            blobs = parent.parent.parent / "blobs"
            return blobs if blobs.is_dir() and not blobs.is_symlink() else None
    return None


def _lstat(path: Path, model_path: Path, place: str) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError as error:
        linked = "it must lie beside the link given as model, or give the model's real path"
        cure = linked if model_path.is_symlink() else "copy it beside the model"
        _fail(place, f"file {_text(str(path))} cannot be read ({error.strerror})", cure)


def _proven(found: _Found, place: str) -> os.stat_result:
    """Open the file to prove that what was checked is what will be read, and return its status."""
    name = _text(found.path.name)
    if not stat.S_ISREG(found.status.st_mode):
        _fail(place, f"file {name} is no regular file", "replace it with the data file")
    descriptor = _open(found.path, place)
    try:
        opened = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    # The second look at the path finds a folder above it that was swapped for a link meanwhile.
    if not os.path.samestat(found.status, opened) or os.path.realpath(found.path) != str(found.path):
        _fail(place, f"file {name} changed while it was opened", "start again")
    return opened


def _open(path: Path, place: str) -> int:
    try:
        descriptor: int = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        _fail(place, f"file {_text(path.name)} cannot be opened ({error.strerror})", "check its permissions")
    return descriptor
