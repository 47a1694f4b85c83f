"""``recipes [list | show NAME]``: the ready recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxslim_ptq.commands.console import columns, emit_json, say
from onnxslim_ptq.commands.options import Json
from onnxslim_ptq.errors import QuantizationError

__all__ = ["recipes"]

Action = Annotated[
    str, typer.Argument(metavar="[list|show]", show_default=False, help="What to do; default: list.")
]
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="The recipe to show.")]


def recipes(action: Action = "list", name: Name = None, json: Json = False) -> None:
    """List the ready recipes, or show one as YAML: a starting point for a file of your own."""
    from onnxslim_ptq import recipes as ready

    if action == "list" and name is None:
        known = {recipe: ready.description(ready.ready_text(recipe)) for recipe in ready.ready_names()}
        if json:
            emit_json({"recipes": known, "exit_code": 0})
            return
        for line in columns(known.items(), indent=""):
            say(line)
        return
    if action != "show" or name is None:
        given = " ".join(filter(None, ("recipes", action, name)))
        raise QuantizationError(f"{given}: use 'recipes list' or 'recipes show NAME'")
    if name not in ready.ready_names():
        raise ready.unknown_name(name)
    text = ready.ready_text(name)
    if json:
        emit_json({"name": name, "recipe": ready.parse(text, name), "exit_code": 0})
    else:
        say(text.rstrip())
