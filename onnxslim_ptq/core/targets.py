"""What each deployment target takes, one row per target. Exporters and planners read the row; they do not branch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from onnxslim_ptq.core.dtypes import INT8, UINT8, IntType

__all__ = ["TARGETS", "BiasForm", "Target"]


_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class BiasForm(Enum):
    """How a Conv or Gemm bias behind quantized inputs is written."""

    INT32 = "int32 codes with scale s_x * s_w"
    FLOAT = "float32, left as it is"


@dataclass(frozen=True)
class Target:
    """One row: types, symmetry, which operators are quantized and which need their output quantized too. A row tells
    where it differs from standard ONNX.

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
    source: str
    activation: IntType
    symmetric_activation: bool = False
    symmetric_weight: bool = False
    ops: frozenset[str] = _LINEAR
    output_q: frozenset[str] = frozenset()
    per_channel: frozenset[str] = _LINEAR
    integer_sums: bool = False
    bias: BiasForm = BiasForm.INT32
    float16_cast: bool = False
    depthwise_pays: bool = True
    optimizes_here: bool = False
    exporter: str = "qdq"
    integer_cache: bool = True
    integer_attention: bool = True
    static_only: bool = False
    reciprocal_scale: bool = False


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="cpu",
            source="ONNX Runtime CPU: signed activations shared by several readers do not fuse on x86",
            activation=UINT8,
            output_q=frozenset({"Conv"}),
            integer_sums=True,
            float16_cast=True,
            depthwise_pays=False,
            optimizes_here=True,
        ),
        Target(
            name="generic",
            source="ONNX specification: standard QuantizeLinear and DequantizeLinear only",
            activation=INT8,
        ),
        Target(
            name="qoperator",
            source="ONNX specification: QLinearConv and QLinearMatMul, which quantize their outputs",
            activation=UINT8,
            output_q=frozenset({"Conv", "MatMul"}),
            exporter="qoperator",
        ),
        Target(
            name="tensorrt",
            source="TensorRT accepts symmetric int8 only (zero points 0) and no int32 bias behind DequantizeLinear",
            activation=INT8,
            symmetric_activation=True,
            symmetric_weight=True,
            bias=BiasForm.FLOAT,
            integer_attention=False,
        ),
        Target(
            name="openvino",
            source="OpenVINO FakeQuantize: u8 activations, symmetric s8 weights",
            activation=UINT8,
            bias=BiasForm.FLOAT,
        ),
        Target(
            name="ascend",
            source="CANN: AscendQuant and AscendDequant; one scale for a whole MatMul or Gemm weight",
            activation=INT8,
            ops=frozenset({"Conv", "Gemm", "MatMul"}),
            per_channel=frozenset({"Conv"}),
            exporter="ascend",
            static_only=True,
            reciprocal_scale=True,
            integer_cache=False,
            integer_attention=False,
        ),
    )
}
