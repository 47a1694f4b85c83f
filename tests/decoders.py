"""Small decoders with a KV cache, in the forms that exporters write."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.types import Array
from tests.graph.models import parse
from tests.models import weights_of

__all__ = ["HEADS", "SIZE", "WIDTH", "appending", "empty_past", "feeds", "grouped", "merged", "stacked"]

HEADS, WIDTH = 2, 8
SIZE = HEADS * WIDTH
_SHAPES = dict.fromkeys(("wq", "wk", "wv", "wo"), (SIZE, SIZE))
_IO = f"(float[B,S,{SIZE}] x, float[B,{HEADS},P,{WIDTH}] {{0}}, float[B,{HEADS},P,{WIDTH}] {{1}})"
_PROJECT = """
    [q_proj] q0 = MatMul (x, wq)  [k_proj] k0 = MatMul (x, wk)  [v_proj] v0 = MatMul (x, wv)
    q1 = Reshape (q0, split)  k1 = Reshape (k0, split)  v1 = Reshape (v0, split)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k = Transpose <perm = [0, 2, 1, 3]> (k1)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
"""
_ATTEND = """
    kt = Transpose <perm = [0, 1, 3, 2]> (present.0.key)
    scores = MatMul (q, kt)
    shares = Softmax <axis = -1> (scores)
    mixed = MatMul (shares, present.0.value)
    m1 = Transpose <perm = [0, 2, 1, 3]> (mixed)
    m2 = Reshape (m1, join)
    [o_proj] y = MatMul (m2, wo)
"""


def _quoted(body: str) -> str:
    """Names with dots stand in quotes."""
    return re.sub(r"\b((?:past|present)[\w.]*\.\d+\.\w+)", r'"\1"', body)


def _weights() -> dict[str, Array]:
    made: dict[str, Array] = dict(weights_of(3, **_SHAPES))
    channels = np.geomspace(0.2, 4.0, SIZE, dtype=np.float32)  # channels of very different size
    made["wk"] = np.asarray(made["wk"] * channels, np.float32)
    made["split"] = np.array([0, 0, HEADS, WIDTH], np.int64)
    made["join"] = np.array([0, 0, SIZE], np.int64)
    return made


def appending(past: str = "past_key_values", opset: int = 17, dtype: str = "float") -> onnx.ModelProto:
    """Past and new keys meet in a Concat (every query sees every key: there is no mask)."""
    names = [f"{past}.0.key", f"{past}.0.value"]
    body = f"""g {_IO.format(*names)} => (float[B,S,{SIZE}] y, float[B,{HEADS},T,{WIDTH}] present.0.key,
        float[B,{HEADS},T,{WIDTH}] present.0.value) {{ {_PROJECT}
        [append_key] present.0.key = Concat <axis = 2> ({names[0]}, k)
        [append_value] present.0.value = Concat <axis = 2> ({names[1]}, v)
        {_ATTEND} }}"""
    weights = _weights()
    if dtype == "float16":
        body = body.replace("float[", "float16[")
        weights = {n: w.astype(np.float16) if w.dtype == np.float32 else w for n, w in weights.items()}
    return parse(_quoted(body), weights, opset)


def merged() -> onnx.ModelProto:
    """As Optimum merges decoders: an If, of which one branch reads the past by name."""
    proto = appending()
    graph = proto.graph
    appends = {n.name: n for n in graph.node if n.op_type == "Concat"}
    branches = {}
    for which in ("then", "else"):
        nodes, outputs = [], []
        for kind, new in (("key", "k"), ("value", "v")):
            read = [f"past_key_values.0.{kind}", new] if which == "then" else [new]
            name = f"{which}.{kind}"
            nodes.append(helper.make_node("Concat", read, [name], axis=2))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        branches[f"{which}_branch"] = helper.make_graph(nodes, which, [], outputs)
    choose = helper.make_node("If", ["use_cache"], ["present.0.key", "present.0.value"], "choose", **branches)
    graph.input.append(helper.make_tensor_value_info("use_cache", TensorProto.BOOL, []))
    at = list(graph.node).index(appends["append_key"])
    kept = [n for n in graph.node if n.op_type != "Concat"]
    kept.insert(at, choose)
    del graph.node[:]
    graph.node.extend(kept)
    return proto


def grouped() -> onnx.ModelProto:
    """ONNX Runtime's GroupQueryAttention keeps the cache: 2 query heads, 2 key heads."""
    names = ["past_key_values.0.key", "past_key_values.0.value"]
    io = _IO.format(*names).replace("(float", "(int32[B] seqlens, int32 total, float", 1)
    body = f"""g {io} => (float[B,S,{SIZE}] y, float[B,{HEADS},T,{WIDTH}] present.0.key,
        float[B,{HEADS},T,{WIDTH}] present.0.value) {{
        [q_proj] q0 = MatMul (x, wq)  [k_proj] k0 = MatMul (x, wk)  [v_proj] v0 = MatMul (x, wv)
        [attend] a, present.0.key, present.0.value = com.microsoft.GroupQueryAttention
            <num_heads = {HEADS}, kv_num_heads = {HEADS}> (q0, k0, v0, {names[0]}, {names[1]}, seqlens, total)
        [o_proj] y = MatMul (a, wo) }}"""
    weights = _weights()
    return parse(_quoted(body), {name: weights[name] for name in _SHAPES})


