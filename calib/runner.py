"""Watches data flow through a model: as few sweeps over the samples as memory allows feed every statistic asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import onnx

from calib.errors import CalibrationError, QuantizationError
from calib.model import Model
from calib.progress import Listener, Meter
from calib.provider import SessionOptions, create_session
from calib.stats import COLLECTORS
from calib.sweep.bounds import Facts
from calib.sweep.budget import BUDGET, split
from calib.sweep.device import Reduced
from calib.sweep.lanes import in_lanes, lanes_for, values_of
from calib.sweep.reduce import Plan, Pooled, make_plan
from calib.types import Array, Dataset, Feed, Probe, Sample, SampleId, Stats

__all__ = ["collect", "run_model", "run_session", "sweeps_of", "tap"]


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
    # Declared shapes of real exports are often wrong and only cost warnings. Those of ONNX Runtime's own operators
    # stay: its attention writes the present over the past unless their shapes are declared to differ.
    foreign = {o for n in model.proto.graph.node if n.domain not in ("", "ai.onnx") for o in n.output}
    declared = [v for v in model.proto.graph.value_info if v.name in foreign]
    del tapped.graph.value_info[:]
    tapped.graph.value_info.extend(declared)
    return tapped


def collect(
    model: Model,
    probes: Sequence[Probe],
    data: Dataset,
    *,
    device: str = "cpu",
    options: SessionOptions = SessionOptions(),
    listener: Listener | None = None,
    memory: int = BUDGET,
    once: bool = False,
) -> dict[Probe, Stats]:
    """Run every sample and return the statistic of each probe.

    One sweep over ``data``; several when the statistics would hold more than ``memory`` bytes at once. Otherwise
    memory is the tapped tensors of the samples in hand (`calib.sweep.lanes`: one per core, at most 4) and does not grow
    with the number of samples. Probes of graph inputs are served from the feeds. ``once``: ``data`` can be read a
    single time; then ``probes`` must be one of `sweeps_of`. Raises CalibrationError when there is no sample or ONNX
    Runtime fails on one (naming it), DeviceError when the device is not there.
    """
    facts = Facts(model)
    stats: dict[Probe, Stats] = {}
    sweeps = sweeps_of(model, probes, memory, facts)
    if once and len(sweeps) > 1:
        raise ValueError(f"data that can be read once cannot serve {len(sweeps)} sweeps")
    meter, done = Meter("calibrating", len(data) * len(sweeps), listener), 0
    for group in sweeps:
        mine = {probe: COLLECTORS[probe.kind](probe) for probe in group}
        sweep = _Sweep(model, make_plan(model.proto, facts, mine, device=device), device, options, once)
        for _ in sweep.run(data):
            done += 1
            meter.at(done)
        sweep.settle(data)
        stats |= mine
    if done == 0:
        raise CalibrationError("the calibration data holds no samples; give at least one")
    return stats


def sweeps_of(
    model: Model, probes: Sequence[Probe], memory: int = BUDGET, facts: Facts | None = None
) -> list[list[Probe]]:
    """Which probes `collect` serves in which sweep over the data; one without probes when there are none."""
    return split(list(dict.fromkeys(probes)), facts or Facts(model), memory) or [[]]


class _Sweep:
    """Every sample once through the tapped model, its values handed to the statistics that want them.

    Statistics do not depend on the order of samples, so lanes feed them as they come, one at a time each. ``once``: the
    data will not come again, so a value of which extremes are missing is looked at right away.
    """

    def __init__(
        self, model: Model, plan: Plan, device: str, options: SessionOptions, once: bool = False
    ) -> None:
        self._model, self._plan, self._device, self._once = model, plan, device, once
        self._lanes, self._options = lanes_for(options, device)
        self._locks = {name: Lock() for name in plan.wanted}
        self._exact: Any = None
        self._making = Lock()
        self._open: dict[str, set[int]] = {name: set() for name in plan.pooled}
        # A session needs an output; the model's own will do.
        self._outputs = plan.outputs or [model.proto.graph.output[0].name]
        tapped = tap(model, self._outputs)
        opset = next((o.version for o in tapped.opset_import if o.domain in ("", "ai.onnx")), 1)
        tapped.graph.node.extend(plan.nodes(opset))
        self._compared: set[tuple[tuple[int, ...], ...]] = set()
        self._session = self._create(tapped)

    def _create(self, tapped: onnx.ModelProto) -> Any:
        return create_session(
            tapped.SerializeToString(), self._model.weights, device=self._device, options=self._options
        )

    def run(self, data: Dataset) -> Iterator[None]:
        """Take in all samples; yields after each."""
        return in_lanes(data, self._take, self._lanes)

    def _take(self, item: Sample) -> None:
        sample, feed = item
        plan = self._plan
        outputs = self._wanted_of(feed)
        found = run_session(self._session, outputs, feed, sample, views=True)
        values = dict(zip(outputs, found, strict=True))
        del found
        broken = False
        missing = [
            n for n, one in plan.reduced.items() if n not in values and not self._reduce(one, values, sample)
        ]
        if missing:
            values |= dict(zip(missing, run_session(self._session, missing, feed, sample), strict=True))
        for name in (*plan.fed, *(n for n in plan.whole if n in values)):
            whole = feed[name] if name in plan.fed else values.pop(name)
            broken |= self._update(name, whole, sample)
        seen = {name: pooled.summary(values) for name, pooled in plan.pooled.items()}
        if broken or any(one is None for one in seen.values()):
            for name, whole in self._whole(list(seen), feed, sample).items():
                self._update(name, whole, sample)
            return
        for name, found_exact in seen.items():
            assert found_exact is not None
            summary, exact = found_exact
            with self._locks[name]:
                for wanted in plan.wanted[name]:
                    wanted.note(summary)
                if not exact:
                    self._open[name].add(sample.index)
        if self._once:
            self._settle(sample, feed)

    def _wanted_of(self, feed: Feed) -> list[str]:
        """All outputs for the first sample of every shape, so that whole tensors of a device are compared with the
        CPU's; then no longer those that are reduced there."""
        shapes = tuple(value.shape for value in feed.values())
        if not self._plan.reduced or shapes not in self._compared:
            self._compared.add(shapes)
            return self._outputs
        return [name for name in self._outputs if name not in self._plan.reduced]

    def _reduce(self, one: Reduced, values: Mapping[str, Array], sample: SampleId) -> bool:
        with self._locks[one.tensor]:
            return one.take(values, self._plan.wanted[one.tensor], sample)

    def _update(self, name: str, whole: Array, sample: SampleId) -> bool:
        """Take in a whole value; whether it is watched and has a NaN."""
        watched = self._plan.wanted[name] if name in self._plan.watched else []
        with self._locks[name]:
            before = sum(wanted.nan for wanted in watched)
            for wanted in self._plan.wanted[name]:
                wanted.update(whole, sample)
            return sum(wanted.nan for wanted in watched) > before

    def _whole(self, names: Sequence[str], feed: Feed, sample: SampleId) -> dict[str, Array]:
        """Pooled values of one sample as they are, from a session that is only made when it is needed."""
        with self._making:
            if self._exact is None:
                self._exact = self._create(tap(self._model, list(self._plan.pooled)))
        return dict(zip(names, run_session(self._exact, names, feed, sample), strict=True))

    def settle(self, data: Dataset) -> None:
        """Look again at the samples of which extremes are missing that could still be the largest of all."""
        if not self._once and any(self._open[name] for name in self._unsettled()):
            for sample, feed in data:
                self._settle(sample, feed)

    def _settle(self, sample: SampleId, feed: Feed) -> None:
        names = [name for name in self._unsettled() if sample.index in self._open[name]]
        for name, whole in (self._whole(names, feed, sample) if names else {}).items():
            with self._locks[name]:
                for wanted in self._plan.wanted[name]:
                    wanted.reach(float(whole.min()), float(whole.max()))

    def _unsettled(self) -> list[str]:
        return [name for name, pooled in self._plan.pooled.items() if not self._settled(pooled)]

    def _settled(self, pooled: Pooled) -> bool:
        extremes = [e for w in self._plan.wanted[pooled.tensor] if (e := w.extremes) is not None]
        return all(pooled.settled(*ends) for ends in extremes)


def run_session(
    session: object, outputs: Sequence[str] | None, feed: Feed, sample: SampleId, *, views: bool = False
) -> list[Array]:
    """Run one sample; an ONNX Runtime failure becomes a CalibrationError that names the sample.

    ``views``: read-only views of the session's memory (see `values_of`) instead of copies, for short use.
    """
    try:
        if views and outputs is not None:
            return values_of(session, outputs, feed)
        result: list[Array] = session.run(list(outputs) if outputs is not None else None, dict(feed))  # type: ignore[attr-defined]
    except QuantizationError:  # a device that fails says so itself: it is not the sample's fault
        raise
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
