"""What a worker needs from this process: the model as a file, and data that can open itself elsewhere."""

from __future__ import annotations

import io
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import CalibrationError
from calib.model import Model
from calib.types import Dataset

__all__ = ["is_portable", "write_for_workers"]

_PORTABLE_BYTES = 1 << 20  # a data set that takes more is its samples, not the way to them


def is_portable(data: Dataset) -> bool:
    """Whether another process can open the data by itself (files, synthetic samples), or must be fed."""
    try:
        ForkingPickler(_Little(), 5).dump(data)
    except Exception:  # whatever a user's object raises when it cannot travel
        return False
    return True


class _Little(io.RawIOBase):
    """Takes what a small object needs and refuses more."""

    def __init__(self) -> None:
        self._room = _PORTABLE_BYTES

    def write(self, piece: Any) -> int:
        size = memoryview(piece).nbytes
        self._room -= size
        if self._room < 0:
            raise OverflowError
        return size


def write_for_workers(model: Model, folder: Path) -> Path:
    """Write the model with its weights beside it, where every worker maps the same pages; returns its path."""
    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    path = folder / "model.onnx"
    try:
        with (folder / "weights.bin").open("wb") as file:
            for tensor in proto.graph.initializer:
                values = model.weights.get(tensor.name)
                if values is None:
                    continue
                file.write(bytes(-file.tell() % 64))
                del tensor.external_data[:]
                place = {"location": "weights.bin", "offset": file.tell(), "length": values.nbytes}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                little = np.asarray(values, values.dtype.newbyteorder("<"), order="C")
                file.write(little.reshape(-1).view(np.uint8).data)
        path.write_bytes(proto.SerializeToString())
    except OSError as error:
        raise CalibrationError(
            f"the model cannot be written for workers to '{folder}' ({error.strerror}); free the disk there, or "
            "point TMPDIR to another"
        ) from None
    return path
