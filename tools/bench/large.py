"""A synthetic transformer of 4 GB with external data, to show what happens to models larger than memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

LAYERS, WIDTH, HEADS, VOCABULARY, TOKENS = 20, 2048, 32, 8192, 32
_NAME = "large-transformer-r1.onnx"


def large_model(samples: int) -> tuple[Path, list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """The model (made on first use, in the user's cache), calibration samples and one evaluation sample."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "onnxslim_ptq" / "synthetic"
    path = folder / _NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _Writer(folder).write(path)
    rng = np.random.default_rng(1)
    feeds = [{"ids": rng.integers(0, VOCABULARY, (1, TOKENS))} for _ in range(samples + 1)]
    return path, feeds[:-1], feeds[-1:]


class _Writer:
    """Adds nodes and weights; a weight goes to the data file as soon as it is drawn."""

    def __init__(self, folder: Path) -> None:
        self.rng = np.random.default_rng(0)
        self.data = folder / f"{_NAME}.data"
        self.nodes: list[Any] = []
        self.weights: list[TensorProto] = []

    def write(self, path: Path) -> None:
        temporary = self.data.with_name(f"{self.data.name}.tmp")
        with temporary.open("wb") as self.file:
            value = self.node("Gather", [self.weight("embedding", VOCABULARY, WIDTH, scale=1.0), "ids"], "x")
            for layer in range(LAYERS):
                value = self.layer(f"l{layer}.", value)
            last = self.node("LayerNormalization", [value, *self.norm("last.")], "last.n")
            self.node("MatMul", [last, self.weight("head", WIDTH, 256)], "y")
        graph = helper.make_graph(
            self.nodes,
            "large",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "tokens"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "tokens", 256])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        temporary.rename(self.data)
        onnx.save(model, path)

    def layer(self, at: str, x: str) -> str:
        n = self.node("LayerNormalization", [x, *self.norm(f"{at}1.")], f"{at}n1")
        heads = {}
        for part in "qkv":
            flat = self.linear(f"{at}{part}", n, WIDTH, WIDTH)
            shape = self.constant(f"{at}{part}.shape", np.array([0, 0, HEADS, WIDTH // HEADS]))
            split = self.node("Reshape", [flat, shape], f"{at}{part}.split")
            perm = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
            heads[part] = self.node("Transpose", [split], f"{at}{part}.heads", perm=perm)
        scores = self.node("MatMul", [heads["q"], heads["k"]], f"{at}scores")
        root = self.constant(f"{at}root", np.array((WIDTH // HEADS) ** -0.5, np.float32))
        scaled = self.node("Mul", [scores, root], f"{at}scaled")
        mixed = self.node(
            "MatMul", [self.node("Softmax", [scaled], f"{at}p", axis=-1), heads["v"]], f"{at}mixed"
        )
        joined = self.node("Transpose", [mixed], f"{at}joined", perm=[0, 2, 1, 3])
        flat = self.node(
            "Reshape", [joined, self.constant(f"{at}flat.shape", np.array([0, 0, WIDTH]))], f"{at}flat"
        )
        x = self.node("Add", [x, self.linear(f"{at}o", flat, WIDTH, WIDTH)], f"{at}x1")
        n = self.node("LayerNormalization", [x, *self.norm(f"{at}2.")], f"{at}n2")
        up = self.node("Relu", [self.linear(f"{at}up", n, WIDTH, 4 * WIDTH)], f"{at}r")
        return self.node("Add", [x, self.linear(f"{at}down", up, 4 * WIDTH, WIDTH)], f"{at}x2")

    def linear(self, name: str, x: str, size: int, width: int) -> str:
        product = self.node("MatMul", [x, self.weight(f"{name}.w", size, width)], f"{name}.m")
        bias = self.constant(
            f"{name}.b", self.rng.standard_normal(width).astype(np.float32) * np.float32(0.02)
        )
        return self.node("Add", [product, bias], f"{name}.y")

    def norm(self, at: str) -> tuple[str, str]:
        one, zero = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
        return self.constant(f"{at}g", one), self.constant(f"{at}b", zero)

    def weight(self, name: str, size: int, width: int, *, scale: float = 0.0) -> str:
        values = self.rng.standard_normal((size, width), np.float32)
        values *= np.float32(scale or 0.7 * size**-0.5)
        tensor = TensorProto(name=name, dims=values.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self.data.name),
            ("offset", self.file.tell()),
            ("length", values.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        self.file.write(values.data)
        self.weights.append(tensor)
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        self.weights.append(onnx.numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{output}.{op}", **attributes))
        return output
