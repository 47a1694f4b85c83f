"""4-bit checkpoints of AutoGPTQ and AutoAWQ, unpacked.

| tensor of layer L | AutoGPTQ | AutoAWQ (gemm) |
|---|---|---|
| ``L.qweight`` int32 | [in / 8, out], 8 rows to a word, lowest first | [in, out / 8], columns 0 2 4 6 1 3 5 7 |
| ``L.qzeros`` int32 | [groups, out / 8], lowest first, zero - 1 (v2: zero) | [groups, out / 8], in that order |
| ``L.scales`` float16 | [groups, out] | [groups, out] |
| ``L.g_idx`` int32 | [in], the group of each row | none |

    w = (q - zero[group]) * scale[group],  q and zero in 0..15

Sources: AutoGPTQ's qlinear and AutoAWQ's WQLinear_GEMM, as documented in their formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.types import Array
from onnxslim_ptq.core.pack import unpack_words
from onnxslim_ptq.errors import GraphError

__all__ = ["Int4Layer", "Read", "read_autoawq", "read_autogptq"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MIDDLE = 8
_PACKED = ("qweight", "qzeros", "scales", "g_idx")
Read = tuple[dict[str, "Int4Layer"], dict[str, Array]]


@dataclass(frozen=True)
class Int4Layer:
    """real = (code - zero) * scale; codes int8 [in, out] in -8..7, scale float32 and zero int8 [groups, out].

    ``order``: the input channel of each row, where rows were put in the order of their groups; else None.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero: NDArray[np.int8]
    order: NDArray[np.int32] | None = None

    def real(self) -> NDArray[np.float32]:
        """The weight, rows where their input channels are, float32 [in, out]."""
        size = len(self.codes) // len(self.scale)
        scale, zero = (v.repeat(size, axis=0) for v in (self.scale, self.zero))
        rows = (self.codes.astype(np.float32) - zero) * scale
        if self.order is None:
            return rows
        placed = np.empty_like(rows)
        placed[self.order] = rows
        return placed


def read_autogptq(tensors: Mapping[str, Array], *, version: int = 1) -> Read:
    """The 4-bit layers and all other tensors; GraphError naming the layer whose tensors do not fit."""

    def layer(name: str, parts: dict[str, Array]) -> Int4Layer:
        codes = unpack_words(parts["qweight"], 0)
        stored = unpack_words(parts["qzeros"], 1)
        zero: Array = stored + 1 & 0xF if version == 1 else stored
        found = _layer(name, codes, zero, parts["scales"])
        groups = parts.get("g_idx")
        return found if groups is None else _in_order(name, found, groups)

    return _read(tensors, layer)


def read_autoawq(tensors: Mapping[str, Array]) -> Read:
    """The 4-bit layers and all other tensors; GraphError naming the layer whose tensors do not fit."""

    def layer(name: str, parts: dict[str, Array]) -> Int4Layer:
        codes, zero = (unpack_words(parts[kind], 1, _AWQ_ORDER) for kind in ("qweight", "qzeros"))
        return _layer(name, codes, zero, parts["scales"])

    return _read(tensors, layer)


def _read(tensors: Mapping[str, Array], make: Callable[[str, dict[str, Array]], Int4Layer]) -> Read:
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not names:
        raise GraphError("the checkpoint has no tensor called <layer>.qweight; is it in another format?")
    layers: dict[str, Int4Layer] = {}
    taken: set[str] = set()
    for name in names:
        parts = {kind: tensors[f"{name}.{kind}"] for kind in _PACKED if f"{name}.{kind}" in tensors}
        taken |= {f"{name}.{kind}" for kind in parts}
        missing = next((kind for kind in ("qzeros", "scales") if kind not in parts), None)
        if missing is not None:
            raise GraphError(f"layer '{name}' has no tensor '{missing}'; give the whole checkpoint")
        _require_forms(name, parts)
        layers[name] = make(name, parts)
    return layers, {name: values for name, values in tensors.items() if name not in taken}


def _require_forms(name: str, parts: Mapping[str, Array]) -> None:
    """GraphError for a tensor whose type or number of axes is not the one in the table."""
    for kind, values in parts.items():
        axes = 1 if kind == "g_idx" else 2
        if values.ndim != axes:
            raise GraphError(f"layer '{name}': {kind} has shape {list(values.shape)}, not {axes} axes")
        if kind != "scales" and values.dtype != np.int32:
            raise GraphError(
                f"layer '{name}': packed codes are int32, and so is g_idx; {kind} is {values.dtype}"
            )


def _layer(name: str, codes: Array, zero: Array, scales: Array) -> Int4Layer:
    rows, columns = codes.shape
    groups = len(scales)
    if scales.shape != zero.shape or scales.shape[1] != columns or not groups or not rows or rows % groups:
        raise GraphError(
            f"layer '{name}': codes {list(codes.shape)}, zero points {list(zero.shape)} and scales "
            f"{list(scales.shape)} do not fit 4 bits; only 4-bit checkpoints can be read"
        )
    signed = [np.asarray(v.astype(np.int16) - _MIDDLE, np.int8) for v in (codes, zero)]
    return Int4Layer(signed[0], scales.astype(np.float32), signed[1])


def _in_order(name: str, layer: Int4Layer, groups: Array) -> Int4Layer:
    """Rows in the order of their groups, which act-order scatters."""
    count = len(layer.scale)
    size = len(layer.codes) // count
    known = len(groups) == len(layer.codes) and groups.min() >= 0 and groups.max() < count
    if not known or (np.bincount(groups, minlength=count) != size).any():
        raise GraphError(f"layer '{name}': g_idx does not give each of {count} groups {size} rows")
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if (order == np.arange(len(order))).all():
        return layer
    return Int4Layer(layer.codes[order], layer.scale, layer.zero, order)
