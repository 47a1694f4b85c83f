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
    from calib.readers import take
    from onnxslim_ptq.analysis.compare import compare_models
    from onnxslim_ptq.recorded import recorded_samples
    from onnxslim_ptq.samples import open_samples

    section, calib, measured = (result.recipe.data, settings["calib_data"], settings["eval_data"])
    same = {name: settings[name] for name in ("samples", "stacked", "threads")}
    drawn = {name: settings[name] for name in ("shapes", "ranges", "seed")}
    try:
        if settings["stats"] is not None:
            data = recorded_samples(
                result.source, settings["stats"], section, calib, measured, **same
            ).evaluation
        else:
            data = open_samples(result.source, section, calib, measured, **same, **drawn).evaluation
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
