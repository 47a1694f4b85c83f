"""Changes of a recipe that tuning tries: ranges, smoothing, rounding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from onnxslim_ptq.recipe import Recipe

__all__ = ["CHANGES"]


def _quantizing(recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return (step for step in recipe["steps"] if step["type"] == "quantize")


def _copied(recipe: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(recipe))
    return copied


def _histogram(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ranges by histogram, in the first step, where activations are static."""
    changed = _copied(recipe)
    first = next(_quantizing(changed), None)
    if first is None or first.get("act", {}) is None or first.get("act", {}).get("when") == "dynamic":
        return None
    first["act"] = {**first.get("act", {}), "range": {"type": "histogram"}}
    return changed


def _explicit(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """`auto_smooth` that may insert a Mul, instead of the one the recipe has."""
    changed = _copied(recipe)
    smoothing = [step for step in changed["steps"] if step["type"] == "auto_smooth"]
    if len(smoothing) > 1 or any(
        step["type"] not in ("auto_smooth", "quantize") for step in changed["steps"]
    ):
        return None
    more = next(
        step for step in Recipe.load("w8a8-transformer").dump()["steps"] if step["type"] == "auto_smooth"
    )
    changed["steps"] = [more, *(step for step in changed["steps"] if step["type"] != "auto_smooth")]
    return changed


def _gptq(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    changed = _copied(recipe)
    first = next(_quantizing(changed), None)
    if first is None:
        return None
    first["rounder"] = {"type": "gptq"}
    return changed


CHANGES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]] = {
    "ranges by histogram": _histogram,
    "explicit smoothing": _explicit,
    "weights by gptq": _gptq,
}
