"""Raises a model's opset: onnx's converter rewrites the operators, everything it would lose is put back.

The converter works on the skeleton, so weights are never copied. It drops local functions, metadata, documentation of
graphs and some kinds of attributes; and it changes the meaning of a few operators (see ``adapters``).
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper
from onnx.inliner import inline_local_functions
from onnx.version_converter import convert_version

from calib.errors import GraphError
from calib.model import Model, lift_constants
from calib.scope import every_node, subgraphs
from onnxslim_ptq.graph.adapters import NORMALIZED_IN, NORMALIZING, give_back, set_aside
from onnxslim_ptq.graph.convert import all_names
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.ir import lowest_ir
from onnxslim_ptq.graph.shapes import infer_shapes

__all__ = ["PER_CHANNEL_OPSET", "raise_opset"]

PER_CHANNEL_OPSET = 13  # the first whose QuantizeLinear has an axis: per-channel weight scales need it

_DEFAULT = ("", "ai.onnx")
_MARK = (
    "onnxslim_ptq:"  # node names while the converter works: what comes back without one was inserted by it
)


def raise_opset(model: Model, least: int) -> Model:
    """The model at opset ``least``, or ``model`` itself when its opset is that high already.

    Names, documentation, metadata, inputs, outputs and weights stay; operators are rewritten to mean the same. Local
    functions are inlined. Constants the converter adds become initializers.

    Raises:
        GraphError: an operator has no equivalent at ``least``.
    """
    old = next((o.version for o in model.proto.opset_import if o.domain in _DEFAULT), None)
    if old is not None and old >= least:
        return model
    source = onnx.ModelProto()
    source.CopyFrom(model.proto)
    if old is None:
        source.opset_import.add(domain="", version=least)
    else:
        if source.functions:
            source = inline_local_functions(source)
        converted = _convert(source, old, least, _along_last(source, model, old, least))
        _rename(converted, all_names(source.graph))
        _take_over(source.graph, converted.graph, _originals(source.graph))
        for entry in source.opset_import:
            if entry.domain in _DEFAULT:
                entry.version = least
        lift_constants(source.graph)
    source.ir_version = max(source.ir_version, lowest_ir(source))
    return Model(source, dict(model.weights), model.path, model.nbytes)


def _along_last(source: onnx.ModelProto, model: Model, old: int, least: int) -> frozenset[str]:
    """Results of Softmax and LogSoftmax along the last axis, which onnx's own inference often cannot tell."""
    found = [n for n in source.graph.node if n.op_type in NORMALIZING and n.domain in _DEFAULT]
    if not found or not old < NORMALIZED_IN <= least:
        return frozenset()
    dims = infer_shapes(Graph(Model(source, dict(model.weights), model.path, model.nbytes))).dims
    last = set()
    for node in found:
        axis, known = next((a.i for a in node.attribute if a.name == "axis"), 1), dims.get(node.input[0])
        if axis == -1 or (known is not None and axis == len(known) - 1):
            last.add(node.output[0])
    return frozenset(last)


def _convert(source: onnx.ModelProto, old: int, least: int, along_last: frozenset[str]) -> onnx.ModelProto:
    """What onnx makes of ``source``: node names carry ``_MARK`` and a number, types and shapes are inferred afresh."""
    work = onnx.ModelProto()
    work.CopyFrom(source)
    for entry in work.opset_import:
        entry.domain = "" if entry.domain in _DEFAULT else entry.domain
    _mark(work.graph, [0])
    set_aside(work, old, least, along_last)
    try:
        converted: onnx.ModelProto = convert_version(work, least)
    except (
        Exception
    ) as error:  # RuntimeError, ConvertError or InferenceError, by operator and release of onnx
        reason = " ".join(str(error).split()).replace(_MARK, "#")[:200]
        raise GraphError(
            f"the model has opset {old} and cannot be raised to {least}: {reason}; "
            f"export the model again with opset >= {least}"
        ) from None
    give_back(converted, least)
    return converted


def _mark(graph: GraphProto, count: list[int]) -> None:
    """Number all nodes in walking order; drop declared shapes (exports get them wrong) and what it cannot hold."""
    del graph.value_info[:]
    for sparse in graph.sparse_initializer:
        graph.input.append(
            helper.make_tensor_value_info(sparse.values.name, sparse.values.data_type, sparse.dims)
        )
    del graph.sparse_initializer[:]
    for node in graph.node:
        foreign = [a for a in node.attribute if _is_foreign(a)]
        for attr in foreign:
            node.attribute.remove(attr)
        node.name = f"{_MARK}{count[0]}"
        node.domain = "" if node.domain in _DEFAULT else node.domain
        count[0] += 1
        for sub in subgraphs(node):
            _mark(sub, count)


