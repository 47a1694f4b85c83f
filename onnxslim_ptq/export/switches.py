"""A float model in which every planned layer can be switched to its quantized form by an input, one run at a time.

Which layers are quantized is then only another feed: one session measures every layer alone, any set of layers
together, and none. A switch is an If, so a run computes one form of each layer, never both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from calib.model import LARGE, Model
from calib.tensors import mark_external
from calib.types import Array
from onnxslim_ptq.core.spec import QuantPlan, Result, Use
from onnxslim_ptq.export.simulation import simulate

__all__ = ["Makers", "Switched", "add_twins", "switch_layers", "uncorrected"]


Makers = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Switched:
    """The model with its switches: ``layers`` maps planned nodes to the bool input that quantizes each, ``results``
    values quantized where they are made to theirs, ``makers`` the same values to groups of layers (`switch_layers`)."""

    model: Model
    layers: Mapping[str, str]
    results: Mapping[str, str]
    makers: Mapping[str, Makers]

    def feed(self, on: Collection[str]) -> dict[str, Array]:
        """The extra feeds that quantize the layers ``on``, with all values they read and make, and no others."""
        feed: dict[str, Array] = {gate: np.asarray(node in on) for node, gate in self.layers.items()}
        for tensor, gate in self.results.items():
            feed[gate] = np.asarray(all(any(node in on for node in group) for group in self.makers[tensor]))
        return feed


def uncorrected(model: Model, plan: QuantPlan) -> Model:
    """``model`` with the biases it had before they took up the mean error of rounded weights: the float function."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    nodes = {n.name: n for n in proto.graph.node}
    added = _Constants(proto.graph, dict(model.weights))
    for layer, (node, port, values) in plan.uncorrected.items():
        nodes[node].input[port] = added.add(f"{layer}.uncorrected", values)
    return replace(model, proto=proto, weights=added.weights)


def switch_layers(model: Model, plan: QuantPlan, makers: Mapping[str, Makers]) -> Switched:
    """Switches for every layer of ``plan`` over ``model``, the float graph whose biases are corrected already.

    ``makers``: groups of layers for each value quantized at its result; it is while each has a layer switched on.
    """
    plain = uncorrected(model, plan)
    graph = plain.proto.graph
    twins = _Twins(model, plan, _Constants(graph, plain.weights))
    layers = {node: f"__quantized_{i}" for i, node in enumerate(plan.quantized_nodes())}
    results = {s.tensor: f"__result_{i}" for i, s in enumerate(plan.activations) if isinstance(s, Result)}
    nodes: list[NodeProto] = []
    for node in list(graph.node):
        made = [name for name in node.output if name in results]
        for name in made:
            node.output[list(node.output).index(name)] = f"{name}.raw"
        if node.name in layers:
            nodes.append(_if(layers[node.name], [*twins.of(node)], [_copy(node)], node.output[0]))
        else:
            nodes.append(_copy(node))
        for name in made:
            rounded = twins.rounded(name, twins.is_half(node for group in makers[name] for node in group))
            nodes.append(_if(results[name], rounded, _identity(name), name))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    gates = [*layers.values(), *results.values()]
    graph.input.extend(helper.make_tensor_value_info(gate, TensorProto.BOOL, []) for gate in gates)
    return Switched(plain, layers, results, makers)


def add_twins(model: Model, plan: QuantPlan) -> tuple[Model, dict[str, str]]:
    """The float function with the quantized form of every layer beside it, on the float input; by node, its result."""
    plain = uncorrected(model, plan)
    graph = plain.proto.graph
    twins = _Twins(model, plan, _Constants(graph, plain.weights))
    names: dict[str, str] = {}
    for node in [n for n in graph.node if n.name in set(plan.quantized_nodes())]:
        twin = _copy(node)
        twin.output[0] = names[node.name] = f"__{node.name}/quantized"
        graph.node.extend(twins.of(twin))
    return plain, names


