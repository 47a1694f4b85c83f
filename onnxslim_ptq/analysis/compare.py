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

from dataclasses import dataclass, field
from typing import Any

import onnx

from calib.errors import CalibrationError, GraphError
from calib.model import Model
from calib.progress import Listener, Meter
from calib.provider import SessionOptions, create_session
from calib.runner import run_session, tap
from calib.types import Dataset
from onnxslim_ptq.analysis.latency import Latency, measure_latency
from onnxslim_ptq.analysis.layers import LayerError, Locals, find_layers, integer_weights
from onnxslim_ptq.analysis.metrics import OutputError, worst_sqnr
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.export.exchange import Exchange
from onnxslim_ptq.export.fusion import Island, dequantized_weights, float_islands, optimized_graph
from onnxslim_ptq.export.lowering import is_ascend, lower_ascend
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.export.reading import read_quantized
from onnxslim_ptq.graph.precision import already_quantized

__all__ = ["Comparison", "compare_models"]


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
    weights = integer_weights(layered)
    notes = [f for e in outputs for f in e.faults[:1]]
    if not layers:
        notes.append("no layer has the same name in both models: errors of layers are not known")
    elif lost := sum(layer.quantized and layer.local is None for layer in layers):
        notes.append(
            f"{lost} quantized layers have no local error: what they compute with is not in the float model"
        )
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
        self.layers = find_layers(inside, layered)
        self.locals = Locals(layered, [la for la in self.layers if la.quantized], inside)
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
