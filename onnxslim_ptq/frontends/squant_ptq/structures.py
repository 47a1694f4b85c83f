"""The names of ``shut_down_structures`` and the passes they switch off here."""

from __future__ import annotations

from collections.abc import Collection

from onnxslim_ptq.graph.forms import EXACT
from onnxslim_ptq.graph.optimize import PASSES

__all__ = ["STRUCTURES", "passes_without"]


def _versions(name: str, *numbers: int, first: str = "") -> dict[str, tuple[str, ...]]:
    return {f"{name}V{n}": (first,) if first else () for n in numbers}


# Moving AscendQuant across other operators and forms that only pay on the device have no pass here.
STRUCTURES: dict[str, tuple[str, ...]] = {
    "ChangeGAPCONVOptimization": ("pool_conv",),
    "ChangeResizeOptimization": (),
    "CombineMatmulOptimization": ("parallel_matmul",),
    "DeleteConcatOptimization": (),
    "DoubleFuseBatchNormOptimization": ("batchnorm", "affine"),
    "DoubleReshapeOptimization": ("double_reshape",),
    "FastClipOptimization": ("clip",),
    "FuseBatchNormOptimization": ("batchnorm",),
    "FuseDivMatmulOptimization": ("div_matmul",),
    "GeluErf2FastGeluOptimization": ("gelu_fast",),
    "GeluErf2SigmoidOptimization": ("gelu_sigmoid",),
    "GeluErf2TanhOptimization": ("gelu_tanh",),
    "GeluTanh2SigmoidOptimization": ("gelu_sigmoid",),
    "LayerNormOptimization": (),
    "Matmul2GemmOptimization": ("matmul_gemm",),
    **_versions("PatchMerging2ConvOptimization", 0, 1, 2, 3, first="patch_merging"),
    "RemoveDoubleResizeOptimization": ("double_resize",),
    **_versions("ReplaceAscendQuantOptimization", 1, 2),
    **_versions("ReplaceConcatQuantOptimization", *range(1, 10)),
    "ReplaceHardSigmoidOptimization": ("hard_sigmoid",),
    "ReplaceLeakyReluOptimization": ("leaky_relu",),
    **_versions("ReplaceMaxPoolBlockOptimization", 1, 2),
    "ReplaceRelu6Optimization": ("clip",),
    "ReplaceReluOptimization": (),
    **_versions("ReplaceReshapeTransposeOptimization", 1, 2, 3),
    "ReplaceResizeQuantOptimization": (),
    **_versions("ReplaceSigmoidOptimization", 1, 2),
    **_versions("ReplaceSoftmaxOptimization", 1, 2),
    "Resize2ConvTransposeOptimization": ("resize_conv",),
    "SimplifyShapeOptimization": ("shapes",),
    "SimplifyShapeOptimizationV2": ("shapes",),
}


def passes_without(shut_down: Collection[str], more: bool = False) -> list[str]:
    """The usual passes, with ``more`` all exact ones, but those that the names switch off."""
    off = {name for structure in shut_down for name in STRUCTURES[structure]}
    return [name for name in (*PASSES, *(EXACT if more else ())) if name not in off]
