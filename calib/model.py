"""Opens a model as a skeleton: structure in memory, weights as read-only views of the files they lie in."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from calib import external
from calib.errors import GraphError
from calib.types import Array, InputInfo
from calib.wire import OWN_FILE, skeleton_bytes

__all__ = ["LARGE", "Model", "declared_inputs", "mark_external", "open_model", "to_array"]

LARGE = 1024  # bytes from which a tensor leaves the skeleton
_EXTERNAL = TensorProto.EXTERNAL


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
    _map: mmap.mmap | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "the model"

    @cached_property
    def sha256(self) -> str:
        """Hash over the skeleton and, in name order, every weight: the same for embedded and external storage."""
        digest = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.weights[name]).view(np.uint8).data)
        return digest.hexdigest()

    def inputs(self) -> list[InputInfo]:
        return declared_inputs(self.proto)


def declared_inputs(proto: onnx.ModelProto) -> list[InputInfo]:
    """The inputs a caller must feed: graph inputs without a default value."""
    defaults = {t.name for t in proto.graph.initializer}
    return [_input_info(i) for i in proto.graph.input if i.name not in defaults]


def _input_info(value: onnx.ValueInfoProto) -> InputInfo:
    if not value.type.HasField("tensor_type"):
        raise GraphError(f"input '{value.name}' is not a tensor; only tensor inputs can be fed with samples")
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
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

    Raises GraphError when the file is missing, empty, malformed, or its external data is not contained (see
    ``calib.external``).
    """
    if isinstance(source, onnx.ModelProto):
        return _open_proto(source)
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise GraphError(f"model '{path}' {what}; give the path of an .onnx file")
    if path.stat().st_size == 0:
        raise GraphError(f"model '{path}' is empty; export or download it again")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        proto = onnx.ModelProto.FromString(skeleton_bytes(memoryview(mapped), LARGE))
    except GraphError as error:
        raise GraphError(f"model '{path}': {error}") from None
    except Exception:
        raise GraphError(f"model '{path}' is not an ONNX protobuf file; give the path of an .onnx model") from None
    if not proto.graph.node and not proto.graph.output:
        raise GraphError(f"model '{path}' holds no graph; give the path of an .onnx model")
    model = Model(proto, {}, path, path.stat().st_size, mapped)
    _take_out_weights(model)
    return model


def _open_proto(proto: onnx.ModelProto) -> Model:
    skeleton = onnx.ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name != "graph":
            _copy_field(skeleton, descriptor.name, value)
    for descriptor, value in proto.graph.ListFields():
        if descriptor.name != "initializer":
            _copy_field(skeleton.graph, descriptor.name, value)
    model = Model(skeleton, {}, None, 0)
    for tensor in proto.graph.initializer:
        slim = skeleton.graph.initializer.add()
        raw = tensor.raw_data if tensor.HasField("raw_data") else b""
        if len(raw) >= LARGE and _has_plain_dtype(tensor.data_type):
            slim.name, slim.data_type, slim.doc_string = tensor.name, tensor.data_type, tensor.doc_string
            slim.dims.extend(tensor.dims)
            mark_external(slim)
            model.weights[tensor.name] = _shaped(np.frombuffer(raw, np.uint8), tensor)
        else:
            slim.CopyFrom(tensor)
    _take_out_weights(model)
    model.nbytes = skeleton.ByteSize() + sum(w.nbytes for w in model.weights.values())
    return model


