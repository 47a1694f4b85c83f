"""What all steps of a recipe together say about each layer of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from calib.model import Model
from onnxslim_ptq.core.choice import (
    AddedBias,
    LayerChoice,
    PerTokenActivation,
    StaticActivation,
    SwitchedActivation,
    WeightForm,
)
from onnxslim_ptq.core.dtypes import int_type
from onnxslim_ptq.core.match import Layer, Pattern, nearest
from onnxslim_ptq.core.spec import BelowTimestep, ManyTokens
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.names import module_names
from onnxslim_ptq.graph.smooth_groups import find_groups
from onnxslim_ptq.recipe import NO_KERNEL, ActConfig, QuantizeStep, Recipe, RounderConfig, WeightConfig
from onnxslim_ptq.recipes.forms import has_kernel
from onnxslim_ptq.steps.attention import AttentionStep
from onnxslim_ptq.steps.kv_cache import KvCacheStep

__all__ = [
    "LayerConfig",
    "Resolution",
    "choice_of",
    "named_layers",
    "original_name",
    "resolve",
    "unquantizable",
]


@dataclass(frozen=True)
class LayerConfig:
    """What all steps together say about one layer; ``step`` is the index of the last one that says something."""

    weight: WeightConfig
    act: ActConfig | None
    rounder: RounderConfig
    bias_correction: bool
    added_bias: AddedBias
    step: int


@dataclass(frozen=True)
class Resolution:
    """By node name: the configuration of each layer to quantize, and the reason for each one that stays float."""

    configs: dict[str, LayerConfig]
    skipped: dict[str, str]


def resolve(recipe: Recipe, layers: Sequence[Layer], others: Sequence[Layer] = ()) -> Resolution:
    """The configuration of every layer; RecipeError when a pattern (other than ``*`` and ``group:``) matches no layer.

    ``others`` are nodes that cannot be quantized anyway: a pattern may match only them.
    """
    patterns: list[tuple[list[Pattern], list[Pattern]]] = []
    for index, step in enumerate(recipe.steps):
        if isinstance(step, KvCacheStep | AttentionStep):  # their patterns are of other things than layers
            patterns.append(([], []))
            continue
        parsed = []
        for key, texts in (("include", step.include), ("exclude", step.exclude)):
            parsed.append([Pattern.parse(text) for text in texts])
            for pattern in parsed[-1]:
                if not pattern.may_miss and not any(map(pattern.matches, (*layers, *others))):
                    raise RecipeError(
                        f"steps[{index}].{key}: pattern '{pattern.text}' matches no layer; "
                        + nearest(pattern, layers)
                    )
        patterns.append((parsed[0], parsed[1]))
    merged: dict[tuple[int, ...], LayerConfig] = {}
    resolution = Resolution({}, {})
    for layer in layers:
        steps, reason = [], "not included by any step"
        for index, (include, exclude) in enumerate(patterns):
            if not isinstance(recipe.steps[index], QuantizeStep):
                continue
            if any(pattern.matches(layer) for pattern in include):
                by = next((pattern.text for pattern in exclude if pattern.matches(layer)), None)
                if by is None:
                    steps.append(index)
                else:
                    reason = f"excluded by pattern '{by}'"
        if steps:
            chosen = tuple(steps)
            if chosen not in merged:
                merged[chosen] = _merged(recipe, chosen)
            resolution.configs[layer.node] = merged[chosen]
        else:
            resolution.skipped[layer.node] = reason
    return resolution


def unquantizable(source: Model, graph: Graph, reasons: Iterable[str]) -> list[Layer]:
    """What patterns see of the nodes that look like layers and are none (``reasons`` by node)."""
    given = {n.name for n in source.proto.graph.node}
    return [Layer(name, graph.node(name).op, original=original_name(name, given)) for name in reasons]


def named_layers(source: Model, recipe: Recipe, graph: Graph) -> dict[str, Layer]:
    """What patterns see of each layer, by node name; their groups only where the recipe has a pattern of that kind."""
    given = {n.name for n in source.proto.graph.node}
    linears = find_linears(graph)[0]
    modules = module_names(graph, linears, recipe.names)
    patterns = [Pattern.parse(text) for step in recipe.steps for text in (*step.include, *step.exclude)]
    wanted = any(pattern.group is not None for pattern in patterns)
    groups = {c.node: g.kind for g in find_groups(graph) for c in g.consumers} if wanted else {}
    return {
        lin.node: Layer(
            lin.node,
            lin.op,
            lin.weight_name,
            original_name(lin.node, given),
            modules[lin.node],
            groups.get(lin.node),
        )
        for lin in linears
    }


def original_name(node: str, given: Collection[str]) -> str:
    """The name in the file of a node that was given a number because others have that name too."""
    base = node.rpartition("#")[0]
    return base if node not in given and base in given else node


def _merged(recipe: Recipe, steps: tuple[int, ...]) -> LayerConfig:
    given: dict[str, Any] = {}
    for index in steps:
        given = _override(given, recipe.steps[index].model_dump(exclude_unset=True))
    step = QuantizeStep.model_validate(given)
    if not has_kernel(step.weight, step.act, recipe.target):
        raise RecipeError(f"recipe: steps[{steps[-1]}].weight: {NO_KERNEL}")
    return LayerConfig(step.weight, step.act, step.rounder, step.bias_correction, step.added_bias, steps[-1])


def _override(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with the keys of ``new``, nested; another ``type`` or ``when`` starts afresh: options belong to it."""
    for key, default in (("type", None), ("when", "static")):
        was = old.get(key, default)
        if new.get(key, was) != was:
            return new
    both = {
        key: _override(was, value)
        if isinstance(value, dict) and isinstance(was := old.get(key), dict)
        else value
        for key, value in new.items()
    }
    return {**old, **both}


