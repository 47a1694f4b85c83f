"""Renders a plan as the graph Ascend's compiler takes: AscendQuant, integer layers, AscendDequant.

q = clip(round(x * scale + offset), -128, 127) with scale = float32(1 / s_x) (AscendQuant); the layer multiplies the
codes with int8 weights and adds an int32 bias, acc = op(q - offset, W) + b; y = acc * deq with deq = float32(s_x * s_w)
packed into uint64 (AscendDequant). The consumer takes the offset out itself, so b = round(bias / deq) leaves it in.
Sources: CANN's AscendQuant and AscendDequant; files written by msModelSlim 26.1.0 (squant_ptq).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from calib.errors import GraphError
from calib.model import Model
from calib.types import Array
from onnxslim_ptq.core.deq_scale import deq_scale, pack_uint64
from onnxslim_ptq.core.qmath import quantize_bias
from onnxslim_ptq.core.spec import PerToken, QParams, QuantPlan, Use
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.lower_opset import with_opset

__all__ = ["IR", "OPSET", "render_ascend"]

OPSET, IR = 17, 8
_BITS = 8


def render_ascend(model: Model, plan: QuantPlan, target: Target, *, fuse_add: bool = True) -> Model:
    """The float ``model`` with every planned layer as AscendQuant -> integer layer -> AscendDequant, opset 17, IR 8.

    Readers of one tensor that share its numbers share the AscendQuant. ``fuse_add``: a constant Add that alone reads a
    MatMul becomes an int32 Add before AscendDequant.

    Raises:
        GraphError: an operator has no form at opset 17, or the plan holds something AscendQuant cannot express.
    """
    graph = Graph(with_opset(model, OPSET))
    writer = _Writer(graph, plan, fuse_add)
    for use, slot in plan.weights.items():
        writer.layer(use, slot.params)
    rendered = graph.to_model()
    rendered.proto.ir_version = IR
    return rendered


@dataclass
class _Writer:
    graph: Graph
    plan: QuantPlan
    fuse_add: bool
    quantized: dict[tuple[str, str, bool], gs.Tensor] = field(default_factory=dict)
    weights: dict[tuple[str, bool], gs.Constant] = field(default_factory=dict)

    def layer(self, use: Use, key: str) -> None:
        node = self.graph.node(use.node)
        codes = self.plan.weight_codes[key]
        params = self._activation(node)
        if codes.params.spec.dtype.bits != _BITS or not codes.params.spec.symmetric:
            raise GraphError(
                f"node '{node.name}': Ascend takes symmetric int8 weights, not {codes.params.spec.dtype}; "
                "quantize again with int8 weights, or exclude the node"
            )
        half = _is_half(self.graph, node, use.port)
        deq = deq_scale(params.scale, codes.params.scale)
        attrs = dict(node.attrs)
        transposed = node.op == "Gemm" and bool(attrs.pop("transB", 0))
        source = self._plain_side(node, attrs)
        node.inputs[0] = self._codes_of(source, self.plan.activations[Use(node.name, 0)].params, params, half)
        if (key, transposed) not in self.weights:
            stored = codes.codes.T if transposed else codes.codes
            name = f"{node.inputs[use.port].name}_quantized"
            self.weights[key, transposed] = self.graph.constant(name, np.ascontiguousarray(stored))
        node.inputs[use.port] = self.weights[key, transposed]
        if node.op == "Gemm":
            self.graph.set_attributes(node, attrs)
        self._bias(node, deq)
        self._dequantize(self._summed(node, deq), deq, half)

    def _activation(self, node: gs.Node) -> QParams:
        slot = self.plan.activations.get(Use(node.name, 0))
        if slot is None or isinstance(slot.spec.grain, PerToken):
            what = "float" if slot is None else "per-token"
            raise GraphError(
                f"node '{node.name}': AscendQuant needs one known scale, its activation is {what}; "
                "quantize again with static activations, or exclude the node"
            )
        return self.plan.params[slot.params]

    def _plain_side(self, node: gs.Node, attrs: dict[str, object]) -> gs.Tensor:
        """The activation of ``node``, behind a Transpose where a Gemm transposes it."""
        source = node.inputs[0]
        if node.op != "Gemm" or not attrs.pop("transA", 0):
            return source
        turned = self.graph.variable(f"{source.name}_transposed")
        self.graph.add_node("Transpose", f"{source.name}_Transpose", [source], [turned], {"perm": [1, 0]})
        return turned

    def _codes_of(self, source: gs.Tensor, key: str, params: QParams, half: bool) -> gs.Tensor:
        at = (source.name, key, half)
        if at not in self.quantized:
            real = source
            if half:
                real = self.graph.variable(f"{source.name}_float")
                to = {"to": int(TensorProto.FLOAT)}
                self.graph.add_node("Cast", f"{source.name}_Cast", [source], [real], to)
            codes = self.graph.variable(f"{source.name}_quantized")
            attrs = {
                "scale": float(np.float32(1) / np.float32(params.scale)),
                "offset": float(_signed_zero(params)),
                "quant_bit": _BITS,
            }
            self.graph.add_node("AscendQuant", f"{source.name}_AscendQuant", [real], [codes], attrs)
            self.quantized[at] = codes
        return self.quantized[at]

    def _bias(self, node: gs.Node, deq: NDArray[np.float32]) -> None:
        """The planned codes, or those of a bias that was added for bias correction and is float elsewhere."""
        if len(node.inputs) < 3 or not node.inputs[2].name:
            return
        name = node.inputs[2].name
        slot = self.plan.biases.get(Use(node.name, 2))
        if slot is not None:
            codes, clipped = self.plan.bias_codes[slot.params].codes, 0
        else:
            values = self.graph.value(node.inputs[2])
            assert values is not None, f"layer {node.name} lost its bias"
            codes, clipped = quantize_bias(values, deq.astype(np.float64))
        if clipped:
            raise GraphError(
                f"node '{node.name}': {clipped} values of its bias leave int32 at the scale s_x * s_w; exclude the node"
            )
        node.inputs[2] = self.graph.constant(f"{name}_quantized", codes)

    def _summed(self, node: gs.Node, deq: NDArray[np.float32]) -> gs.Node:
        """The last integer node of the layer: ``node``, or the Add behind it, whose constant is int32 from here on."""
        output = node.outputs[0]
        add = self.graph.sole_consumer(output) if self.fuse_add and node.op == "MatMul" else None
        if add is None or add.op != "Add" or add.domain not in (None, "", "ai.onnx"):
            return node
        port = 1 if add.inputs[0] is output else 0
        values = self.graph.value(add.inputs[port])
        if values is None or not _per_column(values, self.graph.value(node.inputs[1])):
            return node
        codes, clipped = quantize_bias(values, deq.astype(np.float64))
        if clipped:
            return node
        # A value that was float and is int32 now gets another name: its declared type goes with the old one.
        node.outputs[0] = add.inputs[1 - port] = self.graph.variable(f"{output.name}_accumulated")
        add.inputs[port] = self.graph.constant(f"{add.inputs[port].name}_quantized", codes)
        return add

    def _dequantize(self, node: gs.Node, deq: NDArray[np.float32], half: bool) -> None:
        result = node.outputs[0]
        packed = self.graph.constant(f"{node.name}_deq_scale", pack_uint64(deq.reshape(-1)))
        node.outputs[0] = self.graph.variable(f"{result.name}_accumulated")
        real = self.graph.variable(f"{result.name}_float") if half else result
        self.graph.add_node("AscendDequant", f"{node.name}_AscendDequant", [node.outputs[0], packed], [real])
        if half:
            to = {"to": int(TensorProto.FLOAT16)}
            self.graph.add_node("Cast", f"{result.name}_Cast", [real], [result], to)


def _signed_zero(params: QParams) -> int:
    """The zero point of the same codes as int8: unsigned ones are shifted by 128."""
    return int(params.zero_point) - (0 if params.spec.dtype.signed else 128)


def _is_half(graph: Graph, node: gs.Node, port: int) -> bool:
    values = graph.value(node.inputs[port])
    return values is not None and values.dtype == np.float16


def _per_column(values: Array, weight: Array | None) -> bool:
    """Whether a constant adds one number per column of a MatMul's product."""
    if weight is None or values.dtype.kind != "f" or values.ndim == 0:
        return False
    return bool(values.shape[-1] == weight.shape[-1] and values.size == values.shape[-1])
