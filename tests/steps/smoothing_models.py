"""Small models for tests of smoothing steps, and the formulas' parts written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.model import open_model
from calib.provider import create_session
from calib.readers import from_iterable, spread
from calib.runner import tap
from onnxslim_ptq import Recipe
from onnxslim_ptq.core.match import Layer
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.steps import STEPS
from onnxslim_ptq.steps.smoothing import Smoothed
from onnxslim_ptq.workspace import Workspace
from tests.steps.layers import place_all

__all__ = [
    "QUANTIZE",
    "Matrix",
    "attention_model",
    "block_loss",
    "config",
    "feeds",
    "int8",
    "known",
    "norm_model",
    "output_error",
    "powers",
    "smoothed",
    "tensors",
    "unchanged",
]

Matrix = np.ndarray
QUANTIZE = {"type": "quantize"}


def config(kind: str, **keys: Any) -> Any:
    return Recipe.load({"steps": [{"type": kind, **keys}, QUANTIZE]}).steps[0]


def smoothed(workspace: Workspace, kind: str, **keys: Any) -> list[Smoothed]:
    """What the step does to the workspace's graph."""
    names = {lin.node: Layer(lin.node, lin.op, lin.weight_name) for lin in find_linears(workspace.graph)[0]}
    step = config(kind, **keys)
    placement = place_all(workspace)
    groups = STEPS[kind].groups(workspace.graph, step, names, placement.layers)
    return STEPS[kind].run(workspace, groups, step, placement)


def norm_model() -> onnx.ModelProto:
    """LayerNormalization -> two MatMuls with biases behind them; channel 3 is an outlier, channel 5 is dead."""
    draw = np.random.default_rng(0)
    gamma = np.ones(8, np.float32)
    beta = draw.normal(0, 0.3, 8).astype(np.float32)
    gamma[3], gamma[5], beta[5] = 40, 0, 0
    constants = {
        "gamma": gamma,
        "beta": beta,
        "wa": draw.normal(0, 1, (8, 6)).astype(np.float32),
        "wb": draw.normal(0, 1, (8, 4)).astype(np.float32),
        "bias_a": draw.normal(0, 1, 6).astype(np.float32),
        "bias_b": draw.normal(0, 1, 4).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "wa"], ["a0"], "a"),
        helper.make_node("Add", ["a0", "bias_a"], ["ya"], "add_a"),
        helper.make_node("MatMul", ["n", "wb"], ["b0"], "b"),
        helper.make_node("Add", ["b0", "bias_b"], ["yb"], "add_b"),
    ]
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", 8])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, "T", n]) for y, n in (("ya", 6), ("yb", 4))],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(count: int = 6, tokens: int = 8) -> list[dict[str, Matrix]]:
    draw = np.random.default_rng(1)
    return [{"x": draw.normal(size=(1, tokens, 8)).astype(np.float32)} for _ in range(count)]


def tensors(model: Any, names: list[str], data: list[dict[str, Matrix]]) -> list[Matrix]:
    """Each tensor over all samples, [rows, channels]."""
    session = create_session(tap(model, names).SerializeToString(), model.weights)
    runs = [session.run(names, feed) for feed in data]
    return [np.concatenate([run[i].reshape(-1, run[i].shape[-1]) for run in runs]) for i in range(len(names))]


