"""What every part of a recipe is made of: frozen pydantic models whose errors say what was meant."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from onnxslim_ptq.core.match import Pattern

__all__ = ["Config", "Patterns", "number", "problem", "show"]


def problem(text: str, key: str = "") -> PydanticCustomError:
    """A validator's error; ``key`` extends the path to a key that pydantic has no field for."""
    return PydanticCustomError("recipe", "{text}", {"text": text, "key": key})


def show(value: object) -> str:
    """A value as YAML writes it, cut to a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Config(BaseModel):
    """Part of a recipe: an unknown key is an error, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _pattern(text: str) -> str:
    try:
        Pattern.parse(text)
    except ValueError as error:
        raise problem(str(error)) from None
    return text


Patterns = tuple[Annotated[str, AfterValidator(_pattern)], ...]


def number(lo: float, hi: float = math.inf, *, open_lo: bool = False) -> Any:
    """Validators of a number in [lo, hi] (``open_lo``: above lo); whole numbers count, text and booleans do not."""
    bounds = (
        f"from {lo:g} to {hi:g}" if math.isfinite(hi) else f"{'above' if open_lo else 'of at least'} {lo:g}"
    )

    def check(value: object) -> float:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not lo <= float(value) <= hi or (open_lo and value == lo) or value == math.inf:  # type: ignore[arg-type]
            raise problem(f"expected a number {bounds}, got {show(value)}")
        return float(value)  # type: ignore[arg-type]

    return BeforeValidator(check)
