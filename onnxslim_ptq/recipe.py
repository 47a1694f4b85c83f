"""A recipe: what to quantize and how, as data. All of it is validated before a model is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from onnxslim_ptq import recipes
from onnxslim_ptq.core.choice import AddedBias
from onnxslim_ptq.core.config import Config, Patterns, problem
from onnxslim_ptq.core.match import Pattern
from onnxslim_ptq.core.spec import TIMESTEP
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.optimize import ALL as ALL_PASSES
from onnxslim_ptq.recipes.data import SCHEMA as DATA_SCHEMA
from onnxslim_ptq.recipes.data import DataConfig
from onnxslim_ptq.recipes.explain import explain
from onnxslim_ptq.recipes.forms import (
    NO_KERNEL,
    RANGE_TYPES,
    STEP_RANGES,
    ActConfig,
    RangeConfig,
    RounderConfig,
    WeightConfig,
    has_kernel,
    one_of,
)
from onnxslim_ptq.steps import STEPS
from onnxslim_ptq.steps.attention import AttentionStep
from onnxslim_ptq.steps.kv_cache import KvCacheStep
from onnxslim_ptq.steps.smoothing import SmoothingConfig

__all__ = [
    "NO_KERNEL",
    "RANGE_TYPES",
    "STEP_RANGES",
    "ActConfig",
    "QuantizeStep",
    "RangeConfig",
    "Recipe",
    "RounderConfig",
    "WeightConfig",
    "describe",
    "recipe_names",
]

_QUANTIZE, _KV_CACHE, _ATTENTION = "quantize", "kv_cache", "attention"


class QuantizeStep(Config):
    """Quantizes the layers it includes; a later step overrides an earlier one per layer and per key given."""

    type: Literal["quantize"] = Field(examples=[_QUANTIZE, *STEPS, _KV_CACHE, _ATTENTION])
    include: Patterns = Field(("*",), min_length=1)
    exclude: Patterns = ()
    rounder: RounderConfig = RounderConfig(type="rtn")
    weight: WeightConfig = WeightConfig()
    act: ActConfig | None = ActConfig()
    bias_correction: bool = True
    added_bias: AddedBias = Field(AddedBias.FLOAT, examples=[kind.value for kind in AddedBias])

    @property
    def quant_type(self) -> str:
        bits = self.weight.dtype.removeprefix("u").removeprefix("int")
        if self.act is None:
            return f"W{bits}A16"
        kind = {"dynamic": "_DYNAMIC", "timestep": "_TIMESTEP", "prefill": "_MIX"}.get(self.act.when, "")
        return f"W{bits}A8{kind}"


def _step_type(step: object) -> str:
    """Which model a step is read with; one of no known type with the quantize step's, which says so."""
    kind = step.get("type") if isinstance(step, Mapping) else getattr(step, "type", None)
    return kind if isinstance(kind, str) and kind in _STEP_MODELS else _QUANTIZE


_STEP_MODELS: dict[str, type[BaseModel]] = {
    _QUANTIZE: QuantizeStep,
    **{name: row.config for name, row in STEPS.items()},
    _KV_CACHE: KvCacheStep,
    _ATTENTION: AttentionStep,
}
if TYPE_CHECKING:
    AnyStep = QuantizeStep | SmoothingConfig | KvCacheStep | AttentionStep
else:
    AnyStep = Annotated[
        Union[tuple(Annotated[model, Tag(name)] for name, model in _STEP_MODELS.items())],  # noqa: UP007
        Discriminator(_step_type),
    ]


