"""Networks of the usual kinds, built with onnx's helpers and random weights: ResNet-18, MobileNet, BERT, a decoder.

The weights are scaled so that values keep their size; BatchNormalization and dynamic batch as exporters write them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["bert", "decoder", "mobilenet", "resnet18"]

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


def decoder(
    *, layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2, words: int = 256, seed: int = 0
) -> onnx.ModelProto:
    """LLaMA's blocks with a KV cache, named as Optimum exports them.

    Inputs int64 ``input_ids``, ``position_ids`` [batch, seq] and ``attention_mask`` [batch, total], float
    ``past_key_values.<i>.key`` and ``.value`` [batch, kv_heads, past, width]; outputs ``logits`` [batch, seq, words]
    and ``present.<i>.key`` and ``.value``. RMSNorm is written out; a few of its channels are large, as in trained ones.
    """
    net, width = _Net(seed), hidden // heads
    _causal(net)
    _rotary_tables(net, width)
    x = net.add("Gather", [net.normal("embed_tokens", words, hidden), "input_ids"], "embed", axis=0)
    for index in range(layers):
        name = f"layers.{index}"
        y = _rms_norm(net, x, f"{name}.input_layernorm", hidden)
        y = _cached_attention(net, y, index, hidden, heads, kv_heads)
        x = net.add("Add", [x, y], f"{name}.residual1")
        y = _rms_norm(net, x, f"{name}.post_attention_layernorm", hidden)
        x = net.add("Add", [x, _gated_mlp(net, y, f"{name}.mlp", hidden)], f"{name}.residual2")
    _product(net, _rms_norm(net, x, "norm", hidden), "lm_head", hidden, words, 3.0, out="logits")
    tokens = {n: (TensorProto.INT64, ["batch", "seq"]) for n in ("input_ids", "position_ids")}
    tokens["attention_mask"] = (TensorProto.INT64, ["batch", "total"])
    caches = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    past = (TensorProto.FLOAT, ["batch", kv_heads, "past", width])
    proto = net.model(
        {**tokens, **{f"past_key_values.{c}": past for c in caches}}, "logits", ["batch", "seq", words]
    )
    for cache in caches:
        shape = ["batch", kv_heads, "total", width]
        proto.graph.output.append(helper.make_tensor_value_info(f"present.{cache}", TensorProto.FLOAT, shape))
    return proto


def _product(net: _Net, x: str, name: str, inp: int, out_size: int, scale: float = 1.0, out: str = "") -> str:
    """MatMul without bias."""
    w = net.normal(f"{name}.weight", inp, out_size, scale=float(scale / np.sqrt(inp)))
    made = net.add("MatMul", [x, w], name)
    if out:
        net.nodes[-1].output[0] = out
    return out or made


def _rms_norm(net: _Net, x: str, name: str, size: int) -> str:
    gamma = net.rng.uniform(0.5, 1.5, size)
    gamma[net.rng.choice(size, 3, replace=False)] *= 12
    eps = net.constant(f"{name}.eps", np.asarray(1e-5, np.float32))
    two = net.constant(f"{name}.two", np.asarray(2.0, np.float32))
    mean = net.add("ReduceMean", [net.add("Pow", [x, two])], axes=[-1], keepdims=1)
    y = net.add("Div", [x, net.add("Sqrt", [net.add("Add", [mean, eps])])])
    return net.add("Mul", [y, net.constant(f"{name}.weight", gamma.astype(np.float32))], name)


def _gated_mlp(net: _Net, x: str, name: str, hidden: int) -> str:
    gate = _product(net, x, f"{name}.gate_proj", hidden, 3 * hidden)
    up = _product(net, x, f"{name}.up_proj", hidden, 3 * hidden)
    y = net.add("Mul", [net.add("Mul", [gate, net.add("Sigmoid", [gate])]), up])
    return _product(net, y, f"{name}.down_proj", 3 * hidden, hidden)


def _causal(net: _Net) -> None:
    """``mask`` [batch, 1, seq, total]: 0 where a token may look, -10000 elsewhere."""
    zero, one = (net.constant(f"mask.{v}", np.asarray(v, np.int64)) for v in (0, 1))
    first, second = (net.constant(f"mask.axis{a}", np.asarray([a], np.int64)) for a in (0, 1))
    seq = net.add("Gather", [net.add("Shape", ["input_ids"]), one], axis=0)
    total = net.add("Gather", [net.add("Shape", ["attention_mask"]), one], axis=0)
    keys = net.add("Range", [zero, total, one])
    queries = net.add("Range", [net.add("Sub", [total, seq]), total, one])
    earlier = net.add(
        "LessOrEqual", [net.add("Unsqueeze", [keys, first]), net.add("Unsqueeze", [queries, second])]
    )
    real = net.add("Cast", ["attention_mask"], to=TensorProto.BOOL)
    axes = net.constant("mask.axes", np.asarray([1, 2], np.int64))
    seen = net.add("And", [earlier, net.add("Unsqueeze", [real, axes])])
    allowed, not_allowed = (
        net.constant(f"mask.{n}", np.asarray(v, np.float32)) for n, v in (("yes", 0), ("no", -1e4))
    )
    net.add("Where", [seen, allowed, not_allowed], "mask")


def _rotary_tables(net: _Net, width: int) -> None:
    """``cos`` and ``sin`` [batch, 1, seq, width] of the tokens' positions."""
    turns = net.constant("turns", (1e4 ** -(np.arange(0, width, 2) / width)).astype(np.float32))
    last = net.constant("turns.axis", np.asarray([-1], np.int64))
    place = net.add("Unsqueeze", [net.add("Cast", ["position_ids"], to=TensorProto.FLOAT), last])
    half = net.add("Mul", [place, turns])
    heads = net.constant("turns.heads", np.asarray([1], np.int64))
    angle = net.add("Unsqueeze", [net.add("Concat", [half, half], axis=-1), heads])
    net.add("Cos", [angle], "cos")
    net.add("Sin", [angle], "sin")


