"""Builds what the steps work on: graphs, layers with their choices, workspaces over normal samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx

from calib.model import open_model
from calib.ranges import MinMax
from calib.readers import from_iterable
from calib.types import Feed, Probe, Stats
from onnxslim_ptq.core.choice import LayerChoice, StaticActivation
from onnxslim_ptq.core.dtypes import UINT8
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.steps import quantize
from onnxslim_ptq.steps.placement import Placement, place
from onnxslim_ptq.workspace import Workspace
from tests.models import feeds_for

__all__ = ["PLAIN", "apply_step", "choose", "place_all", "with_activation", "workspace_of"]

PLAIN = LayerChoice(StaticActivation(UINT8, False, MinMax(), "minmax"))


def with_activation(choice: LayerChoice = PLAIN, **changes: Any) -> LayerChoice:
    """``choice`` with other fields of its static activation."""
    assert isinstance(choice.activation, StaticActivation)
    return replace(choice, activation=replace(choice.activation, **changes))


Layers = dict[str, tuple[Linear, LayerChoice]]


def choose(graph: Graph, choice: LayerChoice = PLAIN, **others: Mapping[str, Any]) -> Layers:
    """Every layer of ``graph`` with ``choice``, its activation with the changes given under the node name."""
    linears, _ = find_linears(graph)
    changed = {name: with_activation(choice, **changes) for name, changes in others.items()}
    return {lin.node: (lin, changed.get(lin.node, choice)) for lin in linears}


def workspace_of(
    proto: onnx.ModelProto, feeds: Sequence[Feed] | None = None, target: str = "cpu", **options: Any
) -> Workspace:
    model = open_model(proto)
    data = from_iterable(list(feeds) if feeds is not None else feeds_for(proto), model.inputs())
    return Workspace(Graph(model), TARGETS[target], data, **options)


def place_all(workspace: Workspace, choice: LayerChoice = PLAIN) -> Placement:
    return place(workspace.graph, choose(workspace.graph, choice), workspace.target)


def apply_step(
    workspace: Workspace, choice: LayerChoice = PLAIN, placement: Placement | None = None
) -> tuple[QuantPlan, dict[Probe, Stats]]:
    """The quantize step on all layers; returns its plan and the statistics it was given."""
    if placement is None:
        placement = place_all(workspace, choice)
    stats = workspace.collect(quantize.probes(workspace, placement))
    return quantize.apply(workspace, placement, stats), stats
