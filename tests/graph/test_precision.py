"""Models that were quantized before are recognised wherever their integer operators are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from calib.model import open_model
from onnxslim_ptq.graph.precision import already_quantized
from tests.graph.models import model_of, parse


@pytest.mark.parametrize(
    "op",
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
        "MatMulNBits",
        "QGemm",
        "QLinearAdd",
        "QAttention",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "AscendQuant",
        "QOrderedMatMul",
    ],
)
def test_operators(op: str) -> None:
    assert already_quantized(model_of(f"g (float[4] x) => (float[4] y) {{ [it] y = {op} (x) }}")) == ["it"]


@pytest.mark.parametrize("op", ["Conv", "Quaternion", "Relu", "Cast", "BitShift"])
def test_float_operators(op: str) -> None:
    assert already_quantized(model_of(f"g (float[4] x) => (float[4] y) {{ y = {op} (x) }}")) == []


def test_subgraphs_and_functions() -> None:
    proto = parse("""g (bool c, float[4] x) => (float[4] y) {
        y = If (c) <then_branch = t () => (float[4] a) { q, s, z = DynamicQuantizeLinear (x)
                        a = DequantizeLinear (q, s, z) },
                    else_branch = e () => (float[4] b) { b = local.f (x) }> }""")
    proto.functions.append(
        onnx.parser.parse_function(
            '<domain: "local", opset_import: ["" : 17]> f (x) => (y) '
            "{ q, s, z = DynamicQuantizeLinear (x) y = Cast <to = 1> (q) }"
        )
    )
    assert already_quantized(open_model(proto)) == [
        "DynamicQuantizeLinear_q",
        "DequantizeLinear_a",
        "f/DynamicQuantizeLinear_q",
    ]


@pytest.mark.network
@pytest.mark.parametrize(("name", "integer"), [("voicefilter-int8", True), ("rec", False), ("silero", False)])
def test_real_models(name: str, integer: bool) -> None:
    from tools.zoo import ZooUnavailable, load

    try:
        case = load(name)
    except ZooUnavailable as error:
        pytest.skip(str(error))
    assert bool(already_quantized(open_model(case.model))) is integer


def test_integer_weights_alone_are_no_quantization() -> None:
    assert (
        already_quantized(
            model_of("g (int64[1] i) => (int8[4] y) { y = Gather (w, i) }", {"w": np.zeros((9, 4), np.int8)})
        )
        == []
    )
