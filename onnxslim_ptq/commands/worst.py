"""The layers that cost a doubtful result most, for the warning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxslim_ptq.commands.console import db, program

if TYPE_CHECKING:
    from onnxslim_ptq.api import Result

__all__ = ["worst_layers"]

_WORST, _SAMPLES = 3, 8


def worst_layers(result: Result, quantized: Path, settings: dict[str, Any]) -> str:
    """One sentence: the three layers with the largest error of their own, or how to find them."""
    from calib.errors import QuantizationError
    from calib.readers import synthetic, take
    from onnxslim_ptq.analysis.compare import compare_models
    from onnxslim_ptq.commands.samples import measured_samples

    inputs = result.source.inputs()
    calib, evaluation, samples = (settings[key] for key in ("calib_data", "eval_data", "samples"))
    try:
        if calib or evaluation:
            data, _ = measured_samples(inputs, calib or [], evaluation, samples, settings["stacked"])
        else:
            shapes, ranges = settings["shapes"], settings["ranges"]
            data = synthetic(inputs, shapes=shapes, ranges=ranges, seed=settings["seed"])
        found = compare_models(
            result.source, result.quantized, take(data, _SAMPLES), threads=settings["threads"], latency=False
        )
    except QuantizationError:
        return f"See its layers with: {program()} compare {result.source.path} {quantized} --calib SAMPLES"
    known = {
        layer.node: layer.local.sqnr for layer in found.layers if layer.local and layer.local.sqnr is not None
    }
    worst = sorted(known, key=lambda node: known[node])[:_WORST]
    if not worst:
        return "Try more samples, or another --recipe"
    named = ", ".join(f"'{node}' ({db(known[node])})" for node in worst)
    return f"Worst layers on their own: {named}; --exclude leaves one float"
