"""Which smoothing groups are found in which form, and that scaling them keeps the function."""

from __future__ import annotations

import numpy as np
import pytest

from calib.errors import GraphError
from calib.types import Array
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup, find_groups, smooth
from tests.graph.models import graph_of, parse, same_outputs
from tests.graph.smoothing import FOLDED, groups_of, preserved, weights

C = 16
READ = "[fc] y = MatMul (n, w)"
IN = "g (float[B,T,16] x) => (float[B,T,8] y)"
LN = "[mu] m = ReduceMean <axes = [-1]> (x) [d] d = Sub (x, m) "
RMS = "[sq] q = Mul (x, x) [v] v = ReduceMean <axes = [-1]> (q) [e] e = Add (v, eps) "
NORMS = {
    "operator": ("[ln] n = LayerNormalization (x, g, b)", 17, True),
    "operator without bias": ("[ln] n = LayerNormalization (x, g)", 17, True),
    "TorchScript below opset 17": (
        LN + "[sq] q = Pow (d, two) [v] v = ReduceMean <axes = [-1]> (q) [e] e = Add (v, eps) [r] r = Sqrt (e) "
        "[dv] h = Div (d, r) [w] k = Mul (h, g) [bias] n = Add (k, b)",
        13,
        True,
    ),
    "opset 11": (
        LN + "[sq] q = Mul (d, d) [v] v = ReduceMean <axes = [-1]> (q) [e] e = Add (v, eps) [r] r = Sqrt (e) "
        "[dv] h = Div (d, r) [w] k = Mul (g, h) [bias] n = Add (b, k)",
        11,
        True,
    ),
    "reciprocal": (
        LN + "[sq] q = Mul (d, d) [v] v = ReduceMean <axes = [-1]> (q) [e] e = Add (v, eps) [r] r = Sqrt (e) "
        "[i] i = Reciprocal (r) [dv] h = Mul (d, i) [w] k = Mul (h, g) [bias] n = Sub (k, b)",
        17,
        True,
    ),
    "tf2onnx": (
        LN + "[sq] q = Mul (d, d) [v] v = ReduceMean <axes = [-1]> (q) [e] e = Add (v, eps) [r] r = Sqrt (e) "
        "[i] i = Reciprocal (r) [s] s = Mul (i, g) [a] a = Mul (x, s) [k] k = Mul (m, s) [o] o = Sub (b, k) "
        "[sum] n = Add (a, o)",
        15,
        False,
    ),
    "RMS": (RMS + "[r] r = Sqrt (e) [i] i = Div (one, r) [h] h = Mul (x, i) [w] n = Mul (g, h)", 17, False),
    "RMS, dynamo": (
        "[c] xf = Cast <to = 1> (x) [sq] q = Pow (xf, two) [v] v = ReduceMean (q, axis) [e] e = Add (v, eps) "
        "[r] r = Sqrt (e) [i] i = Reciprocal (r) [h] h = Mul (xf, i) [back] k = Cast <to = 1> (h) [w] n = Mul (k, g)",
        18,
        False,
    ),
    "RMS, cast after the weight": (
        RMS + "[r] r = Sqrt (e) [h] h = Div (x, r) [w] k = Mul (h, g) [back] n = Cast <to = 1> (k)",
        17,
        False,
    ),
    "RMSNormalization": ("[rms] n = RMSNormalization <axis = -1> (x, g)", 23, False),
    "ONNX Runtime's SimplifiedLayerNormalization": (
        "[rms] n = SimplifiedLayerNormalization <axis = -1> (x, g)",
        17,
        False,
    ),
    "ONNX Runtime's SkipLayerNormalization": (
        "[skip] n = com.microsoft.SkipLayerNormalization (x, x, g, b)",
        17,
        True,
    ),
}  # fmt: skip
EXTRA = {
    "two": np.float32(2), "one": np.float32(1), "eps": np.float32(1e-5), "axis": np.array([-1]),
}  # fmt: skip


def constants(**shapes: tuple[int, ...]) -> dict[str, Array]:
    return weights(0, **shapes)


@pytest.mark.parametrize("form", NORMS)
def test_norm_forms(form: str) -> None:
    """Every form is found from its last per-channel constant; scaled and shifted the outputs stay."""
    text, opset, takes_shift = NORMS[form]
    body = f"{IN} {{ {text} {READ} [fcb] y2 = Add (y, c) }}".replace("float[B,T,8] y)", "float[B,T,8] y2)")
    proto = parse(
        body,
        {**constants(g=(C,), b=(C,), w=(C, 8), c=(8,)), **EXTRA},
        opset,
        ir=11 if opset > 21 else 8,
    )
    (group,) = preserved(proto)
    assert group.kind is GroupKind.NORM_LINEAR
    assert (group.tensor, group.axis, group.channels, group.scales, group.index) == ("n", -1, C, C, None)
    assert [c.node for c in group.consumers] == ["fc"]
    assert group.shiftable is takes_shift