class Recipe(Config):
    """Steps in order, for one target. Make it with `Recipe.load`, which raises RecipeError, not pydantic's error."""

    version: Literal[1] = 1
    target: Annotated[str, AfterValidator(one_of(TARGETS))] = "cpu"
    data: DataConfig = DataConfig()
    names: dict[str, str] = Field(default_factory=dict)
    passes: tuple[Annotated[str, AfterValidator(one_of(ALL_PASSES))], ...] | None = None
    steps: tuple[AnyStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _smoothing_comes_first(self) -> Recipe:
        first = next((i for i, s in enumerate(self.steps) if isinstance(s, QuantizeStep)), None)
        if first is None:
            if not self.caches:
                raise problem("nothing is quantized; end with a step of type quantize or kv_cache", "steps")
            first = len(self.steps)
        late = next((i for i, s in enumerate(self.steps) if i > first and s.type in STEPS), None)
        if late is not None:
            what = f"{self.steps[late].type} changes the float model, so it comes before every quantize step"
            raise problem(what, f"steps[{late}].type")
        return self

    @model_validator(mode="after")
    def _weights_have_kernels(self) -> Recipe:
        quantize = [(i, s) for i, s in enumerate(self.steps) if isinstance(s, QuantizeStep)]
        weight_only = any(s.act is None for _, s in quantize)  # another step may take the activation away
        for index, step in quantize:
            act = step.act if "act" in step.model_fields_set or not weight_only else None
            if not has_kernel(step.weight, act, self.target):
                raise problem(NO_KERNEL, f"steps[{index}].weight")
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """The recipe of that name, in that YAML file or mapping; RecipeError naming the key and its accepted values."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._of(dict(source), "recipe")
        text, where = recipes.find(source)
        folder = None if source in recipe_names() else Path(source).parent
        return cls._of(recipes.parse(text, where), where, folder)

    @classmethod
    def _of(cls, data: object, where: str, folder: Path | None = None) -> Recipe:
        try:
            return cls.model_validate(data, context={"folder": folder})
        except ValidationError as error:
            # A misspelt key is also missing, and a bad step leaves too few: name what is there before what is not.
            last = {"missing": 1, "too_short": 2}
            first = min(error.errors(include_url=False), key=lambda found: last.get(found["type"], 0))
            raise RecipeError(f"{where}: {_explain(first)}") from None

    @property
    def quant_type(self) -> str:
        """W8A8, W8A8_DYNAMIC (per token), W8A16 or W4A16 (weight-only); <first>_MIX when steps differ; …_C8 with an
        int8 KV cache (W16A16_C8 when nothing else is quantized)."""
        types = dict.fromkeys(s.quant_type for s in self.steps if isinstance(s, QuantizeStep))
        first, *others = [*types] or ["W16A16"]
        whole = f"{first}_MIX" if others else first
        return f"{whole}_C8" if self.caches else whole

    @property
    def caches(self) -> list[KvCacheStep]:
        """The steps that make a KV cache integer."""
        return [s for s in self.steps if isinstance(s, KvCacheStep)]

    @property
    def attentions(self) -> list[AttentionStep]:
        """The steps that quantize what enters attention."""
        return [s for s in self.steps if isinstance(s, AttentionStep)]

    @property
    def layers(self) -> bool:
        """Whether any step quantizes layers: one that only makes the cache integer does not."""
        return any(isinstance(s, QuantizeStep) for s in self.steps)

    @property
    def needs_ranges(self) -> bool:
        """Whether activations or a KV cache get a range from calibration data."""
        steps = [s for s in self.steps if isinstance(s, QuantizeStep)]
        static = any(s.act is not None and s.act.needs_range for s in steps)
        return static or bool(self.attentions) or any(step.needs_data for step in self.caches)

    @property
    def tag(self) -> str | None:
        """The tag of samples that a range is taken for each value of, so that each has to calibrate."""
        acts = [s.act for s in self.steps if isinstance(s, QuantizeStep)]
        return TIMESTEP if any(act is not None and act.when == "timestep" for act in acts) else None

    def dump(self) -> dict[str, Any]:
        """Plain data that `load` turns into the same recipe: only the keys that were given, for they override."""
        given = self.model_dump(mode="json", exclude_unset=True)
        data = {key: given[key] for key in ("data", "names") if given.get(key)}
        passes = {"passes": given["passes"]} if self.passes is not None else {}
        return {"version": self.version, "target": self.target, **data, **passes, "steps": given["steps"]}

    def with_data(self, **given: object) -> Recipe:
        """With keys of the data section replaced, as they stand in a recipe; RecipeError on a bad value."""
        data = self.dump()
        return Recipe.load({**data, "data": {**data.get("data", {}), **given}})

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
            if not isinstance(step, QuantizeStep):
                continue
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
    **DATA_SCHEMA,
}


def _explain(error: ErrorDetails) -> str:
    """The error in one line; pydantic's path names the model a step was read with, the user's does not."""
    path, model = error["loc"], _QUANTIZE
    if path[:1] == ("steps",) and len(path) > 2:
        model = str(path[2])
        error["loc"] = (*path[:2], *path[3:])
    return explain(error, _SCHEMA | {"steps": _STEP_MODELS[model]})


def recipe_names() -> list[str]:
    """The names of the ready recipes, sorted."""
    return recipes.ready_names()


def describe(name: str) -> str:
    """One line about a ready recipe; RecipeError listing the ready ones when there is none of that name."""
    if name not in recipes.ready_names():
        raise recipes.unknown_name(name)
    return recipes.description(recipes.ready_text(name))