def _copy(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied


def _identity(name: str) -> list[NodeProto]:
    return [helper.make_node("Identity", [f"{name}.raw"], [name])]


def _if(gate: str, then: Iterable[NodeProto], other: Iterable[NodeProto], output: str) -> NodeProto:
    """The value ``output``, made by one branch or the other; both make it under that name."""
    branches = {}
    for key, nodes in (("then_branch", then), ("else_branch", other)):
        branch = onnx.GraphProto(name=f"{gate}_{key}")
        for node in nodes:
            inner = _copy(node)
            for names in (inner.input, inner.output):
                for i, name in enumerate(names):
                    names[i] = f"{gate}_{key}_out" if name == output else name
            branch.node.append(inner)
        branch.output.append(onnx.ValueInfoProto(name=f"{gate}_{key}_out"))
        branches[key] = branch
    return helper.make_node("If", [gate], [output], name=f"{gate}_if", **branches)


class _Constants:
    """Adds initializers to a graph; large ones as shared weights."""

    def __init__(self, graph: onnx.GraphProto, weights: dict[str, Array]) -> None:
        self._graph, self.weights = graph, weights

    def add(self, name: str, values: Array) -> str:
        name = f"__{name}"
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
        tensor.dims.extend(values.shape)
        if values.nbytes >= LARGE:
            mark_external(tensor)
            self.weights[name] = values
        else:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
        self._graph.initializer.append(tensor)
        return name


class _Twins:
    """The quantized forms of layers and values, as nodes whose constants lie in the main graph."""

    def __init__(self, model: Model, plan: QuantPlan, constants: _Constants) -> None:
        self._model, self._plan, self._constants = model, plan, constants
        self._corrected = {n.name: n for n in model.proto.graph.node}
        self._initializers = {t.name: t for t in model.proto.graph.initializer}
        self._made: dict[tuple[str, str], str] = {}
        self._sites: dict[str, list[Use]] = {use.node: [] for use in plan.weights}
        for site in plan.activations:
            if isinstance(site, Use) and site.node in self._sites:  # others are the entries of attention
                self._sites[site.node].append(site)
        self._uses = {use.node: use for use in plan.weights}

    def of(self, layer: NodeProto) -> list[NodeProto]:
        """The layer as `simulate` quantizes it, with its corrected bias; it makes what ``layer`` makes."""
        node = _copy(self._corrected[layer.name])
        node.output[0] = layer.output[0]
        shift = self._shift(layer.name)
        simulation = simulate(self._alone(node), self._only(layer.name))
        found = simulation.model
        numbers = simulation.feed(self._plan.params)
        small = [t for t in found.proto.graph.initializer if t.name not in found.weights]
        values = {**{t.name: numpy_helper.to_array(t) for t in small}, **found.weights, **numbers}
        mine = {o for n in found.proto.graph.node for o in n.output if o != layer.output[0]}
        prefix = f"__{layer.name}/"
        for inner in found.proto.graph.node:
            inner.name = ""
            for i, name in enumerate(inner.input):
                if name in values:
                    inner.input[i] = self._constant(layer.name, name, values[name])
                elif name in mine:
                    inner.input[i] = prefix + name
            for i, name in enumerate(inner.output):
                if name in mine:
                    inner.output[i] = prefix + name
        nodes = list(found.proto.graph.node)
        if shift is not None:
            raw = f"{prefix}unshifted"
            last = next(n for n in nodes if layer.output[0] in n.output)
            last.output[list(last.output).index(layer.output[0])] = raw
            name = self._constants.add(f"{layer.name}/shift", shift)
            nodes.append(helper.make_node("Add", [raw, name], [layer.output[0]]))
        return nodes

    def _constant(self, layer: str, name: str, values: Array) -> str:
        """One constant for all layers that share a weight's codes."""
        slot = self._plan.weights[self._uses[layer]]
        key = (slot.params, str(values.dtype)) if name.endswith(".simulated") else (layer, name)
        if key not in self._made:
            self._made[key] = self._constants.add(f"{layer}/{name}", values)
        return self._made[key]

    def _shift(self, layer: str) -> Array | None:
        """What bias correction adds behind the layer, when it lies in the node after it."""
        if layer not in self._plan.uncorrected:
            return None
        node, port, before = self._plan.uncorrected[layer]
        if node == layer:
            return None
        after = self._value(self._corrected[node].input[port])
        return np.asarray(after.astype(np.float64) - before.astype(np.float64), before.dtype)

    def _value(self, name: str) -> Array:
        known = self._model.weights.get(name)
        return known if known is not None else numpy_helper.to_array(self._initializers[name])

    def _alone(self, node: NodeProto) -> Model:
        proto = onnx.ModelProto(ir_version=self._model.proto.ir_version)
        proto.opset_import.extend(self._model.proto.opset_import)
        proto.graph.name = "layer"
        proto.graph.node.append(node)
        for name in node.input:
            if name in self._initializers:
                proto.graph.initializer.append(self._initializers[name])
            elif name:
                proto.graph.input.append(onnx.ValueInfoProto(name=name))
        proto.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
        weights = {n: self._model.weights[n] for n in node.input if n in self._model.weights}
        return Model(proto, weights, None, 0)

    def _only(self, layer: str) -> QuantPlan:
        plan, use = self._plan, self._uses[layer]
        return QuantPlan(
            activations={site: plan.activations[site] for site in self._sites[layer]},
            weights={use: plan.weights[use]},
            weight_codes=plan.weight_codes,
            params=plan.params,
        )

    def rounded(self, tensor: str, half: bool) -> list[NodeProto]:
        """Q/DQ of a value where it is made, from ``.raw``; in float32, between casts when it is ``half``."""
        params = self._plan.params[self._plan.activations[Result(tensor)].params]
        scale = self._constants.add(f"{tensor}/scale", np.asarray(params.scale, np.float32))
        zero = self._constants.add(f"{tensor}/zero", np.asarray(params.zero_point, params.spec.dtype.dtype))
        raw, codes, wide, real = (
            f"{tensor}.raw",
            *(f"__{tensor}/{part}" for part in ("codes", "wide", "real")),
        )
        pair = [
            helper.make_node("QuantizeLinear", [wide if half else raw, scale, zero], [codes]),
            helper.make_node("DequantizeLinear", [codes, scale, zero], [real if half else tensor]),
        ]
        if not half:
            return pair
        up = helper.make_node("Cast", [raw], [wide], to=TensorProto.FLOAT)
        return [up, *pair, helper.make_node("Cast", [real], [tensor], to=TensorProto.FLOAT16)]

    def is_half(self, layers: Iterable[str]) -> bool:
        """Whether one of the layers has a float16 weight."""
        uses = [self._uses[name] for name in layers if name in self._uses]
        names = [self._corrected[use.node].input[use.port] for use in uses]
        return any(self._initializers[name].data_type == TensorProto.FLOAT16 for name in names)