def choice_of(config: LayerConfig, target: Target) -> LayerChoice:
    """What ``config`` means for a layer on ``target``; RecipeError when the target does not take it."""
    weight = config.weight
    if target.symmetric_weight and not weight.symmetric:
        raise RecipeError(
            f"recipe: steps[{config.step}].weight.symmetric: target '{target.name}' takes symmetric weights only; "
            "set it to true"
        )
    form = WeightForm(
        int_type(weight.dtype),
        weight.symmetric,
        weight.per != "tensor",
        weight.group_size,
        weight.full_range,
    )
    return LayerChoice(
        _activation(config, target), form, config.bias_correction, config.rounder.build(), config.added_bias
    )


def _activation(
    config: LayerConfig, target: Target
) -> StaticActivation | PerTokenActivation | SwitchedActivation | None:
    act = config.act
    if target.static_only and (act is None or act.per == "token"):
        raise RecipeError(
            f"recipe: steps[{config.step}].act: target '{target.name}' takes static activations with one scale "
            "only; leave act at its default, or choose another target"
        )
    if act is None:
        return None
    dtype = target.activation if act.dtype == "auto" else int_type(act.dtype)
    symmetric = target.symmetric_activation if act.symmetric == "auto" else bool(act.symmetric)
    if target.symmetric_activation and (not symmetric or dtype is not target.activation):
        raise RecipeError(
            f"recipe: steps[{config.step}].act: target '{target.name}' takes symmetric "
            f"{target.activation} activations only; leave dtype and symmetric at auto"
        )
    if target.static_only and dtype is not target.activation:
        raise RecipeError(
            f"recipe: steps[{config.step}].act.dtype: target '{target.name}' takes {target.activation} activations "
            "only; leave dtype at auto"
        )
    if act.when == "dynamic":
        return PerTokenActivation(dtype, symmetric)
    method = act.range.build()
    static = StaticActivation(dtype, symmetric, method or act.range.type, act.range.type)
    if act.per == "tensor":
        return static
    return SwitchedActivation(
        static, ManyTokens() if act.timestep_sep is None else BelowTimestep(act.timestep_sep)
    )
