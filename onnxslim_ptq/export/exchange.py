"""Feeds a model whose KV cache is of integers with the float model's samples, and reads its answers as floats.

What its inputs and outputs mean stands in the model's metadata (`onnxslim_ptq.export.cache`). A model without any is
fed and read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.errors import GraphError
from calib.model import Model, to_array
from calib.runner import run_session
from calib.types import Array, Feed, SampleId
from onnxslim_ptq.core.spec import TIMESTEP
from onnxslim_ptq.export.cache import METADATA

__all__ = ["Exchange", "IntegerCache"]

_INTEGERS, _FLOATS = ("int8",), ("float32", "float16")


@dataclass(frozen=True)
class IntegerCache:
    """An input or output as codes: real = code * ``scale`` * the values of tensor ``token_scale``, each where given."""

    dtype: np.dtype[Any]
    real: np.dtype[Any]
    scale: NDArray[np.float32] | None
    token_scale: str | None
    row: tuple[int, ...]

    def codes(self, x: Array) -> tuple[Array, NDArray[np.float32] | None]:
        """The codes of float ``x`` and its tokens' scales, in float32 as the graph computes them."""
        values = np.asarray(x, np.float32)
        if self.scale is not None:
            values = values / self.scale
        highest = np.float32(np.iinfo(self.dtype).max)
        rows = None
        if self.token_scale is not None:
            size = np.abs(values).max(axis=self.row, keepdims=True, initial=0.0)
            rows = np.maximum(size, np.float32(1e-20)) / highest
            values = values / rows
        return np.clip(np.rint(values), np.iinfo(self.dtype).min, highest).astype(self.dtype), rows

    def values(self, codes: Array, rows: Array | None) -> Array:
        """What the codes stand for."""
        real = codes.astype(np.float32)
        for by in (self.scale, rows):
            real = real if by is None else real * np.asarray(by, np.float32)
        return real.astype(self.real)


@dataclass(frozen=True)
class Exchange:
    """``caches`` by name of the input or output; ``timestep``: whether the model wants the sample's time step."""

    caches: Mapping[str, IntegerCache] = field(default_factory=dict)
    timestep: bool = False

    @classmethod
    def of(cls, model: Model) -> Exchange:
        """Read from the model's metadata; GraphError when that is not what this package writes."""
        timestep = any(value.name == TIMESTEP for value in model.proto.graph.input)
        text = next((p.value for p in model.proto.metadata_props if p.key == METADATA), None)
        if text is None:
            return cls(timestep=timestep)
        try:
            stored = {t.name: t for t in model.proto.graph.initializer}
            caches = {name: _cache(name, entry, stored, model) for name, entry in json.loads(text).items()}
            return cls(caches, timestep)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise GraphError(
                f"{model.name}: metadata '{METADATA}' cannot be read ({error!r}); write the model again"
            ) from None

    def feed(self, feed: Feed, sample: SampleId | None = None) -> Feed:
        """The feed with codes in place of float caches, and the time step of ``sample`` (0 when it has none)."""
        if self.timestep and TIMESTEP not in feed:
            step = sample.tags.get(TIMESTEP, 0) if sample is not None else 0
            feed = {**feed, TIMESTEP: np.asarray(step, np.int64)}
        if not self.caches:
            return feed
        made: dict[str, Array] = {}
        for name, values in feed.items():
            cache = self.caches.get(name)
            if cache is None or values.dtype == cache.dtype:
                made[name] = values
                continue
            made[name], rows = cache.codes(values)
            if rows is not None and cache.token_scale is not None:
                made[cache.token_scale] = rows
        return made

    def run(self, session: Any, outputs: Sequence[str], feed: Feed, sample: SampleId) -> list[Any]:
        """The named outputs, as floats."""
        names = self.names(outputs)
        return self.read(names, run_session(session, names, self.feed(feed, sample), sample))[: len(outputs)]

    def read(self, names: Sequence[str], values: Sequence[Any]) -> list[Any]:
        """The values of the named outputs, codes as what they stand for."""
        known = dict(zip(names, values, strict=True))
        real = []
        for name in names:
            cache = self.caches.get(name)
            rows = None if cache is None or cache.token_scale is None else known[cache.token_scale]
            real.append(known[name] if cache is None else cache.values(known[name], rows))
        return real

    def io_changes(self) -> list[dict[str, Any]]:
        """The entries of the weights JSON, as `onnxslim_ptq.export.cache.io_changes` makes them of a plan."""
        found = []
        for name, cache in self.caches.items():
            scale = np.ones(1, np.float32) if cache.scale is None else cache.scale
            row = {} if cache.token_scale is None else {"scale_tensor": cache.token_scale}
            entry: dict[str, Any] = {"scale": scale.reshape(-1), "scale_shape": list(scale.shape)}
            found.append({"name": name, "dtype": str(cache.dtype), **entry, **row})
        return found

    def names(self, outputs: Sequence[str]) -> list[str]:
        """``outputs`` and the scales that go along with them."""
        rows = [c.token_scale for n in outputs if (c := self.caches.get(n)) is not None and c.token_scale]
        return [*outputs, *rows]


def _cache(
    name: str, entry: Mapping[str, Any], stored: Mapping[str, onnx.TensorProto], model: Model
) -> IntegerCache:
    """ValueError, LookupError or TypeError for what `declare_cache` does not write."""
    row = tuple(int(axis) for axis in entry["row"])
    token_scale = entry["token_scale"]
    values = {v.name: v for v in (*model.proto.graph.input, *model.proto.graph.output)}
    if name in values:  # a part of a model may lack it
        axes = len(values[name].type.tensor_type.shape.dim)
        if any(not 0 <= axis < axes for axis in row) or (
            token_scale is not None and token_scale not in values
        ):
            raise ValueError(f"'{name}' has no such axes or scales")
    if entry["dtype"] not in _INTEGERS or entry["float"] not in _FLOATS:
        raise ValueError(f"'{name}' is of {entry['dtype']} for {entry['float']}")
    scale = entry["scale"]
    constant = None if scale is None else np.asarray(to_array(stored[scale], model.weights), np.float32)
    return IntegerCache(np.dtype(entry["dtype"]), np.dtype(entry["float"]), constant, token_scale, row)
