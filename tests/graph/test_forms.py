"""Forms that are switched on by name: the same outputs, what they leave alone, and how far the approximate ones are."""

from __future__ import annotations

import re

import numpy as np
import pytest

from calib.model import open_model
from calib.types import Array
from onnxslim_ptq.graph.forms import APPROXIMATE, EXACT
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize import PASSES, optimize
from tests.graph.models import feed_for, model_of, run, same_outputs
from tests.models import weights_of
from tools import nets

F = {
    "zero": np.float32(0),
    "six": np.float32(6),
    "tenth": np.float32(0.1),
    "root": np.float32(8),
    "up": np.asarray([1, 1, 2, 3], np.float32),
    "again": np.asarray([1, 1, 4, 1], np.float32),
    "flat": np.asarray([3, -1], np.int64),
    "block": np.asarray([3, 2, 2], np.int64),
    "two": np.asarray(2, np.int64),
    "heads": np.asarray([2, 3, 2, 4], np.int64),
}
W = weights_of(1, w=(8, 8), v=(8, 4), b=(8,), c=(4,), k=(5, 3, 1, 1), kb=(5,))
UP = 'Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
# name: (pass, opsets, model, how often it acts)
ACTS: dict[str, tuple[str, tuple[int, ...], str, int]] = {
    "relu6": ("clip", (11, 17), "(float[3,4] x) => (float[3,4] y) { r = Relu (x) y = Min (six, r) }", 1),
    "max min": ("clip", (13,), "(float[3,4] x) => (float[3,4] y) { r = Max (x, zero) y = Min (r, six) }", 1),
    "relu clip": ("clip", (17,), "(float[3,4] x) => (float[3,4] y) { r = Relu (x) y = Clip (r, , six) }", 1),
    "leaky relu": (
        "leaky_relu",
        (11, 17),
        "(float[3,4] x) => (float[3,4] y) { s = Mul (x, tenth) y = Max (s, x) }",
        1,
    ),
    "weights": (
        "div_matmul",
        (13, 17),
        "(float[3,8] x) => (float[3,8] y) { m = MatMul (x, w) y = Div (m, root) }",
        1,
    ),
    "factor": (
        "div_matmul",
        (17,),
        "(float[3,8] x) => (float[3,8] y) { m = MatMul (x, w) y = Mul (root, m) }",
        1,
    ),
    "attention": (
        "div_matmul",
        (17,),
        """(float[2,3,8] x) => (float[2,2,3,3] y) {
            q = MatMul (x, w) p = Add (b, q) r = Reshape (p, heads) t = Transpose <perm = [0, 2, 1, 3]> (r)
            s = Transpose <perm = [0, 1, 3, 2]> (t) u = Identity (s) z = Reshape (x, heads)
            g = Transpose <perm = [0, 2, 3, 1]> (z) h = Transpose <perm = [0, 1, 3, 2]> (u) m = MatMul (h, g)
            y = Div (m, root)
        }""",
        1,
    ),
    "parallel": (
        "parallel_matmul",
        (13, 17),
        "(float[2,3,8] x) => (float[2,3,8] y, float[2,3,4] z) { y = MatMul (x, w) z = MatMul (x, v) }",
        1,
    ),
    "parallel biases": (
        "parallel_matmul",
        (17,),
        """(float[2,3,8] x) => (float[2,3,8] y, float[2,3,4] z) {
            m = MatMul (x, w) y = Add (m, b) n = MatMul (x, v) z = Add (c, n)
        }""",
        1,
    ),
    "gemm": (
        "matmul_gemm",
        (13, 17),
        "(float[N,8] x) => (float[N,8] y) { m = MatMul (x, w) y = Add (m, b) }",
        1,
    ),
    "gemm alone": ("matmul_gemm", (17,), "(float[N,8] x) => (float[N,8] y) { y = MatMul (x, w) }", 1),
    "reshapes": (
        "double_reshape",
        (13, 17),
        "(float[3,4] x) => (float[3,2,2] y) { r = Reshape (x, flat) s = Flatten (r) y = Reshape (s, block) }",
        2,
    ),
    "resizes": (
        "double_resize",
        (13, 17),
        f"(float[2,3,4,5] x) => (float[2,3,32,15] y) {{ r = {UP} (x, , up) y = {UP} (r, , again) }}",
        1,
    ),
    "resize": (
        "resize_conv",
        (13, 17),
        f"(float[2,3,4,5] x) => (float[2,3,8,15] y) {{ y = {UP} (x, , up) }}",
        1,
    ),
    "pool": (
        "pool_conv",
        (13, 17),
        "(float[2,3,4,5] x) => (float[2,5,1,1] y) { c0 = Conv (x, k, kb) y = GlobalAveragePool (c0) }",
        1,
    ),
    "patches": (
        "patch_merging",
        (10, 17),
        """(float[2,6,4,3] x) => (float[2,3,2,12] y) {
            a0 = Slice (x, s0, end, ax1, st) a1 = Slice (a0, s0, end, ax2, st)
            b0 = Slice (x, s1, end, ax1, st) b1 = Slice (b0, s0, end, ax2, st)
            d0 = Slice (x, s0, end, ax1, st) d1 = Slice (d0, s1, end, ax2, st)
            e1 = Slice (x, s11, end2, ax12, st2)
            y = Concat <axis = -1> (a1, b1, d1, e1)
        }""",
        1,
    ),
    "shapes": (
        "shapes",
        (13, 17),
        """(float[3,4] x) => (float[N,M,K] y) {
            s = Shape (x) f = Slice (s, first, last) t = Concat <axis = 0> (f, rest) y = Reshape (x, t)
        }""",
        1,
    ),
}
F |= {
    "first": np.asarray([0], np.int64),
    "last": np.asarray([1], np.int64),
    "rest": np.asarray([2, 2], np.int64),
}
ALONE = {
    "limits cross": (
        "clip",
        "(float[3,4] x) => (float[3,4] y, float[3,4] r) { r = Relu (x) y = Min (six, r) }",
    ),
    "slope": ("leaky_relu", "(float[3,4] x) => (float[3,4] y) { s = Mul (x, six) y = Max (s, x) }"),
    "product is read twice": (
        "div_matmul",
        "(float[3,8] x) => (float[3,8] y, float[3,8] m) { m = MatMul (x, w) y = Div (m, root) }",
    ),
    "reciprocal": ("div_matmul", "(float[3,8] x) => (float[3,8] y) { m = MatMul (x, w) y = Div (root, m) }"),
    "relu between": (
        "div_matmul",
        """(float[3,8] x, float[8,3] u) => (float[3,3] y) {
            m = MatMul (x, w) r = Relu (m) q = MatMul (r, u) y = Div (q, root)
        }""",
    ),
    "other inputs": (
        "parallel_matmul",
        "(float[3,8] x, float[3,8] u) => (float[3,8] y, float[3,4] z) { y = MatMul (x, w) z = MatMul (u, v) }",
    ),
    "rank 3": ("matmul_gemm", "(float[2,3,8] x) => (float[2,3,8] y) { y = MatMul (x, w) }"),
    "rank unknown": ("matmul_gemm", "(float x_) => (float y) { y = Identity (x_) }"),
    "copied dimension": (
        "double_reshape",
        "(float[3,4] x) => (float[3,4] y) { r = Reshape (x, flat) y = Reshape (r, copied) }",
    ),
    "linear": (
        "double_resize",
        '(float[2,3,4,5] x) => (float[2,3,8,15] y) { y = Resize <mode = "linear"> (x, , up) }',
    ),
    "half a pixel": (
        "resize_conv",
        '(float[2,3,4,5] x) => (float[2,3,8,15] y) { y = Resize <mode = "nearest"> (x, , up) }',
    ),
    "a pixel twice": (
        "patch_merging",
        """(float[2,4,4,3] x) => (float[2,2,2,12] y) {
            a = Slice (x, s11, end2, ax12, st2)
            y = Concat <axis = -1> (a, a, a, a)
        }""",
    ),
    "images of bytes": ("resize_conv", f"(uint8[2,3,4,5] x) => (uint8[2,3,8,15] y) {{ y = {UP} (x, , up) }}"),
    "patches of bytes": (
        "patch_merging",
        """(int32[2,4,4,3] x) => (int32[2,2,2,12] y) {
            a = Slice (x, s00, end2, ax12, st2) b = Slice (x, s10, end2, ax12, st2)
            c0 = Slice (x, s01, end2, ax12, st2) d = Slice (x, s11, end2, ax12, st2)
            y = Concat <axis = -1> (a, b, c0, d)
        }""",
    ),
    "a product with itself": (
        "div_matmul",
        "(float[8,8] x) => (float[8,8] y) { q = MatMul (x, w) p = MatMul (q, q) y = Div (p, root) }",
    ),
    "whole numbers": ("matmul_gemm", "(int32[3,2] x) => (int32[3,2] y) { y = MatMul (x, whole) }"),
    "limits of int64": (
        "clip",
        "(int64[3,4] x) => (int64[3,4] y) { r = Clip (x, two, most) y = Relu (r) }",
    ),
    "channels are a dynamic width": (
        "resize_conv",
        f"""(float[2,3,H,W] x) => (float[2,K,L,M] y) {{
            t = Transpose <perm = [0, 3, 1, 2]> (x) y = {UP} (t, , up) }}""",
    ),
    "patches of dynamic channels": (
        "patch_merging",
        """(float[2,C,4,4] z) => (float[2,2,2,K] y) {
            x = Transpose <perm = [0, 2, 3, 1]> (z)
            a = Slice (x, s00, end2, ax12, st2) b = Slice (x, s10, end2, ax12, st2)
            c0 = Slice (x, s01, end2, ax12, st2) d = Slice (x, s11, end2, ax12, st2)
            y = Concat <axis = -1> (a, b, c0, d)
        }""",
    ),
    "a window": (
        "pool_conv",
        "(float[2,3,4,5] x) => (float[2,5,1,1] y) { h = Conv <pads = [1, 1, 1, 1]> (x, k) y = GlobalAveragePool (h) }",
    ),
    "dynamic": (
        "shapes",
        """(float[N,4] x) => (float[K,M,L] y) {
            s = Shape (x) f = Slice (s, first, last) t = Concat <axis = 0> (f, rest) y = Reshape (x, t)
        }""",
    ),
}
F |= {
    "s0": np.asarray([0], np.int64),
    "s1": np.asarray([1], np.int64),
    "s11": np.asarray([1, 1], np.int64),
    "s00": np.asarray([0, 0], np.int64),
    "s10": np.asarray([1, 0], np.int64),
    "s01": np.asarray([0, 1], np.int64),
    "end": np.asarray([2**63 - 1], np.int64),
    "end2": np.asarray([2**63 - 1] * 2, np.int64),
    "ax1": np.asarray([1], np.int64),
    "ax2": np.asarray([2], np.int64),
    "ax12": np.asarray([1, 2], np.int64),
    "st": np.asarray([2], np.int64),
    "st2": np.asarray([2, 2], np.int64),
}
F["whole"] = np.asarray([[1, 2], [3, 4]], np.int32)
F["most"] = np.asarray(2**63 - 1, np.int64)
F["copied"] = np.asarray([0, 4], np.int64)


