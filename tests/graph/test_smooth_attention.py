"""The value path of attention: which channels of v meet which of the output projection, in every layout."""

from __future__ import annotations

import numpy as np
import pytest

from calib.model import open_model
from calib.types import Array
from onnxslim_ptq.graph.edit import following_bias
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup, find_groups, smooth
from tests.graph.models import parse, same_outputs
from tests.graph.smoothing import FOLDED, preserved, weights

HEADS, WIDTH = 4, 6
HIDDEN = HEADS * WIDTH


def attention(value: str, scores: str, result: str, outputs: str = "", inputs: str = "") -> str:
    """Queries and keys of ``HEADS`` heads; ``value`` makes v [B, heads, T, WIDTH] from x."""
    return f"""g (float[B,T,24] x{inputs}) => (float[B,T,24] y{outputs}) {{
        q = MatMul (x, wq)  q4 = Reshape (q, split)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        k = MatMul (x, wk)  k4 = Reshape (k, split)  kh = Transpose <perm = [0, 2, 3, 1]> (k4)
        s = MatMul (qh, kh)  p = Softmax <axis = -1> (s)  {value}  {scores}  {result}
        [out] y = MatMul (o, wo) }}"""


def constants(kv: int = HEADS, **more: Array) -> dict[str, Array]:
    return {
        **weights(0, wq=(24, 24), wk=(24, 24), wv=(24, kv * WIDTH), bv=(kv * WIDTH,), wo=(HIDDEN, 24)),
        "split": np.array([0, 0, HEADS, WIDTH]), "merge": np.array([0, 0, HIDDEN]),
        "kv": np.array([0, 0, kv, WIDTH]), "axis": np.array([2]), **more,
    }  # fmt: skip


V = "v = MatMul (x, wv)  vb = Add (v, bv)  v4 = Reshape (vb, kv)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)"
PV = "a = MatMul (p, vh)"
MERGE = "at = Transpose <perm = [0, 2, 1, 3]> (a)  o = Reshape (at, merge)"
SHAPED = """xs = Shape (x)  i0 = Constant <value_int = 0> ()  i1 = Constant <value_int = 1> ()
    n0 = Gather (xs, i0)  n1 = Gather (xs, i1)  z = Constant <value_ints = [0]> ()
    u0 = Unsqueeze (n0, z)  u1 = Unsqueeze (n1, z)"""


def ov(groups: list[SmoothGroup]) -> SmoothGroup:
    (group,) = [g for g in groups if "out" in [c.node for c in g.consumers]]
    return group


def test_multi_head() -> None:
    group = ov(preserved(parse(attention(V, PV, MERGE), constants())))
    assert (group.kind, group.channels, group.scales, group.index) == (GroupKind.OV, 24, 24, None)
    assert group.tensor == "o"
    assert not group.shiftable


def test_shapes_computed_at_run_time() -> None:
    """TorchScript computes [batch, tokens, -1, width] from Shape, Gather and Concat."""
    value = (
        f"{SHAPED}  target = Concat <axis = 0> (u0, u1, rest, width)  v = MatMul (x, wv)  v4 = Reshape (v, target)  "
        "vh = Transpose <perm = [0, 2, 1, 3]> (v4)"
    )
    merge = "flat = Concat <axis = 0> (u0, u1, rest)  at = Transpose <perm = [0, 2, 1, 3]> (a)  o = Reshape (at, flat)"
    made = constants(rest=np.array([-1]), width=np.array([WIDTH]))
    assert ov(preserved(parse(attention(value, PV, merge), made))).kind is GroupKind.OV


def test_heads_before_the_transposed_product() -> None:
    """[heads, batch * …] layouts and probabilities with a dropout in between."""
    value = (
        "v = MatMul (x, wv)  v4 = Reshape (v, kv)  vt = Transpose <perm = [2, 0, 1, 3]> (v4)  "
        "vh = Transpose <perm = [1, 0, 2, 3]> (vt)"
    )
    group = ov(
        preserved(parse(attention(value, "pd = Dropout (p)  a = MatMul (pd, vh)", MERGE), constants()))
    )
    assert (group.kind, group.scales) == (GroupKind.OV, 24)


