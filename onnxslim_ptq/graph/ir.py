"""The lowest IR version that serves a model: servers run older runtimes than the machine that quantizes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import AttributeProto, TensorProto

from calib.scope import every_node, subgraphs
from calib.tensors import nested_tensors

__all__ = ["lowest_ir"]

_FREE_INITIALIZERS, _ANNOTATIONS, _SPARSE, _TRAINING, _FUNCTIONS, _METADATA, _DEVICES = 4, 5, 6, 7, 8, 10, 11
_IR_OF_TYPES = {
    4: ("BFLOAT16",),
    9: ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
    10: ("INT4", "UINT4"),
    11: ("FLOAT4E2M1",),
    12: ("FLOAT8E8M0",),
    13: ("INT2", "UINT2"),
    14: ("FLOAT6E2M3", "FLOAT6E3M2"),
}
_KNOWN = dict(TensorProto.DataType.items())
_IR_OF_TYPE = {_KNOWN[name]: ir for ir, names in _IR_OF_TYPES.items() for name in names if name in _KNOWN}


def lowest_ir(model: onnx.ModelProto) -> int:
    """The lowest IR version with every opset and feature of ``model``; above its own only where that was too low.

    Opsets: the release that brought them. Features: initializers that are no inputs 4, quantization annotations 5,
    sparse tensors 6, training 7, functions 8, float8 9, int4 10, float4 11, float8e8m0 12, int2 13, float6 14. Metadata
    of nodes and graphs (10) and device placements (11) keep the model's IR from sinking but never raise it: older
    runtimes pass over them.
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
    graphs = [graph, *(sub for node in every_node(graph.node) for sub in subgraphs(node))]
    nodes = [n for g in graphs for n in g.node] + [n for f in model.functions for n in every_node(f.node)]
    if any(g.sparse_initializer for g in graphs):
        yield _SPARSE
    if any(m.metadata_props for m in (*graphs, *nodes, *model.functions)) or any(n.overload for n in nodes):
        yield min(_METADATA, model.ir_version)
    if any(getattr(n, "device_configurations", ()) for n in nodes):
        yield min(_DEVICES, model.ir_version)
    if graph.quantization_annotation:
        yield _ANNOTATIONS
    if any(
        a.type in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)
        for n in nodes
        for a in n.attribute
    ):
        yield _SPARSE
    types = {t.data_type for t in (*graph.initializer, *nested_tensors(model))}
    types |= {v.type.tensor_type.elem_type for g in graphs for v in (*g.input, *g.output, *g.value_info)}
    yield from (_IR_OF_TYPE[t] for t in types if t in _IR_OF_TYPE)