def _rotated(net: _Net, x: str, name: str, width: int) -> str:
    zero, half, end, axis = (
        net.constant(f"{name}.{n}", np.asarray([v], np.int64))
        for n, v in (("zero", 0), ("half", width // 2), ("end", width), ("axis", 3))
    )
    low, high = net.add("Slice", [x, zero, half, axis]), net.add("Slice", [x, half, end, axis])
    turned = net.add("Concat", [net.add("Neg", [high]), low], axis=3)
    return net.add("Add", [net.add("Mul", [x, "cos.out"]), net.add("Mul", [turned, "sin.out"])])


def _cached_attention(net: _Net, x: str, index: int, hidden: int, heads: int, kv_heads: int) -> str:
    """Rotary queries and keys; keys and values are appended to the past, and several queries share a key head."""
    name, width = f"layers.{index}.self_attn", hidden // heads
    parts = {}
    for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        split = net.constant(f"{name}.{part}_split", np.asarray([0, 0, count, width], np.int64))
        y = net.add("Reshape", [_product(net, x, f"{name}.{part}_proj", hidden, count * width), split])
        parts[part] = net.add("Transpose", [y], perm=[0, 2, 1, 3])
    queries, keys = (_rotated(net, parts[p], f"{name}.{p}_rotary", width) for p in "qk")
    axis = net.constant(f"{name}.axis", np.asarray([2], np.int64))
    times = net.constant(f"{name}.times", np.asarray([1, 1, heads // kv_heads, 1, 1], np.int64))
    joined = net.constant(f"{name}.joined", np.asarray([0, heads, -1, width], np.int64))
    for kind, new in (("key", keys), ("value", parts["v"])):
        net.add("Concat", [f"past_key_values.{index}.{kind}", new], f"{name}.{kind}", axis=2)
        net.nodes[-1].output[0] = f"present.{index}.{kind}"
        spread = net.add("Expand", [net.add("Unsqueeze", [f"present.{index}.{kind}", axis]), times])
        parts[kind] = net.add("Reshape", [spread, joined])
    transposed = net.add("Transpose", [parts["key"]], perm=[0, 1, 3, 2])
    root = net.constant(f"{name}.root", np.asarray(width**-0.5, np.float32))
    scores = net.add("Mul", [net.add("MatMul", [queries, transposed]), root])
    shares = net.add("Softmax", [net.add("Add", [scores, "mask.out"])], axis=-1)
    y = net.add("Transpose", [net.add("MatMul", [shares, parts["value"]])], perm=[0, 2, 1, 3])
    merged = net.constant(f"{name}.merged", np.asarray([0, 0, hidden], np.int64))
    return _product(net, net.add("Reshape", [y, merged]), f"{name}.o_proj", hidden, hidden)
