"""Reads an .onnx file as a *skeleton*: the protobuf without its large tensors, which stay in the file.

``onnx.load`` holds every weight in memory two or three times. Walking the wire format instead finds where each
large ``raw_data`` (or packed ``float_data``) lies, so that weights become read-only views of the mapped file.
Field numbers: onnx.proto (ModelProto.graph 7; GraphProto.node 1, .initializer 5; NodeProto.attribute 5;
AttributeProto.t 5; TensorProto.data_type 2, .float_data 4, .raw_data 9, .external_data 13, .data_location 14).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calib.errors import GraphError

__all__ = ["OWN_FILE", "skeleton_bytes"]

OWN_FILE = "*own-file*"  # location of a tensor whose bytes lie inside the model file itself
_LEN = 2
_FLOAT, _DOUBLE = 1, 11
_PATH_TO_TENSORS = {"model": {7: "graph"}, "graph": {1: "node", 5: "tensor"}, "node": {5: "attribute"},
                    "attribute": {5: "tensor"}}


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    start: int  # of the tag
    body: int  # of the payload (after the length of a length-delimited field)
    end: int


def _varint(buf: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = buf[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise GraphError("the file is not a valid ONNX model: a number in it does not end; download or export it again")


def _fields(buf: memoryview, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        tag, body = _varint(buf, at, end)
        wire = tag & 7
        if wire == 0:
            _, stop = _varint(buf, body, end)
        elif wire == _LEN:
            size, body = _varint(buf, body, end)
            stop = body + size
        elif wire in (1, 5):
            stop = body + (8 if wire == 1 else 4)
        else:
            raise GraphError("the file is not a valid ONNX model: unknown field coding; download or export it again")
        if stop > end:
            raise GraphError("the ONNX file ends too early: it is truncated; download or export it again")
        yield _Field(tag >> 3, wire, at, body, stop)
        at = stop


def _put_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _put_bytes(number: int, payload: bytes) -> bytes:
    return _put_varint(number << 3 | _LEN) + _put_varint(len(payload)) + payload


def _external_entry(key: str, value: str) -> bytes:
    return _put_bytes(13, _put_bytes(1, key.encode()) + _put_bytes(2, value.encode()))


def _tensor(buf: memoryview, start: int, end: int, threshold: int) -> bytes:
    fields = list(_fields(buf, start, end))
    dtype = next((_varint(buf, f.body, f.end)[0] for f in fields if f.number == 2 and f.wire == 0), 0)
    packed = {4: _FLOAT, 10: _DOUBLE}
    large = [f for f in fields if f.wire == _LEN and f.end - f.body >= threshold
             and (f.number == 9 or packed.get(f.number, -1) == dtype)]
    if len(large) != 1:  # small, empty, or a repeated field that only a parser should merge
        return bytes(buf[start:end])
    span = large[0]
    kept = b"".join(bytes(buf[f.start : f.end]) for f in fields if f is not span)
    entries = {"location": OWN_FILE, "offset": str(span.body), "length": str(span.end - span.body)}
    return kept + b"".join(_external_entry(k, v) for k, v in entries.items()) + _put_varint(14 << 3) + b"\x01"


def _message(buf: memoryview, start: int, end: int, kind: str, threshold: int) -> bytes:
    if kind == "tensor":
        return _tensor(buf, start, end, threshold)
    out = []
    for field in _fields(buf, start, end):
        child = _PATH_TO_TENSORS[kind].get(field.number) if field.wire == _LEN else None
        if child is None or field.end - field.body < threshold:
            out.append(bytes(buf[field.start : field.end]))
        else:
            out.append(_put_bytes(field.number, _message(buf, field.body, field.end, child, threshold)))
    return b"".join(out)


def skeleton_bytes(buf: memoryview, threshold: int = 1024) -> bytes:
    """The serialized ModelProto with every tensor payload of at least ``threshold`` bytes left in ``buf``.

    Such a tensor (an initializer of the main graph, or a Constant node's value) is marked external with location
    ``OWN_FILE`` and its offset and length in ``buf``. Raises GraphError when ``buf`` is not well-formed protobuf.
    """
    return _message(buf, 0, len(buf), "model", threshold)
