"""The lowest IR version follows from opsets and features, not from what this machine's onnx writes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxslim_ptq.graph.ir import lowest_ir
from tests.graph.models import parse


def model(opset: int = 9, ir: int = 13) -> onnx.ModelProto:
    return parse("g (float[4] x) => (float[4] y) { y = Relu (x) }", opset=opset, ir=ir)


@pytest.mark.parametrize(
    ("opset", "ir"), [(7, 3), (9, 4), (10, 5), (11, 6), (13, 7), (15, 8), (19, 9), (21, 10), (23, 11)]
)
def test_opsets(opset: int, ir: int) -> None:
    assert lowest_ir(model(opset)) == ir
    assert lowest_ir(model(opset, ir=3)) == ir  # raised where the source declares too little


def test_other_domains_do_not_count() -> None:
    proto = model()
    proto.opset_import.add(domain="com.vendor", version=999)
    assert lowest_ir(proto) == 4


def test_initializers() -> None:
    proto = model(7)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "x"))
    assert lowest_ir(proto) == 3
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "k"))
    assert lowest_ir(proto) == 4


@pytest.mark.parametrize(
    ("dtype", "ir"), [("float8_e4m3fn", 9), ("int4", 10), ("float4_e2m1fn", 11), ("bfloat16", 4)]
)
def test_types(dtype: str, ir: int) -> None:
    proto = model(7)
    proto.graph.initializer.append(
        numpy_helper.from_array(np.zeros(4).astype(getattr(ml_dtypes, dtype)), "k")
    )
    assert lowest_ir(proto) == ir


def test_types_of_attributes_and_values() -> None:
    proto = model()
    value = numpy_helper.from_array(np.zeros(4, ml_dtypes.int4))
    proto.graph.node.append(helper.make_node("Constant", [], ["k"], value=value))
    assert lowest_ir(proto) == 10
    proto = model()
    proto.graph.value_info.append(helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT8E5M2, [4]))
    assert lowest_ir(proto) == 9


def test_functions_and_sparse_tensors() -> None:
    proto = model()
    values, indices = (
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64)),
    )
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    assert lowest_ir(proto) == 6
    proto.functions.append(
        onnx.parser.parse_function('<domain: "f", opset_import: ["" : 9]> f (x) => (y) { y = Relu (x) }')
    )
    assert lowest_ir(proto) == 8


@pytest.mark.parametrize(("source", "ir"), [(8, 8), (10, 10), (13, 10)])
def test_metadata_never_raises(source: int, ir: int) -> None:
    proto = model(ir=source)
    proto.graph.node[0].metadata_props.add(key="scope", value="layer")
    assert lowest_ir(proto) == ir
