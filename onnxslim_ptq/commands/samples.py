"""The options that say what turns files into inputs: they stand for keys of the recipe's data section."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxslim_ptq.recipe import Recipe

__all__ = ["data_options", "with_data"]


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


def data_options(recipe: str | Recipe, preprocess: str | None, tokenizer: Path | None) -> str:
    """The options again, as ``compare`` needs them to see the same samples; the recipe when it has a data section."""
    from onnxslim_ptq.recipe import Recipe

    given = {"--preprocess": preprocess, "--tokenizer": tokenizer}
    if isinstance(recipe, str) and Recipe.load(recipe).dump().get("data"):
        given["--recipe"] = recipe
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
