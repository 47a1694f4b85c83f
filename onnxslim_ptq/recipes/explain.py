"""Says in one line what is wrong with a recipe: where, what was found, what is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from onnxslim_ptq.core.config import problem, show

__all__ = ["explain", "meant", "problem", "show"]

Schema = Mapping[str, type[BaseModel]]


def meant(word: object, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of the known words, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.7)
    return f" (did you mean '{near[0]}'?)" if near else ""


def explain(error: ErrorDetails, schema: Schema) -> str:
    """``steps[1].act.range.type: what is wrong; what is accepted`` for one of pydantic's errors.

    ``schema`` maps the last named key of a path to the model there ("" = the recipe itself).
    """
    path = [*_names(error)]
    if key := error.get("ctx", {}).get("key"):
        path.append(key)
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    return f"{where}: {_what(error, schema)}" if where else _what(error, schema)


def _names(error: ErrorDetails) -> list[str | int]:
    """The path; a key that is no text (``3: x``) counts as one, lest it looks like an index."""
    path = list(error["loc"])
    return [*path[:-1], str(path[-1])] if error["type"] in _KEY_ERRORS else path


_KEY_ERRORS = ("extra_forbidden", "invalid_key")


def _what(error: ErrorDetails, schema: Schema) -> str:
    kind, value = error["type"], error["input"]
    names = [name for name in _names(error) if isinstance(name, str)]
    if kind == "recipe":
        return str(error["ctx"]["text"])
    if kind in _KEY_ERRORS:
        known = list(schema[_parent(names)].model_fields)
        return f"unknown key{meant(names[-1], known)}; accepted: {', '.join(known)}"
    if kind == "missing":
        accepted = _accepted(names, schema)
        return f"is missing{'; use ' + accepted if accepted else ''}"
    if kind in ("literal_error", "enum"):
        return f"got {show(value)}; use {_accepted(names, schema)}"
    return (
        f"{_type(kind, value, names, schema) or error['msg']}, got {show(value)}{_cure(kind, value, names)}"
    )


def _type(kind: str, value: object, names: list[str], schema: Schema) -> str | None:
    """What was expected when the value has the wrong type."""
    if kind == "model_type":
        return f"expected a mapping with keys {', '.join(schema[names[-1] if names else ''].model_fields)}"
    return {
        "tuple_type": "expected a list",
        "string_type": "expected text",
        "too_short": "give at least one",
    }.get(kind)


def _cure(kind: str, value: object, names: list[str]) -> str:
    if kind == "model_type" and isinstance(value, str) and names[-1:] != ["act"] and names[-1:] != ["weight"]:
        return f"; write {{type: {value}}}" if names else ""
    return f"; write [{value!r}]" if kind == "tuple_type" and isinstance(value, str) else ""


def _parent(names: list[str]) -> str:
    """The key of the model that the last name is in."""
    return names[-2] if len(names) > 1 else ""


def _accepted(names: list[str], schema: Schema) -> str:
    """The values of a Literal field, the examples of another, or nothing."""
    field = schema[_parent(names)].model_fields[names[-1]]
    literal = get_origin(field.annotation) is Literal
    values: Sequence[Any] = field.examples or (get_args(field.annotation) if literal else ())
    return ", ".join(v if isinstance(v, str) else show(v) for v in values)