def constants(body: str) -> dict[str, Array]:
    used = set(re.findall(r"\w+", body))
    return {name: np.asarray(value) for name, value in {**F, **W}.items() if name in used}


@pytest.mark.parametrize(
    ("name", "opset", "body", "times"),
    [pytest.param(p, v, b, t, id=f"{n} {v}") for n, (p, vs, b, t) in ACTS.items() for v in vs],
)
def test_same_outputs(name: str, opset: int, body: str, times: int) -> None:
    model = model_of(f"g {body}", constants(body), opset)
    graph = Graph(model)
    assert sum(EXACT[name](graph) for _ in range(3)) == times
    same_outputs(model, graph.to_model(), rtol=1e-4, atol=1e-5)


def test_dynamic_sizes_do_not_hide_fixed_channels() -> None:
    body = """g (float[N,3,H,W] z) => (float[N,I,J,12] y) {
        x = Transpose <perm = [0, 2, 3, 1]> (z)
        a = Slice (x, s00, end2, ax12, st2) e = Slice (x, s10, end2, ax12, st2)
        c0 = Slice (x, s01, end2, ax12, st2) d = Slice (x, s11, end2, ax12, st2)
        y = Concat <axis = -1> (a, e, c0, d) }"""
    model = model_of(body, constants(body))
    graph = Graph(model)
    assert EXACT["patch_merging"](graph) == 1
    feeds = [feed_for(model.proto, 0, {"N": 2, "H": 4, "W": 6})]
    same_outputs(model, graph.to_model(), feeds=feeds)


