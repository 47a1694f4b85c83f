"""Computes nodes whose inputs are all constant, so that transposed, cast or scaled weights become plain weights."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from calib.types import Array
from onnxslim_ptq.graph.convert import in_order
from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import LINEAR_OPS

__all__ = ["fold_constants"]

_BROADCASTING = frozenset({"Mul", "Div", "Add", "Sub"})
_FOLDABLE = _BROADCASTING | {
    "Identity",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Cast",
    "Neg",
    "Sqrt",
    "Reciprocal",
    "Slice",
    "Concat",
    "ConstantOfShape",
}
_SMALL = 1 << 16  # bytes up to which a result is folded wherever it is used
_LARGEST = 1 << 31
_GROWTH = 4  # a few bytes of hostile model must not become gigabytes: results stay below this times the model


def fold_constants(graph: Graph) -> int:
    """Fold in one walk in topological order; returns how many nodes went.

    A result above 64 KiB is made only where layers alone read it. All large results together take at most four times
    the model's bytes.
    """
    folded, left = 0, _GROWTH * graph.model.nbytes
    for node in in_order(graph.nodes):
        if node.op not in _FOLDABLE or not is_standard(node) or not _is_constant(graph, node):
            continue
        inputs = {t.name: v for t in node.inputs if t.name and (v := graph.value(t)) is not None}
        size = _largest_result(node, list(inputs.values()))
        if size > _SMALL and (size > min(left, _LARGEST) or not _read_by_layers(graph, node)):
            continue
        values = _evaluate(graph, node, inputs)
        if values is None:
            continue
        left -= values.nbytes if values.nbytes > _SMALL else 0
        result = node.outputs[0]
        graph.remove(node)
        graph.replace_everywhere(result, graph.constant(f"{result.name}.folded", values))
        folded += 1
    return folded


def _is_constant(graph: Graph, node: gs.Node) -> bool:
    if not node.inputs or len(node.outputs) != 1 or node.outputs[0].name in graph.outputs:
        return False
    if any(graph.has_subgraph(r) for r in graph.consumers(node.outputs[0])):
        return False  # a subgraph reads the value by name
    return all(graph.is_constant(t) or not t.name for t in node.inputs)


def _read_by_layers(graph: Graph, node: gs.Node) -> bool:
    readers = graph.consumers(node.outputs[0])
    return bool(readers) and all(r.op in LINEAR_OPS or r.op in _FOLDABLE for r in readers)


def _largest_result(node: gs.Node, inputs: list[Array]) -> int:
    """An upper bound of the result's bytes."""
    if node.op in _BROADCASTING:
        try:
            shape = np.broadcast_shapes(*(v.shape for v in inputs))
        except ValueError:
            return _LARGEST + 1  # the node is invalid; the runtime will say so
        return math.prod(shape) * max(v.dtype.itemsize for v in inputs)
    if node.op == "Cast":
        return inputs[0].size * 16
    if node.op == "ConstantOfShape":  # negative sizes are invalid; the runtime will say so
        sizes = [int(v) for v in inputs[0].reshape(-1)]
        return math.prod(sizes) * 16 if min(sizes, default=0) >= 0 else _LARGEST + 1
    if node.op == "Concat":
        return sum(v.nbytes for v in inputs) * len(node.inputs)  # one input may come several times
    return inputs[0].nbytes


def _evaluate(graph: Graph, node: gs.Node, inputs: dict[str, Array]) -> Array | None:
    """The node's value by the ONNX reference evaluator, or None when that cannot tell what a runtime would give."""
    if any(v.dtype.kind not in "fiub" for v in inputs.values()) or not _is_well_defined(
        node, list(inputs.values())
    ):
        return None
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in inputs.items()
    ]
    result = onnx.ValueInfoProto(name=node.outputs[0].name)
    body = onnx.helper.make_graph([graph.export_node(node)], "fold", infos, [result])
    model = onnx.helper.make_model_gen_version(
        body, opset_imports=[onnx.helper.make_opsetid("", graph.opset)]
    )
    try:
        with np.errstate(all="ignore"):
            results: list[Array] = ReferenceEvaluator(model).run(None, inputs)  # type: ignore[assignment]
    except Exception:  # the reference evaluator raises whatever its numpy code raises; the node simply stays
        return None
    values = np.asarray(results[0])
    return values if values.dtype.kind in "fiub" else None


def _is_well_defined(node: gs.Node, inputs: list[Array]) -> bool:
    """False where runtimes differ: integer division of negatives or by zero, casts of NaN or Inf to integers."""
    if node.op == "Div" and inputs[0].dtype.kind in "iu":
        return all(bool((v.astype(np.int64) >= 0).all()) for v in inputs) and bool(inputs[-1].all())
    if node.op == "Cast" and inputs[0].dtype.kind == "f":
        finite = bool(np.isfinite(inputs[0]).all())
        return finite or node.attrs.get("to") in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    return True