def _originals(graph: GraphProto) -> dict[str, NodeProto]:
    """The nodes of ``graph`` and its subgraphs by the mark ``_mark`` gave their copies."""
    return {f"{_MARK}{number}": node for number, node in enumerate(every_node(graph.node))}


def _rename(converted: onnx.ModelProto, taken: set[str]) -> None:
    """Give values the converter added names that are no one else's: it knows the main graph's names only."""
    count = 0
    renamed: dict[str, str] = {}
    for name in sorted(_inserted(converted.graph) - taken):
        while (fresh := f"opset_{count}") in taken:
            count += 1
        renamed[name] = fresh
        taken.add(fresh)
    _apply_names(converted.graph, renamed)


def _inserted(graph: GraphProto) -> set[str]:
    made = {o for n in every_node(graph.node) if not n.name.startswith(_MARK) for o in n.output}
    return {name for name in made if name.startswith("_v_")}


def _apply_names(graph: GraphProto, renamed: dict[str, str]) -> None:
    for node in every_node(graph.node):
        for names in (node.input, node.output):
            names[:] = [renamed.get(n, n) for n in names]


def _take_over(source: GraphProto, converted: GraphProto, originals: dict[str, NodeProto]) -> None:
    """Give ``source`` the converted nodes and the initializers they add; all else stays as it was."""
    nodes = [_restored(node, originals) for node in converted.node]
    known = {t.name for t in source.initializer}
    added = [t for t in converted.initializer if t.name not in known]
    del source.node[:]
    source.node.extend(nodes)
    source.initializer.extend(added)


def _restored(node: NodeProto, originals: dict[str, NodeProto]) -> NodeProto:
    """A converted node with the name, documentation, metadata and attributes of the one it came from."""
    origin = originals.get(node.name)
    restored = NodeProto()
    restored.CopyFrom(node)
    restored.ClearField("name")
    if origin is None:
        return restored
    restored.CopyFrom(origin)
    restored.op_type = node.op_type
    del restored.input[:], restored.output[:], restored.attribute[:]
    restored.input.extend(node.input)
    restored.output.extend(node.output)
    old = {a.name: a for a in origin.attribute}
    for attr in node.attribute:
        restored.attribute.append(_attribute(attr, old.pop(attr.name, None), originals))
    # What is left was dropped on purpose, unless the operator is the same and the converter has no such type.
    if node.op_type == origin.op_type:
        restored.attribute.extend(a for a in old.values() if _is_foreign(a))
    return restored


def _attribute(
    new: AttributeProto, old: AttributeProto | None, originals: dict[str, NodeProto]
) -> AttributeProto:
    kept = AttributeProto()
    if old is None or old.type != new.type:
        kept.CopyFrom(new)
        return kept
    kept.CopyFrom(old)
    if new.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        for graph, changed in zip(_graphs(kept), _graphs(new), strict=True):
            _take_over(graph, changed, originals)
        return kept
    kept.ClearField("doc_string")
    if not _same(kept, new):
        kept.CopyFrom(new)
    kept.doc_string = old.doc_string
    if not old.HasField("doc_string"):
        kept.ClearField("doc_string")
    return kept


def _graphs(attr: AttributeProto) -> Iterable[GraphProto]:
    return [attr.g] if attr.type == AttributeProto.GRAPH else attr.graphs


def _same(old: AttributeProto, new: AttributeProto) -> bool:
    """Equal but for how a tensor is stored: the converter turns raw data into lists."""
    if old.type == AttributeProto.TENSOR:
        return _same_tensor(old.t, new.t)
    return old == new


def _same_tensor(old: TensorProto, new: TensorProto) -> bool:
    if old.data_type != new.data_type or list(old.dims) != list(new.dims):
        return False
    return onnx.numpy_helper.to_array(old).tobytes() == onnx.numpy_helper.to_array(new).tobytes()


def _is_foreign(attr: AttributeProto) -> bool:
    """Whether the converter cannot hold the attribute: an empty list, a type, a sparse tensor, a reference."""
    empty = attr.type in (AttributeProto.INTS, AttributeProto.FLOATS, AttributeProto.STRINGS) and not (
        attr.ints or attr.floats or attr.strings
    )
    types = (
        AttributeProto.SPARSE_TENSOR,
        AttributeProto.SPARSE_TENSORS,
        AttributeProto.TYPE_PROTO,
        AttributeProto.TYPE_PROTOS,
    )
    return empty or attr.type in types or bool(attr.ref_attr_name)
