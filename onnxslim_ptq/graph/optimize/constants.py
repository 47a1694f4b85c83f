"""Computes nodes whose inputs are all constant, so that transposed, cast or scaled weights become plain weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from calib.types import Array
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import LINEAR_OPS

__all__ = ["fold_constants"]

# Shape-preserving or shrinking operators only: nothing here can turn a few bytes of model into gigabytes.
_FOLDABLE = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Mul", "Div", "Add",
                       "Sub", "Neg", "Sqrt", "Reciprocal", "Slice", "Concat"})
_SMALL = 1 << 16  # bytes up to which a result is folded wherever it is used
_LARGEST = 1 << 31


def fold_constants(graph: Graph) -> int:
    """Fold to a fixpoint; a large result only where a layer reads it as weight, so that shared ones are not doubled."""
    folded = 0
    for node in graph.nodes:
        if node.op in _FOLDABLE and node.domain in (None, "", "ai.onnx") and _wanted(graph, node):
            values = _evaluate(graph, node)
            if values is not None:
                result = node.outputs[0]
                graph.remove(node)
                graph.replace_everywhere(result, graph.constant(f"{result.name}.folded", values))
                folded += 1
    return folded


def _wanted(graph: Graph, node: gs.Node) -> bool:
    if not node.inputs or len(node.outputs) != 1 or node.outputs[0].name in graph.outputs:
        return False
    if not all(graph.is_constant(t) or not t.name for t in node.inputs):
        return False
    readers = graph.consumers(node.outputs[0])
    if any(graph.has_subgraph(r) for r in readers):
        return False  # a subgraph reads the value by name
    size = sum(v.nbytes for t in node.inputs if (v := graph.value(t)) is not None)
    if size <= _SMALL:
        return True
    weights = [r for r in readers if r.op in LINEAR_OPS or r.op in _FOLDABLE]
    return size < _LARGEST and bool(readers) and len(weights) == len(readers)


def _evaluate(graph: Graph, node: gs.Node) -> Array | None:
    """The node's value by the ONNX reference evaluator, or None when that cannot tell."""
    inputs = [(t.name, graph.value(t)) for t in node.inputs if t.name]
    if any(v is None for _, v in inputs):
        return None
    proto = graph.export_node(node)
    infos = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
             for n, v in dict(inputs).items() if v is not None]
    body = onnx.helper.make_graph([proto], "fold", infos, [onnx.ValueInfoProto(name=node.outputs[0].name)])
    model = onnx.helper.make_model_gen_version(body, opset_imports=[onnx.helper.make_opsetid("", graph.opset)])
    try:
        result = ReferenceEvaluator(model).run(None, dict(inputs))[0]
    except Exception:  # the reference evaluator raises whatever its numpy code raises; the node simply stays
        return None
    values = np.asarray(result)
    return values if values.dtype.kind in "fiub" else None
