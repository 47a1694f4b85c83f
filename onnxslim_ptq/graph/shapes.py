"""Shapes of all values for one choice of the dynamic dimensions, through the shape arithmetic that exporters write.

onnx infers shapes node by node; what stops it is a Reshape whose target is computed from other shapes. Here each
dynamic dimension gets a prime number of its own, small integer values are computed along, and so every such target is
known. Which channel of a Reshape's input is which channel of its output then follows by running it on indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import NodeProto, TensorProto, TypeProto, defs, helper
from onnx.reference import ReferenceEvaluator

from calib.types import Array
from onnxslim_ptq.graph.convert import in_order
from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Shape", "Shapes", "evaluate", "fixed_shapes", "infer_shapes"]

_SMALL = 4096  # elements of a value that is computed along
_FIRST_PRIME, _OTHER_PRIME = 11, 1009
Shape = tuple[int | None, ...]


@dataclass
class Shapes:
    """Dimensions of values by name (None: unknown), their types (of TensorProto), and small values that are known."""

    dims: dict[str, Shape] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    def known(self, name: str) -> tuple[int, ...] | None:
        """The shape of ``name`` when every dimension is known."""
        dims = self.dims.get(name)
        return None if dims is None or None in dims else tuple(d for d in dims if d is not None)


def infer_shapes(graph: Graph, first: int = _FIRST_PRIME) -> Shapes:
    """Shapes of every value of the main graph that can be told, with distinct primes for the dynamic dimensions.

    The primes are those from ``first`` on.
    """
    shapes = Shapes()
    types: dict[str, TypeProto] = {}
    _bind_inputs(graph, shapes, types, first)
    opsets = list(graph.model.proto.opset_import)
    for node in in_order(graph.nodes):
        if not graph.has_subgraph(node):
            _visit(graph, node, shapes, types, opsets)
    shapes.kinds = {name: kind.tensor_type.elem_type for name, kind in types.items()}
    return shapes


def fixed_shapes(graph: Graph, known: Shapes | None = None) -> Shapes:
    """`infer_shapes` (``known``, if it was called) less what depends on dynamic dimensions.

    Dimensions that change with the primes are None.
    """
    shapes, others = known or infer_shapes(graph), infer_shapes(graph, _OTHER_PRIME)
    found = Shapes(kinds=shapes.kinds)
    for name, dims in shapes.dims.items():
        again = others.dims.get(name, ())
        if len(again) == len(dims):
            found.dims[name] = tuple(d if d == o else None for d, o in zip(dims, again, strict=True))
    for name, value in shapes.values.items():
        if name in others.values and np.array_equal(value, others.values[name]):
            found.values[name] = value
    return found


def evaluate(graph: Graph, proto: NodeProto, inputs: dict[str, Array]) -> list[Array] | None:
    """The outputs of one node by ONNX's reference implementation, None when that fails."""
    body = helper.make_graph(
        [proto],
        "node",
        [helper.make_value_info(name, TypeProto()) for name in dict.fromkeys(proto.input) if name],
        [helper.make_value_info(name, TypeProto()) for name in proto.output if name],
    )
    model = helper.make_model_gen_version(body, opset_imports=[helper.make_opsetid("", graph.opset)])
    try:
        with np.errstate(all="ignore"):
            return [np.asarray(v) for v in ReferenceEvaluator(model).run(None, inputs)]
    except Exception:  # whatever the reference's numpy code raises on an odd node: nothing is known then
        return None


def _bind_inputs(graph: Graph, shapes: Shapes, types: dict[str, TypeProto], first: int) -> None:
    sizes = _primes(first)
    bound: dict[str, int] = {}
    for value in graph.inputs:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            continue
        dims = []
        for dim in tensor.shape.dim:
            if dim.HasField("dim_value"):
                dims.append(dim.dim_value)
            elif dim.dim_param:
                dims.append(bound[dim.dim_param] if dim.dim_param in bound else next(sizes))
                bound[dim.dim_param] = dims[-1]
            else:
                dims.append(next(sizes))
        shapes.dims[value.name] = tuple(dims)
        types[value.name] = helper.make_tensor_type_proto(tensor.elem_type, dims)


def _primes(first: int) -> Iterator[int]:
    number = first
    while True:
        if all(number % d for d in range(2, math.isqrt(number) + 1)):
            yield number
        number += 2


