"""Runs the smoothing steps of a recipe on the float graph, and places the layers again on what they leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onnxslim_ptq.core.choice import LayerChoice
from onnxslim_ptq.core.match import Layer
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.steps import STEPS
from onnxslim_ptq.steps.fusing import dry_placement
from onnxslim_ptq.steps.placement import Placement, place
from onnxslim_ptq.steps.smoothing import Smoothed, SmoothingConfig
from onnxslim_ptq.workspace import Workspace

__all__ = ["run_smoothing", "smoothing_notes"]

_CHOOSING = frozenset({"auto_smooth", "split_outliers"})  # to do nothing may be their choice
Layers = dict[str, tuple[Linear, LayerChoice]]


def run_smoothing(
    workspace: Workspace,
    steps: Sequence[SmoothingConfig],
    names: Mapping[str, Layer],
    layers: Layers,
    placement: Placement,
) -> tuple[Layers, Placement, list[Smoothed]]:
    """Apply ``steps`` in order; returns the layers and their placement as they are then, and what was smoothed.

    ``names``: what patterns see of each layer; ``layers``: those the recipe quantizes. A step touches only groups of
    layers that ``placement`` quantizes.
    """
    done: list[Smoothed] = []
    for config in steps:
        step = STEPS[config.type]
        groups = step.groups(workspace.graph, config, names, placement.layers)
        if not groups:
            continue
        nodes = len(workspace.graph.nodes)
        found = step.run(workspace, groups, config, placement)
        if not found:
            continue
        done += found
        now = {linear.node: linear for linear in find_linears(workspace.graph)[0]}
        layers = {node: (now[node], choice) for node, (_, choice) in layers.items() if node in now}
        placement = _placed(workspace, layers, placement, same=len(workspace.graph.nodes) == nodes)
    return layers, placement, done


def _placed(workspace: Workspace, layers: Layers, before: Placement, *, same: bool) -> Placement:
    """The placement on the smoothed graph: with the same nodes, the same layers fuse as ``before``."""
    if not same:
        return dry_placement(workspace, layers)
    return place(workspace.graph, layers, workspace.target, before.output_q, before.skipped)


def smoothing_notes(steps: Sequence[SmoothingConfig], done: Sequence[Smoothed]) -> list[str]:
    """One line per step: how many groups of which kind it scaled, or that there was none to scale."""
    lines = []
    for step in dict.fromkeys(config.type for config in steps):
        found = [smoothed for smoothed in done if smoothed.step == step]
        if found:
            lines.append(_scaled(step, found))
        elif step not in _CHOOSING:
            lines.append(
                f"{step} scaled nothing: no group of quantized layers suits it; see inspect --groups"
            )
    return lines


def _scaled(step: str, done: Sequence[Smoothed]) -> str:
    kinds = Counter(found.kind for found in done)
    groups = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) + " groups"
    split = sum(len(found.channels) for found in done)
    took = f"took {split} channel{'s' if split > 1 else ''} out of"
    return f"{step} {took if split else 'scaled'} {groups}"
