"""Whole blocks as exporters write them, norms and activations in pieces: which groups, and the same function after."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup
from tests.graph.models import parse
from tests.graph.smoothing import FOLDED, preserved, weights

K = GroupKind
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 1e-2)])


def summary(groups: list[SmoothGroup]) -> list[tuple[GroupKind, str, int, list[str]]]:
    return [(g.kind, g.name, g.scales, [c.node for c in g.consumers]) for g in groups]


def block(text: str, made: dict[str, np.ndarray], dtype: type, opset: int) -> onnx.ModelProto:
    made |= {"two": dtype(2), "one": dtype(1), "half": dtype(0.5), "eps": dtype(1e-3), "root": dtype(2**0.5)}
    return parse(text.replace("float[", "float16[") if dtype is np.float16 else text, made, opset)


LLAMA = """g (int64[B,T] ids) => (float[B,T,40] logits) {
    h0 = Gather (table, ids)
    q1 = Pow (h0, two)  v1 = ReduceMean <axes = [-1]> (q1)  e1 = Add (v1, eps)  r1 = Sqrt (e1)
    i1 = Div (one, r1)  x1 = Mul (h0, i1)  [norm1] n1 = Mul (g1, x1)
    [q] q = MatMul (n1, wq)  [k] k = MatMul (n1, wk)  [v] v = MatMul (n1, wv)
    q4 = Reshape (q, heads)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape (k, kv)  kh = Transpose <perm = [0, 2, 1, 3]> (k4)  k5 = Unsqueeze (kh, axis)
    ke = Expand (k5, wide)  kr = Reshape (ke, merged)  kt = Transpose <perm = [0, 1, 3, 2]> (kr)
    v4 = Reshape (v, kv)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)  v5 = Unsqueeze (vh, axis)
    ve = Expand (v5, wide)  vr = Reshape (ve, merged)
    s = MatMul (qh, kt)  p = Softmax <axis = -1> (s)  a = MatMul (p, vr)
    at = Transpose <perm = [0, 2, 1, 3]> (a)  ao = Reshape (at, flat)  [o] o = MatMul (ao, wo)  h1 = Add (h0, o)
    q2 = Pow (h1, two)  v2 = ReduceMean <axes = [-1]> (q2)  e2 = Add (v2, eps)  r2 = Sqrt (e2)
    i2 = Div (one, r2)  x2 = Mul (h1, i2)  [norm2] n2 = Mul (g2, x2)
    [gate] gt = MatMul (n2, wg)  sg = Sigmoid (gt)  silu = Mul (gt, sg)  [up] u = MatMul (n2, wu)
    t = Mul (silu, u)  [down] d = MatMul (t, wd)  h2 = Add (h1, d)
    [norm3] n3 = LayerNormalization (h2, g1, b)  [head] l = MatMul (n3, wl)  logits = Add (l, bl) }"""


@PRECISIONS
def test_llama(dtype: type, tolerance: float) -> None:
    """RMSNorm in pieces, two value heads for four query heads, gated MLP, opset 17."""
    made = weights(
        4, dtype, table=(32, 32), g1=(32,), g2=(32,), b=(32,), wq=(32, 32), wk=(32, 16), wv=(32, 16), wo=(32, 32),
        wg=(32, 48), wu=(32, 48), wd=(48, 32), wl=(32, 40), bl=(40,),
    )  # fmt: skip
    made["axis"] = np.array([2])
    made |= {"heads": np.array([0, 0, 4, 8]), "kv": np.array([0, 0, 2, 8]), "flat": np.array([0, 0, 32])}
    made |= {"wide": np.array([1, 1, 2, 1, 1]), "merged": np.array([0, 4, -1, 8])}
    groups = preserved(block(LLAMA, made, dtype, 17), FOLDED, tolerance)
    assert summary(groups) == [
        (K.NORM_LINEAR, "norm1", 32, ["q", "k", "v"]),
        (K.OV, "v", 16, ["o"]),
        (K.NORM_LINEAR, "norm2", 32, ["gate", "up"]),
        (K.UP_DOWN, "up", 48, ["down"]),
        (K.NORM_LINEAR, "norm3", 32, ["head"]),
    ]
    assert [g.shiftable for g in groups] == [False] * 4 + [True]


BERT = """g (float[B,T,24] x) => (float[B,T,24] y) {
    [q] q0 = MatMul (x, wq)  q = Add (q0, bq)  [k] k0 = MatMul (x, wk)  k = Add (k0, bk)
    [v] v0 = MatMul (x, wv)  v = Add (v0, bv)
    q4 = Reshape (q, heads)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape (k, heads)  kh = Transpose <perm = [0, 2, 3, 1]> (k4)
    v4 = Reshape (v, heads)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    s = MatMul (qh, kh)  p = Softmax <axis = 3> (s)  a = MatMul (p, vh)
    at = Transpose <perm = [0, 2, 1, 3]> (a)  ao = Reshape (at, flat)
    [out] o0 = MatMul (ao, wo)  o = Add (o0, bo)  r1 = Add (o, x)
    m1 = ReduceMean <axes = [-1]> (r1)  d1 = Sub (r1, m1)  p1 = Pow (d1, two)  v1 = ReduceMean <axes = [-1]> (p1)
    e1 = Add (v1, eps)  s1 = Sqrt (e1)  h1 = Div (d1, s1)  g1h = Mul (h1, g1)  [ln1] n1 = Add (g1h, b1)
    [fc1] f0 = MatMul (n1, w1)  f = Add (f0, c1)  fd = Div (f, root)  fe = Erf (fd)  fp = Add (fe, one)
    fm = Mul (f, fp)  gelu = Mul (fm, half)  [fc2] t0 = MatMul (gelu, w2)  t = Add (t0, c2)  r2 = Add (t, n1)
    m2 = ReduceMean <axes = [-1]> (r2)  d2 = Sub (r2, m2)  p2 = Pow (d2, two)  v2 = ReduceMean <axes = [-1]> (p2)
    e2 = Add (v2, eps)  s2 = Sqrt (e2)  h2 = Div (d2, s2)  g2h = Mul (h2, g2)  [ln2] y = Add (g2h, b2) }"""


@PRECISIONS
def test_bert(dtype: type, tolerance: float) -> None:
    """LayerNorm and Gelu in pieces, opset 11. The residual sum reads ln1 too; the 0.5 of a Gelu takes no scale, or
    the runtime would no longer see a Gelu."""
    made = weights(
        5, dtype, wq=(24, 24), wk=(24, 24), wv=(24, 24), wo=(24, 24), w1=(24, 48), w2=(48, 24),
        **dict.fromkeys(("bq", "bk", "bv", "bo", "g1", "b1", "c2", "g2", "b2"), (24,)), c1=(48,),
    )  # fmt: skip
    made |= {"heads": np.array([0, 0, 4, 6]), "flat": np.array([0, 0, 24])}
    groups = preserved(block(BERT, made, dtype, 11), None, tolerance)
    assert summary(groups) == [
        (K.UNFUSED, "x", 24, ["q", "k", "v"]),
        (K.OV, "v", 24, ["out"]),
        (K.UNFUSED, "n1", 24, ["fc1"]),
        (K.UNFUSED, "gelu", 48, ["fc2"]),
    ]
    assert [g.shiftable for g in groups] == [True, False, True, True]
    assert groups[2].reason == "'n1' is also read by Add 'Add_r2'"


VIT = """g (float[B,T,24] x) => (float[B,T,24] y) {
    m1 = ReduceMean <axes = [-1]> (x)  d1 = Sub (x, m1)  p1 = Mul (d1, d1)  v1 = ReduceMean <axes = [-1]> (p1)
    e1 = Add (v1, eps)  s1 = Sqrt (e1)  i1 = Reciprocal (s1)  k1 = Mul (i1, g1)
    xk1 = Mul (x, k1)  mk1 = Mul (m1, k1)  o1 = Sub (b1, mk1)  [ln1] n1 = Add (xk1, o1)
    [qkv] f0 = MatMul (n1, wf)  f = Add (f0, bf)  f5 = Reshape (f, split)  ft = Transpose <perm = [2, 0, 3, 1, 4]> (f5)
    qh = Gather <axis = 0> (ft, i0)  kx = Gather <axis = 0> (ft, i1x)  vh = Gather <axis = 0> (ft, i2)
    kh = Transpose <perm = [0, 1, 3, 2]> (kx)  s = MatMul (qh, kh)  p = Softmax <axis = -1> (s)  a = MatMul (p, vh)
    at = Transpose <perm = [0, 2, 1, 3]> (a)  ao = Reshape (at, flat)
    [proj] o0 = MatMul (ao, wo)  o = Add (o0, bo)  ls = Mul (o, layer_scale)  r = Add (ls, x)
    [ln2] n2 = LayerNormalization (r, g2, b2)
    [fc1] t0 = MatMul (n2, w1)  t = Add (t0, c1)  act = Relu (t)  [fc2] u0 = MatMul (act, w2)  u = Add (u0, c2)
    y = Add (u, r) }"""


@PRECISIONS
def test_vit(dtype: type, tolerance: float) -> None:
    """Norms before the layers, tf2onnx's LayerNorm, q, k and v of one layer, opset 17."""
    made = weights(
        6, dtype, wf=(24, 72), wo=(24, 24), w1=(24, 48), w2=(48, 24), bf=(72,), c1=(48,),
        **dict.fromkeys(("g1", "b1", "bo", "layer_scale", "g2", "b2", "c2"), (24,)),
    )  # fmt: skip
    made |= {"split": np.array([0, 0, 3, 4, 6]), "flat": np.array([0, 0, 24])}
    made |= {"i0": np.array(0), "i1x": np.array(1), "i2": np.array(2)}
    groups = preserved(block(VIT, made, dtype, 17), FOLDED, tolerance)
    assert [(kind, layers) for kind, _, _, layers in summary(groups)] == [
        (K.NORM_LINEAR, ["qkv"]), (K.OV, ["proj"]), (K.NORM_LINEAR, ["fc1"]), (K.LINEAR_LINEAR, ["fc2"]),
    ]  # fmt: skip
    assert [g.shiftable for g in groups] == [False, False, True, False]
