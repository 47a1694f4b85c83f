"""Products: divisions folded into weights, products of one input made at once, MatMul with its bias as Gemm."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_graphsurgeon as gs

from calib.types import Array
from onnxslim_ptq.graph.edit import bypass, is_captured, is_standard, narrowed, own_constant
from onnxslim_ptq.graph.forms.activations import scalar
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.shapes import infer_shapes

__all__ = ["fold_division", "form_gemm", "merge_parallel"]

_PASSING = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze"})
_SPLIT_SIZES = 13  # Split takes its sizes as an input


def fold_division(graph: Graph) -> int:
    """A product divided, or multiplied, by a constant number: the factor goes into the weights it came from.

    (x W + b) / c = x (W / c) + b / c, also when an attention's Q Kᵀ / c lies between: then into Q's weights, through
    Reshape and Transpose. Every value on the way is read by the next node alone, once; the constants stay
    finite and keep their digits.
    """
    count = 0
    for node in graph.nodes:
        if node.op not in ("Div", "Mul") or not is_standard(node) or len(node.inputs) != 2:
            continue
        ports = [0] if node.op == "Div" else [0, 1]
        for port in ports:
            value = scalar(graph, node.inputs[1 - port])
            product = graph.producer(node.inputs[port])
            if value is None or value.dtype.kind != "f" or product is None or product.op != "MatMul":
                continue
            factor = float(value.reshape(-1)[0])
            if factor == 0.0 or not graph.reads_alone(node, product.outputs[0]):
                continue
            if _scale(graph, product, 1.0 / factor if node.op == "Div" else factor):
                bypass(graph, product, node)
                count += 1
                break
    return count


def _scale(graph: Graph, product: gs.Node, factor: float) -> bool:
    """Multiply what ``product`` computes: its constant weight, or the layer that makes its left side."""
    found: list[tuple[gs.Node, int, Array]] = []
    node: gs.Node | None = product
    while node is not None:
        port = _constant_port(graph, node)
        if node.op in ("MatMul", "Add") and port is not None:
            found.append((node, port, _constant(graph, node, port)))
            if node.op == "MatMul":
                break
            source = node.inputs[1 - port]
        elif node.op in _PASSING or (node is product and port is None):
            source = node.inputs[0]
        else:
            return False
        if not graph.reads_alone(node, source) or sum(t is source for t in node.inputs) > 1:
            return False
        node = graph.producer(source)
    if node is None:
        return False
    scaled = [narrowed(values.astype(np.float64) * factor, values.dtype) for _, _, values in found]
    if any(values is None for values in scaled):
        return False
    for (layer, port, _), result in zip(found, scaled, strict=True):
        assert result is not None
        own_constant(graph, layer, port, result)
    return True


def _constant_port(graph: Graph, node: gs.Node) -> int | None:
    if not is_standard(node) or len(node.inputs) != 2:
        return None
    ports = [p for p in (0, 1) if graph.is_constant(node.inputs[p])]
    floats = [p for p in ports if _constant(graph, node, p).dtype.kind == "f"]
    return floats[0] if len(ports) == 1 and floats else None


def _constant(graph: Graph, node: gs.Node, port: int) -> Array:
    values = graph.value(node.inputs[port])
    assert values is not None
    return values


def merge_parallel(graph: Graph) -> int:
    """MatMuls with constant [K, N] weights that read one value become one, followed by a Split; opset 13 and higher.

    Their constant Adds of [N], each the only reader, are merged along. Returns how many MatMuls went.
    """
    if graph.opset < _SPLIT_SIZES:
        return 0
    readers: dict[tuple[str, int, str], list[gs.Node]] = defaultdict(list)
    for node in graph.nodes:
        weight = graph.value(node.inputs[1]) if node.op == "MatMul" and is_standard(node) else None
        if weight is not None and weight.ndim == 2 and not graph.is_constant(node.inputs[0]):
            readers[node.inputs[0].name, weight.shape[0], weight.dtype.name].append(node)
    return sum(_merge(graph, nodes) for nodes in readers.values() if len(nodes) > 1)


def _merge(graph: Graph, nodes: list[gs.Node]) -> int:
    weights = [_constant(graph, n, 1) for n in nodes]
    adds = [_bias(graph, n, w.shape[1]) for n, w in zip(nodes, weights, strict=True)]
    whole = all(a is not None for a in adds)
    biases = [a[1] for a in adds if a is not None] if whole else []
    ends = [
        a[0].outputs[0] if whole and a is not None else n.outputs[0] for n, a in zip(nodes, adds, strict=True)
    ]
    if any(is_captured(graph, end) for end in ends):
        return 0
    first = nodes[0]
    source, name = first.inputs[0], first.name
    for node, add in zip(nodes, adds, strict=True):
        if whole and add is not None:
            graph.remove(add[0])
        graph.remove(node)
    joined = graph.variable(f"{name}.joined")
    weight = graph.constant(f"{name}.joined_weight", np.concatenate(weights, axis=1))
    graph.add_node("MatMul", name, [source, weight], [joined])
    if whole:
        shifted = graph.variable(f"{name}.shifted")
        bias = graph.constant(f"{name}.joined_bias", np.concatenate(biases))
        graph.add_node("Add", f"{name}.bias", [joined, bias], [shifted])
        joined = shifted
    sizes = graph.constant(f"{name}.sizes", np.asarray([w.shape[1] for w in weights], np.int64))
    graph.add_node("Split", f"{name}.split", [joined, sizes], ends, {"axis": -1})
    return len(nodes) - 1


def _bias(graph: Graph, node: gs.Node, columns: int) -> tuple[gs.Node, Array] | None:
    """The Add of one value per column that alone reads ``node``, and its values."""
    add = graph.sole_consumer(node.outputs[0])
    if add is None or add.op != "Add" or not is_standard(add):
        return None
    port = 1 if add.inputs[0] is node.outputs[0] else 0
    values = graph.value(add.inputs[port])
    return (add, values) if values is not None and values.shape == (columns,) else None


def form_gemm(graph: Graph) -> int:
    """MatMul of a matrix (rank 2, by shape inference) with a constant matrix, and its bias, become one Gemm."""
    candidates = [n for n in graph.nodes if n.op == "MatMul" and is_standard(n)]
    if not candidates:
        return 0
    shapes = infer_shapes(graph)
    count = 0
    for node in candidates:
        weight, dims = graph.value(node.inputs[1]), shapes.dims.get(node.inputs[0].name)
        if weight is None or weight.dtype.kind != "f" or weight.ndim != 2 or dims is None or len(dims) != 2:
            continue
        found = _bias(graph, node, weight.shape[1])
        inputs, name, result = [*node.inputs], node.name, node.outputs[0]
        if found is not None:
            add = found[0]
            port = 1 if add.inputs[0] is result else 0
            inputs.append(add.inputs[port])
            result = add.outputs[0]
            graph.remove(add)
        graph.remove(node)
        graph.add_node("Gemm", name, inputs, [result])
        count += 1
    return count
