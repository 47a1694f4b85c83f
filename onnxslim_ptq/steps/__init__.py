"""The steps of a recipe. STEPS lists those that smooth the float graph; ``quantize`` comes after them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxslim_ptq.core.match import Layer
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.steps import (
    auto_smooth,
    awq,
    equalize,
    flex_smooth,
    iter_smooth,
    kv_smooth,
    outlier_suppression_lite,
    outlier_suppression_plus,
    smoothquant,
    split_outliers,
)
from onnxslim_ptq.steps.placement import Placement
from onnxslim_ptq.steps.smoothing import Smoothed, SmoothingConfig, chosen_groups
from onnxslim_ptq.workspace import Workspace

__all__ = ["STEPS", "Step"]

Find = Callable[[Graph, Any, Mapping[str, Layer], Collection[str]], Sequence[Any]]
Run = Callable[[Workspace, Sequence[Any], Any, Placement], list[Smoothed]]


@dataclass(frozen=True)
class Step:
    """A smoothing step: its part of the recipe, what it does to groups, and which groups of the graph these are."""

    config: type[SmoothingConfig]
    run: Run
    groups: Find = chosen_groups


def _unplaced(run: Callable[[Workspace, Sequence[Any], Any], list[Smoothed]]) -> Run:
    """For a step to which it does not matter where values will be quantized."""
    return lambda workspace, groups, config, _: run(workspace, groups, config)


STEPS: dict[str, Step] = {
    "auto_smooth": Step(auto_smooth.AutoSmooth, auto_smooth.run),
    "awq": Step(awq.Awq, awq.run),
    "equalize": Step(equalize.Equalize, _unplaced(equalize.run)),
    "flex_smooth": Step(flex_smooth.FlexSmooth, _unplaced(flex_smooth.run)),
    "iter_smooth": Step(iter_smooth.IterSmooth, _unplaced(iter_smooth.run)),
    "kv_smooth": Step(
        kv_smooth.KvSmooth,
        _unplaced(kv_smooth.run),
        lambda graph, config, layers, _: kv_smooth.chosen(graph, config, layers),
    ),
    "outlier_suppression_lite": Step(
        outlier_suppression_lite.OutlierSuppressionLite, outlier_suppression_lite.run
    ),
    "outlier_suppression_plus": Step(
        outlier_suppression_plus.OutlierSuppressionPlus, _unplaced(outlier_suppression_plus.run)
    ),
    "smoothquant": Step(smoothquant.SmoothQuant, _unplaced(smoothquant.run)),
    "split_outliers": Step(split_outliers.SplitOutliers, _unplaced(split_outliers.run)),
}
