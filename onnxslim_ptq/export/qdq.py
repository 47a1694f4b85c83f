"""Renders a plan as QuantizeLinear/DequantizeLinear nodes around the layers they quantize."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from calib.errors import GraphError
from calib.model import Model
from calib.types import Array
from onnxslim_ptq.core.spec import (
    BelowTimestep,
    BiasCodes,
    ManyTokens,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QParams,
    QuantPlan,
    QuantSpec,
    Result,
    Slot,
    Use,
)
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.export.cache import declare_cache, render_cache
from onnxslim_ptq.export.conditions import Conditions
from onnxslim_ptq.export.float16 import ABSORBED, compute_in_float32, half_layers
from onnxslim_ptq.export.per_token import Known, Rows, normalize, row_params, scale_back, switch
from onnxslim_ptq.graph.edit import is_captured
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.ir import lowest_ir
from onnxslim_ptq.graph.opset import raise_opset

__all__ = ["render_qdq", "required_opset"]

_FIRST, _PER_CHANNEL, _FLOAT16_SCALES, _BLOCKS = 10, 13, 19, 21
_BYTE = 8
_WORST_ROUNDING = 0.01  # of a scale that float16 has to hold: below 6e-5 it loses digits


def required_opset(plan: QuantPlan, model: Model, target: Target) -> int:
    """The lowest opset that can express ``plan``: 10, per-channel scales and switches 13, float16
    scales 19, blocks and 4 bits 21.

    float16 scales are needed by float16 layers, unless the target computes those in float32 between casts.
    """
    specs = [slot.spec for slot in (*plan.weights.values(), *plan.activations.values())]
    if any(isinstance(s.grain, PerGroup) or s.dtype.bits != _BYTE for s in specs):
        return _BLOCKS
    if not target.float16_cast and half_layers(Graph(model), plan):
        return _FLOAT16_SCALES
    params = [*plan.params.values(), *(codes.params for codes in plan.weight_codes.values())]
    switched = any(isinstance(s.grain, PerToken) and s.grain.while_ is not None for s in specs)
    return _PER_CHANNEL if switched or any(p.axis is not None for p in params) else _FIRST


def render_qdq(model: Model, plan: QuantPlan, target: Target) -> Model:
    """The float ``model`` with every slot of ``plan`` rendered; ``model`` is not changed.

    Activations: x -> QuantizeLinear -> DequantizeLinear, one pair per tensor and params. Weights: integer
    initializer -> DequantizeLinear. Biases: int32 initializer -> DequantizeLinear with scale s_x * s_w. A KV cache: see
    `render_cache`. The opset is raised where the plan needs it; the IR version is the lowest that serves the result.

    Raises:
        GraphError: the model cannot have the opset the plan needs, or float16 cannot hold a scale.
    """
    graph = Graph(raise_opset(model, required_opset(plan, model, target)))
    half = half_layers(graph, plan)
    narrow = frozenset[str]() if target.float16_cast else frozenset(half)
    writer = _Writer(graph, plan, narrow, Conditions(graph))
    for site, slot in plan.activations.items():
        if isinstance(site, Result):
            writer.quantize_result(site.tensor, slot)
    for site, slot in plan.activations.items():
        if isinstance(site, Use):
            per_token = isinstance(slot.spec.grain, PerToken)
            (writer.quantize_rows if per_token else writer.quantize_use)(site, slot)
    for use, slot in plan.weights.items():
        writer.quantize_weight(use, slot)
    for use, slot in plan.biases.items():
        writer.quantize_bias(use, slot)
    if half and target.float16_cast:
        compute_in_float32(graph, half)
    cache = render_cache(graph, plan.io)
    rendered = graph.to_model()
    writer.conditions.declare(rendered.proto)
    declare_cache(rendered.proto, cache)
    rendered.proto.ir_version = lowest_ir(rendered.proto)
    return rendered


@dataclass
class _Writer:
    """Inserts nodes; ``half`` names the layers whose scales must be float16."""

    graph: Graph
    plan: QuantPlan
    half: frozenset[str]
    conditions: Conditions
    pairs: dict[tuple[str, str], gs.Tensor] = field(default_factory=dict)
    numbers: dict[tuple[str, str], tuple[gs.Constant, gs.Constant]] = field(default_factory=dict)
    weights: dict[tuple[str, bool], gs.Tensor] = field(default_factory=dict)
    rows: dict[tuple[str, str], Rows] = field(default_factory=dict)

    def quantize_result(self, name: str, slot: Slot) -> None:
        """Every reader of value ``name`` reads it quantized, graph outputs and subgraphs too: they know it by name."""
        tensor = self.graph.tensor(name)
        producer = self.graph.producer(tensor)
        by_name = name in self.graph.outputs or is_captured(self.graph, tensor)
        half, params = self._is_half(tensor), self.plan.params[slot.params]
        if producer is not None and by_name:
            raw = self.graph.variable(f"{name}_float")
            producer.outputs[producer.outputs.index(tensor)] = raw
            self.pairs[name, slot.params] = self._pair(raw, slot.params, params, half, tensor)
            return
        readers = [
            (n, p) for n in self.graph.consumers(tensor) for p, t in enumerate(n.inputs) if t is tensor
        ]
        real = self.pairs[name, slot.params] = self._pair(tensor, slot.params, params, half)
        for node, port in readers:
            if not self.graph.has_subgraph(node):  # reached for graph inputs only: their name is not free
                node.inputs[port] = real

    def quantize_use(self, use: Use, slot: Slot) -> None:
        node = self.graph.node(use.node)
        tensor = node.inputs[use.port]
        if any(real is tensor for real in self.pairs.values()):
            return  # the value is already quantized where it is produced
        key = (tensor.name, slot.params)
        if key not in self.pairs:
            params = self.plan.params[slot.params]
            self.pairs[key] = self._pair(tensor, slot.params, params, use.node in self.half)
        node.inputs[use.port] = self.pairs[key]

    def quantize_rows(self, use: Use, slot: Slot) -> None:
        """Per token: readers of one tensor share its rows and their scales."""
        node = self.graph.node(use.node)
        tensor = node.inputs[use.port]
        key = (tensor.name, slot.params)
        if key not in self.rows:
            rows = normalize(self.graph, tensor, _float_type(self.graph, node), slot.spec.symmetric)
            assert isinstance(slot.spec.grain, PerToken)
            if (while_ := slot.spec.grain.while_) is not None:
                static = self.conditions.is_static(tensor, while_)
                rows = switch(self.graph, rows, tensor, self._known(slot.params, while_), static)
            params = row_params(slot.spec.dtype)
            real = self._pair(rows.values, slot.params, params, use.node in self.half)
            self.rows[key] = replace(rows, values=real)
        node.inputs[use.port] = self.rows[key].values
        weight = next(s for u, s in self.plan.weights.items() if u.node == use.node)
        scale_back(self.graph, node, self.rows[key], self.plan.weight_codes[weight.params])

    def _known(self, key: str, while_: BelowTimestep | ManyTokens) -> Known:
        """The numbers that serve where the rows' own do not: those of the time step, where there are several."""
        table = self.plan.timesteps.get(key)
        if table is None or not isinstance(while_, BelowTimestep):
            return Known((self.plan.params[key],))
        table = {step: params for step, params in table.items() if step >= while_.threshold}
        steps = sorted(table)
        row = self.conditions.row(steps) if len(steps) > 1 else None
        return Known(tuple(table[step] for step in steps), row)

    def quantize_weight(self, use: Use, slot: Slot) -> None:
        """Nodes whose weights share a params id share one integer tensor."""
        node = self.graph.node(use.node)
        key = (slot.params, use.node in self.half)
        if key not in self.weights:
            codes = self.plan.weight_codes[slot.params]
            name = node.inputs[use.port].name
            self.weights[key] = self._stored(
                name, codes.codes, codes.params, slot.params, use.node in self.half
            )
        node.inputs[use.port] = self.weights[key]

    def quantize_bias(self, use: Use, slot: Slot) -> None:
        """One integer bias per node: its scale belongs to the node's activation and weight.

        Behind float16 scales it keeps its float32 scale (s_x * s_w and the codes leave float16's range) and is cast.
        Left as a float16 constant, ONNX Runtime's WeightBiasQuantization would give it a float16 scale all the same.
        """
        node = self.graph.node(use.node)
        name = node.inputs[use.port].name
        bias = self.plan.bias_codes[slot.params]
        params = self._bias_params(bias, slot)
        real = self._stored(name, bias.codes, params, f"bias of {use.node}", False)
        if use.node in self.half:
            half = self.graph.variable(f"{name}_float16")
            self.graph.add_node("Cast", f"{name}_Cast", [real], [half], {"to": int(TensorProto.FLOAT16)})
            real = half
        node.inputs[use.port] = real

    def _bias_params(self, bias: BiasCodes, slot: Slot) -> QParams:
        """The bias's numbers; behind a weight with one scale it has one as well, so that opset 10 will do."""
        scale = bias.scale
        weight = self.plan.weight_codes.get(bias.weight)
        if weight is not None and weight.params.axis is None and scale.size and np.ptp(scale) == 0:
            scale = scale.reshape(-1)[0].reshape(())
        spec = QuantSpec(slot.spec.dtype, PerTensor() if scale.ndim == 0 else PerChannel(0), symmetric=True)
        return QParams(spec, scale, np.zeros(scale.shape, np.int64))

    def _is_half(self, tensor: gs.Tensor) -> bool:
        """Whether ``tensor`` is float16: a float16 layer reads it, or makes it, perhaps through a Relu or Clip."""
        near = [*self.graph.consumers(tensor)]
        if (producer := self.graph.producer(tensor)) is not None:
            near.append(producer)
            if producer.op in ABSORBED and (before := self.graph.producer(producer.inputs[0])) is not None:
                near.append(before)
        return any(node.name in self.half for node in near)

    def _pair(
        self, tensor: gs.Tensor, key: str, params: QParams, half: bool, result: gs.Tensor | None = None
    ) -> gs.Tensor:
        name = tensor.name if result is None else result.name
        scale, zero = self._scale_and_zero(key, name, params, half)
        codes = self.graph.variable(f"{name}_quantized")
        real = self.graph.variable(f"{name}_dequantized") if result is None else result
        attrs = _axis(params)
        self.graph.add_node("QuantizeLinear", f"{name}_QuantizeLinear", [tensor, scale, zero], [codes], attrs)
        self.graph.add_node(
            "DequantizeLinear", f"{name}_DequantizeLinear", [codes, scale, zero], [real], attrs
        )
        return real

    def _stored(self, name: str, codes: Array, params: QParams, key: str, half: bool) -> gs.Tensor:
        stored = self.graph.constant(
            f"{name}_quantized", codes.astype(params.spec.dtype.stored_dtype, copy=False)
        )
        scale, zero = self._scale_and_zero(f"{key} stored", name, params, half)
        real = self.graph.variable(f"{name}_dequantized")
        node = f"{name}_DequantizeLinear"
        self.graph.add_node("DequantizeLinear", node, [stored, scale, zero], [real], _axis(params))
        return real

    def _scale_and_zero(
        self, key: str, name: str, params: QParams, half: bool
    ) -> tuple[gs.Constant, gs.Constant]:
        """Scale and zero point constants, shared by everything that uses the same params."""
        kind = "float16" if half else "float32"
        if (key, kind) not in self.numbers:
            shape = params.scale.shape if params.block else () if params.axis is None else (-1,)
            scale = params.scale.reshape(shape).astype(kind)
            if half and (np.abs(scale - params.scale) > _WORST_ROUNDING * params.scale).any():
                raise GraphError(
                    f"value '{name}': its scale {float(params.scale.min()):.3g} leaves the range of "
                    "float16; leave its layers float with --exclude, or give the float32 model"
                )
            zero = params.zero_point.reshape(shape).astype(params.spec.dtype.stored_dtype)
            self.numbers[key, kind] = (
                self.graph.constant(f"{name}_scale", scale),
                self.graph.constant(f"{name}_zero_point", zero),
            )
        return self.numbers[key, kind]


def _float_type(graph: Graph, node: gs.Node) -> type[np.floating]:
    weight = next((v for t in node.inputs if (v := graph.value(t)) is not None), None)
    return np.float16 if weight is not None and weight.dtype == np.float16 else np.float32


def _axis(params: QParams) -> dict[str, int]:
    block = {} if params.block is None else {"block_size": params.block}
    return {} if params.axis is None else {"axis": params.axis, **block}
