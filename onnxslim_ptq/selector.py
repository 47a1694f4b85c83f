"""``LayerSelector``: layers that int8 is likely to harm, by statistics of what they read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import onnx

from calib.stats.spread import SPREADS
from onnxslim_ptq.sensitivity import Ranked, analyze

__all__ = ["LayerSelector"]


class LayerSelector:
    """Scores layers by ``range_method`` (std, quantile or kurtosis of their inputs: `calib.stats.SpreadStats`).

    ``layer_names``: node names to choose from, all layers by default. TypeError and ValueError for wrong arguments.
    """

    def __init__(
        self,
        model: str | Path | onnx.ModelProto,
        layer_names: Sequence[str] | None = None,
        range_method: str = "quantile",
    ) -> None:
        if not isinstance(model, str | Path | onnx.ModelProto):
            raise TypeError(f"model must be a path or ModelProto, not {type(model).__name__}.")
        if layer_names is not None and (
            isinstance(layer_names, str) or not all(isinstance(name, str) for name in layer_names)
        ):
            raise TypeError("layer_names must be a list of str.")
        if range_method not in SPREADS:
            raise ValueError(f"range_method must be one of {', '.join(SPREADS)}, not {range_method!r}.")
        self._model, self._method = model, range_method
        self._names = None if layer_names is None else frozenset(layer_names)
        self._ranking: list[Ranked] | None = None

    def run(self, calib_data: Any, **options: Any) -> list[Ranked]:
        """Watch the samples flow through the model, and return the ranking; ``options`` are those of `analyze`."""
        found = analyze(self._model, "linear", self._method, calib_data, **options).ranking
        if self._names is not None:
            missing = self._names - {node for ranked in found for node in ranked.nodes}
            if missing:
                raise ValueError(f"layer_names: '{min(missing)}' is no layer of the model that has a score.")
            found = [ranked for ranked in found if self._names.intersection(ranked.nodes)]
        self._ranking = found
        return found

    def select_layers_by_threshold(self, threshold: float) -> list[str]:
        """The layers whose score is above ``threshold``, highest first."""
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise TypeError(f"threshold must be a number, not {type(threshold).__name__}.")
        return self._nodes([ranked for ranked in self._scored() if ranked.score > threshold])

    def select_layers_by_disable_level(self, disable_level: int) -> list[str]:
        """The layers of the ``disable_level`` highest scores; layers of equal score come together."""
        if isinstance(disable_level, bool) or not isinstance(disable_level, int):
            raise TypeError(f"disable_level must be int, not {type(disable_level).__name__}.")
        if disable_level < 0:
            raise ValueError(f"disable_level = {disable_level} is smaller than 0.")
        levels = [list(group) for _, group in groupby(self._scored(), key=lambda ranked: ranked.score)]
        return self._nodes([ranked for level in levels[:disable_level] for ranked in level])

    def _scored(self) -> list[Ranked]:
        if self._ranking is None:
            raise ValueError("there are no scores yet; call run(calib_data) first.")
        return self._ranking

    def _nodes(self, ranking: Sequence[Ranked]) -> list[str]:
        nodes = [node for ranked in ranking for node in ranked.nodes]
        return nodes if self._names is None else [node for node in nodes if node in self._names]
