"""One sweep over the samples: the statistics equal those of numpy on ONNX Runtime's own values."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

import calib
from calib import collect as exported
from calib import gather as exported_gather
from calib.errors import CalibrationError, DeviceError, GraphError
from calib.gathering import gather
from calib.model import open_model
from calib.progress import Progress
from calib.provider import SessionOptions
from calib.readers import from_iterable
from calib.runner import collect, run_model, run_session, tap
from calib.stats import COLLECTORS, MinMaxStats
from calib.types import Dataset, Feed, Probe, Sample, SampleId
from tests.models import cnn, feeds_for, mlp, outputs_of


def data_of(proto: onnx.ModelProto, feeds: list[Feed] | None = None) -> Dataset:
    return from_iterable(feeds if feeds is not None else feeds_for(proto), open_model(proto).inputs())


def with_outputs(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    changed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    return changed


class TestCollect:
    def test_extremes_of_inputs_results_and_outputs(self) -> None:
        proto, names = mlp(), ["x", "r1", "a2", "y"]
        stats = collect(open_model(proto), [Probe(n, "minmax") for n in names], data_of(proto))
        feeds = feeds_for(proto)
        values = outputs_of(with_outputs(proto, ["r1", "a2"]), feeds)
        exact = {
            "x": [f["x"] for f in feeds],
            "y": [v[0] for v in values],
            "r1": [v[1] for v in values],
            "a2": [v[2] for v in values],
        }
        for name in names:
            found = stats[Probe(name, "minmax")]
            assert isinstance(found, MinMaxStats)
            assert (found.lo, found.hi) == (
                np.concatenate(exact[name]).min(),
                np.concatenate(exact[name]).max(),
            )
            assert found.count == sum(v.size for v in exact[name])

    @pytest.mark.parametrize("kind", list(COLLECTORS))
    def test_every_kind_of_statistic_like_one_fed_directly(self, kind: str) -> None:
        proto = mlp()
        probe = Probe("x", kind, -1 if kind in ("channel", "gram", "mean", "channel_histogram") else None)
        (swept,) = collect(open_model(proto), [probe], data_of(proto)).values()
        direct = COLLECTORS[kind](probe)
        for sample, feed in data_of(proto):
            direct.update(feed["x"], sample)
        a, b = swept.state(), direct.state()
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])

    def test_large_tensors_go_to_threads_and_come_out_the_same(self) -> None:
        """Above the size worth a thread, statistics are updated by a pool; order and result stay."""
        proto = cnn()
        feeds = feeds_for(proto, 6, {"H": 96, "W": 96})
        probes = [
            Probe(n, k) for n in ("x", "c1", "r1", "c2", "a") for k in ("histogram", "series", "minmax")
        ]
        first, second = (collect(open_model(proto), probes, data_of(proto, feeds)) for _ in range(2))
        for probe in probes:
            for key, value in first[probe].state().items():
                np.testing.assert_array_equal(value, second[probe].state()[key])

    def test_a_failing_statistic_is_not_lost_in_a_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Failing(MinMaxStats):
            def update(self, x: Any, sample: SampleId) -> None:
                raise CalibrationError(f"{sample}: no")

        monkeypatch.setitem(COLLECTORS, "failing", Failing)
        proto = cnn()
        for size in (8, 160):
            with pytest.raises(CalibrationError, match="sample 0: no"):
                collect(
                    open_model(proto),
                    [Probe("c1", "failing")],
                    data_of(proto, feeds_for(proto, 2, {"H": size, "W": size})),
                )

    def test_samples_are_streamed(self) -> None:
        """No more samples are in hand than lanes; the next is asked for when one was used."""
        events: list[str] = []

        class Watched:
            def __len__(self) -> int:
                return 3

            def __iter__(self) -> Iterator[Sample]:
                for i, feed in enumerate(feeds_for(mlp(), 3)):
                    events.append(f"made {i}")
                    yield SampleId(i), feed

        def listener(progress: Progress) -> None:
            events.append(f"done {progress.done}/{progress.total}")

        one, two = SessionOptions(threads=1), SessionOptions(threads=2)
        collect(open_model(mlp()), [Probe("r1", "minmax")], Watched(), options=one, listener=listener)
        assert events == ["made 0", "done 1/3", "made 1", "done 2/3", "made 2", "done 3/3"]
        events.clear()
        collect(open_model(mlp()), [Probe("r1", "minmax")], Watched(), options=two, listener=listener)
        assert events == ["made 0", "made 1", "done 1/3", "made 2", "done 2/3", "done 3/3"]
        assert threading.active_count() < 20, "the pool is gone"

    def test_the_model_is_not_changed(self) -> None:
        model = open_model(mlp())
        before = model.proto.SerializeToString(deterministic=True)
        collect(model, [Probe("r1", "minmax"), Probe("x", "minmax")], data_of(mlp()))
        assert model.proto.SerializeToString(deterministic=True) == before

    def test_inputs_alone(self) -> None:
        (stats,) = collect(open_model(mlp()), [Probe("x", "minmax")], data_of(mlp())).values()
        assert isinstance(stats, MinMaxStats)
        assert stats.count == 16 * 3 * 16

    def test_no_samples(self) -> None:
        class Nothing:
            def __len__(self) -> int:
                return 0

            def __iter__(self) -> Iterator[Sample]:
                return iter(())

        with pytest.raises(CalibrationError, match="no samples"):
            collect(open_model(mlp()), [Probe("r1", "minmax")], Nothing())

    def test_a_sample_the_model_cannot_run_on(self) -> None:
        class Wrong:
            def __len__(self) -> int:
                return 1

            def __iter__(self) -> Iterator[Sample]:
                yield SampleId(0, "seventh.npz"), {"x": np.zeros((2, 7), np.float32)}

        with pytest.raises(
            CalibrationError, match=r"seventh.npz: the model cannot run on it \(x \[2, 7\] float32\)"
        ):
            collect(open_model(mlp()), [Probe("r1", "minmax")], Wrong())

    def test_an_unknown_tensor(self) -> None:
        with pytest.raises(GraphError, match="nowhere"):
            collect(open_model(mlp()), [Probe("nowhere", "minmax")], data_of(mlp()))

    def test_an_unknown_device(self) -> None:
        with pytest.raises(DeviceError, match="'tpu' is unknown"):
            collect(open_model(mlp()), [Probe("r1", "minmax")], data_of(mlp()), device="tpu")

    def test_it_is_what_the_package_exports(self) -> None:
        assert exported is collect
        assert exported_gather is gather
        assert all(not isinstance(getattr(calib, name), ModuleType) for name in calib.__all__)


class TestTap:
    def test_outputs(self) -> None:
        model = open_model(mlp())
        assert [o.name for o in tap(model, ["r1", "y", "r1"]).graph.output] == ["r1", "y"]
        assert [o.name for o in tap(model, ["r1"], keep_outputs=True).graph.output] == ["y", "r1"]
        assert tap(model, ["y"]).graph.output[0] == model.proto.graph.output[0]

    def test_weights_are_not_in_it(self) -> None:
        model = open_model(mlp())
        assert len(model.weights) == 2
        assert len(tap(model, ["r1"]).SerializeToString()) < 4000


def test_run_model() -> None:
    proto = mlp()
    for (sample, outputs), want in zip(
        run_model(open_model(proto), data_of(proto)), outputs_of(proto, feeds_for(proto)), strict=True
    ):
        np.testing.assert_array_equal(outputs["y"], want[0])
        assert str(sample).startswith("sample ")


def test_the_error_of_a_run_is_one_line() -> None:
    from tests.models import session_of

    with pytest.raises(CalibrationError) as caught:
        run_session(session_of(mlp()), None, {"wrong": np.zeros((2, 7), np.float32)}, SampleId(3))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("sample 3: the model cannot run on it (wrong [2, 7] float32)")
