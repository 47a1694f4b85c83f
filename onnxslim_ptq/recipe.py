"""A recipe: what to quantize and how, as data. All of it is validated before a model is opened."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from calib.ranges import RANGES, RangeMethod
from onnxslim_ptq import recipes
from onnxslim_ptq.core.match import Layer, Pattern, nearest
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.recipes.explain import explain, meant, problem, show

__all__ = [
    "ActConfig",
    "LayerConfig",
    "QuantizeStep",
    "RangeConfig",
    "Recipe",
    "Resolution",
    "RounderConfig",
    "WeightConfig",
    "describe",
    "recipe_names",
    "resolve",
]

# Ranges that the quantize step finds itself; every other one is a method of `calib.ranges`.
STEP_RANGES = ("auto", "output_mse")
RANGE_TYPES = (*STEP_RANGES, *RANGES)
# Accepted values to come, by the end of their key path, so that the error can say so.
PLANNED: dict[str, tuple[str, ...]] = {
    "steps.type": ("awq", "gptq", "iter_smooth", "smoothquant"),
    "rounder.type": ("adaround", "admm", "gptq", "squant", "ssz"),
    "act.per": ("token",),
    "act.when": ("dynamic",),
}


def _pattern(text: str) -> str:
    try:
        Pattern.parse(text)
    except ValueError as error:
        raise problem(str(error)) from None
    return text


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in names:
            raise problem(f"{name!r} is unknown{meant(name, names)}; use one of {', '.join(names)}")
        return name

    return check


_Patterns = tuple[Annotated[str, AfterValidator(_pattern)], ...]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RounderConfig(_Config):
    """How weights are rounded."""

    type: Literal["rtn"]


class WeightConfig(_Config):
    """The integer form of weights."""

    dtype: Literal["int8"] = "int8"
    per: Literal["channel", "tensor"] = "channel"
    symmetric: Literal[True] = True


class RangeConfig(_Config):
    """How the range of an activation is found; the options of the method stand beside ``type``."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, AfterValidator(_one_of(RANGE_TYPES))] = Field(examples=list(RANGE_TYPES))

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build(self) -> RangeMethod | None:
        """The method of `calib.ranges`, or None for a range of the quantize step; ValueError on a bad option."""
        return None if self.type in STEP_RANGES else RANGES[self.type](**self.options)

    @model_validator(mode="after")
    def _options_fit(self) -> RangeConfig:
        method = RANGES.get(self.type)
        known = list(inspect.signature(method).parameters) if method else []
        hints = get_type_hints(method) if method else {}
        for key, value in self.options.items():
            if key not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no options"
                raise problem(f"unknown key{meant(key, known)}; range '{self.type}' {takes}", key)
            try:
                TypeAdapter(hints[key]).validate_python(value, strict=True)
            except ValidationError:
                kind = "a whole number" if hints[key] is int else "a number"
                raise problem(f"expected {kind}, got {show(value)}", key) from None
        try:
            self.build()
        except ValueError as error:
            key, _, text = str(error).partition(": ")
            raise problem(text, key) from None
        return self


class ActConfig(_Config):
    """The integer form of activations."""

    dtype: Literal["auto", "int8", "uint8"] = "auto"
    per: Literal["tensor"] = "tensor"
    when: Literal["static"] = "static"
    symmetric: Literal["auto", True, False] = "auto"
    range: RangeConfig = RangeConfig(type="auto")


class QuantizeStep(_Config):
    """Quantizes the layers it includes; a later step overrides an earlier one per layer and per key given."""

    type: Literal["quantize"]
    include: _Patterns = Field(("*",), min_length=1)
    exclude: _Patterns = ()
    rounder: RounderConfig = RounderConfig(type="rtn")
    weight: WeightConfig = WeightConfig()
    act: ActConfig = ActConfig()
    bias_correction: bool = True


