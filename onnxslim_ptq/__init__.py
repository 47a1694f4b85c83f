"""Post-training quantization of ONNX graphs: float model in, verified INT8 model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LayerSelector", "Recipe", "Result", "__version__", "analyze", "calibrate", "quantize"]

if TYPE_CHECKING:
    from onnxslim_ptq.api import Result, quantize
    from onnxslim_ptq.calibration import calibrate
    from onnxslim_ptq.recipe import Recipe
    from onnxslim_ptq.selector import LayerSelector
    from onnxslim_ptq.sensitivity import analyze


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `onnxslim_ptq.core` alone stays light and free of import cycles.
    if name in ("Result", "quantize"):
        from onnxslim_ptq import api

        return getattr(api, name)
    if name == "calibrate":
        from onnxslim_ptq.calibration import calibrate

        return calibrate
    if name == "analyze":
        from onnxslim_ptq.sensitivity import analyze

        return analyze
    if name == "LayerSelector":
        from onnxslim_ptq.selector import LayerSelector

        return LayerSelector
    if name == "Recipe":
        from onnxslim_ptq.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'onnxslim_ptq' has no attribute '{name}'")
