"""4-bit codes in bytes and in 32-bit words, as checkpoints store them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calib.types import Array

__all__ = ["pack_int4", "read_packed", "tell_packed", "unpack_int4", "unpack_words"]

_PER_WORD = 8
_PACKED = "packed_int4"  # in the metadata of a .safetensors file, which has no 4-bit type


def pack_int4(codes: Array) -> NDArray[np.int8]:
    """Two neighbours along the last axis in one byte, the first in the low nibble: int8 [..., n / 2].

    ValueError when the last axis is odd. Source: Golden Stick's qint4x2 weights, [ic, oc / 2].
    """
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"4-bit codes of shape {list(codes.shape)} have no pairs along the last axis")
    nibbles = codes.astype(np.int8).astype(np.uint8) & 0xF
    return np.asarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4, np.uint8).view(np.int8)


def unpack_int4(packed: Array, *, unsigned: bool = False) -> Array:
    """What `pack_int4` packed, as int8 in [-8, 7] (uint8 in [0, 15] when ``unsigned``)."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    nibbles = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)
    return nibbles if unsigned else ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)


def unpack_words(words: Array, axis: int, order: Sequence[int] = range(_PER_WORD)) -> NDArray[np.uint8]:
    """uint8 in [0, 15] from int32 words of 8 nibbles along ``axis``, lowest first.

    ``order[i]``: which of the 8 neighbours nibble i holds.
    """
    raw = np.moveaxis(np.ascontiguousarray(words).view(np.uint32), axis, -1)
    nibbles = np.empty((*raw.shape, _PER_WORD), np.uint8)
    for i, place in enumerate(order):
        nibbles[..., place] = raw >> np.uint32(4 * i) & np.uint32(0xF)
    return np.moveaxis(nibbles.reshape(*raw.shape[:-1], -1), -1, axis)


def tell_packed(kinds: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a .safetensors file that say which of its tensors hold 4-bit codes: int4 or uint4 by name."""
    return {_PACKED: json.dumps(dict(kinds), sort_keys=True)}


def read_packed(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `tell_packed` wrote, empty where there is nothing of it; ValueError for anything else under its key."""
    try:
        kinds = json.loads(metadata.get(_PACKED, "{}"))
    except (ValueError, RecursionError):
        kinds = None
    if not isinstance(kinds, dict) or any(kind not in ("int4", "uint4") for kind in kinds.values()):
        raise ValueError(f"its metadata '{_PACKED}' is no table of int4 and uint4 by tensor")
    return kinds
