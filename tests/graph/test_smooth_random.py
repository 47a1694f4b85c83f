"""Random graphs of layers, norms, attention, sums, products and moves: whatever is found keeps the function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxslim_ptq.graph.smooth_groups import GroupKind
from tests.graph.smoothing import FOLDED, preserved

WIDTH = 8
SEEDS = range(48)


class Builder:
    """Grows a graph from x [B, T, 8]: ``values`` are names with their numbers of channels, 8 or 16."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.values: list[tuple[str, int]] = [("x", WIDTH)]

    def op(self, op: str, *inputs: str, outputs: int = 1, **attrs: object) -> list[str]:
        made = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, f"n{len(self.nodes)}", **attrs))
        return made

    def constant(self, values: object) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def normal(self, *shape: int) -> str:
        values = self.rng.standard_normal(shape)
        scaled = 1 + 0.3 * values if len(shape) == 1 else values / np.sqrt(shape[0])
        return self.constant(scaled.astype(np.float32))

    def pick(self, channels: int | None = None) -> tuple[str, int]:
        recent = [v for v in self.values[-6:] if channels is None or v[1] == channels] or [("x", WIDTH)]
        return recent[int(self.rng.integers(len(recent)))]

    def grow(self) -> None:
        name, channels = self.pick()
        rule = RULES[int(self.rng.integers(len(RULES)))]
        self.values += rule(self, name, channels)

    def model(self) -> onnx.ModelProto:
        for _ in range(int(self.rng.integers(5, 14))):
            self.grow()
        ends = [
            self.op("MatMul", n, self.normal(c, 4))[0] for n, c in dict.fromkeys([self.pick(), self.pick()])
        ]
        results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ends]
        source = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", "T", WIDTH])
        graph = helper.make_graph(self.nodes, "g", [source], results, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


Values = list[tuple[str, int]]


def layer(b: Builder, name: str, channels: int) -> Values:
    wide = int(b.rng.choice([8, 16]))
    product = b.op("MatMul", name, b.normal(channels, wide))[0]
    return [(b.op("Add", b.normal(wide), product)[0] if b.rng.random() < 0.6 else product, wide)]


def norm(b: Builder, name: str, channels: int) -> Values:
    return [(b.op("LayerNormalization", name, b.normal(channels), b.normal(channels))[0], channels)]


def function(b: Builder, name: str, channels: int) -> Values:
    return [(b.op(str(b.rng.choice(["Relu", "LeakyRelu", "Sigmoid"])), name)[0], channels)]


def factor(b: Builder, name: str, channels: int) -> Values:
    return [(b.op("Mul", name, b.normal(channels))[0], channels)]


def combine(b: Builder, name: str, channels: int) -> Values:
    other, size = b.pick(channels)
    if size != channels:
        return []
    return [(b.op(str(b.rng.choice(["Add", "Sub", "Mul"])), name, other)[0], channels)]


def gate(b: Builder, name: str, channels: int) -> Values:
    other, size = b.pick(channels)
    return [(b.op("Mul", b.op("Sigmoid", other)[0], name)[0], channels)] if size == channels else []


def parts(b: Builder, name: str, channels: int) -> Values:
    if channels == WIDTH:
        return []
    halves = b.op("Split", name, b.constant(np.array([8, 8])), outputs=2, axis=-1)
    return [(half, WIDTH) for half in halves]


def mixed(b: Builder, name: str, channels: int) -> Values:
    """Channels in another order, some twice; rows of half the length."""
    if b.rng.random() < 0.5:
        return [
            (b.op("Gather", name, b.constant(b.rng.integers(0, channels, channels)), axis=2)[0], channels)
        ]
    rows = b.op("Reshape", name, b.constant(np.array([0, -1, channels // 2])))[0]
    return [(b.op("Reshape", rows, b.constant(np.array([0, -1, channels])))[0], channels)]


def attention(b: Builder, name: str, channels: int) -> Values:
    heads = int(b.rng.choice([2, 4]))
    own = int(b.rng.choice([1, heads]))
    width = channels // heads
    split = b.op("Reshape", name, b.constant(np.array([0, 0, heads, width])))[0]
    query = b.op("Transpose", split, perm=[0, 2, 1, 3])[0]
    key = b.op("Transpose", query, perm=[0, 1, 3, 2])[0]
    probabilities = b.op("Softmax", b.op("MatMul", query, key)[0], axis=-1)[0]
    value = b.op("MatMul", name, b.normal(channels, own * width))[0]
    value = b.op("Reshape", value, b.constant(np.array([0, 0, own, width])))[0]
    value = b.op("Transpose", value, perm=[0, 2, 1, 3])[0]
    if own < heads and b.rng.random() < 0.5:
        value = b.op("Expand", value, b.constant(np.array([1, heads, 1, 1])))[0]
    result = b.op("Transpose", b.op("MatMul", probabilities, value)[0], perm=[0, 2, 1, 3])[0]
    return [(b.op("Reshape", result, b.constant(np.array([0, 0, channels])))[0], channels)]


RULES: list[Callable[[Builder, str, int], Values]] = [
    layer, layer, layer, norm, function, factor, combine, gate, parts, mixed, attention,
]  # fmt: skip


@pytest.mark.parametrize("kinds", [None, FOLDED], ids=["all", "folded"])
def test_outputs_stay(kinds: frozenset[GroupKind] | None) -> None:
    seen: Counter[GroupKind] = Counter()
    for seed in SEEDS:
        seen.update(group.kind for group in preserved(Builder(seed).model(), kinds, 1e-3))
    wanted = {GroupKind.NORM_LINEAR, GroupKind.LINEAR_LINEAR, GroupKind.OV, GroupKind.UP_DOWN}
    assert wanted <= set(seen), seen
