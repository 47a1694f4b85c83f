"""Finds a decoder's KV cache: graph inputs with past keys and values, and the outputs that hold them with the new.

A pair is known by what the graph does (a Concat that appends to an input, the past and present of an attention
operator) or, where that happens inside a subgraph (merged decoders) or another operator, by its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_ptq.core.cache import CachePair
from onnxslim_ptq.graph.edit import is_captured, is_standard
from onnxslim_ptq.graph.graph import Graph

__all__ = ["find_cache"]

# Attention operators that keep the cache themselves: output port -> input port.
_ATTENTION: dict[tuple[str, str], dict[int, int]] = {
    ("com.microsoft", "GroupQueryAttention"): {1: 3, 2: 4},
    ("com.microsoft", "MultiHeadAttention"): {1: 6, 2: 7},
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): {1: 5, 2: 6},
    ("com.microsoft", "Attention"): {1: 4},
    ("", "Attention"): {1: 4, 2: 5},
}
_PRESENT = re.compile(r"^present(?:_key_values)?[._](.+)$")
_PAST = re.compile(r"^past(?:_key_values)?[._](.+)$")
_TOKENS = re.compile(r"past|total|seq|len|token|cache", re.IGNORECASE)
_FLOAT = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_SIZE_ONLY = frozenset({"Shape", "Size"})
_STACKED = 5  # axes of a tensor with keys and values


def find_cache(graph: Graph) -> list[CachePair]:
    """Every pair of ``graph``, in the order of its outputs; an input belongs to one pair."""
    inputs = {i.name: i for i in graph.inputs if i.type.tensor_type.elem_type in _FLOAT}
    found: dict[str, CachePair] = {}
    named = {m[1]: name for name in inputs if (m := _PAST.match(name))}
    for output in graph.model.proto.graph.output:
        for past, append, tokens in _candidates(graph, output.name, named):
            if past in inputs and past not in found:
                pair = _pair(graph, inputs[past], output, append, tokens)
                if pair is not None:
                    found[past] = pair
                    break
    return list(found.values())


def _candidates(
    graph: Graph, output: str, named: Mapping[str, str]
) -> Iterator[tuple[str, gs.Node | None, int | None]]:
    """(past, the Concat that appends, its axis) that ``output`` may belong to."""
    try:
        node = graph.producer(graph.tensor(output))
    except KeyError:
        node = None
    if node is not None and node.op == "Concat" and is_standard(node) and len(node.inputs) == 2:
        yield node.inputs[0].name, node, int(node.attrs["axis"])
    domain = "" if node is None or is_standard(node) else node.domain
    if node is not None and (domain, node.op) in _ATTENTION:
        at = next(i for i, t in enumerate(node.outputs) if t.name == output)
        port = _ATTENTION[domain, node.op].get(at)
        if port is not None and port < len(node.inputs):
            yield node.inputs[port].name, None, None
    tail = _PRESENT.match(output)
    if tail is not None and tail[1] in named:
        yield named[tail[1]], None, None


def _pair(
    graph: Graph,
    past: onnx.ValueInfoProto,
    present: onnx.ValueInfoProto,
    append: gs.Node | None,
    axis: int | None,
) -> CachePair | None:
    dims = past.type.tensor_type.shape.dim
    rank = len(dims)
    kinds = (past.type.tensor_type.elem_type, present.type.tensor_type.elem_type)
    if rank < 3 or kinds[0] != kinds[1]:
        return None
    stack = 0 if rank == _STACKED else None
    batch = 0 if stack is None else 1
    tokens = _token_axis(dims, batch, stack) if axis is None else axis % rank
    if tokens in (batch, stack) or (axis is not None and dims[tokens].HasField("dim_value")):
        return None  # a Concat along another axis is no cache that grows
    half = kinds[0] == TensorProto.FLOAT16
    alone = append is not None and _meet_only_there(graph, append, past.name, present.name)
    name = append.name if append is not None and alone else None
    return CachePair(past.name, present.name, rank, batch, tokens, stack, name, half)


def _token_axis(dims: Any, batch: int, stack: int | None) -> int:
    """The axis that grows: the only free one besides the batch, or the one whose name says so, or the usual one."""
    free = {
        axis: dim.dim_param
        for axis, dim in enumerate(dims)
        if axis not in (batch, stack) and not dim.HasField("dim_value")
    }
    speaking = [axis for axis, name in free.items() if _TOKENS.search(name)]
    for axes in (list(free), speaking):
        if len(axes) == 1:
            return axes[0]
    return len(dims) - 2


def _meet_only_there(graph: Graph, append: gs.Node, past: str, present: str) -> bool:
    """Whether codes can be appended to codes: only the Concat reads the past, and no subgraph reads either by name."""
    tensors = graph.tensor(past), graph.tensor(present)
    others = [n for n in graph.consumers(tensors[0]) if n is not append]
    captured = any(is_captured(graph, t) for t in tensors)
    return not captured and all(n.op in _SIZE_ONLY for n in others)
