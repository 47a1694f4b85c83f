"""Models whose activations have outlier channels by construction, with the same float function as the untouched ones.

In large transformers a few channels behind each norm are a hundred times larger than the rest. Here 1 % of the
channels at each norm are multiplied by 100 and the weights that read them divided by 100: a quantizer that looks at
whole tensors collapses, one that smooths does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.model import open_model
from onnxslim_ptq import quantize
from onnxslim_ptq.graph.edit import own_constant
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup, find_groups, smooth

Feed = dict[str, np.ndarray]
PLAIN: Mapping[str, Any] = {"steps": [{"type": "quantize"}]}
RECIPES: Mapping[str, Any] = {
    "plain": PLAIN,
    "w8a8": "w8a8",
    "smoothquant": "w8a8-smoothquant",
    "m3": "w8a8-m3",
    "m4": "w8a8-m4",
    "m6": "w8a8-m6",
    "transformer": "w8a8-transformer",
}


def with_outliers(
    model: str | Path | onnx.ModelProto, share: float = 0.01, factor: float = 100.0, seed: int = 0
) -> onnx.ModelProto:
    """The model with ``share`` of the channels (at least one) at each norm ``factor`` times as large."""
    graph = Graph(open_model(model))
    optimize(graph)
    draw = np.random.default_rng(seed)
    groups = [g for g in find_groups(graph) if g.kind is GroupKind.NORM_LINEAR or _behind_norm(graph, g)]
    for group in groups:
        scale = np.ones(group.scales)
        count = max(1, round(share * group.scales))
        scale[draw.choice(group.scales, count, replace=False)] = 1 / factor
        if group.kind is GroupKind.NORM_LINEAR:
            smooth(graph, group, scale)
        else:
            _enlarge(graph, group, scale)
    if not groups:
        raise ValueError("the model has no norm that can take outliers")
    made = graph.to_model()
    for tensor in made.proto.graph.initializer:
        if tensor.name in made.weights:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(made.weights[tensor.name]), tensor.name))
    return made.proto


def _behind_norm(graph: Graph, group: SmoothGroup) -> bool:
    """Whether the group reads a LayerNormalization that a residual sum reads as well (transformers of BERT's kind)."""
    maker = graph.producer(graph.tensor(group.tensor))
    return group.kind is GroupKind.UNFUSED and maker is not None and maker.op == "LayerNormalization"


def _enlarge(graph: Graph, group: SmoothGroup, scale: np.ndarray) -> None:
    """Divide the norm by ``scale``, multiply the layers that read it, and give all other readers a Mul by it."""
    tensor = graph.tensor(group.tensor)
    norm = graph.producer(tensor)
    assert norm is not None
    for port in range(1, len(norm.inputs)):
        values = np.asarray(graph.value(norm.inputs[port]))
        own_constant(graph, norm, port, (values / scale).astype(values.dtype))
    layers = {layer.node for layer in group.consumers}
    for layer in group.consumers:
        node = graph.node(layer.node)
        weight = np.asarray(graph.value(node.inputs[layer.weight]))
        transposed = node.op == "Gemm" and node.attrs.get("transB", 0)
        own_constant(
            graph,
            node,
            layer.weight,
            (weight * (scale if transposed else scale[:, None])).astype(weight.dtype),
        )
    others = [node for node in graph.consumers(tensor) if node.name not in layers]
    if others:
        back = graph.variable(f"{group.tensor}.back")
        inputs = [tensor, graph.constant(f"{group.tensor}.scale", scale.astype(np.float32))]
        graph.add_node("Mul", f"{group.tensor}.Back", inputs, [back])
        for node in others:
            for port in [p for p, t in enumerate(node.inputs) if t is tensor]:
                graph.set_input(node, port, back)


def compare_recipes(
    model: str | Path | onnx.ModelProto,
    calibration: Sequence[Feed],
    evaluation: Sequence[Feed],
    recipes: Mapping[str, Any] = RECIPES,
) -> dict[str, tuple[float, float]]:
    """Recipe -> SQNR in dB of the worst output, on the untouched model and on the one with outliers."""
    altered = with_outliers(model)

    def measured(source: str | Path | onnx.ModelProto, recipe: Any) -> float:
        result = quantize(source, recipe, list(calibration), eval_data=list(evaluation), min_sqnr=0)
        return float(result.metrics["sqnr_db"])

    return {name: (measured(model, recipe), measured(altered, recipe)) for name, recipe in recipes.items()}


def llama_block(
    width: int = 64, heads: int = 4, groups: int = 2, hidden: int = 160, seed: int = 0
) -> onnx.ModelProto:
    """One LLaMA-style decoder block, opset 17, as exporters write it: RMSNorm in pieces, GQA with RoPE, gated MLP.

    Input ``x`` float32 [1, T, width] and its rotation tables ``cos``, ``sin`` [1, 1, T, width / heads]; output ``y``.
    """
    return _Block(width, heads, groups, hidden, np.random.default_rng(seed)).build()


def llama_feeds(count: int, width: int = 64, heads: int = 4, tokens: int = 32, seed: int = 1) -> list[Feed]:
    """Random inputs of `llama_block`; a few channels are larger than the others, as in trained models."""
    draw = np.random.default_rng(seed)
    size = width // heads
    angle = np.arange(tokens)[:, None] / 10000 ** (np.arange(size // 2) * 2 / size)
    turns = np.concatenate([angle, angle], axis=1).astype(np.float32)[None, None]
    spread = np.exp(np.random.default_rng(0).normal(0, 0.5, width)).astype(np.float32)
    return [
        {
            "x": (draw.normal(size=(1, tokens, width)) * spread).astype(np.float32),
            "cos": np.cos(turns),
            "sin": np.sin(turns),
        }
        for _ in range(count)
    ]


class _Block:
    def __init__(self, width: int, heads: int, groups: int, hidden: int, draw: np.random.Generator) -> None:
        self.width, self.heads, self.groups, self.hidden = width, heads, groups, hidden
        self.size = width // heads
        self.draw = draw
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def build(self) -> onnx.ModelProto:
        x = self.add("residual", "x", self.attention(self.norm("norm1", "x")), op="Add")
        normed = self.norm("norm2", x)
        gate = self.linear("gate", normed, self.width, self.hidden)
        silu = self.add("silu", gate, self.add("sigmoid", gate, op="Sigmoid"), op="Mul")
        gated = self.add("gated", silu, self.linear("up", normed, self.width, self.hidden), op="Mul")
        down = self.linear("down", gated, self.hidden, self.width)
        self.nodes.append(helper.make_node("Add", [x, down], ["y"], "output"))
        rope: list[int | str | None] = [1, 1, "T", self.size]
        hidden: list[int | str | None] = [1, "T", self.width]
        inputs = [("x", hidden), ("cos", rope), ("sin", rope)]
        graph = helper.make_graph(
            self.nodes,
            "llama_block",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", self.width])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model

    def add(self, name: str, *inputs: str, op: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name, **attrs))
        return f"{name}.out"

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def linear(self, name: str, x: str, inputs: int, outputs: int) -> str:
        weight = self.draw.normal(0, inputs**-0.5, (inputs, outputs))
        return self.add(name, x, self.constant(f"{name}.weight", weight), op="MatMul")

    def norm(self, name: str, x: str) -> str:
        square = self.add(f"{name}.square", x, self.constant(f"{name}.two", 2.0), op="Pow")
        mean = self.add(f"{name}.mean", square, op="ReduceMean", axes=[-1], keepdims=1)
        root = self.add(
            f"{name}.root",
            self.add(f"{name}.eps", mean, self.constant(f"{name}.epsilon", 1e-5), op="Add"),
            op="Sqrt",
        )
        unit = self.add(f"{name}.unit", x, root, op="Div")
        weight = np.exp(self.draw.normal(0, 0.3, self.width))
        return self.add(name, self.constant(f"{name}.weight", weight), unit, op="Mul")

    def attention(self, x: str) -> str:
        q = self.rope("q_rope", self.split("q", self.linear("q_proj", x, self.width, self.width), self.heads))
        k = self.kv("k", x, lambda value: self.rope("k_rope", value))
        v = self.kv("v", x, lambda value: value)
        scores = self.add(
            "scores", q, self.add("k_turned", k, op="Transpose", perm=[0, 1, 3, 2]), op="MatMul"
        )
        scaled = self.add("scaled", scores, self.constant("root_size", self.size**0.5), op="Div")
        mixed = self.add("mixed", self.add("softmax", scaled, op="Softmax", axis=-1), v, op="MatMul")
        turned = self.add("turned", mixed, op="Transpose", perm=[0, 2, 1, 3])
        joined = self.add(
            "joined", turned, self.constant("joined.shape", [0, 0, self.width], np.int64), op="Reshape"
        )
        return self.linear("o_proj", joined, self.width, self.width)

    def split(self, name: str, x: str, heads: int) -> str:
        shape = self.constant(f"{name}.shape", [0, 0, heads, self.size], np.int64)
        return self.add(
            f"{name}.heads",
            self.add(f"{name}.parts", x, shape, op="Reshape"),
            op="Transpose",
            perm=[0, 2, 1, 3],
        )

    def kv(self, name: str, x: str, turn: Callable[[str], str]) -> str:
        """Keys or values of the few groups, repeated for every query head."""
        made = self.split(
            name, self.linear(f"{name}_proj", x, self.width, self.groups * self.size), self.groups
        )
        repeat = self.heads // self.groups
        axes = self.constant(f"{name}.axes", [2], np.int64)
        tiled = self.add(
            f"{name}.tiled",
            self.add(f"{name}.wide", turn(made), axes, op="Unsqueeze"),
            self.constant(f"{name}.repeats", [1, 1, repeat, 1, 1], np.int64),
            op="Tile",
        )
        shape = self.constant(f"{name}.all", [0, self.heads, -1, self.size], np.int64)
        return self.add(f"{name}.repeated", tiled, shape, op="Reshape")

    def rope(self, name: str, x: str) -> str:
        half, end = self.size // 2, self.size
        axis = self.constant(f"{name}.axis", [3], np.int64)

        def part(which: str, lo: int, hi: int) -> str:
            lo_, hi_ = (
                self.constant(f"{name}.{which}.{k}", [v], np.int64) for k, v in (("lo", lo), ("hi", hi))
            )
            return self.add(f"{name}.{which}", x, lo_, hi_, axis, op="Slice")

        turned = self.add(
            f"{name}.turned",
            self.add(f"{name}.negative", part("second", half, end), op="Neg"),
            part("first", 0, half),
            op="Concat",
            axis=-1,
        )
        return self.add(
            name,
            self.add(f"{name}.cos", x, "cos", op="Mul"),
            self.add(f"{name}.sin", turned, "sin", op="Mul"),
            op="Add",
        )
