"""Reads back the graph as ONNX Runtime will really run it, and finds weights it would dequantize at every run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto

from calib.model import Model
from calib.provider import SessionOptions, create_session

__all__ = ["stored_weight", "unfused_weights"]

_INTEGER = (TensorProto.INT8, TensorProto.UINT8)


def unfused_weights(model: Model) -> set[str]:
    """Names of 8-bit initializers that a DequantizeLinear still reads after ONNX Runtime's optimizations.

    Such a weight is turned back into float at every run: 12 to 17 times slower than the float layer at one token.
    """
    with tempfile.TemporaryDirectory(prefix="onnxslim-ptq-") as folder:
        path = Path(folder) / "optimized.onnx"
        create_session(model.proto.SerializeToString(), model.weights, options=SessionOptions(write_optimized=path))
        optimized = onnx.load(path, load_external_data=False)
        stored = {t.name for t in optimized.graph.initializer if t.data_type in _INTEGER}
        return {n.input[0] for n in optimized.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}


def stored_weight(proto: onnx.ModelProto, ports: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """For each (node, input port) behind a DequantizeLinear: the initializer that it dequantizes."""
    producers = {o: n for n in proto.graph.node for o in n.output}
    nodes = {n.name: n for n in proto.graph.node}
    found = {}
    for name, port in ports:
        source = producers.get(nodes[name].input[port]) if name in nodes else None
        if source is not None and source.op_type == "DequantizeLinear":
            found[name, port] = source.input[0]
    return found
