"""What a TensorProto holds: whether numpy has its type, what its values are, and where all tensors of a model lie."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from calib.errors import GraphError
from calib.types import Array
from calib.wire import OWN_FILE

__all__ = [
    "PAYLOAD_FIELDS",
    "copy_fields",
    "embed",
    "has_plain_dtype",
    "held_values",
    "mark_external",
    "nested_tensors",
    "shaped",
    "to_array",
]

PAYLOAD_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "string_data",
)
_DAMAGED = "the model file is damaged, export it again"
# Every other type is packed or comes from ml_dtypes: such tensors stay in the skeleton as they are.
_PLAIN = frozenset(
    TensorProto.DataType.Value(name)
    for name in (
        "FLOAT",
        "DOUBLE",
        "FLOAT16",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "BOOL",
        "COMPLEX64",
        "COMPLEX128",
    )
)
_BITS = {
    TensorProto.DataType.Value(name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if name in TensorProto.DataType.keys()  # noqa: SIM118 - an enum wrapper, not a dict
}


def has_plain_dtype(data_type: int) -> bool:
    """Whether numpy itself has the type (bfloat16, float8 and everything below a byte are not plain)."""
    return data_type in _PLAIN


def mark_external(tensor: TensorProto) -> None:
    """Turn ``tensor`` into a skeleton entry: no payload, data to be supplied by name when a session is made."""
    for name in (*PAYLOAD_FIELDS, "external_data"):
        tensor.ClearField(name)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=OWN_FILE)


def embed(tensor: TensorProto, array: Array) -> None:
    """Put ``array``'s bytes into ``tensor``, which was external."""
    for name in (*PAYLOAD_FIELDS, "external_data", "data_location"):
        tensor.ClearField(name)
    tensor.raw_data = np.ascontiguousarray(array).tobytes()


def to_array(tensor: TensorProto, weights: Mapping[str, Array]) -> Array:
    """The values of an initializer, wherever they lie."""
    if tensor.name in weights:
        return weights[tensor.name]
    values: Array = onnx.numpy_helper.to_array(tensor)
    return values


def shaped(raw: Array, tensor: TensorProto) -> Array:
    """``raw`` bytes (uint8 [n]) as the tensor's dtype and shape, without a copy; a type numpy lacks stays bytes.

    Raises:
        GraphError: the bytes are not what the dtype and shape take.
    """
    shape = tuple(tensor.dims)
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, ValueError, TypeError):
        raise GraphError(
            f"tensor '{tensor.name}' has the unknown type {tensor.data_type}; {_DAMAGED}"
        ) from None
    bits = _BITS.get(tensor.data_type, 8 * dtype.itemsize)
    if min(shape, default=0) < 0 or (math.prod(shape) * bits + 7) // 8 != raw.nbytes:
        raise GraphError(
            f"tensor '{tensor.name}' declares shape {list(shape)} of {dtype} but holds {raw.nbytes} "
            f"bytes; {_DAMAGED}"
        )
    if not has_plain_dtype(tensor.data_type):
        return raw
    values: Array = raw.view(dtype.newbyteorder("<")).reshape(shape)
    return values


def held_values(tensor: TensorProto) -> Array:
    """The values embedded in ``tensor``; those of a type numpy lacks come as the onnx package decodes them.

    Raises:
        GraphError: the type is unknown or the payload does not fit the shape.
    """
    if tensor.HasField("raw_data") and has_plain_dtype(tensor.data_type):
        return shaped(np.frombuffer(tensor.raw_data, np.uint8), tensor)
    try:
        values: Array = onnx.numpy_helper.to_array(tensor)
    except Exception:  # KeyError, ValueError, TypeError, OverflowError: whatever the damage makes of it
        raise GraphError(
            f"tensor '{tensor.name}' holds no values of its type {tensor.data_type} and shape "
            f"{list(tensor.dims)[:8]}; {_DAMAGED}"
        ) from None
    if values.shape != tuple(tensor.dims):
        raise GraphError(
            f"tensor '{tensor.name}' declares shape {list(tensor.dims)[:8]} but holds "
            f"{list(values.shape)}; {_DAMAGED}"
        )
    return values


def nested_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor that is no initializer of the main graph: in attributes, subgraphs, functions and sparse tensors."""
    yield from _sparse(model.graph.sparse_initializer)
    yield from _of_nodes(model.graph.node)
    for function in model.functions:
        yield from _of_nodes(function.node)
        yield from _of_attributes(function.attribute_proto)
    for training in model.training_info:
        yield from _of_graph(training.initialization)
        yield from _of_graph(training.algorithm)


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _sparse(graph.sparse_initializer)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attr in attributes:
        if attr.HasField("t"):
            yield attr.t
        yield from attr.tensors
        yield from _sparse([attr.sparse_tensor] if attr.HasField("sparse_tensor") else [])
        yield from _sparse(attr.sparse_tensors)
        if attr.HasField("g"):
            yield from _of_graph(attr.g)
        for graph in attr.graphs:
            yield from _of_graph(graph)


def _sparse(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[TensorProto]:
    for tensor in tensors:
        yield tensor.values
        yield tensor.indices


def copy_fields(source: Any, copy: Any, *, skip: Collection[str]) -> None:
    """Copy every field of a protobuf message but those in ``skip``, whose copying would cost memory."""
    for descriptor, value in source.ListFields():
        if descriptor.name in skip:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(copy, descriptor.name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            if isinstance(value, bytes) and descriptor.type == descriptor.TYPE_STRING:
                value = value.decode(
                    errors="replace"
                )  # protobuf reads strings that are no UTF-8, but takes none
            setattr(copy, descriptor.name, value)
        else:
            getattr(copy, descriptor.name).extend(value)
