"""The ``data`` section of a recipe: which files, and what turns them into the model's inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo, model_validator

from calib.readers.preprocess import PRESETS, Channels, Fit, ImagePreprocess, Layout, Resampling
from calib.readers.text import TextSettings
from onnxslim_ptq.core.config import Config, problem, show
from onnxslim_ptq.recipes.explain import meant

__all__ = ["SCHEMA", "DataConfig", "PreprocessConfig", "SetConfig", "TextConfig", "without_folders"]


def _beside_the_recipe(text: str, info: ValidationInfo) -> str:
    """A path of a recipe file counts from the folder of that file."""
    if not text:
        raise problem("expected a path, got ''")
    folder = (info.context or {}).get("folder")
    return str(Path(folder) / text) if folder is not None else text


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise problem(f"{name!r} is unknown{meant(name, PRESETS)}; use one of {', '.join(PRESETS)}")
    return name


def _numbers(value: object) -> object:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return (value,) if plain else value


_Path = Annotated[str, AfterValidator(_beside_the_recipe)]
_Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
_Side = Annotated[int, Field(ge=0, strict=True)]


def _fraction(value: object) -> object:
    """1/255 is no number in YAML, but what people write."""
    found = re.fullmatch(r"([0-9.]+) */ *([0-9.]+)", value) if isinstance(value, str) else None
    try:
        return float(found[1]) / float(found[2]) if found else value
    except (ValueError, ZeroDivisionError):
        return value


def _size(value: object) -> object:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


class PreprocessConfig(Config):
    """What turns an image into a tensor: a preset, and what differs from it."""

    preset: Annotated[str, AfterValidator(_preset)] = Field("none", examples=list(PRESETS))
    scale: Annotated[float, BeforeValidator(_fraction)] = 1.0
    mean: _Numbers = (0.0,)
    std: _Numbers = (1.0,)
    size: Annotated[tuple[_Side, _Side] | None, BeforeValidator(_size)] = None
    fit: Fit = "stretch"
    crop_fraction: float = 0.875
    pad_value: int = 0
    resize: Resampling = "bilinear"
    antialias: bool = True
    channels: Channels = "auto"
    layout: Layout = "auto"

    @model_validator(mode="after")
    def _possible(self) -> PreprocessConfig:
        try:
            self.build()
        except ValueError as error:
            key, _, text = str(error).partition(": ")
            raise problem(text, key) from None
        return self

    @property
    def given(self) -> frozenset[str]:
        return frozenset(self.model_fields_set - {"preset"})

    def build(self) -> ImagePreprocess:
        """The preset with the keys that were given in place of its own."""
        base = {field.name: getattr(PRESETS[self.preset], field.name) for field in fields(ImagePreprocess)}
        return ImagePreprocess(**{**base, **{name: getattr(self, name) for name in self.given}})


class TextConfig(Config):
    """What turns text into token arrays."""

    tokenizer: _Path
    max_length: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    truncation: bool = True
    padding: bool | None = None
    pad_token: str | None = None
    add_special_tokens: bool = True

    def build(self) -> TextSettings:
        given = self.model_dump()
        return TextSettings(**{**given, "tokenizer": Path(self.tokenizer)})


def _named(key: str) -> BeforeValidator:
    """``preprocess: imagenet`` for ``preprocess: {preset: imagenet}``."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _constants(values: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in values.items():
        if not isinstance(value, bool | int | float | list):
            raise problem(f"expected a number or lists of numbers, got {show(value)}", name)
    return values


_Preprocess = Annotated[PreprocessConfig, _named("preset")]
_Text = Annotated[TextConfig, _named("tokenizer")]
_Constants = Annotated[dict[str, Any], AfterValidator(_constants)]
_Count = Annotated[int, Field(ge=1, strict=True)]


class SetConfig(Config):
    """One of several sets of samples; what it does not say is as in the data section."""

    path: _Path
    samples: _Count | None = None
    stacked: bool | None = None
    preprocess: _Preprocess | None = None
    text: _Text | None = None
    constants: _Constants = Field(default_factory=dict)


class DataConfig(Config):
    """The data section. ``sets`` are the samples when no --calib is given."""

    sets: tuple[SetConfig, ...] = ()
    shuffle: Annotated[int, Field(ge=0, strict=True)] | None = None
    stacked: bool = False
    preprocess: _Preprocess | None = None
    text: _Text | None = None
    constants: _Constants = Field(default_factory=dict)
    feedback: dict[str, str] = Field(default_factory=dict)
    reset_every: _Count | None = None
    initial: dict[str, tuple[_Side, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _needs_feedback(self) -> DataConfig:
        for key in ("reset_every", "initial"):
            if getattr(self, key) and not self.feedback:
                raise problem("means something beside feedback only; leave it out", key)
        if self.shuffle is not None and self.feedback:
            raise problem("steps of a sequence are read in order; leave it out beside feedback", "shuffle")
        return self


SCHEMA: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "sets": SetConfig,
    "preprocess": PreprocessConfig,
    "text": TextConfig,
}
"""The model behind each key, for messages about keys."""


def without_folders(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain data with file names only, for a description that must not differ between machines."""

    def bare(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: bare(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [bare(inner) for inner in value]
        return Path(value).name if key in ("path", "tokenizer") and isinstance(value, str) else value

    return {**recipe, "data": bare(recipe["data"])} if "data" in recipe else dict(recipe)
