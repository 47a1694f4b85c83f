"""Tells whether a model was quantized before: what is integer already must not be quantized twice."""

from __future__ import annotations

import onnx

from calib.model import Model
from calib.scope import every_node

__all__ = ["already_quantized", "is_quantization"]

_OPERATORS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "ConvInteger",
        "MatMulInteger",
        # ONNX Runtime, domain com.microsoft; any domain counts, because vendors reuse the names
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QMoE",
        "QOrderedMatMul",
        "QuantizeWithOrder",
        "DequantizeWithOrder",
        "MatMulNBits",
        "MatMulBnb4",
        "GatherBlockQuantized",
        "QuantizeBFP",
        "DequantizeBFP",
        # Ascend and OpenVINO
        "AscendQuant",
        "AscendDequant",
        "AscendAntiQuant",
        "AscendRequant",
        "AscendRequantS16",
        "NPUAscendQuantV2",
        "FakeQuantize",
    }
)
_PREFIXES = ("QLinear", "QOrdered")


def is_quantization(op: str) -> bool:
    """Whether an operator of that name makes, takes or is made of quantized values."""
    return op in _OPERATORS or op.startswith(_PREFIXES)


def already_quantized(model: Model) -> list[str]:
    """Names of the nodes that work on quantized values, in the main graph, its subgraphs and local functions.

    A node without a name is called by its operator and first output.
    """
    found = [_label(n) for n in every_node(model.proto.graph.node) if is_quantization(n.op_type)]
    for function in model.proto.functions:
        found += [
            f"{function.name}/{_label(n)}" for n in every_node(function.node) if is_quantization(n.op_type)
        ]
    return found


def _label(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}_{next(iter(node.output), '')}"
