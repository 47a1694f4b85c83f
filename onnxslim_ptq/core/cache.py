"""A decoder's KV cache in integers: how its graph inputs and outputs change."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnxslim_ptq.core.dtypes import INT8, IntType

__all__ = ["CacheChange", "CachePair"]

_KINDS = re.compile(r"(?<![a-z])(?:keys?|values?|[kv])(?![a-z])")


@dataclass(frozen=True)
class CachePair:
    """Keys or values of one layer: graph input ``past`` and graph output ``present``, float, of ``rank`` axes.

    ``append``: the node that alone joins past and new tokens (a Concat), where there is one; then codes are appended
    to codes. ``stack``: the axis that holds keys and values side by side, in models that keep them in one tensor.
    """

    past: str
    present: str
    rank: int
    batch: int
    tokens: int
    stack: int | None = None
    append: str | None = None
    half: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """The axes with a scale for every index in per-channel form: heads, channels, and the stack."""
        return tuple(axis for axis in range(self.rank) if axis not in (self.batch, self.tokens))

    @property
    def row(self) -> tuple[int, ...]:
        """The axes one scale covers in per-token form: heads and channels."""
        return tuple(axis for axis in self.channels if axis != self.stack)

    @property
    def is_key(self) -> bool:
        """By the last word of the name that says so: ``past_key_values.0.value`` holds values, ``past_key_0`` keys."""
        said = _KINDS.findall(self.past.lower())
        return bool(said) and said[-1].startswith("k")


@dataclass(frozen=True)
class CacheChange:
    """One pair as integers: real = code * ``scale`` * the token's own scale, where ``per_token``.

    ``scale``: float64, 1 along batch and tokens; all ones for plain per-token. A token's scale is max|x / scale| / 127
    over heads and channels; it travels beside the codes as float32, named ``<name>_scale``.
    """

    pair: CachePair
    scale: NDArray[np.float64]
    per_token: bool = False
    dtype: IntType = field(default=INT8)

    @property
    def names(self) -> tuple[str, str]:
        return self.pair.past, self.pair.present

    def scale_name(self, name: str) -> str | None:
        """The tensor that holds the tokens' scales beside input or output ``name``; None in static form."""
        return f"{name}_scale" if self.per_token else None
