"""Options whose feature is still to come: they exist, and say so in one line."""

from __future__ import annotations

from collections.abc import Mapping

from onnxslim_ptq.errors import RecipeError

__all__ = ["refuse"]


def refuse(given: Mapping[str, object]) -> None:
    """Raise RecipeError for the first option that was given."""
    for option, value in given.items():
        if value:
            raise RecipeError(f"{option} is not available yet in this version; leave it out")
