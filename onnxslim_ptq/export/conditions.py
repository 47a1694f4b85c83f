"""What tells while the model runs whether activations are per token or have known numbers, and which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_ptq.core.spec import TIMESTEP, BelowTimestep, ManyTokens
from onnxslim_ptq.graph.graph import Graph

__all__ = ["Conditions"]


@dataclass
class Conditions:
    """Scalars of ``graph``, each made once; `declare` adds the graph input that they read."""

    graph: Graph
    _made: dict[object, gs.Tensor] = field(default_factory=dict)

    def is_static(self, tensor: gs.Tensor, unless: BelowTimestep | ManyTokens) -> gs.Tensor:
        """A bool that is false while ``unless`` holds for the rows of ``tensor``."""
        key = unless if isinstance(unless, BelowTimestep) else tensor.name
        if key not in self._made:
            self._made[key] = (
                self._from_step(unless.threshold)
                if isinstance(unless, BelowTimestep)
                else self._single_token(tensor)
            )
        return self._made[key]

    def row(self, steps: Sequence[int]) -> gs.Tensor:
        """An int64, the index of the highest of the ascending ``steps`` that the time step has reached; at least -1."""
        key = tuple(steps)
        if key not in self._made:
            table = self.graph.constant(f"{TIMESTEP}_known", np.asarray(key, np.int64))
            one = self.graph.constant(f"{TIMESTEP}_before", np.asarray(1, np.int64))
            reached = self._add("LessOrEqual", "reached", [table, self._step()])
            counted = self._add("Cast", "counted", [reached], to=int(TensorProto.INT64))
            number = self._add("ReduceSum", "number", [counted], keepdims=0)
            self._made[key] = self._add("Sub", "row", [number, one])
        return self._made[key]

    def declare(self, rendered: onnx.ModelProto) -> None:
        """Give ``rendered`` the input that was read, where it has none of that name."""
        if TIMESTEP in self._made and all(value.name != TIMESTEP for value in rendered.graph.input):
            rendered.graph.input.append(onnx.helper.make_tensor_value_info(TIMESTEP, TensorProto.INT64, []))

    def _step(self) -> gs.Tensor:
        if TIMESTEP not in self._made:
            own = next((value for value in self.graph.inputs if value.name == TIMESTEP), None)
            step = gs.Variable(TIMESTEP) if own is None else self.graph.tensor(TIMESTEP)
            if own is not None and own.type.tensor_type.elem_type != TensorProto.INT64:
                step = self._add("Cast", "whole", [step], to=int(TensorProto.INT64))
            self._made[TIMESTEP] = step
        return self._made[TIMESTEP]

    def _from_step(self, threshold: int) -> gs.Tensor:
        limit = self.graph.constant(f"{TIMESTEP}_limit", np.asarray(threshold, np.int64))
        return self._add("GreaterOrEqual", "is_static", [self._step(), limit])

    def _single_token(self, tensor: gs.Tensor) -> gs.Tensor:
        name, graph = tensor.name, self.graph
        shape, length = graph.variable(f"{name}_shape"), graph.variable(f"{name}_length")
        graph.add_node("Shape", f"{name}_Shape", [tensor], [shape])
        place = graph.constant(f"{name}_tokens", np.asarray(-2, np.int64))
        graph.add_node("Gather", f"{name}_Gather", [shape, place], [length], {"axis": 0})
        single = graph.variable(f"{name}_is_static")
        one = graph.constant(f"{name}_one", np.asarray(1, np.int64))
        graph.add_node("Equal", f"{name}_Equal", [length, one], [single])
        return single

    def _add(self, op: str, name: str, inputs: list[gs.Tensor], **attributes: int) -> gs.Tensor:
        result = self.graph.variable(f"{TIMESTEP}_{name}")
        self.graph.add_node(op, f"{TIMESTEP}_{op}", inputs, [result], attributes)
        return result
