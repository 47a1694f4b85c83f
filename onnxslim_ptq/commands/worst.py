"""The layers that cost a doubtful result most, for the warning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxslim_ptq.commands.console import db

if TYPE_CHECKING:
    from onnxslim_ptq.api import Result

__all__ = ["worst_layers"]

_WORST, _SAMPLES = 3, 4


def worst_layers(result: Result, quantized: Path, settings: dict[str, Any]) -> str:
    """One sentence: the three layers with the largest error of their own, or how to find them."""
    from calib.errors import QuantizationError
    from calib.readers import open_data, synthetic, take
    from onnxslim_ptq.analysis.compare import compare_models

    inputs = result.source.inputs()
    paths = [settings["eval_data"]] if settings["eval_data"] else settings["calib_data"]
    try:
        data = (
            open_data(paths, inputs, stacked=settings["stacked"])
            if paths
            else synthetic(
                inputs, shapes=settings["shapes"], ranges=settings["ranges"], seed=settings["seed"]
            )
        )
        found = compare_models(
            result.source, result.quantized, take(data, _SAMPLES), threads=settings["threads"], latency=False
        )
    except QuantizationError:
        return f"See its layers with: onnxslim-ptq compare {result.source.path} {quantized} --calib SAMPLES"
    known = {
        layer.node: layer.local.sqnr for layer in found.layers if layer.local and layer.local.sqnr is not None
    }
    worst = sorted(known, key=lambda node: known[node])[:_WORST]
    if not worst:
        return "Try more samples, or another --recipe"
    named = ", ".join(f"'{node}' ({db(known[node])})" for node in worst)
    return f"Worst layers on their own: {named}; --exclude leaves one float"
