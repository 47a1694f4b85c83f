"""The ``kv_cache`` step: a decoder's keys and values as int8, in the inputs and outputs of its graph.

``per: channel``: s = max|x| / 127 for every head and channel over all samples, known before the model runs. ``per:
token``: one scale for every token and layer, found while the model runs; no data is needed. Sources: MindSpore Golden
Stick, KVCache int8; C. Hooper et al., KVQuant, NeurIPS 2024, on why keys want a scale per channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from calib.errors import CalibrationError, GraphError
from calib.stats import AxesStats
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.cache import CacheChange, CachePair
from onnxslim_ptq.core.config import Config, Patterns, number, problem
from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.match import Layer, Pattern, nearest
from onnxslim_ptq.core.qmath import params_from_range
from onnxslim_ptq.core.spec import PerTensor, QuantSpec
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.kv_cache import find_cache

__all__ = ["KvCacheStep", "apply", "chosen", "probes"]

Floats = NDArray[np.float64]
Chosen = list[tuple[CachePair, "KvCacheStep"]]


class KvCacheStep(Config):
    """Patterns match the names of the cache's inputs and outputs; a later step overrides an earlier one.

    ``smooth_factor``: per token, each key channel is divided by (max |k|)^smooth_factor first. ``full_range``: static
    scales are max|x| / 127.5.
    """

    type: Literal["kv_cache"]
    include: Patterns = Field(("*",), min_length=1)
    exclude: Patterns = ()
    dtype: Literal["int8"] = "int8"
    per: Literal["channel", "token"] = "channel"
    smooth_factor: Annotated[float, number(0, 1)] = 0.0
    full_range: bool = False

    @property
    def needs_data(self) -> bool:
        return self.per == "channel" or self.smooth_factor > 0

    @model_validator(mode="after")
    def _fits(self) -> KvCacheStep:
        if self.per == "channel" and self.smooth_factor:
            raise problem("every channel has its own scale already; per: token takes it", "smooth_factor")
        if self.per == "token" and self.full_range:
            raise problem("a token's scale is max|x| / 127; per: channel takes it", "full_range")
        return self


def chosen(graph: Graph, steps: Sequence[KvCacheStep], target: Target) -> Chosen:
    """Every cache pair with the last step that includes and does not exclude it.

    Raises GraphError when the model has no KV cache, RecipeError when a pattern matches none of it, or when the
    target's form has no integer cache.
    """
    if not steps:
        return []
    if not target.integer_cache:
        raise RecipeError(
            f"kv_cache: an int8 KV cache is not available for target '{target.name}'; use generic or cpu"
        )
    pairs = find_cache(graph)
    if not pairs:
        raise GraphError(
            f"{graph.model.name} has no KV cache: no past keys and values among its inputs belong to an output; "
            "export the decoder with its cache, or leave the kv_cache step out"
        )
    layers = [Layer(pair.past, "", pair.present) for pair in pairs]
    found: dict[str, tuple[CachePair, KvCacheStep]] = {}
    for step in steps:
        include, exclude = (_parsed(texts, layers) for texts in (step.include, step.exclude))
        for pair, layer in zip(pairs, layers, strict=True):
            if any(p.matches(layer) for p in include) and not any(p.matches(layer) for p in exclude):
                found[pair.past] = (pair, step)
        _require_keys(step, [pair for pair, one in found.values() if one is step])
    return [found[pair.past] for pair in pairs if pair.past in found]


def _require_keys(step: KvCacheStep, pairs: Sequence[CachePair]) -> None:
    if step.smooth_factor and pairs and not any(pair.is_key for pair in pairs):
        raise RecipeError(
            f"kv_cache: smooth_factor is about keys, and by its name no cache holds keys alone ('{pairs[0].past}'); "
            "leave it out"
        )


def _parsed(texts: Sequence[str], layers: Sequence[Layer]) -> list[Pattern]:
    patterns = [Pattern.parse(text) for text in texts]
    for pattern in patterns:
        if pattern.text != "*" and not any(map(pattern.matches, layers)):
            raise RecipeError(
                f"kv_cache: pattern '{pattern.text}' matches no cache; {nearest(pattern, layers)}"
            )
    return patterns


def probes(pairs: Chosen) -> list[Probe]:
    """The extremes of every head and channel, where a scale comes from data."""
    return [
        _probe(pair) for pair, step in pairs if step.per == "channel" or (step.smooth_factor and pair.is_key)
    ]


def apply(pairs: Chosen, stats: Mapping[Probe, Stats]) -> list[CacheChange]:
    """The changes of the plan; CalibrationError where the samples left nothing to take a scale from."""
    return [_change(pair, step, stats) for pair, step in pairs]


def _change(pair: CachePair, step: KvCacheStep, stats: Mapping[Probe, Stats]) -> CacheChange:
    per_token = step.per == "token"
    if per_token and not (step.smooth_factor and pair.is_key):
        return CacheChange(pair, np.ones((1,) * pair.rank), per_token)
    seen = stats[_probe(pair)]
    assert isinstance(seen, AxesStats)
    size = seen.absmax
    if size is None or seen.extent.nan + seen.extent.inf:
        what = "no values" if size is None else f"{seen.extent.nan} NaN and {seen.extent.inf} Inf values"
        raise CalibrationError(
            f"KV cache '{pair.present}': the samples gave {what}; calibrate with other samples"
        )
    if per_token:
        return CacheChange(pair, channel_smoothing(size, step.smooth_factor), per_token)
    spec = QuantSpec(INT8, PerTensor(), True, step.full_range)
    return CacheChange(pair, params_from_range(Range(-size, size), spec).scale)


def channel_smoothing(size: Floats, factor: float) -> Floats:
    """s = m^factor, m = max |k| of a channel, in float32; 1 for dead channels. Source: `kv_smooth`."""
    scale = np.where(size > 0, size, 1.0) ** factor
    return np.asarray(scale.astype(np.float32), np.float64)


def _probe(pair: CachePair) -> Probe:
    reduced = tuple((f"reduce{i}", float(axis)) for i, axis in enumerate(sorted((pair.batch, pair.tokens))))
    return Probe(pair.present, "axes", None, reduced)
