"""Watches data flow through a model: one sweep over the samples feeds every statistic that was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import onnx

from calib.errors import CalibrationError
from calib.model import Model
from calib.provider import SessionOptions, create_session
from calib.stats import COLLECTORS
from calib.types import Array, Dataset, Feed, Probe, SampleId, Stats

__all__ = ["Progress", "collect", "run_model", "run_session", "tap"]


@dataclass(frozen=True)
class Progress:
    """An event for whoever shows progress: ``done`` of ``total`` samples of phase ``what``."""

    what: str
    done: int
    total: int


_WORTH_A_THREAD = 1 << 16
Listener = Callable[[Progress], None]


def tap(model: Model, tensors: Sequence[str], *, keep_outputs: bool = False) -> onnx.ModelProto:
    """The skeleton with ``tensors`` as outputs (after its own when ``keep_outputs``); weights are not copied."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model.proto)
    known = {v.name: v for v in model.proto.graph.output}
    outputs = list(known.values()) if keep_outputs else []
    taken = {o.name for o in outputs}
    for name in tensors:
        if name not in taken:
            outputs.append(known.get(name) or onnx.ValueInfoProto(name=name))
            taken.add(name)
    del tapped.graph.output[:]
    tapped.graph.output.extend(outputs)
    del tapped.graph.value_info[:]  # declared shapes of real exports are often wrong and only cost warnings
    return tapped


def collect(
    model: Model,
    probes: Sequence[Probe],
    data: Dataset,
    *,
    device: str = "cpu",
    options: SessionOptions = SessionOptions(),
    listener: Listener | None = None,
) -> dict[Probe, Stats]:
    """Run every sample once and return the statistic of each probe.

    Memory is one sample's tapped tensors plus the statistics; it does not grow with the number of samples. Probes
    of graph inputs are served from the feeds. Raises CalibrationError when there is no sample or ONNX Runtime fails
    on one (naming it), DeviceError when the device is not there.
    """
    stats = {probe: COLLECTORS[probe.kind](probe) for probe in probes}
    inputs = {i.name for i in model.proto.graph.input}
    by_tensor: dict[str, list[Stats]] = {}
    for probe, stat in stats.items():
        by_tensor.setdefault(probe.tensor, []).append(stat)
    tapped = [name for name in by_tensor if name not in inputs]
    fed = [name for name in by_tensor if name in inputs]
    if not tapped:  # a session needs an output; the model's own will do
        tapped = [model.proto.graph.output[0].name]
    session = create_session(
        tap(model, tapped).SerializeToString(), model.weights, device=device, options=options
    )
    total, done = len(data), 0
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for sample, feed in data:
            arrays = dict(zip(tapped, run_session(session, tapped, feed, sample), strict=True))
            arrays.update({name: feed[name] for name in fed})
            # Handing a small array to a thread costs more than looking at it.
            large = [n for n in arrays if arrays[n].size >= _WORTH_A_THREAD]
            jobs = [pool.submit(_update, by_tensor.get(n, ()), arrays.pop(n), sample) for n in large]
            for name in list(arrays):
                _update(by_tensor.get(name, ()), arrays.pop(name), sample)
            for job in jobs:
                job.result()
            done += 1
            if listener is not None:
                listener(Progress("calibrating", done, total))
    if done == 0:
        raise CalibrationError("the calibration data holds no samples; give at least one")
    return stats


def _update(stats: Sequence[Stats], array: Array, sample: SampleId) -> None:
    for stat in stats:
        stat.update(array, sample)


def run_session(session: object, outputs: Sequence[str] | None, feed: Feed, sample: SampleId) -> list[Array]:
    """Run one sample; an ONNX Runtime failure becomes a CalibrationError that names the sample."""
    try:
        result: list[Array] = session.run(list(outputs) if outputs is not None else None, dict(feed))  # type: ignore[attr-defined]
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        shapes = ", ".join(f"{k} {list(v.shape)} {v.dtype}" for k, v in feed.items())
        raise CalibrationError(f"{sample}: the model cannot run on it ({shapes}): {text}") from None
    return result


def run_model(
    model: Model, data: Dataset, *, device: str = "cpu", options: SessionOptions = SessionOptions()
) -> Iterator[tuple[SampleId, Mapping[str, Array]]]:
    """Yield the model's own outputs, sample by sample."""
    names = [o.name for o in model.proto.graph.output]
    session = create_session(model.proto.SerializeToString(), model.weights, device=device, options=options)
    for sample, feed in data:
        yield sample, dict(zip(names, run_session(session, names, feed, sample), strict=True))
