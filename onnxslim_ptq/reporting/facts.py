"""Everything the report shows, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from calib.provider import SessionOptions
from calib.runner import collect
from calib.stats import ChannelStats, HistogramStats
from calib.types import Probe, Sample, Stats
from onnxslim_ptq.analysis.compare import Comparison
from onnxslim_ptq.analysis.layers import LayerError
from onnxslim_ptq.analysis.metrics import OutputError
from onnxslim_ptq.api import Result
from onnxslim_ptq.core.spec import Slot, Use
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.steps.weights import float_weight

__all__ = ["gather_facts"]

_BINS, _POINTS = 48, 64  # of a histogram; of a curve over channels
_DIGITS = 4
Floats = NDArray[np.float64]


def gather_facts(
    result: Result,
    comparison: Comparison,
    samples: Sequence[Sample],
    *,
    nbytes: tuple[int, int],
    next_command: str = "",
    task: Mapping[str, tuple[float, float]] | None = None,
    threads: int = 0,
) -> dict[str, Any]:
    """The page's data for ``result``; one sweep over ``samples`` finds distributions.

    ``nbytes``: of the float and of the written model; ``task``: the user's own metrics, float and quantized.
    """
    linears = {layer.node: layer for layer in find_linears(result.graph)[0]}
    planned = [linears[use.node] for use in result.plan.weights if use.node in linears]
    stats = _distributions(result, planned, samples, threads)
    layers = _Layers(result, linears, stats)
    rows = [layers.row(layer) for layer in comparison.layers]
    known = {row["node"] for row in rows}
    rows += [layers.unmatched(node, why) for node, why in result.skipped.items() if node not in known]
    latency = comparison.latency
    metrics = {k: v for k, v in result.metrics.items() if k != "per_output"}
    metrics["sqnr_db"] = _decibels(metrics.get("sqnr_db"))
    return {
        "title": result.context.source,
        "target": result.context.target,
        "quant_type": result.context.quant_type,
        "bytes": list(nbytes),
        "metrics": metrics,
        "outputs": [_output(error) for error in comparison.outputs],
        "latency": None if latency is None else latency.as_json(),
        "task": {name: list(pair) for name, pair in (task or {}).items()},
        "layers": rows,
        "islands": [asdict(island) for island in comparison.islands],
        "unfused": comparison.unfused,
        "health": layers.health(planned),
        "notes": result.notes,
        "recipe": yaml.safe_dump(result.context.recipe, sort_keys=False, allow_unicode=True),
        "manifest": {
            "source": {"file": result.context.source, "sha256": result.context.source_sha256},
            "tool": result.context.tool,
            "calibration": {
                "samples": result.context.calibration.samples,
                "device": result.context.calibration.device,
                "sha256": result.context.calibration.sha256,
            },
            "seed": result.context.seed,
        },
        "next": next_command,
    }


def _output(error: OutputError) -> dict[str, Any]:
    known = {"sqnr_db": _decibels(error.sqnr), "top1_agree": error.top1} if error.is_float else {}
    return {"name": error.name, **error.as_json(), **known}


def _distributions(
    result: Result, layers: Sequence[Linear], samples: Sequence[Sample], threads: int
) -> dict[Probe, Stats]:
    probes = [probe for layer in layers for probe in (_values(layer), _channels(layer))]
    if not probes:
        return {}
    options = SessionOptions(threads=threads, lanes=1)
    return collect(result.graph.to_model(), probes, samples, options=options)


def _values(layer: Linear) -> Probe:
    return Probe(layer.activation_name, "histogram")


def _channels(layer: Linear) -> Probe:
    return Probe(layer.activation_name, "channel", 1 if layer.op in ("Conv", "ConvTranspose") else -1)


class _Layers:
    """Rows of the table with what a click opens."""

    def __init__(self, result: Result, linears: Mapping[str, Linear], stats: Mapping[Probe, Stats]) -> None:
        self._result, self._linears, self._stats = result, linears, stats
        self._uses = {use.node: use for use in result.plan.weights}
        self._scales = {
            node: np.asarray(entry["scale"], np.float64)
            for entry in result.context.smoothing
            for node in entry["group"]
            if isinstance(entry.get("scale"), np.ndarray | list)
        }

    def row(self, layer: LayerError) -> dict[str, Any]:
        use = self._uses.get(layer.node)
        row: dict[str, Any] = {
            "node": layer.node,
            "op": layer.op,
            "state": "int8" if layer.quantized else "float",
            "why": "" if layer.quantized else self._result.skipped.get(layer.node, ""),
            "local": _decibels(layer.local.sqnr) if layer.local else None,
            "cumulative": _decibels(layer.cumulative.sqnr),
        }
        if use is not None and layer.node in self._linears:
            row |= self._details(self._linears[layer.node], use)
        return row

    def unmatched(self, node: str, why: str) -> dict[str, Any]:
        graph = self._result.graph
        op = next((n.op for n in graph.nodes if n.name == node), "")
        return {"node": node, "op": op, "state": "float", "why": why, "local": None, "cumulative": None}

    def _details(self, layer: Linear, use: Use) -> dict[str, Any]:
        plan = self._result.plan
        found: dict[str, Any] = {"weights": self._weights(layer)}
        slot = plan.activations.get(Use(layer.node, layer.activation))
        histogram = self._stats.get(_values(layer))
        if isinstance(histogram, HistogramStats) and histogram.extent.count:
            found["input"] = self._input(layer, slot, histogram)
        channels = self._stats.get(_channels(layer))
        scale = self._scales.get(layer.node)
        if isinstance(channels, ChannelStats) and scale is not None and scale.size == channels.absmax.size:
            found["smoothing"] = {
                "before": _curve(channels.absmax * scale),
                "after": _curve(channels.absmax),
            }
        return found

    def _input(self, layer: Linear, slot: Slot | None, histogram: HistogramStats) -> dict[str, Any]:
        values, counts = histogram.values_and_counts()
        lo, hi = float(histogram.lo), float(histogram.hi)
        bars, _ = np.histogram(values, _BINS, (lo, hi if hi > lo else lo + 1), weights=counts)
        found: dict[str, Any] = {
            "tensor": layer.activation_name,
            "lo": _short(lo),
            "hi": _short(hi),
            "bars": [int(bar) for bar in bars],
        }
        params = self._result.plan.params.get(slot.params) if slot is not None else None
        if slot is not None and params is not None and params.scale.ndim == 0:
            low, high = (float(v) for v in params.range())
            half = float(params.scale) / 2
            outside = counts[(values < low - half) | (values > high + half)].sum()
            method = self._result.plan.ranges.get(slot.params)
            found |= {
                "clip": [_short(low), _short(high)],
                "dtype": str(params.spec.dtype),
                "method": method[1] if method else "",
                "saturated": _short(float(outside / max(counts.sum(), 1))),
            }
        return found

    def _weights(self, layer: Linear) -> dict[str, Any]:
        weight = float_weight(self._result.graph, layer)
        axis = layer.channel_axis if layer.channel_axis is not None else weight.ndim - 1
        largest = (
            np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)).astype(np.float64)
        )
        return {"channels": int(largest.size), "largest": _curve(largest), "dead": int((largest == 0).sum())}

    def health(self, planned: Sequence[Linear]) -> dict[str, Any]:
        """What calibration samples looked like, where that is worth a line."""
        lines: list[dict[str, Any]] = []
        for name, layer in {layer.activation_name: layer for layer in planned}.items():
            histogram, channels = self._stats.get(_values(layer)), self._stats.get(_channels(layer))
            assert isinstance(histogram, HistogramStats)
            assert isinstance(channels, ChannelStats)
            extent = histogram.extent
            dead = int((channels.absmax == 0).sum())
            if extent.nan or extent.inf or dead:
                counts = {
                    "nan": extent.nan,
                    "inf": extent.inf,
                    "dead": dead,
                    "channels": channels.absmax.size,
                }
                lines.append({"tensor": name, **{key: int(value) for key, value in counts.items()}})
        return {"tensors": len({layer.activation_name for layer in planned}), "lines": lines}


def _curve(values: Floats) -> list[float]:
    """At most `_POINTS` values, each the largest of its neighbours."""
    parts = np.array_split(np.asarray(values, np.float64), min(_POINTS, values.size) or 1)
    return [_short(float(part.max())) for part in parts if part.size]


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else 0.0


def _decibels(value: float | None) -> float | None:
    """Two decimals; an exact result counts as 999, so that it can be sorted."""
    return None if value is None else 999.0 if value == math.inf else round(value, 2)