def stacked() -> onnx.ModelProto:
    """Keys and values in one tensor [2, batch, heads, tokens, channels], as GPT-2 exports have it."""
    proto = appending()
    graph = proto.graph
    for values, name, tokens in ((graph.input, "past.0", "P"), (graph.output, "present.0", "T")):
        others = [v for v in values if ".0." not in v.name]
        del values[:]
        values.extend(others)
        shape = [2, "B", HEADS, tokens, WIDTH]
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    kept = []
    for node in graph.node:
        if node.op_type == "Concat" and node.name == "append_key":
            kept.append(helper.make_node("Unsqueeze", ["k", "first"], ["k5"]))
            kept.append(helper.make_node("Unsqueeze", ["v", "first"], ["v5"]))
            kept.append(helper.make_node("Concat", ["k5", "v5"], ["kv5"], axis=0))
            kept.append(helper.make_node("Concat", ["past.0", "kv5"], ["present.0"], "append", axis=3))
            for at, kind in enumerate(("key", "value")):
                part = [f"present.0.{kind}"]
                kept.append(helper.make_node("Gather", ["present.0", f"at{at}"], part, axis=0))
        elif node.op_type != "Concat":
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    for name, value in (("first", [0]), ("at0", 0), ("at1", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    return proto


def empty_past(proto: onnx.ModelProto, dtype: type = np.float32) -> dict[str, Array]:
    """No tokens yet, for every past of the model."""
    made: dict[str, Array] = {}
    for value in proto.graph.input:
        if value.name.startswith("past"):
            dims = [d.dim_value or {"B": 1}.get(d.dim_param, 0) for d in value.type.tensor_type.shape.dim]
            made[value.name] = np.zeros(dims, dtype)
    return made


def feeds(proto: onnx.ModelProto, count: int = 12, tokens: int = 9) -> list[dict[str, Array]]:
    """Samples that start with an empty past."""
    return list(_feeds(proto, count, tokens))


def _feeds(proto: onnx.ModelProto, count: int, tokens: int) -> Iterator[dict[str, Array]]:
    rng = np.random.default_rng(5)
    inputs = {i.name for i in proto.graph.input}
    half = (
        next(i for i in proto.graph.input if i.name == "x").type.tensor_type.elem_type == TensorProto.FLOAT16
    )
    dtype = np.float16 if half else np.float32
    for _ in range(count):
        feed = {"x": rng.standard_normal((1, tokens, SIZE)).astype(dtype), **empty_past(proto, dtype)}
        if "use_cache" in inputs:
            feed["use_cache"] = np.array(True)
        if "seqlens" in inputs:
            feed |= {"seqlens": np.array([tokens - 1], np.int32), "total": np.array(tokens, np.int32)}
        yield feed
