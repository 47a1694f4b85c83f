"""The options that say what turns files into inputs: they stand for keys of the recipe's data section."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim_ptq.recipe import Recipe

__all__ = ["Again", "with_data"]

_USUAL = "w8a8"


def with_data(recipe: str | Recipe, preprocess: str | None, tokenizer: Path | None) -> Recipe:
    """The recipe with what the options say in its data section; RecipeError when it is not valid."""
    from onnxslim_ptq.recipe import Recipe

    loaded = Recipe.load(recipe)
    if preprocess is not None:
        loaded = loaded.with_data(preprocess=preprocess)
    if tokenizer is not None:
        text = loaded.dump().get("data", {}).get("text", {})
        loaded = loaded.with_data(text={**text, "tokenizer": str(tokenizer)})
    return loaded


@dataclass(frozen=True)
class Again:
    """Options of a run for another command: ``data`` reads the same samples, ``form`` also makes the same kind."""

    data: str = ""
    form: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Again:
        """From the parameters of ``quantize``; the recipe is part of ``data`` when it has a data section."""
        from onnxslim_ptq.recipe import Recipe

        recipe = given["recipe"] if isinstance(given["recipe"], str) else None
        described = recipe is not None and bool(Recipe.load(recipe).dump().get("data"))
        data = {name: given[name] for name in ("preprocess", "tokenizer")}
        data["recipe"] = recipe if described else None
        form = {
            **data,
            "recipe": recipe if described or recipe != _USUAL else None,
            "target": given["target"],
        }
        return cls(_options(data), _options(form))


def _options(values: Mapping[str, Any]) -> str:
    return "".join(
        f" --{name} {shlex.quote(str(value))}" for name, value in values.items() if value is not None
    )
