"""Compares a quantized model with its float model: outputs, each layer, speed, and weights that do not become integer
kernels.

A layer is a Conv, ConvTranspose, Gemm or MatMul of the quantized model whose result has the same name in the float
model (folding BatchNormalization keeps the name of the chain's end). Two errors are measured at that result:

* cumulative: what the quantized model holds there, with the errors of all layers before it;
* local: what the layer makes of the *float* model's input through its own quantized input, weight and bias alone.

Both suppose that a name means the same value in both models. Smoothing rescales values on purpose, so the layers of a
smoothed model are compared with the float model after smoothing; where there is none, they mislead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import NodeProto, TensorProto

from calib.errors import CalibrationError, GraphError
from calib.model import Model
from calib.progress import Listener, Meter
from calib.provider import Optimize, SessionOptions, create_session
from calib.runner import run_session, tap
from calib.types import Array, Dataset, Feed
from onnxslim_ptq.analysis.latency import Latency, measure_latency
from onnxslim_ptq.analysis.metrics import OutputError, worst_sqnr
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.export.exchange import Exchange
from onnxslim_ptq.export.fusion import Island, dequantized_weights, float_islands, optimized_graph
from onnxslim_ptq.export.lowering import is_ascend, lower_ascend
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.export.reading import read_quantized
from onnxslim_ptq.graph.linears import LINEAR_OPS
from onnxslim_ptq.graph.precision import already_quantized

__all__ = ["Comparison", "LayerError", "compare_models"]

_TRANSPARENT = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
_INTEGER = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4})
_LOCAL = "@local"


@dataclass
class LayerError:
    """One layer: ``local`` is None for a layer whose weight is float."""

    node: str
    op: str
    tensor: str
    quantized: bool
    cumulative: OutputError
    local: OutputError | None

    def as_json(self) -> dict[str, Any]:
        local = self.local
        return {
            "node": self.node,
            "op": self.op,
            "tensor": self.tensor,
            "quantized": self.quantized,
            "cumulative": self.cumulative.as_json(),
            "local": None if local is None else local.as_json(),
        }


@dataclass
class Comparison:
    """What was measured on ``samples`` samples; ``runs_here``: ONNX Runtime runs the quantized model as it is."""

    outputs: list[OutputError]
    layers: list[LayerError]
    samples: int
    latency: Latency | None
    integer_weights: int
    unfused: list[str]
    islands: list[Island]
    notes: list[str] = field(default_factory=list)
    runs_here: bool = True

    @property
    def sqnr(self) -> float | None:
        return worst_sqnr(self.outputs)


def compare_models(
    exact: Model,
    quantized: Model,
    data: Dataset,
    *,
    threads: int = 0,
    latency: bool = True,
    listener: Listener | None = None,
    rescaled: Model | None = None,
) -> Comparison:
    """Run both models on every sample; GraphError when they do not have the same inputs and outputs.

    ``rescaled``: what layers are compared with, the float model smoothed as ``quantized`` is; by default ``exact``.
    A model for Ascend is compared in standard operators, since ONNX Runtime does not know AscendQuant, its layers in
    QDQ form, and it is not timed.
    """
    _check_pair(exact, quantized)
    foreign = is_ascend(quantized)
    layered = quantized
    if foreign:
        layered, quantized = _as_qdq(quantized), lower_ascend(quantized)
    outputs, layers, count = _Run(exact, quantized, layered, rescaled or exact, threads).measure(
        data, listener
    )
    weights = _integer_weights(layered)
    notes = [f for e in outputs for f in e.faults[:1]]
    if not layers:
        notes.append("no layer has the same name in both models: errors of layers are not known")
    if foreign:  # what a lowered graph does here says nothing of the device
        return Comparison(outputs, layers, count, None, len(weights), [], [], notes, runs_here=False)
    speed = measure_latency(exact, quantized, next(iter(data))[1], threads) if latency else None
    graph = optimized_graph(quantized)
    unfused = sorted(weights & dequantized_weights(graph))
    return Comparison(outputs, layers, count, speed, len(weights), unfused, float_islands(graph), notes)


def _as_qdq(ascend: Model) -> Model:
    """An Ascend graph with the same integers between QuantizeLinear and DequantizeLinear."""
    reading = read_quantized(ascend)
    return render_qdq(reading.graph.to_model(), reading.plan, TARGETS["ascend"])


def _check_pair(exact: Model, quantized: Model) -> None:
    if already_quantized(exact) and not already_quantized(quantized):
        raise GraphError(f"{exact.name} is quantized and {quantized.name} is not; give the float model first")
    for what, a, b in (
        ("input", [i.name for i in exact.inputs()], [i.name for i in quantized.inputs()]),
        (
            "output",
            [o.name for o in exact.proto.graph.output],
            [o.name for o in quantized.proto.graph.output],
        ),
    ):
        for name in a:
            if name not in b:
                raise GraphError(
                    f"{quantized.name} has no {what} '{name}' of {exact.name} "
                    f"(it has {', '.join(b) or 'none'}); give a quantized form of the same model"
                )


class _Run:
    """The sessions of one comparison: outputs of ``exact`` and ``quantized``, layers of ``inside`` and ``layered``."""

    def __init__(self, exact: Model, quantized: Model, layered: Model, inside: Model, threads: int) -> None:
        self.outputs = [o.name for o in exact.proto.graph.output]
        self.layers = _layers(inside, layered)
        self.locals = _Locals(layered, [la for la in self.layers if la.quantized], _tensors(inside))
        self.inputs = {i.name for i in exact.proto.graph.input}
        options = SessionOptions(threads=threads)
        results = [layer.tensor for layer in self.layers]
        reads = [name for name in self.locals.feeds if name not in self.inputs]
        self.exchange = Exchange.of(quantized)
        self.names = list(dict.fromkeys([*results, *reads])) or self.outputs
        # Taps keep ONNX Runtime from fusing, so the outputs come from sessions without any.
        self.exact, self.plain = (_open(m.proto, m, options) for m in (exact, quantized))
        self.exact_tapped = _open(tap(inside, self.names), inside, options)
        self.tapped = _open(tap(layered, results), layered, options) if results else None

    def measure(
        self, data: Dataset, listener: Listener | None
    ) -> tuple[list[OutputError], list[LayerError], int]:
        errors, count = [OutputError(name) for name in self.outputs], 0
        meter = Meter("comparing", len(data), listener)
        for sample, feed in data:
            expected = run_session(self.exact, self.outputs, feed, sample)
            seen = self.exchange.run(self.plain, self.outputs, feed, sample)
            for error, y, z in zip(errors, expected, seen, strict=True):
                error.add(y, z, str(sample))
            seen = run_session(self.exact_tapped, self.names, feed, sample)
            known = dict(zip(self.names, seen, strict=True))
            if self.tapped is not None:
                given = self.exchange.feed(feed, sample)
                seen = run_session(self.tapped, [layer.tensor for layer in self.layers], given, sample)
                for layer, values in zip(self.layers, seen, strict=True):
                    layer.cumulative.add(known[layer.tensor], values, str(sample))
            self.locals.add({**feed, **known}, known, sample)
            count += 1
            meter.at(count)
        if count == 0:
            raise CalibrationError("the data holds no samples; give at least one")
        return errors, self.layers, count


def _open(proto: onnx.ModelProto, model: Model, options: SessionOptions) -> Any:
    return create_session(proto.SerializeToString(), model.weights, options=options)


def _tensors(model: Model) -> set[str]:
    graph = model.proto.graph
    return {i.name for i in graph.input} | {o for n in graph.node for o in n.output if o}


def _layers(exact: Model, quantized: Model) -> list[LayerError]:
    graph, known = quantized.proto.graph, _tensors(exact)
    producers = {o: n for n in graph.node for o in n.output}
    types = {t.name: t.data_type for t in graph.initializer}
    casts = {n.input[0]: n.output[0] for n in graph.node if n.op_type == "Cast"}
    found = []
    for node in graph.node:
        if node.op_type in LINEAR_OPS:
            result = node.output[0] if node.output[0] in known else casts.get(node.output[0])
            if result in known:  # float16 models compute quantized layers in float32 between casts
                integer = any(_stored(name, producers, types) for name in node.input)
                local = OutputError(result) if integer else None
                found.append(
                    LayerError(node.name or result, node.op_type, result, integer, OutputError(result), local)
                )
    return found


def _stored(name: str, producers: dict[str, NodeProto], types: dict[str, int]) -> bool:
    """Whether the value is an integer initializer behind a DequantizeLinear."""
    source = producers.get(name)
    return (
        source is not None and source.op_type == "DequantizeLinear" and types.get(source.input[0]) in _INTEGER
    )


class _Locals:
    """All quantized layers in one graph, cut apart: each reads float values of the float model and feeds nobody.

    What a layer reads is followed back through QuantizeLinear, DequantizeLinear and Cast to a value the float model
    has too, which becomes an input; a layer for which there is none has no local error.
    """

    def __init__(self, quantized: Model, layers: Sequence[LayerError], known: set[str]) -> None:
        graph = quantized.proto.graph
        self._quantized = quantized
        self._producers = {o: n for n in graph.node for o in n.output}
        self._constants = {t.name for t in graph.initializer}
        self._known = known
        self._nodes: dict[str, NodeProto] = {}  # by first output
        self.feeds: dict[str, None] = {}
        self._layers: list[LayerError] = []
        self._session: Any = None
        for layer in layers:
            if self._add_layer(layer.tensor):
                self._layers.append(layer)
            else:
                layer.local = None

    def _add_layer(self, tensor: str) -> bool:
        """Take in the nodes between the known values a layer reads and ``tensor``, its result."""
        nodes: dict[str, NodeProto] = {}
        feeds: dict[str, None] = {}
        last = self._producers[tensor]
        linear = self._producers[last.input[0]] if last.op_type == "Cast" else last
        todo = [name for name in linear.input if name]
        while todo:
            name = todo.pop()
            source = self._producers.get(name)
            if name in self._constants:
                continue
            if name in self._known:
                feeds[name] = None
            elif source is not None and source.op_type in _TRANSPARENT:
                nodes[source.output[0]] = source
                todo += [i for i in source.input if i]
            else:
                return False
        cut = NodeProto()
        cut.CopyFrom(last)
        cut.output[0] += _LOCAL
        self._nodes |= {**nodes, linear.output[0]: linear, tensor: cut}
        self.feeds |= feeds
        return True

    def add(self, values: Feed, exact: Feed, sample: Any) -> None:
        """Run all layers on the float model's values of one sample."""
        if not self._layers:
            return
        feed = {name: values[name] for name in self.feeds}
        if self._session is None:
            self._session = self._open(feed)
        names = [layer.tensor + _LOCAL for layer in self._layers]
        for layer, seen in zip(self._layers, run_session(self._session, names, feed, sample), strict=True):
            assert layer.local is not None
            layer.local.add(exact[layer.tensor], seen, str(sample))

    def _open(self, feed: dict[str, Array]) -> Any:
        source = self._quantized.proto
        proto = onnx.ModelProto(ir_version=source.ir_version, opset_import=source.opset_import)
        proto.graph.name = "layers"
        names = [next(iter(n.output), "") for n in source.graph.node]
        proto.graph.node.extend(self._nodes[name] for name in names if name in self._nodes)
        read = {name for n in proto.graph.node for name in n.input}
        proto.graph.initializer.extend(t for t in source.graph.initializer if t.name in read)
        for name, values in feed.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        proto.graph.output.extend(onnx.ValueInfoProto(name=layer.tensor + _LOCAL) for layer in self._layers)
        weights = {name: w for name, w in self._quantized.weights.items() if name in read}
        return create_session(
            proto.SerializeToString(), weights, options=SessionOptions(optimize=Optimize.BASIC, simulate=True)
        )


def _integer_weights(quantized: Model) -> set[str]:
    graph = quantized.proto.graph
    types = {t.name: t.data_type for t in graph.initializer if len(t.dims) > 1}
    return {
        n.input[0]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and types.get(n.input[0]) in _INTEGER
    }
