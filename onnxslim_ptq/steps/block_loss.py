"""How far the end of a block gets from its float values when one group's layers are quantized, for a scale under test.

Golden Stick judges AWQ and Outlier Suppression Lite so: by the output of the decoder layer, everything else in float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.model import LARGE, mark_external
from calib.provider import SessionOptions, create_session
from calib.types import Array, Range
from onnxslim_ptq.core.qmath import dequantize, fake_quantize, params_from_range, quantize
from onnxslim_ptq.core.spec import QParams, QuantSpec
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.residual import Block, find_block
from onnxslim_ptq.graph.smooth_groups import SmoothGroup
from onnxslim_ptq.steps.placement import Placement, weight_spec
from onnxslim_ptq.steps.weights import float_weight, start_numbers
from onnxslim_ptq.workspace import Workspace

__all__ = ["BlockLoss", "block_losses"]

Floats = NDArray[np.float64]
_SAMPLES = 4
_TOGETHER = 8  # groups whose values are fetched in one run: they lie in memory side by side
_LEAST = 1e-30


@dataclass(frozen=True)
class _Layer:
    """A quantized layer of the group: the name its weight is fed by, the weight [inputs, outputs] and its form."""

    feed: str
    layer: Linear
    weight: NDArray[np.float32]
    spec: QuantSpec


class BlockLoss:
    """mean over samples of |block(Q(x / s), Q(diag(s) W)) - block(x, W)|² / |block(x, W)|².

    x: the group's tensor [..., channels] float32; the block ends at the residual sum (`find_block`), nothing else in it
    is quantized. Q(W): the recipe's form, to nearest. Source: MindSpore Golden Stick, the losses of AWQ and OSL; the
    division by the float energy, which does not move the minimum of one block, is for several ends.
    """

    def __init__(
        self,
        workspace: Workspace,
        group: SmoothGroup,
        block: Block,
        placement: Placement,
        values: Sequence[Mapping[str, Array]],
    ) -> None:
        graph = workspace.graph
        planned = [placement.layers[c.node] for c in group.consumers if c.node in placement.layers]
        self._layers = [
            _Layer(
                f"__weight_{i}",
                layer,
                float_weight(graph, layer),
                weight_spec(layer, choice, workspace.target),
            )
            for i, (layer, choice) in enumerate(planned)
        ]
        self._reduce_range = workspace.reduce_range
        spec = next((p.spec for p in placement.tensors.values() if p.tensor == group.tensor), None)
        self._spec = spec
        self._rows = [np.asarray(v[group.tensor], np.float32) for v in values]
        self._dtype = values[0][group.tensor].dtype
        self._given = [{name: v[name] for name in block.given} for v in values]
        self._exact = [[v[name].astype(np.float64) for name in block.ends] for v in values]
        self._energy = [[max(float((y * y).sum()), _LEAST) for y in sample] for sample in self._exact]
        self._input, self._ends = "__input", list(block.ends)
        model, weights = self._open(graph, group, block, values[0])
        self._session = create_session(
            model.SerializeToString(), weights, options=SessionOptions(threads=workspace.threads)
        )

    def _open(
        self, graph: Graph, group: SmoothGroup, block: Block, values: Mapping[str, Array]
    ) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """The block as a model that is fed the group's tensor and the layers' weights."""
        opened = {layer.layer.node: layer for layer in self._layers}
        nodes, constants = [], {}
        for name in block.nodes:
            node = graph.node(name)
            proto = graph.export_node(node)
            for port, tensor in enumerate(node.inputs):
                if name in opened and port == opened[name].layer.activation:
                    proto.input[port] = self._input
                elif name in opened and port == opened[name].layer.weight:
                    proto.input[port] = opened[name].feed
                elif graph.is_constant(tensor):
                    constants[tensor.name] = np.asarray(graph.value(tensor))
            nodes.append(proto)
        fed: dict[str, Any] = {n: values[n].dtype for n in block.given}
        fed |= {self._input: self._dtype, **{x.feed: self._dtype for x in self._layers}}
        inputs = [_info(name, dtype) for name, dtype in fed.items()]
        outputs = [_info(name, values[name].dtype) for name in block.ends]
        made = onnx.helper.make_graph(nodes, "block", inputs, outputs)
        made.initializer.extend(_initializer(n, v) for n, v in constants.items())
        source = graph.model.proto
        proto = onnx.helper.make_model(made, opset_imports=source.opset_import, ir_version=source.ir_version)
        return proto, {n: v for n, v in constants.items() if v.nbytes >= LARGE}

    def of(self, scale: Floats, reach: tuple[Floats, Floats] | None = None) -> float:
        """The loss for ``scale`` [channels]; ``reach``: the extremes of each channel over all samples, for losses with
        quantized activations."""
        column = scale.astype(np.float32)
        weights: dict[str, Array] = {}
        for layer in self._layers:
            turned = layer.layer.op == "Gemm" and layer.layer.channel_axis == 0
            scaled = layer.weight * (column if turned else column[:, None])
            start, _ = start_numbers(scaled, layer.spec, self._reduce_range)
            weights[layer.feed] = dequantize(quantize(scaled, start), start).astype(self._dtype)
        params: QParams | None = None
        if reach is not None and self._spec is not None:
            ends = Range(np.asarray((reach[0] / scale).min()), np.asarray((reach[1] / scale).max()))
            params = params_from_range(ends, self._spec)
        total = 0.0
        for rows, given, exact, energy in zip(
            self._rows, self._given, self._exact, self._energy, strict=True
        ):
            x = rows / column
            x = x if params is None else np.asarray(fake_quantize(x, params), np.float32)
            seen = self._session.run(self._ends, {**given, **weights, self._input: x.astype(self._dtype)})
            pairs = zip(seen, exact, energy, strict=True)
            total += float(np.mean([float(((z - y) ** 2).sum()) / e for z, y, e in pairs]))
        return total / len(self._rows)


def block_losses(
    workspace: Workspace, groups: Sequence[SmoothGroup], placement: Placement
) -> Iterator[tuple[SmoothGroup, BlockLoss]]:
    """Each group with its loss over some calibration samples; groups without a block of their own are left out."""
    found = [(group, block) for group in groups if (block := _block(workspace.graph, group)) is not None]
    for part in [found[i : i + _TOGETHER] for i in range(0, len(found), _TOGETHER)]:
        names = [n for group, block in part for n in (group.tensor, *block.given, *block.ends)]
        values = workspace.values(dict.fromkeys(names), _SAMPLES)
        for group, block in part:
            yield group, BlockLoss(workspace, group, block, placement, values)


def _block(graph: Graph, group: SmoothGroup) -> Block | None:
    return find_block(graph, group.tensor, [c.node for c in group.consumers])


def _initializer(name: str, values: Array) -> onnx.TensorProto:
    if values.nbytes < LARGE:
        return onnx.numpy_helper.from_array(values, name)
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = onnx.TensorProto(name=name, dims=values.shape, data_type=kind)
    mark_external(tensor)
    return tensor


def _info(name: str, dtype: Any) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None
    )
