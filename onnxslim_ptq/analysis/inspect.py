"""Facts about a model file: what it is, what can be quantized in it, and why the rest cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, ValueInfoProto

from calib.errors import QuantizationError
from calib.model import Model, open_model
from calib.scope import every_node, subgraphs
from calib.tensors import nested_tensors
from onnxslim_ptq.analysis.beside import document_beside
from onnxslim_ptq.export.check import source_files
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.names import module_names
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.precision import already_quantized
from onnxslim_ptq.graph.smooth_groups import find_groups

__all__ = ["Group", "Inspection", "Layer", "inspect_model"]

_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized; ``module`` is the name it had in the training framework, as far as it shows."""

    node: str
    op: str
    weight: str
    module: str
    shape: list[int]
    channels: int


@dataclass(frozen=True)
class Group:
    """Layers that share a smoothing scale; ``source`` absorbs it, or is the value an explicit Mul would follow."""

    kind: str
    source: str
    tensor: str
    layers: list[str]
    channels: int
    scales: int
    shiftable: bool
    reason: str


@dataclass
class Inspection:
    """Everything ``inspect`` tells; plain values only."""

    file: str
    bytes: int
    external: list[str]
    ir: int
    opsets: dict[str, int]
    producer: str
    metadata: list[str]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    operators: dict[str, int]
    precision: str
    weights: dict[str, dict[str, int]]
    quantized_nodes: list[str]
    subgraphs: list[dict[str, Any]]
    functions: list[str]
    layers: list[Layer] = field(default_factory=list)
    not_quantizable: dict[str, str] = field(default_factory=dict)
    shared_weights: dict[str, list[str]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    groups: list[Group] | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(path: Path, groups: bool = False) -> Inspection:
    """Open ``path`` and describe it, smoothing groups on request; GraphError only when it cannot be opened.

    Layers are those ``quantize`` would see: after the opset is raised and the float graph simplified. When that fails
    on an odd model, a note says so and the graph is described as it is in the file.
    """
    model = open_model(path)
    proto = model.proto
    weights = _weights(proto)
    integer = already_quantized(model)
    found = Inspection(
        file=str(path),
        bytes=model.nbytes,
        external=[str(p) for p in source_files(path)[1:]],
        ir=proto.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in proto.opset_import},
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
        metadata=[p.key for p in proto.metadata_props],
        inputs=_inputs(proto),
        outputs=[_value(v) for v in proto.graph.output],
        operators=dict(sorted(_operators(proto).items(), key=lambda item: (-item[1], item[0]))),
        precision=_precision(weights, integer),
        weights=weights,
        quantized_nodes=integer,
        subgraphs=list(_with_subgraphs(proto.graph.node)),
        functions=[f.name for f in proto.functions],
    )
    if integer:
        calibration = (document_beside(path) or {}).get("calibration")
        found.calibration = calibration if isinstance(calibration, dict) else None
    _describe_layers(found, model, groups)
    return found


def _describe_layers(found: Inspection, model: Model, groups: bool) -> None:
    try:
        graph = _simplified(found, model)
        linears, found.not_quantizable = find_linears(graph)
        found.groups = _groups(graph) if groups else None
    except (
        Exception
    ) as error:  # a model may be odd in ways nobody thought of; the rest of the answer still serves
        reason = " ".join(str(error).split()) or type(error).__name__
        found.notes.append(f"layers cannot be told: {reason}")
        return
    found.notes += graph.notes
    names = module_names(graph, linears)
    found.layers = [_layer(graph, linear, names[linear.node]) for linear in linears]
    readers: dict[str, list[str]] = {}
    for layer in found.layers:
        readers.setdefault(layer.weight, []).append(layer.node)
    found.shared_weights = {weight: nodes for weight, nodes in readers.items() if len(nodes) > 1}


def _simplified(found: Inspection, model: Model) -> Graph:
    try:
        graph = Graph(raise_opset(model, PER_CHANNEL_OPSET))
        folded = {name: n for name, n in optimize(graph).items() if n}
    except QuantizationError as error:
        found.notes.append(f"layers as in the file, the graph cannot be simplified: {error}")
        return Graph(model)
    if folded:
        found.notes.append(
            "layers as after quantize's exact simplifications: "
            + ", ".join(f"{n} {name}" for name, n in folded.items())
        )
    return graph


def _groups(graph: Graph) -> list[Group]:
    return [
        Group(
            group.kind.value,
            group.name,
            group.tensor,
            [layer.node for layer in group.consumers],
            group.channels,
            group.scales,
            group.shiftable,
            group.reason,
        )
        for group in find_groups(graph)
    ]


def _layer(graph: Graph, linear: Linear, module: str) -> Layer:
    node = graph.node(linear.node)
    values = graph.value(node.inputs[linear.weight])
    shape = [] if values is None else list(values.shape)
    return Layer(linear.node, linear.op, linear.weight_name, module, shape, linear.channels)


def _inputs(proto: onnx.ModelProto) -> list[dict[str, Any]]:
    defaults = {t.name for t in proto.graph.initializer}
    return [_value(v) for v in proto.graph.input if v.name not in defaults]


def _value(value: ValueInfoProto) -> dict[str, Any]:
    kind = value.type.WhichOneof("value") or "unknown"
    if kind != "tensor_type":
        return {"name": value.name, "type": kind.removesuffix("_type"), "shape": None}
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    shape = dims if tensor.HasField("shape") else None
    return {"name": value.name, "type": _type_name(tensor.elem_type), "shape": shape}


def _type_name(number: int) -> str:
    try:
        name = str(TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return f"type {number}"
    return {"float": "float32", "double": "float64"}.get(name, name)


def _operators(proto: onnx.ModelProto) -> Counter[str]:
    every = [*every_node(proto.graph.node), *(n for f in proto.functions for n in every_node(f.node))]
    return Counter(n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}" for n in every)


def _with_subgraphs(nodes: Any) -> Iterator[dict[str, Any]]:
    for node in nodes:
        inner = [len(list(every_node(graph.node))) for graph in subgraphs(node)]
        if inner:
            yield {"node": node.name or next(iter(node.output), ""), "op": node.op_type, "nodes": sum(inner)}


def _weights(proto: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Per element type: how many constants of that type there are and how many bytes they hold."""
    found: dict[str, dict[str, int]] = {}
    for tensor in (*proto.graph.initializer, *nested_tensors(proto)):
        entry = found.setdefault(_type_name(tensor.data_type), {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += _nbytes(tensor)
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _nbytes(tensor: TensorProto) -> int:
    name = _type_name(tensor.data_type)
    bits = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}.get(name)
    if bits is None:
        try:
            bits = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        except (KeyError, ValueError, TypeError):
            bits = 0
    return int(math.prod(tensor.dims)) * bits // 8


def _precision(weights: dict[str, dict[str, int]], integer: list[str]) -> str:
    floats = [name for name in weights if name in _FLOATS]
    main = floats[0] if floats else "no float weights"
    return f"quantized, the rest {main}" if integer else main