QKV = "[q] yq = MatMul (n, wq) [k] yk = MatMul (n, wk) [v] y = MatMul (n, w)"


@pytest.mark.parametrize(
    ("extra", "folds", "reason"),
    [
        ("", True, ""),
        ("[s] sh = Shape (n)", True, ""),
        ("[u] u = Mul (n, g)", True, ""),  # a Mul with a constant per channel takes the scale back
        ("[u] u = Mul (n, two)", False, "read by Mul 'u'"),
        ("[u] u = Add (n, x)", False, "read by Add 'u'"),
        ("[u] u = Softmax (n)", False, "read by Softmax 'u'"),
    ],
)
def test_other_readers(extra: str, folds: bool, reason: str) -> None:
    """All readers of a norm share its scale; one that cannot undo it leaves the norm alone."""
    value = "sh" if "Shape" in extra else "u" if extra else "yq"
    outputs = {"sh": ", int64[3] sh", "u": ", float[B,T,16] u"}.get(value, "")
    body = (
        f"g (float[B,T,16] x) => (float[B,T,8] yq, float[B,T,8] yk, float[B,T,8] y{outputs}) "
        f"{{ [ln] n = LayerNormalization (x, g, b) {QKV} {extra} }}"
    )
    proto = parse(body, {**constants(g=(C,), b=(C,), w=(C, 8), wq=(C, 8), wk=(C, 8)), "two": np.float32(2)})
    (group,) = preserved(proto)
    assert [c.node for c in group.consumers] == ["q", "k", "v"]
    assert group.kind is (GroupKind.NORM_LINEAR if folds else GroupKind.UNFUSED)
    assert reason in group.reason


def test_a_graph_output_is_not_scaled() -> None:
    body = f"g (float[B,T,16] x) => (float[B,T,8] y, float[B,T,16] n) {{ [ln] n = LayerNormalization (x, g) {READ} }}"
    (group,) = preserved(parse(body, constants(g=(C,), w=(C, 8))))
    assert group.kind is GroupKind.UNFUSED
    assert group.reason == "'n' is a graph output"


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        ("t = Identity (u)", GroupKind.LINEAR_LINEAR),
        ("t = Relu (u)", GroupKind.LINEAR_LINEAR),
        ("t = LeakyRelu (u)", GroupKind.LINEAR_LINEAR),
        ("t = PRelu (u, slope)", GroupKind.LINEAR_LINEAR),
        ("t = Dropout (u)", GroupKind.LINEAR_LINEAR),
        ("t = Clip (u, zero)", GroupKind.LINEAR_LINEAR),
        ("t = Clip (u, zero, six)", GroupKind.UNFUSED),
        ("t = Gelu (u)", GroupKind.UNFUSED),
        ("t = Sigmoid (u)", GroupKind.UNFUSED),
        ("t = Mul (u, u)", GroupKind.UNFUSED),
        ("t = Add (u, u)", GroupKind.LINEAR_LINEAR),
        ("t = Softmax <axis = -1> (u)", GroupKind.UNFUSED),
        ("z = Sigmoid (u)  t = Mul (u, z)", GroupKind.UNFUSED),
        (
            "z = Transpose <perm = [0, 2, 1]> (u)  t = Transpose <perm = [0, 2, 1]> (z)",
            GroupKind.LINEAR_LINEAR,
        ),
        ("z = Reshape (u, flat)  t = Reshape (z, back)", GroupKind.LINEAR_LINEAR),
    ],
)
def test_between_two_linears(between: str, kind: GroupKind) -> None:
    """What commutes with a positive scale lets it pass, nothing else does."""
    made = constants(w1=(8, C), b1=(C,), w2=(C, 4), slope=(C,))
    made |= {"zero": np.float32(0), "six": np.float32(6)}
    made |= {"flat": np.array([-1, 4]), "back": np.array([3, -1, 16])}
    body = f"""g (float[3,T,8] x) => (float[3,T,4] y) {{
        a = MatMul (x, w1)  u = Add (a, b1)  {between}  [fc2] y = MatMul (t, w2) }}"""
    groups = preserved(parse(body, made, 20, ir=9))
    assert [g.kind for g in groups] == [GroupKind.UNFUSED, kind]
    assert groups[0].reason == "'x' is a graph input"


