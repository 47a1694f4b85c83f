"""Reads back the graph as ONNX Runtime will really run it, and finds weights it would dequantize at every run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import TensorProto

from calib.blocks.spool import Spool
from calib.model import Model
from calib.provider import SessionOptions
from onnxslim_ptq.export.mapped import session_of
from onnxslim_ptq.graph.convert import all_names

__all__ = [
    "Island",
    "dequantized_weights",
    "float_islands",
    "guard_float_layers",
    "optimized_graph",
    "stored_weight",
    "unfused_weights",
]

# What WeightBiasQuantization of ONNX Runtime rewrites, and operators that ONNX Runtime moves Q/DQ across or absorbs.
_REWRITTEN = frozenset({"Conv", "ConvTranspose", "Gemm"})
_LOOKED_THROUGH = frozenset(
    {
        "Clip",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "LeakyRelu",
        "MaxPool",
        "Pad",
        "Relu",
        "Reshape",
        "Resize",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)

_INTEGER = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
# Operators between DequantizeLinear and QuantizeLinear that ONNX Runtime's CPU provider has an integer kernel for.
_INTEGER_KERNELS = frozenset(
    {
        "Add",
        "AveragePool",
        "Concat",
        "Conv",
        "Gemm",
        "GlobalAveragePool",
        "MatMul",
        "Mul",
        "ReduceMean",
        "Sigmoid",
        "Softmax",
        "Where",
    }
)


def unfused_weights(model: Model, spool: Spool | None = None) -> set[str]:
    """Names of 8-bit and 4-bit initializers that a DequantizeLinear still reads after ONNX Runtime's optimizations.

    Such a weight is turned back into float at every run: 12 to 17 times slower than the float layer at one token.
    """
    return dequantized_weights(optimized_graph(model, spool))


def dequantized_weights(graph: onnx.GraphProto) -> set[str]:
    """`unfused_weights` of an optimized graph."""
    stored = {t.name for t in graph.initializer if t.data_type in _INTEGER}
    return {n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}


@dataclass(frozen=True)
class Island:
    """A node that computes in float although it reads quantized values, and why."""

    node: str
    op: str
    reason: str


def float_islands(graph: onnx.GraphProto) -> list[Island]:
    """The nodes of an `optimized_graph` that read a DequantizeLinear, in its order.

    Each costs a conversion to float in front of it and often one back behind it.
    """
    makers = {o: n for n in graph.node for o in n.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    constants = {t.name for t in graph.initializer}
    found = []
    for node in graph.node:
        values = [name for name in node.input if name and name not in constants]
        plain = [n for n in values if n not in makers or makers[n].op_type != "DequantizeLinear"]
        if len(plain) < len(values) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            found.append(Island(node.name or node.output[0], node.op_type, _why(node, plain, readers)))
    return found


def _why(node: onnx.NodeProto, plain: list[str], readers: Mapping[str, list[str]]) -> str:
    if node.op_type not in _INTEGER_KERNELS and node.op_type not in _LOOKED_THROUGH:
        return f"ONNX Runtime has no integer {node.op_type} on the CPU"
    if plain:
        return f"its input '{plain[0]}' is not quantized"
    if not all(set(readers.get(name, [])) == {"QuantizeLinear"} for name in node.output):
        return "its result is not quantized, or is also read in float"
    return "types or scales do not suit ONNX Runtime's integer kernel"


def optimized_graph(model: Model, spool: Spool | None = None) -> onnx.GraphProto:
    """The graph as ONNX Runtime will run it, weights left out."""
    with tempfile.TemporaryDirectory(
        prefix="onnxslim-ptq-", dir=spool.folder if spool is not None else None
    ) as folder:
        path = Path(folder) / "optimized.onnx"
        session_of(model, SessionOptions(write_optimized=path), spool)
        return onnx.load(path, load_external_data=False).graph


def guard_float_layers(model: Model) -> Model:
    """``model`` with layers that stay float between quantized values protected from ONNX Runtime.

    It would quantize their float weights by itself, per tensor, when it sees DequantizeLinear -> layer ->
    QuantizeLinear. A Max of one input, which is the identity and which no optimization removes, breaks the pattern.
    """
    graph = model.proto.graph
    producers = {o: n for n in graph.node for o in n.output}
    quantized = {i for n in graph.node if n.op_type == "QuantizeLinear" for i in n.input[:1]}
    for node in reversed(graph.node):
        if node.op_type in _LOOKED_THROUGH and not quantized.isdisjoint(node.output):
            quantized.add(node.input[0])
    floats = {t.name for t in graph.initializer if t.data_type not in _INTEGER}
    exposed = {
        n.name
        for n in graph.node
        if n.op_type in _REWRITTEN
        and n.input[1] in floats
        and n.output[0] in quantized
        and _dequantized(n.input[0], producers)
    }
    if not exposed:
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    taken = all_names(graph) | {n.name for n in graph.node}
    nodes = []
    for node in proto.graph.node:
        if node.name in exposed:
            name = _unused(f"{node.name}_float_input", taken)
            nodes.append(onnx.helper.make_node("Max", [node.input[0]], [name], name))
            node.input[0] = name
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return replace(model, proto=proto)


def _dequantized(name: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a DequantizeLinear makes ``name``, as it is or before operators that ONNX Runtime moves it across."""
    node = producers.get(name)
    while node is not None and node.op_type in _LOOKED_THROUGH:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def stored_weight(proto: onnx.ModelProto, ports: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """For each (node, input port) behind a DequantizeLinear: the initializer that it dequantizes."""
    producers = {o: n for n in proto.graph.node for o in n.output}
    nodes = {n.name: n for n in proto.graph.node}
    found = {}
    for name, port in ports:
        source = producers.get(nodes[name].input[port]) if name in nodes else None
        if source is not None and source.op_type == "DequantizeLinear":
            found[name, port] = source.input[0]
    return found