class Recipe(_Config):
    """Steps in order, for one target. Make it with `Recipe.load`, which raises RecipeError, not pydantic's error."""

    version: Literal[1] = 1
    target: Annotated[str, AfterValidator(_one_of(TARGETS))] = "cpu"
    steps: tuple[QuantizeStep, ...] = Field(min_length=1)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """The recipe of that name, in that YAML file or mapping; RecipeError naming the key and its accepted values."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._of(dict(source), "recipe")
        text, where = recipes.find(source)
        return cls._of(recipes.parse(text, where), where)

    @classmethod
    def _of(cls, data: object, where: str) -> Recipe:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            # A misspelt key is also missing, and a bad step leaves too few: name what is there before what is not.
            last = {"missing": 1, "too_short": 2}
            first = min(error.errors(include_url=False), key=lambda found: last.get(found["type"], 0))
            raise RecipeError(f"{where}: {explain(first, _SCHEMA, PLANNED)}") from None

    def dump(self) -> dict[str, Any]:
        """Plain data that `load` turns into the same recipe: only the keys that were given, for they override."""
        steps = self.model_dump(mode="json", exclude_unset=True)["steps"]
        return {"version": self.version, "target": self.target, "steps": steps}

    def with_patterns(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Recipe:
        """With patterns added to every quantize step, an include in place of ``*``; RecipeError on a bad one."""
        for key, patterns in (("include", include), ("exclude", exclude)):
            for text in patterns:
                try:
                    Pattern.parse(text)
                except ValueError as error:
                    raise RecipeError(f"{key}: {error}") from None
        data = self.dump()
        for step, given in zip(self.steps, data["steps"], strict=True):
            if include:
                given["include"] = [*(text for text in step.include if text != "*"), *include]
            if exclude:
                given["exclude"] = [*step.exclude, *exclude]
        return Recipe.load(data)


# The model behind each key, for messages about keys.
_SCHEMA: dict[str, type[BaseModel]] = {
    "": Recipe,
    "steps": QuantizeStep,
    "rounder": RounderConfig,
    "weight": WeightConfig,
    "act": ActConfig,
    "range": RangeConfig,
}


def recipe_names() -> list[str]:
    """The names of the ready recipes, sorted."""
    return recipes.ready_names()


def describe(name: str) -> str:
    """One line about a ready recipe; RecipeError listing the ready ones when there is none of that name."""
    if name not in recipes.ready_names():
        raise recipes.unknown_name(name)
    return recipes.description(recipes.ready_text(name))


@dataclass(frozen=True)
class LayerConfig:
    """What all steps together say about one layer; ``step`` is the index of the last one that says something."""

    weight: WeightConfig
    act: ActConfig
    rounder: RounderConfig
    bias_correction: bool
    step: int


@dataclass(frozen=True)
class Resolution:
    """By node name: the configuration of each layer to quantize, and the reason for each one that stays float."""

    configs: dict[str, LayerConfig]
    skipped: dict[str, str]


def resolve(recipe: Recipe, layers: Sequence[Layer], others: Sequence[Layer] = ()) -> Resolution:
    """The configuration of every layer; RecipeError when a pattern (other than ``*``) matches no layer.

    ``others`` are nodes that cannot be quantized anyway: a pattern may match only them.
    """
    patterns: list[tuple[list[Pattern], list[Pattern]]] = []
    for index, step in enumerate(recipe.steps):
        parsed = []
        for key, texts in (("include", step.include), ("exclude", step.exclude)):
            parsed.append([Pattern.parse(text) for text in texts])
            for pattern in parsed[-1]:
                if pattern.text != "*" and not any(map(pattern.matches, (*layers, *others))):
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


def _merged(recipe: Recipe, steps: tuple[int, ...]) -> LayerConfig:
    given: dict[str, Any] = {}
    for index in steps:
        given = _override(given, recipe.steps[index].model_dump(exclude_unset=True))
    step = QuantizeStep.model_validate(given)
    return LayerConfig(step.weight, step.act, step.rounder, step.bias_correction, steps[-1])


def _override(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with the keys of ``new``, nested; another ``type`` starts afresh, since options belong to their type."""
    if new.get("type", old.get("type")) != old.get("type"):
        return new
    both = {
        key: _override(old[key], value) if isinstance(value, dict) and key in old else value
        for key, value in new.items()
    }
    return {**old, **both}
