"""One file of arrays with a JSON header: safetensors, read within bounds, checked by its hash, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calib.errors import CalibrationError
from calib.types import Array

__all__ = ["Header", "read_container", "require_place", "write_container"]

_KEY = "calib"
_HEADER_BYTES = 64 << 20  # of the names and shapes of all arrays plus the JSON header
_DENSE_ENTRIES = 1 << 26  # of an array that is stored sparsely: a few bytes must not claim all memory
_SPARSE_FROM = 1024
_FILE_MODE = 0o640


class Header(BaseModel):
    """What a header is made of: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


H = TypeVar("H", bound=Header)


def write_container(path: Path, form: str, version: int, header: Header, arrays: Mapping[str, Array]) -> None:
    """Write ``arrays`` and ``header`` to ``path``, all or nothing: temporary file, fsync, rename.

    Integer arrays that are mostly zeros (the counters of histograms) are stored as positions and values.
    CalibrationError when the disk refuses.
    """
    packed: dict[str, Array] = {}
    shapes: dict[str, list[int]] = {}
    for name, array in arrays.items():
        _pack(name, array, packed, shapes)
    text = header.model_dump_json()
    metadata = {
        "format": form,
        "version": str(version),
        "header": text,
        "sparse": json.dumps(shapes),
        "content": _digest(text, json.dumps(shapes), packed),
    }
    with _placed(path) as temporary:
        # One key: the order in which safetensors writes several changes from run to run.
        save_file(packed, temporary, metadata={_KEY: json.dumps(metadata)})


def require_place(path: Path, protected: Iterable[Path] = ()) -> None:
    """CalibrationError, before the long work, when nothing could be written to ``path`` or it is an input."""
    if path.is_dir():
        raise CalibrationError(f"'{path}' is a folder; give the name of a file")
    if any(path.exists() and other.exists() and path.samefile(other) for other in protected):
        raise CalibrationError(f"'{path}' is an input; give another name")
    with _explained(path):
        path.parent.mkdir(0o750, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _pack(name: str, array: Array, packed: dict[str, Array], shapes: dict[str, list[int]]) -> None:
    array = np.asarray(array, order="C")
    if array.dtype == np.int64 and array.size >= _SPARSE_FROM and array.size <= _DENSE_ENTRIES:
        places = np.flatnonzero(array)
        if 4 * places.size <= array.size:
            shapes[name] = list(array.shape)
            packed[f"{name}@"] = places.astype(np.uint32)
            array = array.reshape(-1)[places]
    packed[name] = array


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes it when the block ends well."""
    with _explained(path):
        path.parent.mkdir(0o750, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".tmp", f".{path.name[:40]}.", path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                mask = os.umask(0o077)
                os.umask(mask)
                temporary.chmod(_FILE_MODE & ~mask)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CalibrationError(
            f"'{path}' cannot be written ({reason}); free the disk or choose another place"
        ) from None


def read_container(path: Path, form: str, version: int, header: type[H]) -> tuple[H, dict[str, Array]]:
    """The header and the arrays of a file that `write_container` made; nothing in it is executed or trusted.

    Raises:
        CalibrationError: there is no such file, it is another format or version, too large a header, truncated,
            changed since it was written (sha256), or its header does not validate.
    """
    metadata, packed = _raw(path)
    if metadata.get("format") != form:
        raise CalibrationError(f"'{path}' is no {form} file; give a file that this tool wrote")
    if metadata.get("version") != str(version):
        raise CalibrationError(
            f"'{path}' has version {metadata.get('version', '?')[:20]!r} of its format, this tool reads {version}; "
            "make it again with this version"
        )
    text, sparse = metadata.get("header", ""), metadata.get("sparse", "")
    if _digest(text, sparse, packed) != metadata.get("content"):
        raise _damaged(path, "its content is not what was written (sha256)")
    try:
        shapes = json.loads(sparse)
        found = header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"header {where}: {first['msg']}") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return found, _unpacked(path, packed, shapes)


def _raw(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CalibrationError(f"'{path}' {what}; check the path")
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if len(start) < 8 or struct.unpack("<Q", start)[0] > min(_HEADER_BYTES, path.stat().st_size):
            raise _damaged(path, "it does not start with a header")
        with safe_open(path, framework="numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return _strings((opened.metadata() or {}).get(_KEY, "{}")), arrays
    except OSError as error:
        raise CalibrationError(f"'{path}' cannot be read ({error.strerror}); check its permissions") from None
    except (
        SafetensorError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # the last three: unknown dtypes
        raise _damaged(path, " ".join(str(error).split())[:200]) from None


def _strings(text: str) -> dict[str, str]:
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata is none of this tool")
    return found


def _unpacked(path: Path, packed: dict[str, Array], shapes: object) -> dict[str, Array]:
    if not isinstance(shapes, dict):
        raise _damaged(path, "its list of sparse arrays is none")
    arrays = {name: array for name, array in packed.items() if not name.endswith("@")}
    for name, shape in shapes.items():
        places, values = packed.get(f"{name}@"), packed.get(name)
        if places is None or values is None or not _is_shape(shape):
            raise _damaged(path, f"array '{name}' is incomplete")
        size = int(np.prod(shape, dtype=np.float64))
        fits = places.ndim == values.ndim == 1 and places.size == values.size and places.dtype == np.uint32
        if not fits or size > _DENSE_ENTRIES or (places.size and int(places.max()) >= size):
            raise _damaged(path, f"array '{name}' does not fit its shape {shape}")
        dense = np.zeros(size, np.int64)
        dense[places] = values
        arrays[name] = dense.reshape(shape)
    return arrays


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(isinstance(n, int) and 0 <= n <= _DENSE_ENTRIES for n in shape)


def _digest(header: str, sparse: str, packed: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(f"{len(header)}\n{header}{sparse}".encode())
    for name in sorted(packed):
        array = np.asarray(packed[name], order="C")
        digest.update(f"\n{name!r} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> CalibrationError:
    return CalibrationError(f"'{path}' is damaged or no statistics file: {why}; make it again")