REPEATS = {
    "expand": "v5 = Unsqueeze (vh, axis)  ve = Expand (v5, wide)  vr = Reshape (ve, heads)",
    "tile": "v5 = Unsqueeze (vh, axis)  ve = Tile (v5, times)  vr = Reshape (ve, heads)",
    "concat": "v5 = Unsqueeze (vh, axis)  ve = Concat <axis = 2> (v5, v5)  vr = Reshape (ve, heads)",
    "gather": "vr = Gather <axis = 1> (vh, twice)",
}


@pytest.mark.parametrize("repeat", REPEATS)
def test_grouped_queries(repeat: str) -> None:
    """Two value heads for four query heads: head h reads value head h // 2, whose scales it shares."""
    made = constants(
        kv=2,
        wide=np.array([1, 2, 2, 1, WIDTH]), times=np.array([1, 1, 2, 1, 1]),
        heads=np.array([0, HEADS, -1, WIDTH]), twice=np.array([0, 0, 1, 1]),
    )  # fmt: skip
    group = ov(preserved(parse(attention(f"{V}  {REPEATS[repeat]}", "a = MatMul (p, vr)", MERGE), made)))
    expected = np.arange(2 * WIDTH).reshape(2, 1, WIDTH).repeat(2, axis=1)
    assert (group.kind, group.channels, group.scales) == (GroupKind.OV, 24, 12)
    assert group.index == tuple(expected.ravel().tolist())


def test_one_value_head_for_all() -> None:
    """MQA by broadcasting: v [B, 1, T, WIDTH]."""
    group = ov(preserved(parse(attention(V, PV, MERGE), constants(kv=1))))
    assert (group.channels, group.scales) == (24, WIDTH)
    assert group.index == tuple(np.tile(range(WIDTH), HEADS).tolist())


HEADS_FIRST = "v4 = Reshape (vs, kv)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)"
FUSED = {
    "split": f"q0, k0, vs = Split <axis = -1> (f, thirds)  {HEADS_FIRST}",
    "slice": f"vs = Slice (f, from, to, last)  {HEADS_FIRST}",
    "gather": "f5 = Reshape (f, three)  ft = Transpose <perm = [2, 0, 3, 1, 4]> (f5)  vh = Gather <axis = 0> (ft, two)",
    "split of heads": "f5 = Reshape (f, per_head)  ft = Transpose <perm = [0, 2, 1, 3]> (f5)  "
    "q0, k0, vh = Split <axis = -1> (ft, widths)",
}  # fmt: skip


@pytest.mark.parametrize("form", FUSED)
def test_fused_qkv(form: str) -> None:
    """One layer makes q, k and v; the columns of q and k stay as they are."""
    made = constants(
        wf=weights(1, w=(24, 72))["w"], bf=weights(2, b=(72,))["b"],
        thirds=np.array([24, 24, 24]), last=np.array([2]), to=np.array([72]),
        three=np.array([0, 0, 3, HEADS, WIDTH]), two=np.array(2),
        per_head=np.array([0, 0, HEADS, 3 * WIDTH]), widths=np.array([WIDTH] * 3),
    )  # fmt: skip
    made["from"] = np.array([48])
    value = f"[qkv] f0 = MatMul (x, wf)  f = Add (f0, bf)  {FUSED[form]}"
    group = ov(preserved(parse(attention(value, PV, MERGE), made)))
    assert (group.kind, group.name, group.scales) == (GroupKind.OV, "qkv", 24)
    columns = next(s.map.numbers for s in group.sources if s.node == "qkv")
    assert sum(n >= 0 for n in columns) == 24


