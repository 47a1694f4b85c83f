"""Renders an integer KV cache: codes in graph inputs and outputs, float values inside.

Static form, one scale s for every head and channel: q = round(x / s), x = q s. Per token: t = max|x / s| / 127 over
heads and channels, q = round(x / (s t)), x = q s t, and t goes along as an input and an output of its own. Where one
Concat joins past and new tokens, codes are appended to codes: what was written once is never rounded again, and the
answer does not depend on how many tokens came at once. Elsewhere the float cache is kept inside, between Q and DQ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_ptq.core.cache import CacheChange
from onnxslim_ptq.graph.graph import Graph

__all__ = ["METADATA", "declare_cache", "io_changes", "render_cache"]

METADATA = "onnxslim_ptq.kv_cache"
_AXES_ARE_INPUTS = 18  # of ReduceMax
_TINY = 1e-20  # a row of zeros keeps codes 0
_SIZE_ONLY = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class RenderedCache:
    """A change as it stands in the graph; ``scale``: the constant with its per-channel scales; ``inner``: the float
    present inside."""

    change: CacheChange
    scale: str | None
    inner: str | None


def render_cache(graph: Graph, changes: Sequence[CacheChange]) -> list[RenderedCache]:
    """Edit ``graph``; `declare_cache` then changes the types of the inputs and outputs."""
    unit = graph.constant("cache_unit", np.ones((), np.float32)) if changes else None
    zero = graph.constant("cache_zero_point", np.zeros((), np.int8)) if changes else None
    return [_Writer(graph, change, unit, zero).render() for change in changes]


def declare_cache(proto: onnx.ModelProto, rendered: Sequence[RenderedCache]) -> None:
    """Declare codes, and scales that go along, in the model's interface; and say in its metadata what they mean."""
    described = {}
    for one in rendered:
        pair = one.change.pair
        for name, values in zip(one.change.names, (proto.graph.input, proto.graph.output), strict=True):
            info = next(v for v in values if v.name == name)
            if one.inner is not None and name == pair.present:
                # An attention operator may write the present over the past unless their shapes are seen to differ.
                proto.graph.value_info.add().CopyFrom(info)
                proto.graph.value_info[-1].name = one.inner
            row = one.change.scale_name(name)
            if row is not None:
                values.append(_row_info(info, row, pair.row))
            info.type.tensor_type.elem_type = TensorProto.INT8
            described[name] = {
                "dtype": one.change.dtype.name,
                "float": "float16" if pair.half else "float32",
                "scale": one.scale,
                "token_scale": row,
                "row": list(pair.row),
            }
    if described:
        proto.metadata_props.add(key=METADATA, value=json.dumps(described, sort_keys=True))


def io_changes(changes: Sequence[CacheChange]) -> list[dict[str, Any]]:
    """The entries of the weights JSON, one per changed input and output."""
    return [
        {
            "name": name,
            "dtype": change.dtype.name,
            "scale": change.scale.reshape(-1),
            "scale_shape": list(change.scale.shape),
            **({"scale_tensor": row} if (row := change.scale_name(name)) is not None else {}),
        }
        for change in changes
        for name in change.names
    ]


def _row_info(info: onnx.ValueInfoProto, name: str, row: tuple[int, ...]) -> onnx.ValueInfoProto:
    """Shaped like the cache, with 1 for heads and channels."""
    made = onnx.ValueInfoProto()
    made.CopyFrom(info)
    made.name = name
    made.type.tensor_type.elem_type = TensorProto.FLOAT
    for axis in row:
        made.type.tensor_type.shape.dim[axis].Clear()
        made.type.tensor_type.shape.dim[axis].dim_value = 1
    return made


