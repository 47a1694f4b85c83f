"""What a tuned model has to reach."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from onnxslim_ptq.errors import RecipeError

__all__ = ["GOALS", "OWN", "Goal"]

OWN = "metric"  # what an evaluator returns
GOALS = ("sqnr", "cosine", "top1_agree", OWN)
_FORM = re.compile(r"\s*(\w+)\s*>=\s*(\S+)\s*")


@dataclass(frozen=True)
class Goal:
    """``metric`` (one of `GOALS`; of the worst output) is at least ``bound``; sqnr in dB, the others as ratios."""

    metric: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """``"sqnr>=30"``; RecipeError when it is not of that form."""
        found = _FORM.fullmatch(text)
        if found is None or found[1] not in GOALS:
            raise RecipeError(
                f"goal '{text}': write METRIC>=NUMBER, such as \"sqnr>=30\", with {', '.join(GOALS)}"
            )
        try:
            bound = float(found[2])
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise RecipeError(f"goal '{text}': '{found[2]}' is not a number")
        if found[1] in ("cosine", "top1_agree") and not 0 <= bound <= 1:
            raise RecipeError(f"goal '{text}': {found[1]} goes from 0 to 1")
        return cls(found[1], bound)

    def __str__(self) -> str:
        return f"{self.metric}>={self.bound:g}"

    def met(self, measures: Mapping[str, float | None]) -> bool:
        """Whether the measured value reaches the bound; an output without signal or rows has nothing to lose."""
        value = measures.get(self.metric)
        return value is None or value >= self.bound