def _visit(
    graph: Graph,
    node: gs.Node,
    shapes: Shapes,
    types: dict[str, TypeProto],
    opsets: list[onnx.OperatorSetIdProto],
) -> None:
    for tensor in node.inputs:
        if graph.is_constant(tensor) and tensor.name not in types:
            _add_constant(graph, tensor, shapes, types)
    proto = graph.export_node(node)
    found = _infer(node, proto, shapes, types, opsets)
    for name, kind in found.items():
        if kind.HasField("tensor_type"):
            types[name] = kind
            if kind.tensor_type.HasField("shape"):
                shapes.dims[name] = tuple(
                    d.dim_value if d.HasField("dim_value") else None for d in kind.tensor_type.shape.dim
                )
    _compute(graph, node, proto, shapes)


def _add_constant(graph: Graph, tensor: gs.Tensor, shapes: Shapes, types: dict[str, TypeProto]) -> None:
    values = graph.value(tensor)
    assert values is not None
    shapes.dims[tensor.name] = values.shape
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    types[tensor.name] = helper.make_tensor_type_proto(kind, values.shape)
    if values.size <= _SMALL and values.dtype.kind in "iubf":
        shapes.values[tensor.name] = values


def _infer(
    node: gs.Node,
    proto: NodeProto,
    shapes: Shapes,
    types: dict[str, TypeProto],
    opsets: list[onnx.OperatorSetIdProto],
) -> dict[str, TypeProto]:
    if not is_standard(node) or node.op in _KEEPING:
        return _like_first(proto, types) if node.op in _KEEPING else {}
    if node.op in _COMPARING:
        return _broadcast(proto, shapes, types, TensorProto.BOOL)
    version = next((o.version for o in opsets if o.domain in ("", "ai.onnx")), 1)
    inputs = {n: types[n] for n in proto.input if n in types}
    data = {
        n: onnx.numpy_helper.from_array(shapes.values[n], n)
        for n in proto.input
        if n in shapes.values and shapes.values[n].ndim <= 1
    }
    try:
        schema = defs.get_schema(node.op, version, "")
        return onnx.shape_inference.infer_node_outputs(schema, proto, inputs, data, opset_imports=opsets)
    except Exception:  # dimensions that must agree were bound to different primes, or the operator is unknown
        return _broadcast(proto, shapes, types) if node.op in _BROADCASTING else {}


# Norms of ONNX Runtime, and those that onnx has no shape inference for: the first output is like the first input.
_KEEPING = frozenset(
    {
        "GroupNormalization",
        "MeanVarianceNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "FastGelu",
        "BiasGelu",
        "QuickGelu",
    }
)
_COMPARING = frozenset({"GreaterOrEqual", "LessOrEqual"})  # from opset 12 to 15 onnx infers no shape for them
_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Pow", "Min", "Max"})


def _like_first(proto: NodeProto, types: dict[str, TypeProto]) -> dict[str, TypeProto]:
    return {proto.output[0]: types[proto.input[0]]} if proto.input[0] in types else {}


def _broadcast(
    proto: NodeProto, shapes: Shapes, types: dict[str, TypeProto], kind: int | None = None
) -> dict[str, TypeProto]:
    """Broadcasting that leaves a dimension unknown where two sizes disagree (a mask's length is past + present).

    ``kind``: the type of the result, by default that of the last input."""
    dims = [shapes.dims.get(name) for name in proto.input]
    if any(d is None for d in dims) or not all(n in types for n in proto.input):
        return {}
    rank = max(len(d) for d in dims if d is not None)
    full = [(1,) * (rank - len(d)) + d for d in dims if d is not None]
    sizes = [set(column) - {1} for column in zip(*full, strict=True)]
    result = [1 if not found else found.pop() if len(found) == 1 else None for found in sizes]
    kind = types[proto.input[-1]].tensor_type.elem_type if kind is None else kind
    return {proto.output[0]: helper.make_tensor_type_proto(kind, result)}


def _compute(graph: Graph, node: gs.Node, proto: NodeProto, shapes: Shapes) -> None:
    if not is_standard(node):
        return
    if node.op == "Shape":
        known = shapes.known(node.inputs[0].name)
        if known is not None:
            start, end = node.attrs.get("start", 0), node.attrs.get("end")
            shapes.values[node.outputs[0].name] = np.asarray(known[start:end], np.int64)
        return
    sizes = [shapes.known(t.name) for t in node.outputs]
    if any(s is None or math.prod(s) > _SMALL for s in sizes) or not node.inputs:
        return
    names = [t.name for t in node.inputs if t.name]
    if not all(n in shapes.values for n in names):
        return
    results = evaluate(graph, proto, {n: shapes.values[n] for n in names})
    for tensor, value in zip(node.outputs, results or [], strict=False):
        if value.dtype.kind in "iubf" and value.size <= _SMALL:
            shapes.values[tensor.name] = value
