"""Decides where values are quantized, from the layers, their choices and the target's row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_ptq.core.choice import (
    LayerChoice,
    PerTokenActivation,
    StaticActivation,
    SwitchedActivation,
    WeightForm,
)
from onnxslim_ptq.core.dtypes import INT32
from onnxslim_ptq.core.spec import (
    BelowTimestep,
    Grain,
    ManyTokens,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantPlan,
    QuantSpec,
    Result,
    Slot,
    Use,
)
from onnxslim_ptq.core.targets import BiasForm, Target
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear

NO_ROWS = "per token needs a layer whose rows stay rows: a MatMul, or a Gemm without transA"

__all__ = ["PlacedTensor", "Placement", "after_activation", "place"]


@dataclass
class PlacedTensor:
    """A value to be quantized once: ``readers`` are the layers that multiply it with a weight, ``producers`` those
    that make it, perhaps through an activation function.

    ``at_result``: quantized where it is produced, for every reader, because the integer kernel that makes it needs a
    quantized output. ``while_``: its numbers hold unless that is so.
    """

    params: str
    tensor: str
    spec: QuantSpec
    choice: StaticActivation
    readers: list[Linear] = field(default_factory=list)
    producers: list[Linear] = field(default_factory=list)
    at_result: bool = False
    while_: BelowTimestep | ManyTokens | None = None


@dataclass
class Placement:
    """The layers that will be quantized with their choices, the values that need a range, and who stays float.

    ``output_q`` names the layers whose output is quantized although the target does not ask for it.
    """

    layers: dict[str, tuple[Linear, LayerChoice]] = field(default_factory=dict)
    tensors: dict[str, PlacedTensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    output_q: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def plan(self, target: Target) -> QuantPlan:
        """The plan with all its slots; numbers and codes are still missing."""
        plan = QuantPlan(skipped=dict(self.skipped), notes=list(self.notes))
        produced = {placed.tensor: placed.params for placed in self.tensors.values() if placed.at_result}
        for placed in self.tensors.values():
            if placed.at_result:
                plan.activations[Result(placed.tensor)] = Slot(placed.spec, placed.params)
        for layer, choice in self.layers.values():
            plan.weights[Use(layer.node, layer.weight)] = Slot(
                weight_spec(layer, choice, target), weight_params(layer, choice)
            )
            site = Use(layer.node, layer.activation)
            if isinstance(choice.activation, PerTokenActivation):
                spec = QuantSpec(choice.activation.dtype, PerToken(), choice.activation.symmetric)
                kind = "@tokens" if spec.symmetric else "@token"
                plan.activations[site] = Slot(spec, f"{layer.activation_name}{kind}")
            if isinstance(choice.activation, SwitchedActivation):
                key, static = (
                    switched_params(layer.activation_name, choice.activation),
                    choice.activation.static,
                )
                spec = QuantSpec(static.dtype, PerToken(choice.activation.while_), static.symmetric)
                plan.activations[site] = Slot(spec, key)
            if not isinstance(choice.activation, StaticActivation):
                continue
            params = produced.get(layer.activation_name) or activation_params(
                layer.activation_name, choice.activation
            )
            plan.activations[site] = Slot(self.tensors[params].spec, params)
            if layer.bias is not None and target.bias is BiasForm.INT32:
                plan.biases[Use(layer.node, layer.bias)] = Slot(
                    QuantSpec(INT32, PerChannel(0), True), f"{layer.node}.bias"
                )
        return plan


def activation_params(tensor: str, choice: StaticActivation) -> str:
    """Readers of one tensor share its numbers unless they want another type, symmetry or range."""
    return f"{tensor}@{choice.dtype}{'s' if choice.symmetric else ''}@{choice.range_name}"


def switched_params(tensor: str, choice: SwitchedActivation) -> str:
    """Readers of one tensor with the same condition share its numbers, of which they have their own."""
    return f"{activation_params(tensor, choice.static)}@{choice.while_}"


def weight_params(layer: Linear, choice: LayerChoice) -> str:
    """Layers that share a weight share its codes unless they want another form of it."""
    form = choice.weight
    axis = layer.channel_axis if form.per_channel else None
    return f"{layer.weight_name}@{axis}@{form.dtype}{_convention(form)}@{form.group}"


def _convention(form: WeightForm) -> str:
    return ("f" if form.full_range else "") if form.symmetric else "a"


def weight_spec(layer: Linear, choice: LayerChoice, target: Target) -> QuantSpec:
    form = choice.weight
    grain: Grain = PerTensor()
    if form.per_channel and layer.channel_axis is not None and layer.op in target.per_channel:
        grain = PerChannel(layer.channel_axis)
        if form.group is not None and layer.op in ("MatMul", "Gemm"):
            grain = PerGroup(1 - layer.channel_axis, form.group)
    return QuantSpec(form.dtype, grain, form.symmetric, form.full_range)


def place(
    graph: Graph,
    layers: Mapping[str, tuple[Linear, LayerChoice]],
    target: Target,
    output_q: frozenset[str] = frozenset(),
    floats: Mapping[str, str] = {},
) -> Placement:
    """Sites for every layer; ``output_q`` names further layers whose output is quantized, ``floats`` maps layers that
    were found to be better left float to the reason."""
    placement = Placement(skipped=dict(floats), output_q=output_q)
    for name, (layer, choice) in layers.items():
        if name in floats:
            continue
        if layer.op not in target.ops:
            placement.skipped[name] = f"{target.name} has no integer {layer.op}"
            continue
        if isinstance(choice.activation, PerTokenActivation | SwitchedActivation) and not _has_rows(
            graph, layer
        ):
            placement.skipped[name] = NO_ROWS
            continue
        placement.layers[name] = (layer, choice)
        found = choice.activation
        while_: BelowTimestep | ManyTokens | None = None
        if isinstance(found, SwitchedActivation):
            key, act, while_ = switched_params(layer.activation_name, found), found.static, found.while_
        elif isinstance(found, StaticActivation):
            key, act = activation_params(layer.activation_name, found), found
        else:
            continue
        spec = QuantSpec(act.dtype, PerTensor(), act.symmetric)
        placed = placement.tensors.setdefault(
            key, PlacedTensor(key, layer.activation_name, spec, act, while_=while_)
        )
        placed.readers.append(layer)
    for name, (layer, choice) in placement.layers.items():
        wanted = layer.op in target.output_q or name in output_q
        if wanted and isinstance(choice.activation, StaticActivation):
            _quantize_output(graph, placement, layer, choice.activation)
    if target.integer_sums:
        _quantize_sums(graph, placement)
    return placement


def _has_rows(graph: Graph, layer: Linear) -> bool:
    """Whether each row of the layer's input along the last axis makes one row of its output."""
    return layer.op == "MatMul" or (layer.op == "Gemm" and not graph.node(layer.node).attrs.get("transA", 0))


