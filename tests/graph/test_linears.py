"""Which nodes are layers, what is known of them, and the reason of those that are none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from calib.model import open_model
from calib.types import Array
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from tests.graph.models import graph_of, parse


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def only(body: str, weights: Mapping[str, Array]) -> Linear:
    (linear,), reasons = find_linears(
        graph_of(f"g (float[2,4,9,9] x) => (float[N] y) {{ [it] y = {body} }}", weights)
    )
    assert reasons == {}
    return linear


def reason(body: str, weights: Mapping[str, Array] | None = None, inputs: str = "float[2,4,9,9] x") -> str:
    found, reasons = find_linears(
        graph_of(f"g ({inputs}) => (float[N] y) {{ [it] y = {body} }}", weights or {})
    )
    assert found == []
    return reasons["it"]


@pytest.mark.parametrize(
    ("body", "shape", "axis", "channels", "macs"),
    [
        ("Conv (x, w)", (6, 4, 3), 0, 6, 12),
        ("Conv (x, w)", (6, 4, 3, 3), 0, 6, 36),
        ("Conv (x, w)", (6, 4, 3, 3, 3), 0, 6, 108),
        ("Conv <group = 4> (x, w)", (8, 1, 3, 3), 0, 8, 9),
        ("ConvTranspose (x, w)", (4, 6, 3, 3), 1, 6, 36),
        ("ConvTranspose <group = 2> (x, w)", (4, 6, 3, 3), None, 12, 18),
        ("Gemm (x, w)", (16, 8), 1, 8, 16),
        ("Gemm <transB = 1> (x, w)", (16, 8), 0, 16, 8),
        ("Gemm <transA = 1> (x, w)", (16, 8), 1, 8, 16),
        ("MatMul (x, w)", (16, 8), 1, 8, 16),
        ("MatMul (x, w)", (3, 16, 8), None, 8, 48),
        ("Conv (x, w, )", (6, 4, 3, 3), 0, 6, 36),
    ],
)
def test_layers(body: str, shape: tuple[int, ...], axis: int | None, channels: int, macs: int) -> None:
    linear = only(body, {"w": zeros(*shape)})
    assert (linear.channel_axis, linear.channels, linear.macs_per_output) == (axis, channels, macs)
    assert (linear.activation_name, linear.weight_name, linear.output_name) == ("x", "w", "y")
    assert linear.bias is None
    assert linear.bias_name is None


def test_bias() -> None:
    linear = only("Conv (x, w, b)", {"w": zeros(6, 4, 3, 3), "b": zeros(6)})
    assert (linear.bias, linear.bias_name) == (2, "b")
    assert (
        only("Gemm (x, w, b)", {"w": zeros(4, 6).astype(np.float16), "b": zeros(6).astype(np.float16)}).bias
        == 2
    )
    assert only("ConvTranspose <group = 2> (x, w, b)", {"w": zeros(4, 3, 3, 3), "b": zeros(6)}).bias == 2


@pytest.mark.parametrize(
    ("body", "weights", "words"),
    [
        ("MatMul (x, x)", {}, "computed at run time"),
        ("MatMul (w, x)", {"w": zeros(4, 4)}, "on the left side"),
        ("MatMul (w, w)", {"w": zeros(4, 4)}, "both inputs are constant"),
        ("MatMul (x, w)", {"w": zeros(4)}, "shape [4]"),
        ("MatMul (x, w)", {"w": zeros(4, 0)}, "shape [4, 0]"),
        ("MatMul (x, w)", {"w": zeros(4, 4).astype(np.float64)}, "type float64"),
        ("MatMul (x, w)", {"w": zeros(4, 4).astype(np.int8)}, "type int8"),
        ("Conv (x, w)", {"w": np.full((6, 4, 3, 3), np.nan, np.float32)}, "NaN"),
        ("Conv (x, w)", {"w": zeros(6, 4)}, "shape [6, 4]"),
        ("Conv (x, w, b)", {"w": zeros(6, 4, 3, 3), "b": zeros(1)}, "bias has shape [1]"),
        (
            "Conv (x, w, b)",
            {"w": zeros(6, 4, 3, 3), "b": np.full(6, np.inf, np.float32)},
            "bias holds NaN or Inf",
        ),
        ("Conv (x, w, x)", {"w": zeros(6, 4, 3, 3)}, "bias is computed"),
        ("Gemm (x, w, b)", {"w": zeros(4, 6), "b": zeros(2, 6)}, "bias has shape [2, 6]"),
        ("Gemm <alpha = 2.0> (x, w, b)", {"w": zeros(4, 6), "b": zeros(6)}, "alpha or beta"),
        ("local.Conv (x, w)", {"w": zeros(6, 4, 3, 3)}, "domain local"),
        ("Conv (x)", {}, "no weight"),
        ('Einsum <equation = "ij,jk->ik"> (x, w)', {"w": zeros(4, 4)}, "no integer form"),
        ("com.microsoft.FusedMatMul (x, w)", {"w": zeros(4, 4)}, "no integer form"),
    ],
)
def test_reasons(body: str, weights: Mapping[str, Array], words: str) -> None:
    if "com.microsoft" in body:
        proto = parse("g (float[4] x) => (float[4] y) { [it] y = Relu (x) }")
        proto.graph.node[0].op_type, proto.graph.node[0].domain = "FusedMatMul", "com.microsoft"
        assert words in find_linears(Graph(open_model(proto)))[1]["it"]
        return
    assert words in reason(body, weights)


def test_bfloat16() -> None:
    import ml_dtypes

    assert "type bfloat16" in reason("MatMul (x, w)", {"w": zeros(4, 4).astype(ml_dtypes.bfloat16)})


def test_subgraphs() -> None:
    body = """If (c) <then_branch = t () => (float[2,4] a) { a = MatMul (x, w) },
                     else_branch = e () => (float[2,4] b) { b = Identity (x) }>"""
    assert "subgraphs stay float" in reason(body, {"w": zeros(4, 4)}, "bool c, float[2,4] x")


def test_quantized_neighbours() -> None:
    body = """g (float[2,4] x) => (float[2,4] y, float[2,4] z, float[2,4] u, float[2,4] v) {
        q = QuantizeLinear (x, s, zp) d = DequantizeLinear (q, s, zp) [reads] y = MatMul (d, w)
        [feeds] a = MatMul (x, w) p = QuantizeLinear (a, s, zp) z = DequantizeLinear (p, s, zp)
        dw = DequantizeLinear (wq, s, zw) [weighs] u = MatMul (x, dw) [free] v = MatMul (x, w) }"""
    weights = {
        "w": zeros(4, 4),
        "s": np.float32(1),
        "zp": np.uint8(0),
        "zw": np.int8(0),
        "wq": np.zeros((4, 4), np.int8),
    }
    found, reasons = find_linears(graph_of(body, weights))
    assert [linear.node for linear in found] == ["free"]
    assert set(reasons) == {"reads", "feeds", "weighs"}
    assert all("quantized already" in text for text in reasons.values())


def test_local_functions() -> None:
    proto = parse("g (float[2,4] x) => (float[2,4] y) { [call] y = local.layer (x) }")
    proto.functions.append(
        onnx.parser.parse_function(
            '<domain: "local", opset_import: ["" : 17]> layer (x) => (y) '
            "{ w = Constant <value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> () y = MatMul (x, w) }"
        )
    )
    found, reasons = find_linears(Graph(open_model(proto)))
    assert (found, list(reasons)) == ([], ["call"])