def known() -> tuple[Matrix, Matrix]:
    """The activation of the group, and its weights side by side, in float64."""
    model = open_model(norm_model())
    rows = tensors(model, ["n"], feeds())[0].astype(np.float64)
    values = {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    return rows, np.concatenate([values["wa"], values["wb"]], axis=1).astype(np.float64)


def int8(weight: Matrix) -> Matrix:
    step = np.abs(weight).max(axis=0) / 127
    return np.asarray(np.rint(weight / step) * step)


def output_error(rows: Matrix, weight: Matrix, scale: Matrix, shift: Matrix | float = 0.0) -> float:
    """RMS of the relative output error with 8-bit activations (asymmetric) and int8 weights."""
    x = (rows - shift) / scale
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    step = (hi - lo) / 255
    seen = np.rint(x / step) * step
    exact = rows @ weight
    off = seen @ int8(weight * scale[:, None]) + (np.broadcast_to(shift, rows.shape[1]) @ weight) - exact
    return float(np.sqrt((off**2).mean()) / np.sqrt((exact**2).mean()))


def block_loss(scale: Matrix, quantized_input: bool) -> float:
    """Mean over 4 samples and both outputs of `norm_model`, which end its block, of |y' - y|² / |y|²."""
    model = open_model(norm_model())
    few = [feed for _, feed in spread(from_iterable(feeds(), model.inputs()), 4)]
    rows, weight = known()
    x_all = rows / scale
    lo, hi = min(x_all.min(), 0.0), max(x_all.max(), 0.0)
    step = (hi - lo) / 255
    zero = np.rint(-lo / step)
    losses = []
    for feed in few:
        n, *exact = (v.astype(np.float64) for v in tensors(model, ["n", "ya", "yb"], [feed]))
        x = n / scale
        if quantized_input:
            x = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
        change = x @ int8(weight * scale[:, None]) - n @ weight
        parts = zip((change[:, :6], change[:, 6:]), exact, strict=True)
        losses.append(np.mean([(c**2).sum() / (y**2).sum() for c, y in parts]))
    return float(np.mean(losses))


def powers(act: Matrix, weight: Matrix, alpha: float, beta: float) -> Matrix:
    alive = (act > 0) & (weight > 0)
    scale = np.ones(len(act))
    scale[alive] = np.maximum(act[alive] ** alpha / weight[alive] ** beta, 1e-5)
    return scale


def attention_model(heads: int = 2, size: int = 4) -> onnx.ModelProto:
    """Self-attention with separate projections and biases, as BERT has it; one key channel is large."""
    draw = np.random.default_rng(3)
    width = heads * size
    bias = np.zeros(width, np.float32)
    bias[2] = 30
    constants: dict[str, Matrix] = {"bk": bias, "root": np.asarray(size**0.5, np.float32)}
    constants |= {f"w{n}": draw.normal(size=(width, width)).astype(np.float32) for n in "qkvo"}
    constants |= {f"b{n}": draw.normal(size=width).astype(np.float32) for n in "qv"}
    constants["shape"] = np.array([0, 0, heads, size])
    constants["joined"] = np.array([0, 0, width])
    nodes = []
    for n, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["x", f"w{n}"], [f"{n}0"], f"{n}_proj"),
            helper.make_node("Add", [f"{n}0", f"b{n}"], [f"{n}1"], f"{n}_bias"),
            helper.make_node("Reshape", [f"{n}1", "shape"], [f"{n}2"], f"{n}_heads"),
            helper.make_node("Transpose", [f"{n}2"], [n], f"{n}_turn", perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["s0"], "scores"),
        helper.make_node("Div", ["s0", "root"], ["s1"], "scaled"),
        helper.make_node("Softmax", ["s1"], ["p"], "softmax"),
        helper.make_node("MatMul", ["p", "v"], ["m"], "mix"),
        helper.make_node("Transpose", ["m"], ["t"], "turn", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "joined"], ["j"], "join"),
        helper.make_node("MatMul", ["j", "wo"], ["y"], "o_proj"),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", width])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def unchanged(before: onnx.ModelProto, workspace: Workspace, data: list[dict[str, Matrix]]) -> None:
    names = [o.name for o in before.graph.output]
    pairs = zip(
        tensors(open_model(before), names, data), tensors(workspace.model(), names, data), strict=True
    )
    for y, z in pairs:
        np.testing.assert_allclose(z, y, atol=1e-5 * max(float(np.abs(y).max()), 1.0))