def test_float16_keeps_its_digits() -> None:
    """1e-3 / 1e4 is no normal float16; the product x W of large x divided by it is."""
    half = {"w": (W["w"] * 1e-3).astype(np.float16), "c": np.float16(1e4)}
    graph = Graph(
        model_of("g (float16[3,8] x) => (float16[3,8] y) { m = MatMul (x, w) y = Div (m, c) }", half)
    )
    assert EXACT["div_matmul"](graph) == 0


@pytest.mark.parametrize(("name", "body"), ALONE.values(), ids=ALONE)
def test_left_alone(name: str, body: str) -> None:
    graph = Graph(model_of(f"g {body}", constants(body)))
    assert EXACT[name](graph) == 0


NETS = [nets.bert, lambda: nets.mobilenet(width=8, size=32), lambda: nets.resnet18(width=8, size=32)]


@pytest.mark.parametrize("make", NETS)
def test_all_at_once_on_whole_networks(make: object) -> None:
    proto = make()  # type: ignore[operator]
    graph = Graph(open_model(proto))
    acted = optimize(graph, [*EXACT, "constants", "batchnorm", "affine", "gemm"])
    assert sum(acted.values()) > 0
    feeds = [feed_for(proto, seed) for seed in (0, 1)]
    same_outputs(open_model(proto), graph.to_model(), rtol=1e-3, atol=1e-4, feeds=feeds)
    if "ids" in {i.name for i in proto.graph.input}:
        assert acted["div_matmul"] == 2
        assert acted["parallel_matmul"] == 4


