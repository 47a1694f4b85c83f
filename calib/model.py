"""Opens a model as a skeleton: structure in memory, weights as read-only views of the files they lie in."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from calib import external
from calib.errors import GraphError
from calib.tensors import (
    PAYLOAD_FIELDS,
    copy_fields,
    embed,
    has_plain_dtype,
    held_values,
    mark_external,
    nested_tensors,
    shaped,
    to_array,
)
from calib.types import Array, InputInfo
from calib.wire import OWN_FILE, read_skeleton

__all__ = ["LARGE", "Model", "declared_inputs", "lift_constants", "mark_external", "open_model", "to_array"]

LARGE = 1024  # bytes from which a tensor leaves the skeleton
_IR_OF_FREE_INITIALIZERS = 4  # before, every initializer had to be a graph input as well


@dataclass
class Model:
    """A model with its large main-graph initializers taken out.

    ``proto`` holds everything but them (each is marked external and carries no data); ``weights`` maps their names to
    read-only arrays backed by the files on disk, so nothing is read before it is used. ``path`` is None for a model
    that came from memory; ``nbytes`` is its size with all weights.
    """

    proto: onnx.ModelProto
    weights: dict[str, Array]
    path: Path | None
    nbytes: int

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "the model"

    @cached_property
    def sha256(self) -> str:
        """Hash over the skeleton and, in name order, every weight: the same for embedded and external storage."""
        digest = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.weights[name]).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def inputs(self) -> list[InputInfo]:
        return declared_inputs(self.proto)


def declared_inputs(proto: onnx.ModelProto) -> list[InputInfo]:
    """The inputs a caller must feed: graph inputs without a default value.

    Raises:
        GraphError: an input is not a tensor or has no type numpy can hold.
    """
    defaults = {t.name for t in proto.graph.initializer}
    return [_input_info(i) for i in proto.graph.input if i.name not in defaults]


def _input_info(value: onnx.ValueInfoProto) -> InputInfo:
    if not value.type.HasField("tensor_type"):
        raise GraphError(f"input '{value.name}' is not a tensor; only tensor inputs can be fed with samples")
    tensor = value.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, ValueError, TypeError):
        raise GraphError(
            f"input '{value.name}' has the unknown element type {tensor.elem_type}; "
            "update onnx or export the model again"
        ) from None
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(_dim(d) for d in tensor.shape.dim)
    return InputInfo(value.name, dtype, shape)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None  # Paddle writes -1 for "dynamic"
    return dim.dim_param if dim.HasField("dim_param") else None


def open_model(source: str | Path | onnx.ModelProto) -> Model:
    """Open a path or a ModelProto (never changed) as a skeleton with lazy weights.

    Constant nodes of the main graph become initializers. Raises GraphError when the file is missing, empty, malformed,
    or its external data is not contained (see ``calib.external``).
    """
    if isinstance(source, onnx.ModelProto):
        opened = _Opened(_without_raw_data(source), source=source)
        return opened.model(None, source.ByteSize())
    if not isinstance(source, str | os.PathLike):
        raise GraphError(
            f"model: expected the path of an .onnx file or an onnx.ModelProto, got {type(source).__name__}; "
            "export a model of another framework first"
        )
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise GraphError(f"model '{path}' {what}; give the path of an .onnx file")
    size = path.stat().st_size
    if size == 0:
        raise GraphError(f"model '{path}' is empty; export or download it again")
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise GraphError(f"model '{path}' cannot be read ({error.strerror}); check its permissions") from None
    try:
        skeleton = read_skeleton(memoryview(mapped), LARGE)
        proto = onnx.ModelProto.FromString(skeleton.data)
    except GraphError as error:
        raise GraphError(f"model '{path}': {error}") from None
    except Exception:  # protobuf's DecodeError lies in a private module
        raise GraphError(
            f"model '{path}' is not an ONNX protobuf file; give the path of an .onnx model"
        ) from None
    if not proto.graph.node and not proto.graph.output:
        raise GraphError(f"model '{path}' holds no graph; give the path of an .onnx model")
    return _Opened(proto, path=path, mapped=mapped, spans=skeleton.spans).model(path, size)


def _without_raw_data(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``source`` whose large plain initializers are empty: copying them would double the memory."""
    proto = onnx.ModelProto()
    copy_fields(source, proto, skip=("graph",))
    copy_fields(source.graph, proto.graph, skip=("initializer",))
    for tensor in source.graph.initializer:
        slim = proto.graph.initializer.add()
        if _is_large(tensor):
            copy_fields(tensor, slim, skip=PAYLOAD_FIELDS)
        else:
            slim.CopyFrom(tensor)
    return proto


