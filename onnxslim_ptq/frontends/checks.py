"""Argument checks with msModelSlim's exception types and wording."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

__all__ = ["require_choice", "require_int", "require_names", "require_type"]


def require_type(name: str, value: Any, *types: type) -> None:
    """TypeError "<name> must be <type>, not <type>."; a bool is no int."""
    wrong = isinstance(value, bool) and bool not in types
    if wrong or not isinstance(value, types):
        wanted = " or ".join(t.__name__ for t in types)
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}.")


def require_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    """TypeError for another type, ValueError "<name> = v is smaller|larger than b." """
    require_type(name, value, int)
    if value < least:
        raise ValueError(f"{name} = {value} is smaller than {least}.")
    if most is not None and value > most:
        raise ValueError(f"{name} = {value} is larger than {most}.")


def require_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """ValueError listing the choices; the type is that of the choices."""
    require_type(name, value, *{type(c) for c in choices})
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {value}.")


def require_names(name: str, value: Any) -> None:
    """A list of strings; TypeError."""
    require_type(name, value, list, tuple)
    for item in value:
        require_type(f"an item of {name}", item, str)