def _copy_field(message: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    if hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    elif isinstance(value, (str, bytes, int, float)):
        setattr(message, name, value)
    else:
        getattr(message, name).extend(value)


def _take_out_weights(model: Model) -> None:
    _lift_constant_nodes(model.proto.graph)
    for tensor in model.proto.graph.initializer:
        if tensor.name in model.weights:
            continue
        if tensor.data_location == _EXTERNAL:
            array = _read_external(model, tensor)
            if _has_plain_dtype(tensor.data_type) and array.nbytes:
                model.weights[tensor.name] = array
                mark_external(tensor)
            else:
                _embed(tensor, array)
        elif len(tensor.float_data) * 4 >= LARGE and tensor.data_type == TensorProto.FLOAT:
            model.weights[tensor.name] = onnx.numpy_helper.to_array(tensor)
            mark_external(tensor)
    for tensor in _nested_tensors(model.proto.graph):
        if tensor.data_location == _EXTERNAL:
            _embed(tensor, _read_external(model, tensor))


def _lift_constant_nodes(graph: onnx.GraphProto) -> None:
    """Constant nodes of the main graph become initializers: exporters use both forms for weights."""
    outputs = {o.name for o in graph.output}
    kept = []
    for node in graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if tensor is None or node.output[0] in outputs:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(kept) != len(graph.node):
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _constant_tensor(node: onnx.NodeProto) -> TensorProto | None:
    if len(node.attribute) != 1:
        return None
    attr = node.attribute[0]
    if attr.name == "value":
        return attr.t
    kinds = {"value_float": (np.float32, attr.f), "value_floats": (np.float32, attr.floats),
             "value_int": (np.int64, attr.i), "value_ints": (np.int64, attr.ints)}
    if attr.name in kinds:
        dtype, value = kinds[attr.name]
        return onnx.numpy_helper.from_array(np.asarray(value, dtype))
    return None


def _nested_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Tensors that are not initializers of ``graph``: node attributes and everything inside subgraphs."""
    for node in graph.node:
        for attr in node.attribute:
            if attr.HasField("t"):
                yield attr.t
            yield from attr.tensors
            for sub in [attr.g, *attr.graphs] if attr.HasField("g") else attr.graphs:
                yield from sub.initializer
                yield from _nested_tensors(sub)


def _has_plain_dtype(data_type: int) -> bool:
    """Whether numpy itself has the type: packed int4, bfloat16 and float8 tensors stay in the skeleton."""
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(data_type).isbuiltin == 1 and data_type != TensorProto.STRING \
            and data_type not in _NOT_PLAIN
    except (KeyError, TypeError):
        return False


_NOT_PLAIN = {
    getattr(TensorProto, n)
    for n in ("BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0", "INT4",
              "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if hasattr(TensorProto, n)
}


def _read_external(model: Model, tensor: TensorProto) -> Array:
    entries = {e.key: e.value for e in tensor.external_data}
    if entries.get("location") == OWN_FILE and model._map is not None:
        start, size = int(entries["offset"]), int(entries["length"])
        return _shaped(np.frombuffer(model._map, np.uint8, size, start), tensor)
    if model.path is None:
        raise GraphError(f"tensor '{tensor.name}' keeps its data in '{entries.get('location')}', but the model came "
                         "from memory; pass the path of the .onnx file instead")
    return external.read_tensor(model.path, tensor)


def _shaped(raw: Array, tensor: TensorProto) -> Array:
    shape = tuple(tensor.dims)
    if not _has_plain_dtype(tensor.data_type):
        return raw
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<")
    if min(shape, default=0) < 0 or int(np.prod(shape, dtype=object)) * dtype.itemsize != raw.nbytes:
        raise GraphError(f"tensor '{tensor.name}' declares shape {list(shape)} of {dtype} but holds {raw.nbytes} bytes; "
                         "the model file is damaged, export it again")
    return raw.view(dtype).reshape(shape)


def mark_external(tensor: TensorProto) -> None:
    """Turn ``tensor`` into a skeleton entry: no payload, data to be supplied by name when a session is made."""
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data"):
        tensor.ClearField(name)
    tensor.data_location = _EXTERNAL
    tensor.external_data.add(key="location", value=OWN_FILE)


def _embed(tensor: TensorProto, array: Array) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = np.ascontiguousarray(array).tobytes()


def to_array(tensor: TensorProto, weights: dict[str, Array]) -> Array:
    """The values of an initializer, wherever they lie."""
    return weights[tensor.name] if tensor.name in weights else onnx.numpy_helper.to_array(tensor)
