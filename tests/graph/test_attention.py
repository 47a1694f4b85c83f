"""Attention in every exported form, and what only looks like it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from calib.model import open_model
from onnxslim_ptq.core.spec import Use
from onnxslim_ptq.graph.attention import Attention, find_attention
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize import optimize
from tools import zoo

HEAD = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>\n'
QKV = "float[B,4,S,8] q, float[B,4,S,8] k, float[B,4,S,8] v"


def find(text: str, opset: int = 18) -> tuple[list[Attention], dict[str, str]]:
    proto = onnx.parser.parse_model(HEAD.replace(": 18", f": {opset}") + text)
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"/blk.0/attn/{node.op_type}_{index}"
    graph = Graph(open_model(proto))
    optimize(graph)
    return find_attention(graph)


PLAIN = f"""g ({QKV}) => (float[B,4,S,8] y) <float c = {{0.35}}> {{
  kt = Transpose <perm = [0, 1, 3, 2]> (k)  s = MatMul (q, kt)  t = Mul (s, c)
  p = Softmax <axis = -1> (t)  y = MatMul (p, v) }}"""
SCALED_BEFORE = f"""g ({QKV}, float[B,1,S,S] mask) => (float[B,4,S,8] y) <float c = {{0.6}}> {{
  a = Mul (q, c)  b = Mul (k, c)  kt = Transpose <perm = [0, 1, 3, 2]> (b)  s = MatMul (a, kt)  m = Add (mask, s)
  p = Softmax <axis = -1> (m)  y = MatMul (p, v) }}"""
WHERE = f"""g ({QKV}, bool[B,1,S,S] mask) => (float[B,4,S,8] y) <float low = {{-1e9}}> {{
  kt = Transpose <perm = [0, 1, 3, 2]> (k)  s = MatMul (q, kt)  m = Where (mask, s, low)
  p = Softmax <axis = -1> (m)  y = MatMul (p, v) }}"""


@pytest.mark.parametrize("text", [PLAIN, SCALED_BEFORE, WHERE], ids=["plain", "scaled-before", "where"])
def test_products_around_a_softmax(text: str) -> None:
    found, reasons = find(text)
    assert reasons == {}
    (attention,) = found
    assert {role: (e.tensor, e.axis, e.heads) for role, e in attention.entries.items()} == {
        "q": ("q", 1, 4), "k": ("k", 1, 4), "v": ("v", 1, 4)
    }  # fmt: skip
    assert attention.output == "y"
    assert attention.name == "blk.0.attn"


def test_heads_that_lie_in_the_batch_during_the_products() -> None:
    """As in BLOOM: products of rank 3, the mask and the Softmax of rank 4."""
    text = f"""g ({QKV}, float[B,1,S,S] mask) => (float[H,S,8] y)
    <int64[3] rows = {{-1,5,8}}, int64[3] cols = {{-1,8,5}}, int64[4] heads = {{-1,4,5,5}},
     int64[3] flat = {{-1,5,5}}> {{
      q3 = Reshape (q, rows)  kt = Transpose <perm = [0, 1, 3, 2]> (k)  k3 = Reshape (kt, cols)  v3 = Reshape (v, rows)
      s3 = MatMul (q3, k3)  s = Reshape (s3, heads)  m = Add (s, mask)  p = Softmax <axis = -1> (m)
      p3 = Reshape (p, flat)  y = MatMul (p3, v3) }}""".replace("B,4,S,8", "B,4,5,8")
    (attention,), reasons = find(text)
    assert reasons == {}
    assert [(e.tensor, e.axis, e.heads) for e in attention.entries.values()] == [
        ("q", 1, 4), ("k", 1, 4), ("v", 1, 4)
    ]  # fmt: skip


def test_key_heads_that_queries_share_are_found_before_they_are_repeated() -> None:
    text = """g (float[B,6,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v) => (float[B,6,S,8] y)
    <int64[1] two = {2}, int64[5] many = {1,2,3,1,1}, int64[4] shape = {0,6,-1,8}> {
      k5 = Unsqueeze (k, two)  ke = Expand (k5, many)  kr = Reshape (ke, shape)
      v5 = Unsqueeze (v, two)  ve = Expand (v5, many)  vr = Reshape (ve, shape)
      kt = Transpose <perm = [0, 1, 3, 2]> (kr)  s = MatMul (q, kt)  p = Softmax <axis = -1> (s)
      y = MatMul (p, vr) }"""
    (attention,), _ = find(text)
    assert [(e.tensor, e.heads) for e in attention.entries.values()] == [("q", 6), ("k", 2), ("v", 2)]
    assert attention.key.use == Use("/blk.0/attn/Unsqueeze_0", 0)


@pytest.mark.parametrize(
    ("op", "opset"),
    [
        ("Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)", 23),
        ("com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v)", 18),
    ],
)
def test_one_node(op: str, opset: int) -> None:
    (attention,), _ = find(
        "g (float[B,S,32] q, float[B,S,16] k, float[B,S,16] v) => (float[B,S,32] y) { y = " + op + " }", opset
    )
    assert [(e.heads, e.width, e.axis) for e in attention.entries.values()] == [
        (4, 8, 2),
        (2, 8, 2),
        (2, 8, 2),
    ]


def test_what_cannot_be_reached_has_a_reason() -> None:
    packed = "g (float[B,S,96] x) => (float[B,S,32] y) { y = com.microsoft.MultiHeadAttention <num_heads = 4> (x) }"
    found, reasons = find(packed)
    assert found == []
    assert list(reasons.values()) == ["its queries, keys and values lie in one tensor"]


def test_other_softmaxes_are_no_attention() -> None:
    text = """g (float[B,8] x) => (float[B,8] y) <float[8,8] w = {1,2,3}> {
      h = MatMul (x, w)  y = Softmax <axis = -1> (h) }"""
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "w"))
    assert find_attention(Graph(open_model(proto))) == ([], {})


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "count", "heads"),
    [("minilm", 6, (12, 12, 12)), ("smollm2", 30, (9, 3, 3)), ("rec", 2, (8, 8, 8))],
)
def test_real_models(name: str, count: int, heads: tuple[int, int, int]) -> None:
    try:
        case = zoo.load(name)
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))
    graph = Graph(open_model(case.model))
    optimize(graph)
    found, reasons = find_attention(graph)
    assert (len(found), reasons) == (count, {})
    assert {tuple(e.heads for e in a.entries.values()) for a in found} == {heads}
    assert len({a.name for a in found}) == count
