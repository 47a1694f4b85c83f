"""Renders a plan as QuantizeLinear/DequantizeLinear nodes around the layers they quantize."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from calib.model import Model
from calib.types import Array
from onnxslim_ptq.core.spec import QParams, QuantPlan, Result, Slot, Use
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.graph.graph import Graph

__all__ = ["render_qdq"]


def render_qdq(model: Model, plan: QuantPlan, target: Target) -> Model:
    """The float ``model`` with every slot of ``plan`` rendered; ``model`` is not changed.

    Activations: x -> QuantizeLinear -> DequantizeLinear, one pair per tensor and params. Weights: integer
    initializer -> DequantizeLinear. Biases: int32 initializer -> DequantizeLinear with scale s_x * s_w.
    """
    graph = Graph(model)
    writer = _Writer(graph, plan, target)
    for site, slot in plan.activations.items():
        if isinstance(site, Result):
            writer.quantize_result(site.tensor, slot)
    for site, slot in plan.activations.items():
        if isinstance(site, Use):
            writer.quantize_use(site, slot)
    for use, slot in plan.weights.items():
        writer.quantize_weight(use, slot)
    for use, slot in plan.biases.items():
        writer.quantize_bias(use, slot)
    if target.float16_cast:
        writer.restore_float16()
    return graph.to_model()


@dataclass
class _Writer:
    graph: Graph
    plan: QuantPlan
    target: Target
    pairs: dict[tuple[str, str], gs.Variable] = field(default_factory=dict)
    constants: dict[str, gs.Constant] = field(default_factory=dict)
    dequantized: dict[str, gs.Variable] = field(default_factory=dict)
    float16_layers: dict[str, gs.Node] = field(default_factory=dict)

    def quantize_result(self, name: str, slot: Slot) -> None:
        tensor = self._tensor(name)
        readers = [(n, p) for n in self.graph.consumers(tensor) for p, t in enumerate(n.inputs) if t is tensor]
        real = self._pair(tensor, slot)
        for node, port in readers:
            if not self.graph.has_subgraph(node):  # a subgraph reads its captured values by their own name
                node.inputs[port] = real

    def quantize_use(self, use: Use, slot: Slot) -> None:
        node = self.graph.node(use.node)
        tensor = node.inputs[use.port]
        if any(t is tensor for t in self.pairs.values()):
            return  # the value is already quantized where it is produced
        node.inputs[use.port] = self._pair(tensor, slot)

    def quantize_weight(self, use: Use, slot: Slot) -> None:
        node = self.graph.node(use.node)
        old = node.inputs[use.port]
        if slot.params not in self.dequantized:
            codes = self.plan.weight_codes[slot.params]
            self.dequantized[slot.params] = self._dequantize(old.name, codes.codes, codes.params)
        node.inputs[use.port] = self.dequantized[slot.params]

    def quantize_bias(self, use: Use, slot: Slot) -> None:
        node = self.graph.node(use.node)
        bias = self.plan.bias_codes[slot.params]
        params = QParams(slot.spec, bias.scale, np.zeros(bias.scale.shape, np.int64))
        node.inputs[use.port] = self._dequantize(node.inputs[use.port].name, bias.codes, params, unique=use.node)

    def restore_float16(self) -> None:
        """Filled in by float16 models only: see ``_pair``."""

    def _tensor(self, name: str) -> gs.Tensor:
        return self.graph.tensor(name)

    def _pair(self, tensor: gs.Tensor, slot: Slot) -> gs.Variable:
        key = (tensor.name, slot.params)
        if key not in self.pairs:
            params = self.plan.params[slot.params]
            scale, zero = self._numbers(slot.params, tensor.name, params)
            codes = self.graph.variable(f"{tensor.name}_quantized")
            real = self.graph.variable(f"{tensor.name}_dequantized")
            attrs = {} if params.axis is None else {"axis": params.axis}
            self.graph.add_node("QuantizeLinear", f"{tensor.name}_QuantizeLinear", [tensor, scale, zero], [codes], attrs)
            self.graph.add_node("DequantizeLinear", f"{tensor.name}_DequantizeLinear", [codes, scale, zero], [real],
                                attrs)
            self.pairs[key] = real
        return self.pairs[key]

    def _dequantize(self, name: str, codes: Array, params: QParams, *, unique: str = "") -> gs.Variable:
        base = f"{name}.{unique}" if unique and f"{name}_quantized" in self.constants else name
        stored = self.constants[f"{base}_quantized"] = self.graph.constant(f"{base}_quantized", codes)
        scale, zero = self._numbers(f"{base}@weight", base, params)
        real = self.graph.variable(f"{base}_dequantized")
        attrs = {} if params.axis is None else {"axis": params.axis}
        self.graph.add_node("DequantizeLinear", f"{base}_DequantizeLinear", [stored, scale, zero], [real], attrs)
        return real

    def _numbers(self, key: str, name: str, params: QParams) -> tuple[gs.Constant, gs.Constant]:
        """Scale and zero point constants, shared by everything that uses the same params."""
        if f"{key}@scale" not in self.constants:
            self.constants[f"{key}@scale"] = self.graph.constant(f"{name}_scale", params.scale.astype(np.float32))
            self.constants[f"{key}@zero"] = self.graph.constant(
                f"{name}_zero_point", params.zero_point.astype(params.spec.dtype.dtype))
        return self.constants[f"{key}@scale"], self.constants[f"{key}@zero"]