def test_a_cache_that_is_seen_outside() -> None:
    """present = Concat(past, v) is an output: its values must stay."""
    value = f"{V}  present = Concat <axis = 2> (past, vh)"
    body = attention(
        value, "pt = Slice (p, zero, one, last)  a = MatMul (pt, present)", MERGE,
        outputs=", float[B,4,U,6] present", inputs=", float[B,4,1,6] past",
    )  # fmt: skip
    made = constants(zero=np.array([0]), one=np.array([1 << 30]), last=np.array([3]))
    body = body.replace("s = MatMul (qh, kh)", "s0 = MatMul (qh, kh)  s = Pad (s0, pads)")
    made["pads"] = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    group = ov(preserved(parse(body, made)))
    assert (group.kind, group.reason) == (GroupKind.UNFUSED, "'present' is a graph output")


def test_a_past_without_an_output() -> None:
    value = f"{V}  all = Concat <axis = 2> (past, vh)"
    body = attention(value, "a = MatMul (p1, all)", MERGE, inputs=", float[B,4,1,6] past")
    body = body.replace("p = Softmax <axis = -1> (s)", "s1 = Pad (s, pads)  p1 = Softmax <axis = -1> (s1)")
    made = constants(pads=np.array([0, 0, 0, 0, 0, 0, 0, 1]))
    group = ov(preserved(parse(body, made)))
    assert (group.kind, group.reason) == (GroupKind.UNFUSED, "'past' is a graph input")


def test_values_that_are_read_elsewhere() -> None:
    body = attention(f"{V}  extra = ReduceSum <keepdims = 0> (vh)", PV, MERGE, outputs=", float extra")
    group = ov(preserved(parse(body, constants())))
    assert group.reason == "'vh' is also read by ReduceSum 'ReduceSum_extra'"


@pytest.mark.parametrize("rank", [3, 4])
def test_the_attention_operator(rank: int) -> None:
    """Opset 23, with two value heads for four query heads."""
    if rank == 3:
        core = "[at] o = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, vb)"
    else:
        core = """q4 = Reshape (q, split)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
            k4 = Reshape (k, kv)  kh = Transpose <perm = [0, 2, 1, 3]> (k4)
            v4 = Reshape (vb, kv)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
            [at] a = Attention (qh, kh, vh)  at = Transpose <perm = [0, 2, 1, 3]> (a)  o = Reshape (at, merge)"""
    body = f"""g (float[B,T,24] x) => (float[B,T,24] y) {{
        q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)  vb = Add (v, bv)  {core}
        [out] y = MatMul (o, wo) }}"""
    made = constants(kv=2) | weights(3, wk=(24, 12))
    group = ov(preserved(parse(body, made, 23, ir=11), FOLDED))
    assert (group.kind, group.channels, group.scales) == (GroupKind.OV, 24, 12)


def test_a_wrong_head_order_would_be_seen() -> None:
    """The check itself: value heads in the wrong order change the outputs."""
    proto = parse(attention(V, PV, MERGE), constants())
    graph = Graph(open_model(proto))
    group = ov(find_groups(graph, {GroupKind.OV}))
    scale = np.linspace(0.5, 2, group.scales)
    smooth(graph, group, scale)
    weight = graph.node("out").inputs[1]
    wrong = np.asarray(graph.value(weight)) / scale[:, None] * scale[::-1, None]
    graph.set_value(weight, wrong.astype(np.float32))
    with pytest.raises(AssertionError):
        same_outputs(proto, graph.to_model(), rtol=1e-4, atol=1e-5)


def test_the_bias_of_the_values_is_still_known_for_one() -> None:
    graph = Graph(open_model(parse(attention(V, PV, MERGE), constants())))
    group = ov(find_groups(graph, {GroupKind.OV}))
    scale = np.linspace(0.5, 2, group.scales)
    smooth(graph, group, scale)
    value = graph.producer(next(node for node in graph.nodes if node.op == "Add").inputs[0])
    assert value is not None
    found = following_bias(graph, value, 24)
    assert found is not None
    np.testing.assert_allclose(found[2], constants()["bv"] / scale, rtol=1e-6)
