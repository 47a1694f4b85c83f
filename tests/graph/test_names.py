"""Module names: by weight, by dynamo's scopes, by node path, by the user; and patterns that use them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from calib.model import open_model
from onnxslim_ptq import quantize
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.names import module_name, module_names

TWO = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,32] x) => (float[N,32] y) {
  ["/blocks.0/fc/MatMul"] a = MatMul(x, w)  b = Relu(a)  ["/blocks.1/fc/MatMul"] y = MatMul(b, v)
}"""


def model(first: str = "onnx::MatMul_7", second: str = "onnx::MatMul_9") -> onnx.ModelProto:
    proto = onnx.parser.parse_model(TWO.replace("w)", "first)").replace("v)", "second)"))
    draw = np.random.default_rng(0)
    for node, name in zip((proto.graph.node[0], proto.graph.node[2]), (first, second), strict=True):
        node.input[1] = name
    for name in dict.fromkeys((first, second)):
        values = draw.normal(size=(32, 32)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def names_of(proto: onnx.ModelProto, given: dict[str, str] | None = None) -> dict[str, str]:
    graph = Graph(open_model(proto))
    return module_names(graph, find_linears(graph)[0], given)


def test_the_weight_comes_first_then_the_path() -> None:
    assert names_of(model("blocks.0.attn.to_q.weight")) == {
        "/blocks.0/fc/MatMul": "blocks.0.attn.to_q",
        "/blocks.1/fc/MatMul": "blocks.1.fc",
    }


def test_dynamo_notes_the_module_of_a_node() -> None:
    proto = model("val_3")
    note = proto.graph.node[0].metadata_props.add()
    note.key, note.value = "pkg.torch.onnx.name_scopes", "['', 'blocks.0', 'blocks.0.attn', 'linear_4']"
    assert names_of(proto)["/blocks.0/fc/MatMul"] == "blocks.0.attn"
    assert module_name("w_1", "node_linear", "blocks.0.attn") == "blocks.0.attn"


def test_a_shared_weight_gives_two_names() -> None:
    assert list(names_of(model("fc.weight", "fc.weight")).values()) == ["fc", "fc#2"]


def test_the_user_knows_best_and_may_take_a_name() -> None:
    given = {"/blocks.1/fc/MatMul": "blocks.0.fc"}
    assert list(names_of(model(), given).values()) == ["blocks.0.fc#2", "blocks.0.fc"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"/blocks.2/fc/MatMul": "a"}, "names: node '/blocks.2/fc/MatMul' is no layer"),
        ({"/blocks.0/fc/MatMul": "a", "/blocks.1/fc/MatMul": "a"}, "names: module 'a' is given to several"),
    ],
)
def test_a_map_that_fits_nothing_is_an_error(given: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        quantize(model(), {"names": given, "steps": [{"type": "quantize"}]})


def test_patterns_see_modules() -> None:
    recipe = {
        "names": {"/blocks.1/fc/MatMul": "head"},
        "steps": [{"type": "quantize", "exclude": ["blocks.0.*", "head"], "act": None}],
    }
    with pytest.raises(Exception, match="no layer can be quantized"):
        quantize(model(), recipe, target="generic")
    recipe["steps"] = [{"type": "quantize", "exclude": ["head"], "act": None}]
    result = quantize(model(), recipe, target="generic")
    assert result.skipped == {"/blocks.1/fc/MatMul": "excluded by pattern 'head'"}
    assert result.context.recipe["names"] == {"/blocks.1/fc/MatMul": "head"}
