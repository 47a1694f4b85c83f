"""What a graph's operators say of a value before any data is seen: its limits, its shape, and where a NaN shows up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from calib.model import Model, to_array
from calib.provider import SessionOptions, create_session
from calib.types import Array

__all__ = ["NAN_PASSES", "Facts", "Limits", "Padded"]

# Operators whose output holds a NaN wherever an input does (any input, unless listed in _FIRST_ONLY).
NAN_PASSES = frozenset(
    {
        "Add",
        "BatchNormalization",
        "Clip",
        "Concat",
        "Conv",
        "Flatten",
        "Gemm",
        "GlobalAveragePool",
        "HardSwish",
        "Identity",
        "MatMul",
        "Mul",
        "Pad",
        "Relu",
        "Reshape",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
    }
)
_FIRST_ONLY = frozenset({"BatchNormalization", "Clip", "Conv", "Pad", "Reshape", "Squeeze", "Unsqueeze"})
_SYMBOLIC = -1
_FEW = 200  # values that lead to a constant worth computing
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """lo <= x for every value; x <= hi too, or None where only data tells."""

    lo: float
    hi: float | None


@dataclass(frozen=True)
class Padded:
    """A value that is ``source`` with zeros around it: ``pads`` holds (before, after) per axis."""

    source: str
    pads: tuple[tuple[int, int], ...]

    def size(self, shape: Shape) -> int:
        """How many elements the padded value has when ``source`` has this shape."""
        return int(np.prod([n + b + a for n, (b, a) in zip(shape, self.pads, strict=True)], dtype=np.int64))


class Facts:
    """Answers about the main graph of a model; shapes and types come from ONNX shape inference over its inputs."""

    def __init__(self, model: Model) -> None:
        graph = model.proto.graph
        self._model = model
        self._producers = {o: node for node in graph.node for o in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self._readers.setdefault(name, []).append(node)
        self._initializers = {t.name: t for t in graph.initializer}
        self._computed = _compute_constants(model, self._producers)
        self._shapes: Mapping[str, Shape] | None = None

    def limits(self, tensor: str) -> Limits | None:
        """Limits that the operator computing ``tensor`` guarantees: Relu (0, -) and Clip (lo, hi)."""
        node = self._producers.get(tensor)
        if node is None or node.domain:
            return None
        if node.op_type == "Relu":
            return Limits(0.0, None)
        if node.op_type != "Clip":
            return None
        attributes = {a.name: float(a.f) for a in node.attribute}
        ends = [attributes.get(key, self._scalar(node, port)) for port, key in ((1, "min"), (2, "max"))]
        return Limits(ends[0], ends[1]) if ends[0] is not None else None

    def padded(self, tensor: str) -> Padded | None:
        """``tensor`` as a zero-padded other value, when a Pad with constant sizes makes it."""
        node = self._producers.get(tensor)
        if node is None or node.op_type != "Pad" or node.domain or not 2 <= len(node.input) <= 3:
            return None
        if any(a.name != "mode" or a.s != b"constant" for a in node.attribute):
            return None
        pads = self._constant(node.input[1])
        fill = self._scalar(node, 2) if len(node.input) > 2 and node.input[2] else 0.0
        if pads is None or fill != 0.0 or (np.asarray(pads, np.int64) < 0).any():
            return None
        before, after = np.asarray(pads, np.int64).reshape(2, -1).tolist()
        return Padded(node.input[0], tuple(zip(before, after, strict=True)))

    def shape(self, tensor: str) -> Shape | None:
        """The shape of a float32 value, -1 for sizes that depend on the feed; None when its rank or type is unknown."""
        if self._shapes is None:
            self._shapes = _shapes(self._model.proto, self._computed)
        return self._shapes.get(tensor)

    def shows_nan(self, tensor: str, watched: Collection[str]) -> bool:
        """Whether a NaN anywhere in ``tensor`` is bound to reach a ``watched`` value (one of itself included)."""
        todo, seen = [tensor], {tensor}
        while todo:
            name = todo.pop()
            if name in watched:
                return True
            for node in self._readers.get(name, ()):
                if self._passes(node, name):
                    found = [o for o in node.output[:1] if o not in seen]
                    seen.update(found)
                    todo += found
        return False

    def _passes(self, node: NodeProto, name: str) -> bool:
        if node.domain or node.op_type not in NAN_PASSES:
            return False
        if node.op_type in _FIRST_ONLY and name != node.input[0]:
            return False
        if node.op_type == "Pad":
            return self.padded(node.output[0]) is not None  # others may crop
        return node.op_type != "Conv" or self._reads_all(node)

    def _reads_all(self, conv: NodeProto) -> bool:
        """Whether every element of the input lies in some window; strides may skip elements, at the far edge too."""
        given = {a.name: onnx.helper.get_attribute_value(a) for a in conv.attribute}
        if given.get("auto_pad", b"NOTSET") != b"NOTSET" or set(given.get("dilations", [1])) != {1}:
            return False
        strides = given.get("strides", [1])
        if set(strides) == {1}:
            return True
        shape, kernel = self.shape(conv.input[0]), given.get("kernel_shape")
        if shape is None or kernel is None:
            return False
        begins, ends = np.asarray(given.get("pads", [0] * 2 * len(kernel)), np.int64).reshape(2, -1).tolist()
        return all(
            n > 0 and s <= k and (n + b + e - k) % s <= e
            for n, k, s, b, e in zip(shape[2:], kernel, strides, begins, ends, strict=True)
        )

    def _scalar(self, node: NodeProto, port: int) -> float | None:
        value = self._constant(node.input[port]) if len(node.input) > port and node.input[port] else None
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def _constant(self, name: str) -> Array | None:
        if name in self._computed:
            return self._computed[name]
        found = self._initializers.get(name)
        return to_array(found, self._model.weights) if found is not None else None


def _compute_constants(model: Model, producers: Mapping[str, NodeProto]) -> dict[str, Array]:
    """Sizes of Pad and limits of Clip that nodes compute from small constants, as exporters like to write them."""
    graph = model.proto.graph
    small = {t.name: t for t in graph.initializer if t.name not in model.weights}
    ends = [name for n in graph.node if n.op_type in ("Pad", "Clip") for name in n.input[1:3]]
    outputs, needed = [], set()
    for end in dict.fromkeys(ends):
        todo, inside = [end], {end}
        while todo and (todo[-1] in small or todo[-1] in producers or not todo[-1]):
            node = producers.get(todo.pop())
            found = [i for i in node.input if i not in inside] if node is not None else []
            inside.update(found)
            todo += found
        if not todo and end in producers and len(inside) <= _FEW:
            outputs.append(end)
            needed |= inside
    if not outputs:
        return {}
    part = onnx.ModelProto(ir_version=model.proto.ir_version, opset_import=model.proto.opset_import)
    part.functions.extend(model.proto.functions)
    part.graph.name = "constants"
    part.graph.node.extend(n for n in graph.node if needed.intersection(n.output))
    part.graph.initializer.extend(t for name, t in small.items() if name in needed)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    try:
        values = create_session(part.SerializeToString(), options=SessionOptions(threads=1)).run(outputs, {})
    except Exception:  # random or unknown operators: nothing is known then
        return {}
    return dict(zip(outputs, values, strict=True))


def _shapes(proto: onnx.ModelProto, computed: Mapping[str, Array]) -> Mapping[str, Shape]:
    """Shapes of all float32 values that inference finds from the declared inputs, whose fixed sizes are enforced."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.value_info[:]  # declared, and in real exports often wrong
    nodes = [n for n in proto.graph.node if len(n.output) > 1 or n.output[0] not in computed]
    del bare.graph.node[:]
    bare.graph.node.extend(nodes)
    bare.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in computed.items()
    )
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(bare).graph
    except Exception:  # inference gives up with all kinds of exceptions; then nothing is known
        return {}
    found = {}
    for value in (*graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type == TensorProto.FLOAT and tensor.HasField("shape"):
            found[value.name] = tuple(
                int(d.dim_value) if d.HasField("dim_value") else _SYMBOLIC for d in tensor.shape.dim
            )
    return found
