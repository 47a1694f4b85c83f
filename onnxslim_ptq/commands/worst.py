"""A closer look at a result's layers: those that cost it most, for the summary, the warning and the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim_ptq.commands.console import db, program

if TYPE_CHECKING:
    from calib.types import Sample
    from onnxslim_ptq.analysis.compare import Comparison
    from onnxslim_ptq.api import Result
    from onnxslim_ptq.asked import Asked

__all__ = ["Look", "look_closer", "worst_layers"]

_WORST = 3


@dataclass(frozen=True)
class Look:
    """Errors of all layers on some of the samples that measured the result."""

    comparison: Comparison
    samples: list[Sample]

    def worst(self) -> list[tuple[str, float]]:
        """The three layers with the largest error of their own, and its SQNR."""
        known = [
            (layer.node, layer.local.sqnr)
            for layer in self.comparison.layers
            if layer.local and layer.local.sqnr is not None
        ]
        return sorted(known, key=lambda pair: pair[1])[:_WORST]


def look_closer(result: Result, asked: Asked, count: int, *, latency: bool = False) -> Look | None:
    """Compare the layers on ``count`` samples; None where they cannot be compared."""
    from calib.errors import QuantizationError
    from calib.readers import take
    from onnxslim_ptq.analysis.compare import compare_models
    from onnxslim_ptq.job import samples_of

    try:
        samples = list(take(samples_of(result.source, result.recipe, asked).evaluation, count))
        compared = compare_models(
            result.source,
            result.quantized,
            samples,
            threads=asked.threads,
            latency=latency,
            rescaled=result.exact,
        )
    except QuantizationError:
        return None
    return Look(compared, samples)


def worst_layers(look: Look | None, source: Path | None, quantized: Path) -> str:
    """One sentence: the three layers with the largest error of their own, or how to find them."""
    if look is None:
        return f"See its layers with: {program()} compare {source} {quantized} --calib SAMPLES"
    worst = look.worst()
    if not worst:
        return "Try more samples, or another --recipe"
    named = ", ".join(f"'{node}' ({db(sqnr)})" for node, sqnr in worst)
    return f"Worst layers on their own: {named}; --exclude leaves one float"
