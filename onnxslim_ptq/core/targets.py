"""What each deployment target takes, one row per target. Exporters and planners read the row; they do not branch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from onnxslim_ptq.core.dtypes import INT8, UINT8, IntType

__all__ = ["TARGETS", "BiasForm", "Target"]


class BiasForm(Enum):
    """How a Conv or Gemm bias behind quantized inputs is written."""

    INT32 = "int32 codes with scale s_x * s_w"
    FLOAT = "float32, left as it is"


@dataclass(frozen=True)
class Target:
    """One row: types, symmetry, which operators are quantized and which need their output quantized too.

    ``output_q``: operators whose integer kernel is only used when the output is quantized as well.
    ``depthwise_pays``: whether an integer depthwise Conv is faster than the float one between float values.
    ``integer_sums``: whether an Add of two quantized values is an integer kernel too when its sum is quantized.
    ``float16_cast``: a float16 model computes its quantized layers in float32 between casts (no float16 kernels).
    ``optimizes_here``: ONNX Runtime on this machine is the target, so its optimized graph is checked for weights
    that would be dequantized at every run. ``exporter`` names the form of the written graph (export.renderers).
    ``integer_cache``: whether that form has an int8 KV cache.
    ``integer_attention``: whether its form has activations with a scale per head.
    ``static_only``: activations have one known scale of type ``activation``; no weight-only or per-token layers.
    ``reciprocal_scale``: the file holds 1 / s_x, so s_x is one that its own reciprocal tells exactly.
    """

    name: str
    activation: IntType
    symmetric_activation: bool
    ops: frozenset[str]
    output_q: frozenset[str]
    per_channel: frozenset[str]
    integer_sums: bool
    bias: BiasForm
    float16_cast: bool
    depthwise_pays: bool
    optimizes_here: bool
    exporter: str
    highest_opset: int
    source: str
    integer_cache: bool = True
    integer_attention: bool = True
    static_only: bool = False
    reciprocal_scale: bool = False


_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="cpu",
            activation=UINT8,
            symmetric_activation=False,
            ops=_LINEAR,
            output_q=frozenset({"Conv"}),
            per_channel=_LINEAR,
            integer_sums=True,
            bias=BiasForm.INT32,
            float16_cast=True,
            depthwise_pays=False,
            optimizes_here=True,
            exporter="qdq",
            highest_opset=25,
            source="ONNX Runtime CPU: signed activations shared by several readers do not fuse on x86",
        ),
        Target(
            name="generic",
            activation=INT8,
            symmetric_activation=False,
            ops=_LINEAR,
            output_q=frozenset(),
            per_channel=_LINEAR,
            integer_sums=False,
            bias=BiasForm.INT32,
            float16_cast=False,
            depthwise_pays=True,
            optimizes_here=False,
            exporter="qdq",
            highest_opset=25,
            source="ONNX specification: standard QuantizeLinear and DequantizeLinear only",
        ),
        Target(
            name="qoperator",
            activation=UINT8,
            symmetric_activation=False,
            ops=_LINEAR,
            output_q=frozenset({"Conv", "MatMul"}),
            per_channel=_LINEAR,
            integer_sums=False,
            bias=BiasForm.INT32,
            float16_cast=False,
            depthwise_pays=True,
            optimizes_here=False,
            exporter="qoperator",
            highest_opset=25,
            source="ONNX specification: QLinearConv and QLinearMatMul, which quantize their outputs",
        ),
        Target(
            name="tensorrt",
            activation=INT8,
            symmetric_activation=True,
            ops=_LINEAR,
            output_q=frozenset(),
            per_channel=_LINEAR,
            integer_sums=False,
            bias=BiasForm.FLOAT,
            float16_cast=False,
            depthwise_pays=True,
            optimizes_here=False,
            exporter="qdq",
            highest_opset=25,
            source="TensorRT accepts symmetric int8 only (zero points 0) and no int32 bias behind DequantizeLinear",
            integer_attention=False,
        ),
        Target(
            name="openvino",
            activation=UINT8,
            symmetric_activation=False,
            ops=_LINEAR,
            output_q=frozenset(),
            per_channel=_LINEAR,
            integer_sums=False,
            bias=BiasForm.FLOAT,
            float16_cast=False,
            depthwise_pays=True,
            optimizes_here=False,
            exporter="qdq",
            highest_opset=25,
            source="OpenVINO FakeQuantize: u8 activations, symmetric s8 weights",
        ),
        Target(
            name="ascend",
            activation=INT8,
            symmetric_activation=False,
            ops=frozenset({"Conv", "Gemm", "MatMul"}),
            output_q=frozenset(),
            per_channel=frozenset({"Conv"}),
            integer_sums=False,
            bias=BiasForm.INT32,
            float16_cast=False,
            depthwise_pays=True,
            optimizes_here=False,
            exporter="ascend",
            highest_opset=17,
            source="CANN: AscendQuant and AscendDequant; one scale for a whole MatMul or Gemm weight",
            static_only=True,
            reciprocal_scale=True,
            integer_cache=False,
            integer_attention=False,
        ),
    )
}
