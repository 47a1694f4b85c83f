"""The lowest IR version that serves a model: servers run older runtimes than the machine that quantizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto, TensorProto

from calib.tensors import nested_tensors
from onnxslim_ptq.graph.convert import subgraphs

__all__ = ["lowest_ir"]

_FREE_INITIALIZERS, _SPARSE, _TRAINING, _FUNCTIONS, _FLOAT8, _METADATA, _FLOAT4, _TINY_INT = 4, 6, 7, 8, 9, 10, 11, 13
_TYPES = {
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), _FLOAT8),
    **dict.fromkeys(("INT4", "UINT4"), _METADATA),
    "FLOAT4E2M1": _FLOAT4,
    "FLOAT8E8M0": 12,
    **dict.fromkeys(("INT2", "UINT2"), _TINY_INT),
}
_BY_NUMBER = {TensorProto.DataType.Value(n): ir for n, ir in _TYPES.items() if n in TensorProto.DataType.keys()}  # noqa: SIM118


def lowest_ir(model: onnx.ModelProto) -> int:
    """The lowest IR version with every opset and feature of ``model``; at most its own unless that was too low.

    Opsets: the release that brought them. Features: initializers that are no inputs 4, sparse tensors 6, training 7,
    functions 8, float8 9, node metadata and int4 10, float4 and multi-device 11, float8e8m0 12, int2 13.
    """
    needed = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    return max([needed, *_features(model)])


def _features(model: onnx.ModelProto) -> Iterator[int]:
    graph = model.graph
    inputs = {i.name for i in graph.input}
    if any(t.name not in inputs for t in graph.initializer):
        yield _FREE_INITIALIZERS
    if model.training_info:
        yield _TRAINING
    if model.functions:
        yield _FUNCTIONS
    if model.metadata_props and model.ir_version >= _METADATA:
        yield 1  # of the model itself: always there
    graphs = list(_graphs(graph))
    nodes = [n for g in graphs for n in g.node] + [n for f in model.functions for n in _nodes(f.node)]
    if any(g.sparse_initializer for g in graphs):
        yield _SPARSE
    if any(m.metadata_props for m in (*graphs, *nodes, *model.functions)) or any(n.overload for n in nodes):
        yield _METADATA
    if any(getattr(n, "device_configurations", ()) for n in nodes):
        yield _FLOAT4
    if any(a.type in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS) for n in nodes for a in n.attribute):
        yield _SPARSE
    types = {t.data_type for t in (*graph.initializer, *nested_tensors(model))}
    types |= {v.type.tensor_type.elem_type for g in graphs for v in (*g.input, *g.output, *g.value_info)}
    yield from (_BY_NUMBER[t] for t in types if t in _BY_NUMBER)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for sub in subgraphs(node):
            yield from _graphs(sub)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for sub in subgraphs(node):
            yield from _nodes(sub.node)
