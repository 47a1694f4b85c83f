"""Brings a model to one opset, up or down: runtimes with a newest opset of their own still take newer models.

Upwards onnx's converter does it (``opset``). Downwards an operator stays as it is when its definition did not change in
between, or when it grew by types alone; a few are rewritten:

====================  ================================================================================================
Gelu (20)             0.5 x (1 + erf(x / sqrt 2)), or with tanh where ``approximate`` says so
Mish (18)             x tanh(softplus(x))
Reduce* (18)          constant axes go back from an input into the attribute
Split (18)            ``num_outputs`` becomes sizes, where the dimension is known to divide evenly
Pad, Resize (18, 19)  as they were, where they use nothing new (axes, antialias, keep_aspect_ratio_policy, wrap)
====================  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from calib.errors import GraphError
from calib.model import Model
from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.opset import raise_opset

__all__ = ["with_opset"]

# Newer versions of these differ by more types, by a feature whose default is the old behaviour, or in words only.
_GREW = frozenset(
    {
        *("Cast", "CastLike", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "If", "IsInf"),
        *("IsNaN", "Loop", "Reshape", "Scan", "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze"),
        *(
            "BitShift",
            "GlobalLpPool",
            "LpPool",
            "ScatterElements",
            "ScatterND",
            "TopK",
            "Clip",
            "Cos",
            "Cosh",
        ),
        *("Sin", "Sinh", "Tan", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Softplus", "Softsign"),
        *(
            "InstanceNormalization",
            "MaxPool",
            "GlobalMaxPool",
            "GlobalAveragePool",
            "HardSigmoid",
            "HardSwish",
        ),
        *(
            "Conv",
            "ConvTranspose",
            "EyeLike",
            "Elu",
            "Selu",
            "ThresholdedRelu",
            "Round",
            "Det",
            "LpNormalization",
        ),
        *(
            "Multinomial",
            "RandomNormal",
            "RandomUniform",
            "DequantizeLinear",
            "QuantizeLinear",
            "AveragePool",
        ),
        *("Dropout", "Hardmax", "RNN", "LSTM", "GRU", "NonMaxSuppression", "Expand"),
    }
)
_REDUCE_INPUT = frozenset(
    f"Reduce{k}" for k in ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp")
)
_REDUCE = _REDUCE_INPUT | {"ReduceSumSquare"}
# Attributes that came later without a default, and the value that is the old behaviour.
_OLD = {"dilations": 1}
_NEW_MODES = {
    "Pad": ("mode", ("wrap",)),
    "Resize": ("coordinate_transformation_mode", ("half_pixel_symmetric",)),
    "ScatterElements": ("reduction", ("max", "min")),
    "ScatterND": ("reduction", ("max", "min")),
}


def with_opset(model: Model, opset: int) -> Model:
    """The model at exactly ``opset``; downwards 17 or less, for what is rewritten takes forms from before 18.

    Raises GraphError naming the node that has no form there.
    """
    raised = raise_opset(model, opset)
    graph = Graph(raised)
    if graph.opset == opset:
        return raised
    if any(graph.has_subgraph(n) for n in graph.nodes) or raised.proto.functions:
        raise GraphError(
            f"the model has opset {graph.opset} and subgraphs or functions, which cannot be brought down to {opset}; "
            f"export it again with opset {opset}"
        )
    for node in graph.nodes:
        if is_standard(node):
            _lower(graph, node, opset)
    lowered = graph.to_model()
    for entry in lowered.proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    return lowered


def _lower(graph: Graph, node: gs.Node, opset: int) -> None:
    try:
        since = onnx.defs.get_schema(node.op, graph.opset, "").since_version
    except onnx.defs.SchemaError:
        return
    if since <= opset:
        return
    adapter = _ADAPTERS.get(node.op)
    if adapter is not None:
        adapter(graph, node, opset)
    elif node.op not in _GREW or not onnx.defs.has(node.op, opset, ""):
        raise _no_form(graph, node, opset)
    else:
        _as_it_was(graph, node, opset)


def _no_form(graph: Graph, node: gs.Node, opset: int, why: str = "") -> GraphError:
    return GraphError(
        f"node '{node.name}': {node.op} of opset {graph.opset} has no form at opset {opset}{why}; export the model "
        f"again with opset {opset}"
    )


def _gelu(graph: Graph, node: gs.Node, opset: int) -> None:
    """Gelu as Erf or Tanh and arithmetic; the output keeps its name."""
    source, result = node.inputs[0], node.outputs[0]
    approximate = node.attrs.get("approximate", "none")
    name = node.name
    dtype = np.float16 if _float16(graph, result.name) else np.float32
    graph.remove(node)

    def number(value: float, label: str) -> gs.Constant:
        return graph.constant(f"{name}.{label}", np.asarray(value, dtype))

    def step(op: str, inputs: list[gs.Tensor], label: str) -> gs.Tensor:
        made = graph.variable(f"{name}.{label}")
        graph.add_node(op, f"{name}/{label}", inputs, [made])
        return made

    if approximate == "tanh":
        square = step("Mul", [source, source], "square")
        cube = step("Mul", [square, source], "cube")
        bent = step("Add", [source, step("Mul", [cube, number(0.044715, "c3")], "bend")], "bent")
        inner = step("Tanh", [step("Mul", [bent, number(float(np.sqrt(2 / np.pi)), "c1")], "inner")], "tanh")
    else:
        inner = step("Erf", [step("Div", [source, number(float(np.sqrt(2)), "root")], "inner")], "erf")
    share = step("Add", [inner, number(1.0, "one")], "share")
    product = step("Mul", [source, share], "product")
    graph.add_node("Mul", name, [product, number(0.5, "half")], [result])


def _mish(graph: Graph, node: gs.Node, opset: int) -> None:
    source, result, name = node.inputs[0], node.outputs[0], node.name
    graph.remove(node)
    soft, bent = graph.variable(f"{name}.softplus"), graph.variable(f"{name}.tanh")
    graph.add_node("Softplus", f"{name}/softplus", [source], [soft])
    graph.add_node("Tanh", f"{name}/tanh", [soft], [bent])
    graph.add_node("Mul", name, [source, bent], [result])


def _reduce(graph: Graph, node: gs.Node, opset: int) -> None:
    attrs = dict(node.attrs)
    empty = bool(attrs.pop("noop_with_empty_axes", 0))
    if len(node.inputs) > 1 and node.inputs[1].name:
        axes = graph.value(node.inputs[1])
        if axes is None:
            raise _no_form(graph, node, opset, ", its axes are computed")
        if axes.size:  # none means all, and an attribute cannot be an empty list
            attrs["axes"] = [int(a) for a in axes.reshape(-1)]
    if empty and not attrs.get("axes"):
        raise _no_form(graph, node, opset, ", it reduces nothing")
    source, result, name, op = node.inputs[0], node.outputs[0], node.name, node.op
    graph.remove(node)
    graph.add_node(op, name, [source], [result], attrs)


def _split(graph: Graph, node: gs.Node, opset: int) -> None:
    """Without sizes opsets before 18 divide evenly by the number of outputs, as 18 does unless the last is smaller."""
    if "num_outputs" in node.attrs:
        size = _dimension(graph, node.inputs[0].name, int(node.attrs.get("axis", 0)))
        if size is None or size % len(node.outputs):
            raise _no_form(graph, node, opset, ", its sizes are not known to be equal")
    graph.set_attributes(node, {k: v for k, v in node.attrs.items() if k != "num_outputs"})


def _as_it_was(graph: Graph, node: gs.Node, opset: int) -> None:
    """Without attributes that came after ``opset``; GraphError where one of them, or a newer mode, is made use of."""
    now, then = (onnx.defs.get_schema(node.op, version, "").attributes for version in (graph.opset, opset))
    new = [key for key in node.attrs if key in now and key not in then]
    for key in new:
        default = now[key].default_value
        old = _OLD.get(key) if not default.name else onnx.helper.get_attribute_value(default)
        old = old.decode() if isinstance(old, bytes) else old
        if any(value != old for value in np.ravel(node.attrs[key])):
            raise _no_form(graph, node, opset, f", it uses '{key}'")
    key, modes = _NEW_MODES.get(node.op, ("", ()))
    if node.attrs.get(key) in modes:
        raise _no_form(graph, node, opset, f", it uses {key} {node.attrs[key]}")
    if node.op == "Pad" and len(node.inputs) > 3 and node.inputs[3].name:
        raise _no_form(graph, node, opset, ", it uses axes")
    if new:
        graph.set_attributes(node, {k: v for k, v in node.attrs.items() if k not in new})


def _dimension(graph: Graph, name: str, axis: int) -> int | None:
    source = graph.model.proto.graph
    for value in (*source.input, *source.value_info):
        if value.name == name and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            return dims[axis].dim_value or None
    return None


def _float16(graph: Graph, name: str) -> bool:
    source = graph.model.proto.graph
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*source.value_info, *source.output, *source.input)
    }
    weights = [t.data_type for t in source.initializer]
    half = onnx.TensorProto.FLOAT16
    if kinds.get(name):
        return bool(kinds[name] == half)
    return half in weights and onnx.TensorProto.FLOAT not in weights


_ADAPTERS: dict[str, Callable[[Graph, gs.Node, int], None]] = {
    "Gelu": _gelu,
    "Mish": _mish,
    "Split": _split,
    "Pad": _as_it_was,
    "Resize": _as_it_was,
    **dict.fromkeys(_REDUCE, _reduce),
}
