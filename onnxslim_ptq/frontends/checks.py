"""Argument checks with msModelSlim's exception types and wording."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

__all__ = ["require_choice", "require_int", "require_names", "require_shapes", "require_type"]


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


def require_shapes(shapes: Any, needed: bool) -> None:
    """``input_shape``: one list of sizes per input, ``needed`` with is_dynamic_shape; TypeError, ValueError."""
    require_type("input_shape", shapes, list, tuple)
    for shape in shapes:
        require_type("an item of input_shape", shape, list, tuple)
        for size in shape:
            require_int("a size in input_shape", size, 1)
    if needed and not shapes:
        raise ValueError("is_dynamic_shape needs input_shape, one list of sizes per input.")
