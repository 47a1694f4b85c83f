"""Simplifications that are switched on by name, beside those of ``optimize.PASSES``: forms that pay on some runtimes.

All of `EXACT` keep the float function (sums may be made in another order); those of `APPROXIMATE` do not, and say how
far they are from it. Each returns how often it acted and leaves alone what does not meet its condition.
"""

from __future__ import annotations

from collections.abc import Callable

from onnxslim_ptq.graph.forms.activations import form_clip, form_leaky_relu
from onnxslim_ptq.graph.forms.gelu import gelu_fast, gelu_sigmoid, gelu_tanh
from onnxslim_ptq.graph.forms.matmul import fold_division, form_gemm, merge_parallel
from onnxslim_ptq.graph.forms.patch_merging import merge_patches
from onnxslim_ptq.graph.forms.resize import merge_resizes, pool_before_conv, resize_as_conv
from onnxslim_ptq.graph.forms.shapes import fix_shapes, merge_reshapes
from onnxslim_ptq.graph.graph import Graph

__all__ = ["APPROXIMATE", "EXACT"]

EXACT: dict[str, Callable[[Graph], int]] = {
    "shapes": fix_shapes,
    "double_reshape": merge_reshapes,
    "double_resize": merge_resizes,
    "clip": form_clip,
    "leaky_relu": form_leaky_relu,
    "div_matmul": fold_division,
    "parallel_matmul": merge_parallel,
    "matmul_gemm": form_gemm,
    "pool_conv": pool_before_conv,
    "resize_conv": resize_as_conv,
    "patch_merging": merge_patches,
}
APPROXIMATE: dict[str, Callable[[Graph], int]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_sigmoid": gelu_sigmoid,
    "gelu_fast": gelu_fast,
}
