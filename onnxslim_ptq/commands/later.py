"""Commands and options whose feature is still to come: they exist, and say so in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import typer

from onnxslim_ptq.errors import RecipeError

__all__ = ["LATER", "not_available_yet", "refuse"]


def not_available_yet(what: str, instead: str = "") -> RecipeError:
    return RecipeError(f"{what} is not available yet in this version" + (f"; {instead}" if instead else ""))


def refuse(given: Mapping[str, object]) -> None:
    """Raise RecipeError for the first option that was given."""
    for option, value in given.items():
        if value:
            raise not_available_yet(option, "leave it out")


def _later(name: str, help_text: str, instead: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        raise not_available_yet(f"the command '{name}'", instead)

    command.__doc__ = f"{help_text} (not available yet)"
    return command


LATER: dict[str, Callable[[typer.Context], None]] = {
    name: _later(name, help_text, instead)
    for name, help_text, instead in (
        ("convert", "Convert between weight formats.", "quantize writes an ONNX file and a weights JSON"),
    )
}