def _quantize_output(graph: Graph, placement: Placement, layer: Linear, choice: StaticActivation) -> None:
    """One Q at the value: it is then quantized for every reader, so a reader that wants other numbers shares these."""
    tensor = after_activation(graph, graph.node(layer.node), choice)
    existing = [p for p in placement.tensors.values() if p.tensor == tensor.name and p.while_ is None]
    if existing:
        _share(placement, existing, layer.node).producers.append(layer)
        return
    spec = QuantSpec(choice.dtype, PerTensor(), choice.symmetric)
    key = activation_params(tensor.name, choice)
    placement.tensors[key] = PlacedTensor(key, tensor.name, spec, choice, producers=[layer], at_result=True)


def _quantize_sums(graph: Graph, placement: Placement) -> None:
    """Quantize at the result of an Add what layers read, where both its inputs are quantized where they are made.

    The Add between integer layers is then an integer one, and the value does not leave their memory layout.
    """
    by_tensor: dict[str, list[PlacedTensor]] = {}
    for placed in (p for p in placement.tensors.values() if p.while_ is None):
        by_tensor.setdefault(placed.tensor, []).append(placed)
    integer = {name for name, found in by_tensor.items() if any(p.at_result for p in found)}
    for node in graph.nodes:
        if node.op != "Add" or not all(i.name in integer for i in node.inputs):
            continue
        for tensor in (node.outputs[0], _rectified(graph, node.outputs[0])):
            found = by_tensor.get(tensor.name, [])
            if found and (tensor is node.outputs[0] or not found[0].choice.symmetric):
                _share(placement, found, node.name)
                integer.add(tensor.name)
                break


def _share(placement: Placement, found: Sequence[PlacedTensor], maker: str) -> PlacedTensor:
    """The first of ``found``, which say how one tensor is quantized, for all its readers, where ``maker`` makes it."""
    kept, *others = found
    kept.at_result = True
    for other in others:
        kept.readers += other.readers
        del placement.tensors[other.params]
        placement.notes += [
            f"{reader.node}: its input '{kept.tensor}' is quantized where {maker} makes it, with "
            f"the range of {kept.readers[0].node}"
            for reader in other.readers
        ]
    return kept


def after_activation(graph: Graph, node: gs.Node, choice: StaticActivation) -> gs.Tensor:
    """The output of ``node``, or of a Relu or Clip(0, ..) that alone reads it: integer kernels absorb those when the
    lowest code means 0."""
    return node.outputs[0] if choice.symmetric else _rectified(graph, node.outputs[0])


def _rectified(graph: Graph, value: gs.Tensor) -> gs.Tensor:
    """``value``, or what a Relu or Clip(0, ..) that alone reads it makes of it."""
    reader = graph.sole_consumer(value)
    if reader is not None and (
        reader.op == "Relu" or (reader.op == "Clip" and _clips_at_zero(graph, reader))
    ):
        return reader.outputs[0]
    return value


def _clips_at_zero(graph: Graph, clip: gs.Node) -> bool:
    if "min" in clip.attrs:  # before opset 11
        return float(clip.attrs["min"]) == 0.0
    low = graph.value(clip.inputs[1]) if len(clip.inputs) > 1 and clip.inputs[1].name else None
    return low is not None and np.asarray(low).size == 1 and float(np.asarray(low).reshape(())) == 0.0