class _Writer:
    """One pair."""

    def __init__(self, graph: Graph, change: CacheChange, unit: gs.Tensor, zero: gs.Tensor) -> None:
        self.graph, self.change, self.unit, self.zero = graph, change, unit, zero
        plain = change.per_token and bool((change.scale == 1).all())
        values = change.scale.astype(np.float32)
        self.scale = None if plain else graph.constant(f"{change.pair.past}_channel_scale", values)

    def render(self) -> RenderedCache:
        append = self.change.pair.append
        inner = None
        if append is not None:
            self._append(append)
        else:
            inner = self._around()
        return RenderedCache(self.change, None if self.scale is None else self.scale.name, inner)

    def _append(self, append: str) -> None:
        """Codes are appended to codes; readers see what the codes stand for."""
        pair = self.change.pair
        node = self.graph.node(append)
        new, present = node.inputs[1], node.outputs[0]
        codes, rows = self._codes(new, f"{pair.present}_new")
        row = None
        if rows is not None:
            before, row = self._named(pair.past), self._named(pair.present)
            axis = {"axis": pair.tokens}
            self.graph.add_node("Concat", f"{pair.present}_scale_Concat", [before, rows], [row], axis)
        readers = [n for n in self.graph.consumers(present) if n.op not in _SIZE_ONLY]
        node.inputs[1] = codes
        if readers:
            real = self._real(present, row, pair.present)
            for reader in readers:
                for port, tensor in enumerate(reader.inputs):
                    if tensor is present:
                        reader.inputs[port] = real

    def _around(self) -> str:
        """Codes outside, float inside; the name of the float present."""
        pair = self.change.pair
        past, present = self.graph.tensor(pair.past), self.graph.tensor(pair.present)
        row = self._named(pair.past) if self.change.per_token else None
        readers = self.graph.consumers(past)
        if readers:
            self.graph.read_instead(readers, past, self._real(past, row, pair.past))
        producer = self.graph.producer(present)
        assert producer is not None, f"nobody makes {pair.present}"
        readers = self.graph.consumers(present)
        raw = self.graph.variable(f"{pair.present}_float")
        producer.outputs[producer.outputs.index(present)] = raw
        self.graph.read_instead(readers, present, raw)
        self._codes(raw, pair.present, present)
        return str(raw.name)

    def _named(self, name: str) -> gs.Variable:
        """The tensor of scales that stands beside the cache's input or output of that name."""
        return self.graph.variable_named(self.change.scale_name(name) or name)

    def _codes(
        self, x: gs.Tensor, name: str, result: gs.Tensor | None = None
    ) -> tuple[gs.Tensor, gs.Tensor | None]:
        """int8 codes of float ``x``, as ``result`` when given, and the tokens' scales."""
        rows: gs.Tensor | None = None
        if self.change.pair.half:
            x = self._node("Cast", f"{name}_float32", [x], {"to": int(TensorProto.FLOAT)})
        if self.scale is not None:
            x = self._node("Div", f"{name}_scaled", [x, self.scale])
        if self.change.per_token:
            own = self._named(name) if result is not None else self.graph.variable(f"{name}_token_scale")
            rows = self._rows(x, name, own)
            x = self._node("Div", f"{name}_rows", [x, rows])
        codes = result if result is not None else self.graph.variable(f"{name}_codes")
        inputs = [x, self.unit, self.zero]
        self.graph.add_node("QuantizeLinear", f"{name}_QuantizeLinear", inputs, [codes])
        return codes, rows

    def _rows(self, x: gs.Tensor, name: str, result: gs.Tensor) -> gs.Tensor:
        """max|x| / 127 over heads and channels of every token."""
        size = self._node("Abs", f"{name}_abs", [x])
        axes = list(self.change.pair.row)
        if self.graph.opset >= _AXES_ARE_INPUTS:
            kept = self.graph.constant(f"{name}_row_axes", np.asarray(axes, np.int64))
            largest = self._node("ReduceMax", f"{name}_row_max", [size, kept], {"keepdims": 1})
        else:
            largest = self._node("ReduceMax", f"{name}_row_max", [size], {"axes": axes, "keepdims": 1})
        floor = self.graph.constant(f"{name}_row_floor", np.asarray(_TINY, np.float32))
        floored = self._node("Max", f"{name}_row_floored", [largest, floor])
        steps = self.graph.constant(f"{name}_row_steps", np.asarray(self.change.dtype.highest, np.float32))
        self.graph.add_node("Div", f"{name}_row_scale", [floored, steps], [result])
        return result

    def _real(self, codes: gs.Tensor, row: gs.Tensor | None, name: str) -> gs.Tensor:
        """What the codes stand for, in the cache's float type."""
        x = self._node("DequantizeLinear", f"{name}_dequantized", [codes, self.unit, self.zero])
        for by in (self.scale, row):
            if by is not None:
                x = self._node("Mul", f"{name}_real", [x, by])
        if self.change.pair.half:
            x = self._node("Cast", f"{name}_float16", [x], {"to": int(TensorProto.FLOAT16)})
        return x

    def _node(
        self, op: str, name: str, inputs: Sequence[gs.Tensor], attrs: dict[str, object] | None = None
    ) -> gs.Tensor:
        result = self.graph.variable(name)
        self.graph.add_node(op, f"{name}_{op}", inputs, [result], attrs)
        return result
