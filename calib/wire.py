"""Reads an .onnx file as a *skeleton*: the protobuf without its large tensors, which stay in the file.

``onnx.load`` holds every weight in memory two or three times. Walking the wire format instead finds where each
large ``raw_data`` (or packed ``float_data``) lies, so that weights become read-only views of the mapped file.
Field numbers: onnx.proto (ModelProto.graph 7; GraphProto.node 1, .initializer 5; NodeProto.attribute 5;
AttributeProto.t 5; TensorProto.data_type 2, .float_data 4, .raw_data 9, .external_data 13, .data_location 14).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from calib.errors import GraphError

__all__ = ["OWN_FILE", "Skeleton", "read_skeleton"]

OWN_FILE = "*own-file*"  # location of a tensor whose bytes lie inside the model file itself
_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5
_FLOAT, _DOUBLE = 1, 11
_PACKED_AS_IN_MEMORY = {
    4: _FLOAT,
    10: _DOUBLE,
}  # float_data and double_data lie in the file as numpy wants them
_PAYLOADS = frozenset({4, 5, 6, 7, 9, 10, 11})
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14
_CHILDREN = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor"},
}


@dataclass(frozen=True)
class Skeleton:
    """A serialized ModelProto and the (offset, length) of every payload that was left behind in the file.

    A tensor that was taken out is marked external with location ``OWN_FILE``, its offset and its length. Only an
    entry whose span is in ``spans`` was written here; any other comes from the file and proves nothing.
    """

    data: bytes
    spans: frozenset[tuple[int, int]]


def read_skeleton(buf: memoryview, threshold: int = 1024) -> Skeleton:
    """Take every tensor payload of at least ``threshold`` bytes out of the serialized ModelProto ``buf``.

    Tensors are initializers of the main graph and values of its nodes' attributes; those in subgraphs and functions
    stay. Without a large tensor the result equals ``buf`` byte by byte.

    Raises:
        GraphError: ``buf`` is no well-formed protobuf message.
    """
    walker = _Walker(buf, threshold)
    data = walker.message(0, len(buf), "model")
    return Skeleton(data, frozenset(walker.spans))


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    start: int  # of the tag
    body: int  # of the payload (after the length of a length-delimited field)
    end: int


@dataclass
class _Walker:
    buf: memoryview
    threshold: int
    spans: list[tuple[int, int]] = field(default_factory=list)

    def message(self, start: int, end: int, kind: str) -> bytes:
        if kind == "tensor":
            return self._tensor(start, end)
        out = []
        for item in _fields(self.buf, start, end):
            child = _CHILDREN[kind].get(item.number) if item.wire == _LEN else None
            if child is None or item.end - item.body < self.threshold:
                out.append(bytes(self.buf[item.start : item.end]))
                continue
            taken = len(self.spans)
            body = self.message(item.body, item.end, child)
            changed = (
                len(self.spans) > taken
            )  # lengths may be coded in more bytes than needed: keep what is there
            out.append(_put_bytes(item.number, body) if changed else bytes(self.buf[item.start : item.end]))
        return b"".join(out)

    def _tensor(self, start: int, end: int) -> bytes:
        fields = list(_fields(self.buf, start, end))
        payloads = [f for f in fields if f.number in _PAYLOADS]
        external = any(f.number == _DATA_LOCATION and self._number(f) != 0 for f in fields)
        if len(payloads) != 1 or external or not self._is_plain(payloads[0], fields):
            return bytes(
                self.buf[start:end]
            )  # small, empty, elsewhere, or something only a parser should merge
        span = payloads[0]
        self.spans.append((span.body, span.end - span.body))
        dropped = (span.number, _EXTERNAL_DATA, _DATA_LOCATION)
        kept = b"".join(bytes(self.buf[f.start : f.end]) for f in fields if f.number not in dropped)
        entries = {"location": OWN_FILE, "offset": str(span.body), "length": str(span.end - span.body)}
        marks = b"".join(_external_entry(key, value) for key, value in entries.items())
        return kept + marks + _put_varint(_DATA_LOCATION << 3) + b"\x01"

    def _is_plain(self, payload: _Field, fields: list[_Field]) -> bool:
        """Whether ``payload`` is large and its bytes are the tensor's values as numpy wants them."""
        if payload.wire != _LEN or payload.end - payload.body < self.threshold:
            return False
        dtype = next((self._number(f) for f in reversed(fields) if f.number == 2), 0)
        return payload.number == _RAW_DATA or _PACKED_AS_IN_MEMORY.get(payload.number) == dtype

    def _number(self, item: _Field) -> int:
        return _varint(self.buf, item.body, item.end)[0] if item.wire == _VARINT else -1


def _varint(buf: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = buf[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise GraphError(
        "the file is not a valid ONNX model: a number in it does not end; download or export it again"
    )


def _fields(buf: memoryview, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        tag, body = _varint(buf, at, end)
        wire = tag & 7
        if wire == _VARINT:
            _, stop = _varint(buf, body, end)
        elif wire == _LEN:
            size, body = _varint(buf, body, end)
            stop = body + size
        elif wire in (_FIXED64, _FIXED32):
            stop = body + (8 if wire == _FIXED64 else 4)
        else:
            raise GraphError(
                "the file is not a valid ONNX model: unknown field coding; download or export it again"
            )
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
    return _put_bytes(_EXTERNAL_DATA, _put_bytes(1, key.encode()) + _put_bytes(2, value.encode()))
