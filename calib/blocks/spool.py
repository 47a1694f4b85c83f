"""Tensors that wait on the disk: they are written when made, read when needed, and gone when the work is over."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from calib.errors import CalibrationError
from calib.types import Array

__all__ = ["Spool"]

_MAPPED = 1 << 16  # bytes from which an array is mapped instead of read
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


class Spool:
    """A folder of .npy files, one per key, removed with everything in it when the ``with`` block is left.

    ``folder`` is where it is made: default the first of TMPDIR, /var/tmp and the working folder whose file system is
    not in memory. Values that are no array of numbers (strings, sequences, maps) stay in memory. Threads may share
    it, each with keys of its own.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._parent = folder if folder is not None else _on_disk()
        self._made: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[object, Path] = {}
        self._held: dict[object, Any] = {}
        self._numbers = count()

    def __enter__(self) -> Spool:
        """Make the folder; CalibrationError when it cannot be made."""
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._made = tempfile.TemporaryDirectory(
                prefix="calib-spool-", dir=self._parent, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise self._refused(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder; arrays that were handed out stay readable while somebody holds them."""
        self._files.clear()
        self._held.clear()
        if self._made is not None:
            self._made.cleanup()
            self._made = None

    @property
    def folder(self) -> Path:
        """Where other files of the same work may lie; they vanish with it."""
        assert self._made is not None, "a spool is used within its with block"
        return Path(self._made.name)

    def put(self, key: object, values: Any) -> None:
        """Write ``values`` under ``key``; CalibrationError when the disk refuses."""
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "biufc":
            self._held[key] = values
            return
        path = self.folder / f"{next(self._numbers)}.npy"
        plain = np.asarray(values, order="C")
        header = np.lib.format.header_data_from_array_1_0(plain)
        try:
            with path.open("wb") as file:  # np.save hides why the disk refuses
                np.lib.format.write_array_header_1_0(file, header)
                file.write(plain.reshape(-1).view(np.uint8).data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._refused(error) from None
        self._files[key] = path

    def get(self, key: object) -> Any:
        """What was put under ``key``, large arrays as read-only views of their files; KeyError when there is none."""
        if key in self._held:
            return self._held[key]
        path = self._files[key]
        try:
            mapped = path.stat().st_size >= _MAPPED
            return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"spooled tensor '{path}' cannot be read back ({error}); somebody removed or changed it, start again"
            ) from None

    def drop(self, key: object) -> None:
        """Forget ``key`` and free its place on the disk."""
        self._held.pop(key, None)
        path = self._files.pop(key, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def keep(self, values: Array) -> Array:
        """Move ``values`` to the disk: an equal read-only array, whose place there is freed when nobody holds it."""
        if values.nbytes < _MAPPED:
            return values
        key = object()
        self.put(key, values)
        kept: Array = self.get(key)
        with suppress(OSError):  # Windows keeps a mapped file; it goes with the folder
            self.drop(key)
        return kept

    def _refused(self, error: OSError) -> CalibrationError:
        reason = error.strerror or str(error)
        return CalibrationError(
            f"tensors cannot be spooled to '{self._parent}' ({reason}); free the disk there, or point TMPDIR to another"
        )


def _on_disk() -> Path:
    """A temporary folder that does not take the memory it is meant to save."""
    first = Path(tempfile.gettempdir())
    return next((p for p in (first, Path("/var/tmp"), Path.cwd()) if _is_disk(p)), first)


def _is_disk(folder: Path) -> bool:
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return False
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    except OSError:
        return True
    real = Path(os.path.realpath(folder))
    above = [(point, kind) for point, kind in mounts if real.is_relative_to(point)]
    return not above or max(above, key=lambda m: len(m[0]))[1] not in _IN_MEMORY