def test_reshapes_that_mix_channels_tie_scales() -> None:
    """(u, flat) has rows of 4: there channels 0, 4, 8, ... meet the same weight row and must share a scale."""
    body = """g (float[B,T,8] x) => (float[N,4] y) {
        u = MatMul (x, w1)  z = Reshape (u, flat)  [fc2] y = MatMul (z, w2) }"""
    made = {**constants(w1=(8, C), w2=(4, 4)), "flat": np.array([-1, 4])}
    group = preserved(parse(body, made))[1]
    assert (group.kind, group.channels, group.scales) == (GroupKind.LINEAR_LINEAR, 4, 4)


def test_gated_mlp() -> None:
    """down reads silu(gate) * up: up absorbs, gate cannot; the order of the operands does not matter."""
    for product in ("Mul (s, up)", "Mul (up, s)"):
        body = f"""g (float[B,T,16] x) => (float[B,T,16] y) {{
            [ln] n = SimplifiedLayerNormalization <axis = -1> (x, g)
            [gate] gate = MatMul (n, w1)  [up] up = MatMul (n, w2)
            sg = Sigmoid (gate)  s = Mul (gate, sg)  t = {product}
            [down] o = MatMul (t, w3)  y = Add (o, x) }}"""
        groups = preserved(parse(body, constants(g=(C,), w1=(C, 24), w2=(C, 24), w3=(24, C))), FOLDED)
        assert [(g.kind, g.name) for g in groups] == [
            (GroupKind.NORM_LINEAR, "ln"), (GroupKind.UP_DOWN, "up"),
        ]  # fmt: skip
        assert [c.node for c in groups[0].consumers] == ["gate", "up"]


def test_up_and_gate_in_one_layer() -> None:
    """Only up's half of the columns is scaled."""
    body = """g (float[B,T,16] x) => (float[B,T,16] y) {
        [both] b = MatMul (x, w)  gate, up = Split <axis = -1> (b, sizes)
        s = Relu (gate)  t = Mul (s, up)  [down] y = MatMul (t, w3) }"""
    made = {**constants(w=(C, 48), w3=(24, C)), "sizes": np.array([24, 24])}
    group = preserved(parse(body, made))[1]
    assert (group.kind, group.name, group.channels) == (GroupKind.UP_DOWN, "both", 24)
    assert set(group.sources[0].map.numbers[:24]) == {-1}


def test_shared_weights() -> None:
    """Two layers with one initializer, both readers of one norm; another layer keeps the old values."""
    body = """g (float[B,T,16] x) => (float[B,T,8] y1, float[B,T,8] y2, float[B,T,8] y3) {
        [ln] n = LayerNormalization (x, g)
        [a] y1 = MatMul (n, w)  [b] y2 = MatMul (n, w)  [c] y3 = MatMul (x, w) }"""
    groups = preserved(parse(body, constants(g=(C,), w=(C, 8))), FOLDED)
    assert [c.node for c in groups[0].consumers] == ["a", "b"]


def test_a_norm_weight_shared_by_two_norms() -> None:
    body = """g (float[B,T,16] x) => (float[B,T,16] y) {
        [ln1] n = LayerNormalization (x, g, b)  [a] u = MatMul (n, w)  r = Add (u, x)
        [ln2] m = LayerNormalization (r, g, b)  [b] y = MatMul (m, w) }"""
    groups = preserved(parse(body, constants(g=(C,), b=(C,), w=(C, C))))
    assert [g.name for g in groups] == ["ln1", "ln2"]


def test_layers_that_read_reshaped_copies() -> None:
    """Gemms want rows: each reads its own Reshape of the norm."""
    body = """g (float[B,T,16] x) => (float[N,8] y1, float[N,8] y2, float[B,T,8] y3) {
        [ln] n = LayerNormalization (x, g, b)
        r1 = Reshape (n, rows)  [a] y1 = Gemm <transB = 1> (r1, w1, c)
        r2 = Reshape (n, rows)  [b] y2 = Gemm (r2, w2)
        [c] y3 = MatMul (n, w2) }"""
    made = {**constants(g=(C,), b=(C,), w1=(8, C), w2=(C, 8), c=(8,)), "rows": np.array([-1, C])}
    (group,) = preserved(parse(body, made))
    assert group.kind is GroupKind.NORM_LINEAR
    assert {c.node for c in group.consumers} == {"a", "b", "c"}
    assert not group.shiftable, "MatMul c has no constant behind it to take the shift"