GELUS = {
    "x ( ) half": "d = Div (x, root2) e = Erf (d) a = Add (e, one) m = Mul (x, a) y = Mul (m, half)",
    "half x ( )": "d = Mul (x, inverse) e = Erf (d) a = Add (one, e) h = Mul (half, x) y = Mul (h, a)",
    "half ( ) x": "d = Div (x, root2) e = Erf (d) a = Add (e, one) m = Mul (half, a) y = Mul (m, x)",
    "operator": "y = Gelu (x)",
}
NUMBERS = {
    "root2": np.float32(2**0.5),
    "inverse": np.float32(0.5**0.5),
    "one": np.float32(1),
    "half": np.float32(0.5),
}


@pytest.mark.parametrize("text", GELUS.values(), ids=GELUS)
@pytest.mark.parametrize(
    ("name", "distance"), [("gelu_tanh", 0.0005), ("gelu_sigmoid", 0.021), ("gelu_fast", 0.021)]
)
def test_approximations_are_as_close_as_they_say(text: str, name: str, distance: float) -> None:
    used = {
        k: v
        for k, v in NUMBERS.items()
        if k in text.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    model = model_of(f"g (float[4001] x) => (float[4001] y) {{ {text} }}", used, 20 if "Gelu" in text else 17)
    graph = Graph(model)
    assert APPROXIMATE[name](graph) == 1
    feed = {"x": np.linspace(-50, 50, 4001, dtype=np.float32)}
    (exact,), (seen,) = run(model, feed), run(graph.to_model(), feed)
    assert 0 < np.abs(exact - seen).max() <= distance
    assert np.isfinite(seen).all()


def test_gelu_by_tanh_becomes_a_sigmoid() -> None:
    model = model_of('g (float[4001] x) => (float[4001] y) { y = Gelu <approximate = "tanh"> (x) }', opset=20)
    assert APPROXIMATE["gelu_tanh"](Graph(model)) == 0
    graph = Graph(model)
    assert APPROXIMATE["gelu_sigmoid"](graph) == 1
    feed = {"x": np.linspace(-50, 50, 4001, dtype=np.float32)}
    (exact,), (seen,) = run(model, feed), run(graph.to_model(), feed)
    assert 0 < np.abs(exact - seen).max() <= 0.021


def test_other_uses_of_erf_stay() -> None:
    text = "d = Div (x, root2) e = Erf (d) a = Add (e, one) y = Mul (a, half)"
    graph = Graph(model_of(f"g (float[9] x) => (float[9] y) {{ {text} }}", NUMBERS | {}))
    assert all(run_pass(graph) == 0 for run_pass in APPROXIMATE.values())


def test_half_precision_stays() -> None:
    """The approximations add float32 constants."""
    graph = Graph(model_of("g (float16[9] x) => (float16[9] y) { y = Gelu (x) }", opset=20))
    assert all(run_pass(graph) == 0 for run_pass in APPROXIMATE.values())


def test_names_are_distinct() -> None:
    assert not set(PASSES) & set(EXACT)
    assert not set(APPROXIMATE) & {*PASSES, *EXACT}
