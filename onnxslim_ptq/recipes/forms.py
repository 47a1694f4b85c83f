"""The parts of a quantize step: the integer form of weights and activations, the rounder, the range."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from calib.ranges import RANGES, RangeMethod
from onnxslim_ptq.core.config import Config, problem, show
from onnxslim_ptq.core.rounding import Rounder
from onnxslim_ptq.recipes.explain import meant
from onnxslim_ptq.rounders import ROUNDERS

__all__ = [
    "NO_KERNEL",
    "RANGE_TYPES",
    "STEP_RANGES",
    "ActConfig",
    "RangeConfig",
    "RounderConfig",
    "WeightConfig",
    "has_kernel",
    "one_of",
]

# Ranges that the quantize step finds itself; every other one is a method of `calib.ranges`.
STEP_RANGES = ("auto", "output_mse")
RANGE_TYPES = (*STEP_RANGES, *RANGES)


NO_KERNEL = (
    "integer kernels take symmetric int8 weights without groups; use act: null for such weights, or per-token "
    "activations on target generic"
)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in names:
            raise problem(f"{name!r} is unknown{meant(name, names)}; use one of {', '.join(names)}")
        return name

    return check


def _check_options(kind: str, name: str, method: Any, options: Mapping[str, Any]) -> None:
    """The options that stand beside a ``type`` are fields of the method's class, of their types, that it accepts."""
    known = list(inspect.signature(method).parameters) if method else []
    hints = get_type_hints(method) if method else {}
    for key, value in options.items():
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise problem(f"unknown key{meant(key, known)}; {kind} '{name}' {takes}", key)
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError:
            wanted = {int: "a whole number", bool: "true or false"}.get(hints[key], "a number")
            raise problem(f"expected {wanted}, got {show(value)}", key) from None
    try:
        if method:
            method(**options)
    except ValueError as error:
        key, _, text = str(error).partition(": ")
        raise problem(text, key) from None


class RounderConfig(Config):
    """How weights are rounded; the options of the rounder stand beside ``type``."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, AfterValidator(one_of(ROUNDERS))] = Field(examples=list(ROUNDERS))

    def build(self) -> Rounder:
        return ROUNDERS[self.type](**(self.model_extra or {}))

    @model_validator(mode="after")
    def _options_fit(self) -> RounderConfig:
        _check_options("rounder", self.type, ROUNDERS[self.type], self.model_extra or {})
        return self


class WeightConfig(Config):
    """The integer form of weights."""

    dtype: Literal["int8", "int4", "uint4"] = "int8"
    per: Literal["channel", "tensor", "group"] = "channel"
    group_size: int | None = Field(default=None, ge=16)
    symmetric: bool = True
    full_range: bool = False

    @property
    def fits_integer_kernels(self) -> bool:
        return self.dtype == "int8" and self.symmetric and self.group_size is None

    @model_validator(mode="after")
    def _groups_have_a_size(self) -> WeightConfig:
        if (self.per == "group") != (self.group_size is not None):
            raise problem("per: group and group_size belong together; give both or neither", "group_size")
        if self.group_size is not None and self.group_size & (self.group_size - 1):
            raise problem(f"{self.group_size} is no power of two, as runtimes want it", "group_size")
        return self

    @model_validator(mode="after")
    def _full_range_is_symmetric(self) -> WeightConfig:
        if self.full_range and not (self.symmetric and self.dtype.startswith("int")):
            raise problem("full_range is of symmetric weights of a signed type", "full_range")
        return self


def has_kernel(weight: WeightConfig, act: ActConfig | None, target: str) -> bool:
    """Whether such weights go with such activations: off the cpu, per-token ones take every weight (A8W4)."""
    return act is None or weight.fits_integer_kernels or (act.when == "dynamic" and target != "cpu")


class RangeConfig(Config):
    """How the range of an activation is found; the options of the method stand beside ``type``."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, AfterValidator(one_of(RANGE_TYPES))] = Field(examples=list(RANGE_TYPES))

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build(self) -> RangeMethod | None:
        """The method of `calib.ranges`, or None for a range of the quantize step; ValueError on a bad option."""
        return None if self.type in STEP_RANGES else RANGES[self.type](**self.options)

    @model_validator(mode="after")
    def _options_fit(self) -> RangeConfig:
        _check_options("range", self.type, RANGES.get(self.type), self.options)
        return self


class ActConfig(Config):
    """The integer form of activations."""

    dtype: Literal["auto", "int8", "uint8"] = "auto"
    per: Literal["tensor", "token"] = "tensor"
    when: Literal["static", "dynamic", "prefill", "timestep"] = "static"
    timestep_sep: int | None = Field(default=None, ge=0)
    symmetric: Literal["auto", True, False] = "auto"
    range: RangeConfig = RangeConfig(type="auto")

    @property
    def needs_range(self) -> bool:
        """Whether there is a scale that is known before the model runs."""
        return self.when != "dynamic"

    @model_validator(mode="after")
    def _tokens_are_dynamic(self) -> ActConfig:
        if (self.per == "token") != (self.when != "static"):
            raise problem("per: token and when: dynamic belong together; give both or neither", "when")
        if (self.when == "timestep") != (self.timestep_sep is not None):
            raise problem(
                "when: timestep and timestep_sep belong together; give both or neither", "timestep_sep"
            )
        if self.needs_range and self.per == "token" and self.range.type in STEP_RANGES:
            raise problem(
                f"'{self.range.type}' serves static activations only; name a method, as minmax", "range"
            )
        if self.when == "dynamic" and "range" in self.model_fields_set:
            raise problem("a per-token scale is found while the model runs; leave the range out", "range")
        return self