@pytest.mark.parametrize("group", [1, 4])
def test_convolutions(group: int) -> None:
    """Conv, Relu, grouped or depthwise Conv; padding is zeros, which no scale changes, but a shift would."""
    body = f"""g (float[B,3,9,T] x) => (float[B,6,H,W] y) {{
        [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (a)  p = MaxPool <kernel_shape = [2, 2]> (r)
        [c2] d = Conv <group = {group}, pads = [1, 1, 1, 1]> (p, w2)
        [c3] e = ConvTranspose (d, w3, b3)  [c4] y = Conv (e, w4) }}"""
    made = constants(
        w1=(8, 3, 3, 3), b1=(8,), w2=(8, 8 // group, 3, 3), w3=(8, 5, 2, 2), b3=(5,), w4=(6, 5, 1, 1)
    )
    groups = preserved(parse(body, made))
    assert [g.kind for g in groups] == [GroupKind.UNFUSED] + [GroupKind.CONV_CONV] * 3
    assert [(g.axis, g.channels, g.shiftable) for g in groups[1:]] == [
        (1, 8, False), (1, 8, False), (1, 5, True),
    ]  # fmt: skip


def test_conv_to_gemm_through_flatten() -> None:
    """Channel c of the Conv is 4 inputs of the Gemm, which share its scale."""
    body = """g (float[B,3,4,4] x) => (float[B,5] y) {
        [c1] a = Conv (x, w1, b1)  r = Relu (a)  f = Flatten (r)  [fc] y = Gemm (f, w2, b2) }"""
    group = preserved(parse(body, constants(w1=(6, 3, 3, 3), b1=(6,), w2=(24, 5), b2=(5,))))[1]
    assert (group.kind, group.channels, group.scales) == (GroupKind.LINEAR_LINEAR, 24, 6)
    assert group.index == tuple(np.repeat(range(6), 4).tolist())


def test_a_kind_that_is_left_out_is_unfused_where_allowed() -> None:
    body = f"{IN} {{ [ln] n = LayerNormalization (x, g) {READ} }}"
    made = constants(g=(C,), w=(C, 8))
    assert groups_of(body, made, kinds={GroupKind.OV}) == []
    (group,) = groups_of(body, made, kinds={GroupKind.UNFUSED})
    assert (group.kind, group.reason) == (GroupKind.UNFUSED, "norm-linear is left out")


def one_group() -> tuple[str, dict[str, Array]]:
    return f"{IN} {{ [ln] n = LayerNormalization (x, g) {READ} }}", constants(g=(C,), w=(C, 8))


def test_what_a_scale_does() -> None:
    """x' = x / s at the tensor, W' = W s; the numbers themselves."""
    body, made = one_group()
    graph = graph_of(body, made)
    (group,) = find_groups(graph)
    scale = np.arange(1.0, C + 1)
    smooth(graph, group, scale)
    np.testing.assert_allclose(graph.value(graph.node("ln").inputs[1]), made["g"] / scale, rtol=1e-6)
    np.testing.assert_allclose(graph.value(graph.node("fc").inputs[1]), made["w"] * scale[:, None], rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "shift", "text"),
    [
        (np.ones(C - 1), None, "needs 16 finite scales"),
        (np.zeros(C), None, "needs 16 finite scales"),
        (np.full(C, np.nan), None, "needs 16 finite scales"),
        (np.ones(C), np.full(C, np.inf), "needs 16 finite shifts"),
        (np.ones(C), np.ones(C), "takes no shift"),
    ],
)
def test_bad_scales(scale: Array, shift: Array | None, text: str) -> None:
    graph = graph_of(*one_group())
    (group,) = find_groups(graph)
    with pytest.raises(ValueError, match=text):
        smooth(graph, group, scale, shift)


@pytest.mark.parametrize("kinds", [None, {GroupKind.UNFUSED}])
def test_a_constant_that_would_overflow_leaves_the_graph_alone(kinds: set[GroupKind] | None) -> None:
    made = {k: v.astype(np.float16) for k, v in constants(g=(C,), w=(C, 8)).items()}
    body = one_group()[0].replace("float[", "float16[")
    graph = graph_of(body, made)
    before = graph.to_model()
    (group,) = find_groups(graph, kinds)
    for extreme in (1e7, 1e-9):
        with pytest.raises(GraphError, match="leaves float16"):
            smooth(graph, group, np.full(C, extreme))
    assert len(graph.nodes) == 2
    same_outputs(before, graph.to_model(), rtol=0, atol=0)


def test_each_layer_is_in_one_group_at_most() -> None:
    body = """g (float[B,T,16] x) => (float[B,T,16] y) {
        [a] u = MatMul (x, w)  [b] v = MatMul (x, w)  r = Relu (u)  [c] t = MatMul (r, w)
        s = Add (t, v)  [d] y = MatMul (s, w) }"""
    groups: list[SmoothGroup] = preserved(parse(body, constants(w=(C, C))))
    assert [[c.node for c in g.consumers] for g in groups] == [["a", "b"], ["c"], ["d"]]
    assert groups[2].kind is GroupKind.LINEAR_LINEAR
    assert [s.node for s in groups[2].sources] == ["c", "b"], "both terms of the sum absorb"