def _is_large(tensor: TensorProto) -> bool:
    inside = tensor.data_location != TensorProto.EXTERNAL and tensor.HasField("raw_data")
    return inside and has_plain_dtype(tensor.data_type) and len(tensor.raw_data) >= LARGE


@dataclass
class _Opened:
    """A skeleton whose weights still have to be found: in the mapped file, in external files or in ``source``."""

    proto: onnx.ModelProto
    path: Path | None = None
    mapped: mmap.mmap | None = None
    spans: frozenset[tuple[int, int]] = frozenset()
    source: onnx.ModelProto | None = None
    weights: dict[str, Array] = field(default_factory=dict)
    bytes_beside: int = 0

    def model(self, path: Path | None, nbytes: int) -> Model:
        _clean_documentation(self.proto)
        _clean_documentation(self.proto.graph)
        if not all(
            isinstance(text, str) for text in _names(self.proto.graph)
        ):  # protobuf hands out bad UTF-8 as bytes
            raise GraphError("a name in the model is not UTF-8 text; the model is damaged, export it again")
        if lift_constants(self.proto.graph) and self.proto.ir_version < _IR_OF_FREE_INITIALIZERS:
            self.proto.ir_version = _IR_OF_FREE_INITIALIZERS
        self._take_out_initializers()
        for tensor in nested_tensors(self.proto):
            if tensor.data_location == TensorProto.EXTERNAL:
                embed(tensor, self._read_external(tensor))
            else:
                tensor.ClearField("data_location")
        return Model(self.proto, self.weights, path, nbytes + self.bytes_beside)

    def _take_out_initializers(self) -> None:
        """Large plain tensors go to ``weights``, everything else into the skeleton: wherever each was stored."""
        in_memory = {t.name: t for t in self.source.graph.initializer if _is_large(t)} if self.source else {}
        seen: set[str] = set()
        for tensor in self.proto.graph.initializer:
            if not tensor.name or tensor.name in seen:
                what = "has no name" if not tensor.name else f"'{tensor.name}' is defined twice"
                raise GraphError(f"an initializer {what}; the model is damaged, export it again")
            seen.add(tensor.name)
            outside = tensor.data_location == TensorProto.EXTERNAL
            values = (
                self._read_external(tensor) if outside else held_values(in_memory.get(tensor.name, tensor))
            )
            if has_plain_dtype(tensor.data_type) and values.nbytes >= LARGE:
                self.weights[tensor.name] = values
                mark_external(tensor)
            elif outside:
                embed(tensor, values)
            else:
                tensor.ClearField(
                    "data_location"
                )  # written or not, "inside" is the default: one form, one hash

    def _read_external(self, tensor: TensorProto) -> Array:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries.get("location") == OWN_FILE and self.mapped is not None:
            span = (_whole(entries.get("offset")), _whole(entries.get("length")))
            if span in self.spans:  # else the file itself claims so, and is treated like any other location
                return shaped(np.frombuffer(self.mapped, np.uint8, span[1], span[0]), tensor)
        if self.path is None:
            raise GraphError(
                f"tensor '{tensor.name}' keeps its data in '{entries.get('location')}', but the model "
                "came from memory; pass the path of the .onnx file instead"
            )
        values = external.read_tensor(self.path, tensor)
        self.bytes_beside += values.nbytes
        return values


def _clean_documentation(message: onnx.ModelProto | onnx.GraphProto) -> None:
    """Replace bytes that are not UTF-8 (protobuf reads such strings but does not write them)."""
    for descriptor, value in message.ListFields():
        if isinstance(value, bytes):
            setattr(message, descriptor.name, value.decode(errors="replace"))


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    for value in (*graph.initializer, *graph.input, *graph.output):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attr in node.attribute:
            yield attr.name


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else -1


def lift_constants(graph: onnx.GraphProto) -> int:
    """Constant nodes of the main graph become initializers (exporters use both for weights); returns how many."""
    outputs = {o.name for o in graph.output}
    kept = []
    for node in graph.node:
        tensor = (
            _constant_tensor(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        )
        if tensor is None or len(node.output) != 1 or node.output[0] in outputs:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    lifted = len(graph.node) - len(kept)
    if lifted:
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
        del graph.node[:]
        graph.node.extend(copies)
    return lifted


def _constant_tensor(node: onnx.NodeProto) -> TensorProto | None:
    if len(node.attribute) != 1:
        return None
    attr = node.attribute[0]
    kinds = {
        "value_float": (np.float32, attr.f),
        "value_floats": (np.float32, attr.floats),
        "value_int": (np.int64, attr.i),
        "value_ints": (np.int64, attr.ints),
    }
    made: TensorProto | None = None
    if attr.name == "value":
        made = attr.t
    elif attr.name in kinds:
        dtype, value = kinds[attr.name]
        made = onnx.numpy_helper.from_array(np.asarray(value, dtype))
    return made
