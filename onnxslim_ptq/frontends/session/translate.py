"""A session as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from calib.model import Model
from onnxslim_ptq import recipes
from onnxslim_ptq.core.choice import AddedBias
from onnxslim_ptq.core.match import Pattern, literal, nearest
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.export.weight_files import WeightFiles
from onnxslim_ptq.frontends.session.config import (
    ACT_METHODS,
    PROCESSORS,
    FA3ProcessorConfig,
    M6ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    SessionFile,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    W8A8TimeStepProcessorConfig,
)
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.resolution import named_layers, unquantizable

__all__ = ["is_session_file", "read_session", "recipe_of", "require_complete", "weight_files"]

_SMOOTHING = ("m3", "m4", "m6")
_SCHEMES = ("w8a8", "w8a8_dynamic", "w8a8_timestep")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_GIGABYTE = 1024**3
_KEY = "processor_cfg_map"
Made = TypeVar("Made", bound=BaseModel)
_Scheme = W8A8ProcessorConfig | W8A8DynamicProcessorConfig | W8A8TimeStepProcessorConfig


def require_complete(session: SessionConfig, has_data: bool) -> None:
    """RecipeError naming the field when the processors of ``session`` do not make one job."""
    given = session.processor_cfg_map
    schemes = [name for name in given if name in _SCHEMES]
    smoothing = [name for name in given if name in _SMOOTHING]
    if not schemes:
        held = f"only {', '.join(given)}" if given else "nothing"
        raise RecipeError(f"{_KEY}: holds {held}; it needs one of {', '.join(_SCHEMES)}")
    for names, what in ((schemes, "quantize"), (smoothing, "suppress outliers")):
        if len(names) > 1:
            raise RecipeError(f"{_KEY}: {' and '.join(names)} both {what}; keep one")
    if "fa3" in given and "w8a8_dynamic" not in given:
        raise RecipeError(f"{_KEY}: fa3 goes with w8a8_dynamic, not with {schemes[0]}")
    if has_data:
        return
    needing = [name for name in (*smoothing, *schemes, "fa3") if name in given and name != "w8a8_dynamic"]
    if needing:
        raise RecipeError(
            f"calib_data: '{needing[0]}' needs calibration samples; give a list of them (on the command line --calib), "
            "or use w8a8_dynamic alone, which needs none"
        )


def recipe_of(
    session: SessionConfig,
    model: Model,
    *,
    target: str = "cpu",
    names: Mapping[str, str] | None = None,
    disable_last_linear: bool = True,
    quantize_conv: bool = False,
) -> Recipe:
    """The recipe of ``session`` for ``model``; RecipeError when a processor cannot be served."""
    given = session.processor_cfg_map
    scheme = next(given[name] for name in given if name in _SCHEMES)
    assert isinstance(scheme, _Scheme)
    graph = Graph(raise_opset(model, PER_CHANNEL_OPSET))
    optimize(graph)
    last = _last_linear(graph) if disable_last_linear else []
    _require_layers(graph, last, quantize_conv)
    ops = {node.op_type for node in model.proto.graph.node}
    convolutions = [] if quantize_conv else [f"op:{op}" for op in _CONVOLUTIONS if op in ops]
    disabled = list(scheme.disable_names)
    steps = [_smoothing(name, given[name], disabled) for name in given if name in _SMOOTHING]
    quantize = {
        "type": "quantize",
        "exclude": list(dict.fromkeys([*disabled, *convolutions, *map(literal, last)])),
        "rounder": {"type": "rtn"},
        "weight": {"dtype": "int8", "per": "channel", "symmetric": True},
        "act": _activation(scheme),
        "bias_correction": False,
    }
    if isinstance(scheme, W8A8ProcessorConfig):
        quantize["added_bias"] = (
            AddedBias.INT32
        )  # an NPU adds quant_bias, which is whole, to its accumulators
    attention = [{"type": "attention"}] if isinstance(given.get("fa3"), FA3ProcessorConfig) else []
    whole = [*steps, quantize, *attention]
    recipe = Recipe.load({"target": target, "names": dict(names or {}), "steps": whole})
    _require_known(disabled, model, recipe, graph)
    return recipe


def _require_layers(graph: Graph, last: Sequence[str], convolutions: bool) -> None:
    """RecipeError when all layers are of those that a session leaves float."""
    layers = find_linears(graph)[0]
    kept = [x for x in layers if x.node not in last and (convolutions or x.op not in _CONVOLUTIONS)]
    if layers and not kept:
        raise RecipeError(
            f"{graph.model.name}: a session leaves convolutions and the last linear layer float, and there is no other "
            "layer; set quantize_conv to true or disable_last_linear to false"
        )


def _require_known(disabled: Sequence[str], model: Model, recipe: Recipe, graph: Graph) -> None:
    """RecipeError for a layer to be left float that is not there; it suggests names of modules."""
    layers = named_layers(model, recipe, graph).values()
    others = unquantizable(model, graph, find_linears(graph)[1])
    for name in disabled:
        pattern = Pattern.parse(name)
        if not pattern.may_miss and not any(map(pattern.matches, (*layers, *others))):
            modules = [replace(layer, node=layer.module or layer.node) for layer in layers]
            raise RecipeError(f"disable_names: '{name}' matches no layer; {nearest(pattern, modules)}")


def _activation(scheme: _Scheme) -> dict[str, Any]:
    if isinstance(scheme, W8A8DynamicProcessorConfig):
        return {"per": "token", "when": "dynamic"}
    ranges = {"range": {"type": ACT_METHODS[scheme.cfg.act_method]}}
    if isinstance(scheme, W8A8TimeStepProcessorConfig):
        return {"per": "token", "when": "timestep", "timestep_sep": scheme.timestep_sep, **ranges}
    return {"per": "tensor", "when": "static", **ranges}


def _smoothing(name: str, config: BaseModel, disabled: list[str]) -> dict[str, Any]:
    """m3 scales norms alone; m4 and m6 also the values of attention. A group with a disabled layer stays as it is."""
    if name == "m3":
        return {"type": "awq", "groups": ["norm-linear"], "exclude": disabled}
    groups = ["norm-linear", "ov"]
    if not isinstance(config, M6ProcessorConfig):
        return {"type": "iter_smooth", "alpha": 0.9, "groups": groups, "exclude": disabled}
    alpha, beta = config.cfg.alpha, config.cfg.beta
    both = {} if alpha is None or beta is None else {"alpha": alpha, "beta": beta}
    return {"type": "flex_smooth", **both, "groups": groups, "exclude": disabled}


def _last_linear(graph: Graph) -> list[str]:
    """The last MatMul or Gemm with a weight, by node name, as msModelSlim leaves it float; empty when there is none."""
    return [layer.node for layer in find_linears(graph)[0] if layer.op in ("MatMul", "Gemm")][-1:]


def weight_files(save: SaveProcessorConfig) -> WeightFiles:
    """What ``save`` writes beside the graph; RecipeError naming the field."""
    size = save.part_file_size
    try:
        return WeightFiles(
            tuple(save.save_type),
            save.safetensors_name,
            save.json_name,
            None if size is None else size * _GIGABYTE,
        )
    except ValueError as error:
        raise RecipeError(f"SaveProcessorConfig: {error}") from None


def is_session_file(recipe: str) -> bool:
    """Whether ``recipe`` is a YAML file that holds a session."""
    if not recipe.endswith((".yaml", ".yml")) or not Path(recipe).is_file():
        return False
    document = recipes.parse(*recipes.find(recipe))
    return isinstance(document, dict) and _KEY in document


def read_session(recipe: str) -> tuple[SessionConfig, SessionFile]:
    """The session of a YAML file and what else it says; RecipeError naming the file and the key."""
    where = f"session file {recipe}"
    file = _made(SessionFile, _named(recipes.parse(*recipes.find(recipe))), where)
    made: dict[str, Any] = {}
    for name, fields in file.processor_cfg_map.items():
        if name not in PROCESSORS:  # then this says which names there are
            _made(SessionConfig, {_KEY: {name: fields}}, where)
        made[name] = _made(PROCESSORS[name], fields or {}, f"{where}: {_KEY}.{name}")
    return SessionConfig(processor_cfg_map=made, device=file.device), file


def _named(document: Any) -> Any:
    """YAML keys may be numbers; names of fields are text."""
    return (
        {str(key): _named(value) for key, value in document.items()}
        if isinstance(document, dict)
        else document
    )


def _made(cls: type[Made], fields: Mapping[str, Any], where: str) -> Made:
    try:
        return cls(**fields)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
