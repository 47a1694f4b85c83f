"""Networks of the usual kinds, built with onnx's helpers and random weights: ResNet-18, MobileNet, BERT.

The weights are scaled so that values keep their size; BatchNormalization and dynamic batch as exporters write them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["bert", "mobilenet", "resnet18"]

_OPSET, _IR = 17, 8


@dataclass
class _Net:
    """Collects nodes and weights; every method returns the name of its output."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def add(self, op: str, inputs: list[str], name: str = "", **attrs: Any) -> str:
        name = name or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"{name}.out"], name, **attrs))
        return f"{name}.out"

    def constant(self, name: str, values: NDArray[Any]) -> str:
        self.weights[name] = values
        return name

    def normal(self, name: str, *shape: int, scale: float = 1.0) -> str:
        return self.constant(name, (self.rng.standard_normal(shape) * scale).astype(np.float32))

    def conv(self, x: str, name: str, inp: int, out: int, k: int, stride: int = 1, group: int = 1) -> str:
        """Conv without bias and the BatchNormalization behind it."""
        fan = inp // group * k * k
        w = self.normal(f"{name}.weight", out, inp // group, k, k, scale=float(np.sqrt(2 / fan)))
        p = k // 2
        x = self.add(
            "Conv", [x, w], name, kernel_shape=[k, k], strides=[stride, stride], pads=[p] * 4, group=group
        )
        bn = [
            self.constant(f"{name}.gamma", self.rng.uniform(0.5, 1.5, out).astype(np.float32)),
            self.normal(f"{name}.beta", out, scale=0.2),
            self.normal(f"{name}.mean", out, scale=0.2),
            self.constant(f"{name}.var", self.rng.uniform(0.5, 1.5, out).astype(np.float32)),
        ]
        return self.add("BatchNormalization", [x, *bn], f"{name}_bn")

    def linear(self, x: str, name: str, inp: int, out: int) -> str:
        """MatMul and the Add of its bias, as transformers are exported."""
        w = self.normal(f"{name}.weight", inp, out, scale=float(np.sqrt(1 / inp)))
        x = self.add("MatMul", [x, w], name)
        return self.add("Add", [x, self.normal(f"{name}.bias", out, scale=0.1)], f"{name}_add")

    def model(
        self, inputs: dict[str, tuple[int, list[Any]]], output: str, shape: list[Any]
    ) -> onnx.ModelProto:
        given = [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in inputs.items()]
        made = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        constants = [numpy_helper.from_array(v, n) for n, v in self.weights.items()]
        graph = helper.make_graph(self.nodes, "net", given, made, constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR, producer_name="tools.nets"
        )


def resnet18(*, width: int = 64, size: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """20 Conv and one Gemm, 11.7 M parameters at width 64; input ``x`` [N, 3, size, size], output [N, classes]."""
    net = _Net(seed)
    x = net.add("Relu", [net.conv("x", "conv1", 3, width, 7, 2)])
    x = net.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inp = width
    for stage, out in enumerate(width * 2**i for i in range(4)):
        for block in range(2):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = net.add("Relu", [net.conv(x, f"{name}.conv1", inp, out, 3, stride)])
            y = net.conv(y, f"{name}.conv2", out, out, 3)
            short = x if stride == 1 and inp == out else net.conv(x, f"{name}.down", inp, out, 1, stride)
            x, inp = net.add("Relu", [net.add("Add", [y, short])]), out
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    w = net.normal("fc.weight", classes, inp, scale=float(np.sqrt(1 / inp)))
    y = net.add("Gemm", [x, w, net.normal("fc.bias", classes, scale=0.1)], "fc", transB=1)
    return net.model({"x": (TensorProto.FLOAT, ["N", 3, size, size])}, y, ["N", classes])


def mobilenet(*, width: int = 32, size: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """Inverted residuals with depthwise Conv and ReLU6, as MobileNetV2; input ``x``, output [N, classes]."""
    net = _Net(seed)
    low, high = (net.constant(n, np.asarray(v, np.float32)) for n, v in (("zero", 0), ("six", 6)))

    def relu6(x: str) -> str:
        return net.add("Clip", [x, low, high])

    x = relu6(net.conv("x", "stem", 3, width, 3, 2))
    inp = width
    for index, (out, stride) in enumerate([(16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (64, 2), (64, 1)]):
        name, out, wide = f"block{index}", out * width // 32, inp * 4
        y = relu6(net.conv(x, f"{name}.expand", inp, wide, 1))
        y = relu6(net.conv(y, f"{name}.depthwise", wide, wide, 3, stride, group=wide))
        y = net.conv(y, f"{name}.project", wide, out, 1)
        x, inp = net.add("Add", [x, y]) if stride == 1 and inp == out else y, out
    x = net.add("Flatten", [net.add("GlobalAveragePool", [relu6(net.conv(x, "head", inp, inp * 4, 1))])])
    w = net.normal("fc.weight", classes, inp * 4, scale=float(np.sqrt(1 / (inp * 4))))
    y = net.add("Gemm", [x, w, net.normal("fc.bias", classes, scale=0.1)], "fc", transB=1)
    return net.model({"x": (TensorProto.FLOAT, ["N", 3, size, size])}, y, ["N", classes])


def bert(
    *, layers: int = 2, hidden: int = 64, heads: int = 4, length: int = 16, words: int = 128, seed: int = 0
) -> onnx.ModelProto:
    """Token and position embeddings, post-norm blocks with erf GELU, a pooler; input ``ids`` int64 [N, length]."""
    net = _Net(seed)
    x = net.add("Gather", [net.normal("words", words, hidden), "ids"], axis=0)
    x = _norm(net, net.add("Add", [x, net.normal("positions", length, hidden, scale=0.3)]), "embed", hidden)
    for block in range(layers):
        name = f"layer{block}"
        y = _attention(net, x, name, hidden, heads, length)
        x = _norm(net, net.add("Add", [x, y]), f"{name}.norm1", hidden)
        y = _gelu(net, net.linear(x, f"{name}.up", hidden, 4 * hidden), name)
        y = net.linear(y, f"{name}.down", 4 * hidden, hidden)
        x = _norm(net, net.add("Add", [x, y]), f"{name}.norm2", hidden)
    first = net.add("Gather", [x, net.constant("first", np.asarray(0, np.int64))], axis=1)
    y = net.add("Tanh", [net.linear(first, "pooler", hidden, hidden)])
    w = net.normal("classifier.weight", 2, hidden, scale=float(np.sqrt(1 / hidden)))
    y = net.add("Gemm", [y, w, net.normal("classifier.bias", 2, scale=0.1)], "classifier", transB=1)
    return net.model({"ids": (TensorProto.INT64, ["N", length])}, y, ["N", 2])


def _norm(net: _Net, x: str, name: str, size: int) -> str:
    scale = net.constant(f"{name}.gamma", net.rng.uniform(0.5, 1.5, size).astype(np.float32))
    return net.add(
        "LayerNormalization", [x, scale, net.normal(f"{name}.beta", size, scale=0.1)], name, axis=-1
    )


def _gelu(net: _Net, x: str, name: str) -> str:
    root, one, half = (
        net.constant(f"{name}.gelu{i}", np.asarray(v, np.float32)) for i, v in enumerate((2**0.5, 1.0, 0.5))
    )
    y = net.add("Add", [net.add("Erf", [net.add("Div", [x, root])]), one])
    return net.add("Mul", [net.add("Mul", [x, y]), half])


def _attention(net: _Net, x: str, name: str, hidden: int, heads: int, length: int) -> str:
    """Softmax(Q Kᵀ / sqrt d) V with the division written out."""
    split = net.constant(f"{name}.split", np.asarray([-1, length, heads, hidden // heads], np.int64))
    merged = net.constant(f"{name}.merge", np.asarray([-1, length, hidden], np.int64))
    q, k, v = (net.add("Reshape", [net.linear(x, f"{name}.{n}", hidden, hidden), split]) for n in "qkv")
    q, v = (net.add("Transpose", [t], perm=[0, 2, 1, 3]) for t in (q, v))
    k = net.add("Transpose", [k], perm=[0, 2, 3, 1])
    root = net.constant(f"{name}.root", np.asarray((hidden // heads) ** 0.5, np.float32))
    scores = net.add("Softmax", [net.add("Div", [net.add("MatMul", [q, k]), root])], axis=-1)
    y = net.add("Transpose", [net.add("MatMul", [scores, v])], perm=[0, 2, 1, 3])
    return net.linear(net.add("Reshape", [y, merged]), f"{name}.out", hidden, hidden)
