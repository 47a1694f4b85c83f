"""Outlier channels leave the integer product and are multiplied beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.model import open_model
from onnxslim_ptq import quantize
from onnxslim_ptq.analysis.beside import smoothed_as
from onnxslim_ptq.core.spec import PerToken
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.steps.split_outliers import outliers
from tests.models import feeds_for, mlp, outputs_of, parse, sqnr_of
from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import config, smoothed, tensors, unchanged
from tools.bench.outliers import llama_block, llama_feeds, with_outliers

CHANNELS = 64
LOUD = (7, 40)


def model(op: str = "MatMul", trans: int = 0, bias: bool = True) -> onnx.ModelProto:
    """Two layers that read one Mul, of whose channels two are three hundred times larger than the others."""
    draw = np.random.default_rng(0)
    gain = np.ones(CHANNELS, np.float32)
    gain[list(LOUD)] = 300
    constants = {"gain": gain}
    nodes = [helper.make_node("Mul", ["x", "gain"], ["h"], "source")]
    for name, width in (("a", 24), ("b", 16)):
        weight = draw.normal(0, 0.1, (CHANNELS, width)).astype(np.float32)
        constants |= {f"w{name}": np.ascontiguousarray(weight.T) if trans else weight}
        constants |= {f"c{name}": draw.normal(size=width).astype(np.float32)}
        if op == "Gemm":
            inputs = ["h", f"w{name}", *([f"c{name}"] if bias else [])]
            nodes.append(
                helper.make_node(op, inputs, [f"y{name}"], name, transB=trans, alpha=1.0 if bias else 0.5)
            )
        else:
            nodes.append(helper.make_node(op, ["h", f"w{name}"], [f"m{name}"], name))
            nodes.append(helper.make_node("Add", [f"m{name}", f"c{name}"], [f"y{name}"], f"{name}_bias"))
    shape = ["N", CHANNELS]
    graph = helper.make_graph(
        nodes,
        "loud",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["N", n]) for y, n in (("ya", 24), ("yb", 16))],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def data(count: int = 8) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(1)
    return [{"x": draw.normal(size=(16, CHANNELS)).astype(np.float32)} for _ in range(count)]


def test_outliers_are_what_the_formula_says() -> None:
    size = np.array([1.0, 90, 2, 3.9, 800, 4, 2, 4.1, 3, 2])
    assert outliers(size, size / 9, share=0.2, ratio=8) == (1, 4)  # A' = 4.1
    assert outliers(size, size / 9, share=0.1, ratio=8) == (4,)  # A' = 90, and only 800 is above 180
    assert outliers(size, size / 9, share=0.1, ratio=9) == ()
    few = np.array([5.0, 0, 0])
    assert outliers(few, few, 0.01, 8) == ()
    assert outliers(few[:1], few[:1], 0.5, 2) == ()


def test_a_channel_that_is_loud_once_stays() -> None:
    size = np.array([1.0, 90, 2, 3.9, 800, 4, 2, 4.1, 3, 2])
    usual = np.array([0.1, 9, 0.2, 0.4, 0.3, 0.4, 0.2, 0.4, 0.3, 0.2])
    assert outliers(size, usual, share=0.2, ratio=8) == (1,)


@pytest.mark.parametrize(
    ("op", "trans", "bias"), [("MatMul", 0, True), ("Gemm", 0, False), ("Gemm", 1, True)]
)
def test_the_function_stays_and_the_layers_see_no_outlier(op: str, trans: int, bias: bool) -> None:
    proto = model(op, trans, bias)
    workspace = workspace_of(proto, data())
    (found,) = smoothed(workspace, "split_outliers", share=0.05)
    assert found.channels == LOUD
    assert set(found.nodes) == {"a", "b"}
    assert found.as_json()["channels"] == list(LOUD)
    read = workspace.graph.node("a").inputs[0].name
    rows, before = tensors(workspace.model(), [read], data())[0], tensors(open_model(proto), ["h"], data())[0]
    expected = before.copy()
    expected[:, LOUD] = 0
    np.testing.assert_array_equal(rows, expected)
    weight = workspace.graph.value(workspace.graph.node("a").inputs[1])
    assert weight is not None
    assert not (weight.T if trans else weight)[list(LOUD)].any()
    unchanged(proto, workspace, data())


def test_a_decoder_block_keeps_its_function() -> None:
    """Norms feed three and two layers; each value is split once, for all that read it."""
    proto = with_outliers(llama_block())
    workspace = workspace_of(proto, llama_feeds(4))
    found = smoothed(workspace, "split_outliers", share=0.02, ratio=4)
    assert [one.nodes for one in found] == [("q_proj", "k_proj", "v_proj"), ("gate", "up")]
    unchanged(proto, workspace, llama_feeds(4))
    assert smoothed(workspace, "split_outliers", share=0.02, ratio=4) == []  # what is gone is not taken again


def test_nothing_stands_out() -> None:
    quiet = model()
    quiet.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(CHANNELS, np.float32), "gain"))
    assert smoothed(workspace_of(quiet, data()), "split_outliers", share=0.05) == []


def test_a_layer_of_the_group_reads_the_value_transposed() -> None:
    draw = np.random.default_rng(0)
    gain = np.ones(16, np.float32)
    gain[3] = 300
    weights = {name: draw.normal(0, 0.1, (16, 8)).astype(np.float32) for name in ("wa", "wb")}
    proto = parse(
        """g (float[N,4,16] x) => (float[N,4,8] ya, float[4,N,8] yb) {
            [source] h = Mul (x, gain)
            [a] ya = MatMul (h, wa)
            [turn] t = Transpose <perm = [1, 0, 2]> (h)
            [b] yb = MatMul (t, wb)
        }""",
        {"gain": gain, **weights},
        17,
    )
    feeds = [{"x": draw.normal(size=(2, 4, 16)).astype(np.float32)} for _ in range(4)]
    workspace = workspace_of(proto, feeds)
    (found,) = smoothed(workspace, "split_outliers", share=0.1)
    assert found.nodes == ("a", "b")
    unchanged(proto, workspace, feeds)


def test_the_weights_json_tells_how_to_split_again(tmp_path: Path) -> None:
    """The second time takes what stands out of the rest; its groups are those of the first."""
    proto = model()
    gain = np.ones(CHANNELS, np.float32)
    gain[list(LOUD)] = 30_000, 100
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(gain, "gain"))
    onnx.save(proto, tmp_path / "float.onnx")
    split = {"type": "split_outliers", "share": 0.02}
    steps = [split, split, {"type": "smoothquant"}, {"type": "quantize"}]
    result = quantize(tmp_path / "float.onnx", {"steps": steps}, data(), min_sqnr=0)
    assert [entry.get("channels") for entry in result.context.smoothing] == [[7], [40], None]
    again = smoothed_as(result.source, result.save(tmp_path / "int8.onnx").model)
    assert again is not None
    assert again.proto.SerializeToString() == result.exact.proto.SerializeToString()


@pytest.mark.parametrize(
    ("keys", "text"),
    [({"share": 0}, "share"), ({"share": 0.6}, "share"), ({"ratio": 1}, "ratio"), ({"groups": []}, "groups")],
)
def test_refused(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        config("split_outliers", **keys)


def test_quantized_with_outliers_aside() -> None:
    """All that the outlier channels carry is exact, and the others get the range they need."""
    proto = model()
    static = {"type": "quantize", "act": {"range": {"type": "minmax"}}}
    split = {"type": "split_outliers", "share": 0.05}
    exact, found = outputs_of(proto, data()), {}
    for name, steps in (("plain", [static]), ("split", [split, static])):
        result = quantize(proto, {"steps": steps}, data(), min_sqnr=0)
        found[name] = sqnr_of(exact, outputs_of(result.model, data()))
        taken = [note for note in result.notes if "split_outliers took 2 channels" in note]
        assert bool(taken) == (name == "split")
    assert found["split"] > found["plain"] + 20


def test_the_recipe_for_decoders_takes_gated_projections_per_token() -> None:
    result = quantize(llama_block(), "w8a8-decoder", llama_feeds(8))
    rows = {
        use.node for use, slot in result.plan.activations.items() if isinstance(slot.spec.grain, PerToken)
    }
    assert rows == {"down"}
    plain = quantize(mlp(), "w8a8-decoder", feeds_for(mlp()))  # a model without such a group
    assert not any(isinstance(slot.spec.grain, PerToken) for slot in plain.plan.activations.values())
