"""Where a block ends: at the sum with a shortcut, not at masks, biases or rotations."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.model import open_model
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.residual import Block, find_block
from tests.steps.smoothing_models import norm_model
from tools.bench.outliers import llama_block


def block(model: onnx.ModelProto, tensor: str, *layers: str) -> Block:
    found = find_block(Graph(open_model(model)), tensor, layers)
    assert found is not None
    return found


def test_halves_of_a_decoder_layer() -> None:
    attention = block(llama_block(), "norm1.out", "q_proj", "k_proj", "v_proj")
    assert attention.ends == ("residual.out",)
    assert set(attention.given) == {"x", "cos", "sin"}
    assert attention.nodes[-1] == "residual"
    assert {"k_rope", "softmax", "o_proj"} <= set(attention.nodes)
    mlp = block(llama_block(), "norm2.out", "gate", "up")
    assert (mlp.ends, mlp.given) == (("y",), ("residual.out",))
    assert block(llama_block(), "gated.out", "down").nodes == ("down", "output")


def test_one_of_several_layers() -> None:
    """What the other layers make does not depend on it, so it is given."""
    found = block(llama_block(), "norm1.out", "q_proj")
    assert {"k_turned.out", "v.repeated.out"} <= set(found.given)
    assert "k_proj" not in found.nodes


def test_without_a_shortcut_the_outputs_end_it() -> None:
    found = block(norm_model(), "n", "a", "b")
    assert (set(found.ends), found.given) == ({"ya", "yb"}, ())


def test_the_shortcut_of_a_norm_behind_the_sum() -> None:
    """BERT's form: the layers and the shortcut read the same value."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "layer"),
        helper.make_node("Add", ["h", "mask"], ["m"], "masked"),
        helper.make_node("Add", ["m", "x"], ["y"], "sum"),
    ]
    graph = helper.make_graph(
        nodes,
        "post",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in ("x", "mask")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert block(model, "x", "layer") == Block(("layer", "masked", "sum"), ("y",), ("mask", "x"))
