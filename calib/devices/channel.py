"""Messages between two processes of our own: a JSON header and raw array bytes over a socket, no pickle."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.types import Array

__all__ = ["receive", "send"]

_HEADER = struct.Struct("<Q")
_MOST_HEADER = 1 << 26


def send(channel: socket.socket, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """One message: the header and the arrays' bytes; TypeError for an array that is not of plain numbers."""
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.kind not in "biufc":
            raise TypeError(f"'{name}' has the type {array.dtype}")
    described = [[name, array.dtype.str, list(array.shape)] for name, array in plain.items()]
    text = json.dumps({**header, "arrays": described}).encode()
    channel.sendall(_HEADER.pack(len(text)) + text)
    for array in plain.values():
        channel.sendall(np.require(array, requirements="C").reshape(-1).view(np.uint8).data)


def receive(channel: socket.socket) -> tuple[dict[str, Any], dict[str, Array]]:
    """The next message; EOFError when the other side is gone."""
    (length,) = _HEADER.unpack(_exactly(channel, np.empty(_HEADER.size, np.uint8)).tobytes())
    if length > _MOST_HEADER:
        raise EOFError("the other side sent something else than a message")
    header: dict[str, Any] = json.loads(_exactly(channel, np.empty(length, np.uint8)).tobytes())
    arrays: dict[str, Array] = {}
    for name, dtype, shape in header.pop("arrays"):
        array = np.empty(shape, np.dtype(dtype))
        _exactly(channel, array.reshape(-1).view(np.uint8))
        arrays[name] = array
    return header, arrays


def _exactly(channel: socket.socket, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = buffer.data
    while view:
        count = channel.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return buffer
