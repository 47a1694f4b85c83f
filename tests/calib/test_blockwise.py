"""Block after block: the values and statistics of the whole model, in a part of its memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calib.blocks.blockwise import collect_blockwise, run_blockwise
from calib.errors import CalibrationError
from calib.model import open_model
from calib.progress import Progress
from calib.provider import create_session
from calib.readers import from_iterable
from calib.runner import collect, tap
from calib.stats import COLLECTORS, HistogramStats, MinMaxStats
from calib.types import Dataset, Probe, SampleId
from tests.calib.test_cut import CAPTURING
from tests.models import cnn, feeds_for, mlp, parse, weights_of
from tools import zoo

MB = 1 << 20


def data_of(proto: onnx.ModelProto, count: int = 3) -> Dataset:
    return from_iterable(feeds_for(proto)[:count], open_model(proto).inputs())


def every_value(proto: onnx.ModelProto) -> list[str]:
    return [o for node in proto.graph.node for o in node.output]


def capturing() -> tuple[onnx.ModelProto, Dataset]:
    proto = parse(CAPTURING, weights_of(0, w1=(64, 64), w1row=(64,)), 17, 8)
    rng = np.random.default_rng(0)
    feeds = [
        {"x": rng.standard_normal((2 + i, 64)).astype(np.float32), "flag": np.asarray(i % 2 == 0)}
        for i in range(4)
    ]
    return proto, from_iterable(feeds, open_model(proto).inputs())


class TestCollect:
    @pytest.mark.parametrize("make", [cnn, mlp])
    @pytest.mark.parametrize("memory", [1, 1 << 16])
    def test_every_statistic_of_every_value(self, make: Any, memory: int, tmp_path: Path) -> None:
        """Every value is watched, so no fusion depends on the cuts: equal to the last bit."""
        proto = make()
        names = ["x", *every_value(proto)]
        kinds = [k for k in COLLECTORS if k not in ("gram", "rows")]
        probes = [Probe(n, k, 1 if "channel" in k or k == "mean" else None) for n in names for k in kinds]
        model, data = open_model(proto), data_of(proto)
        whole = {probe: COLLECTORS[probe.kind](probe) for probe in probes}
        session = create_session(tap(model, names[1:]).SerializeToString(), model.weights)
        for sample, feed in data:
            values = dict(zip(names[1:], session.run(names[1:], dict(feed)), strict=True))
            for probe, stat in whole.items():
                stat.update({**feed, **values}[probe.tensor], sample)
        blocks = collect_blockwise(model, probes, data, memory=memory, folder=tmp_path)
        assert list(blocks) == probes
        for probe in probes:
            states = whole[probe].state(), blocks[probe].state()
            assert all(np.array_equal(states[0][k], states[1][k]) for k in states[0]), probe
        assert list(tmp_path.iterdir()) == [], "the spool is gone"

    def test_values_captured_by_a_branch_cross_the_cut(self) -> None:
        proto, data = capturing()
        probes = [Probe(n, "minmax") for n in ("a", "b", "c", "y", "x")]
        whole = collect(open_model(proto), probes, data)
        blocks = collect_blockwise(open_model(proto), probes, data, memory=1)
        for probe in probes:
            x, y = whole[probe], blocks[probe]
            assert isinstance(x, MinMaxStats)
            assert isinstance(y, MinMaxStats)
            assert (x.lo, x.hi, x.count) == (y.lo, y.hi, y.count)

    def test_progress_counts_blocks_and_samples(self) -> None:
        proto, events = mlp(), list[Progress]()
        data = data_of(proto)
        collect_blockwise(open_model(proto), [Probe("y", "minmax")], data, memory=1, listener=events.append)
        assert [e.done for e in events] == list(range(1, events[-1].total + 1))
        blocks, rest = divmod(events[-1].total, len(data))
        assert (blocks > 1, rest) == (True, 0)


class TestRefused:
    def test_no_samples(self) -> None:
        with pytest.raises(CalibrationError, match="no samples"):
            collect_blockwise(open_model(mlp()), [Probe("y", "minmax")], [])  # type: ignore[arg-type]

    def test_a_value_the_model_does_not_have(self) -> None:
        with pytest.raises(CalibrationError, match="no value 'nope'"):
            collect_blockwise(open_model(mlp()), [Probe("nope", "minmax")], data_of(mlp()))

    def test_data_that_ends_early_the_second_time(self) -> None:
        proto, data = capturing()

        class Shrinking:
            times = 0

            def __len__(self) -> int:
                return 4

            def __iter__(self) -> Iterator[Any]:
                self.times += 1
                for i, item in enumerate(data):
                    if self.times < 3 or i < 2:
                        yield item

        with pytest.raises(CalibrationError, match="gave 4 samples, then 2"):
            collect_blockwise(open_model(proto), [Probe("y", "minmax")], Shrinking(), memory=1)

    def test_a_failing_sample_is_named_and_the_spool_removed(self, tmp_path: Path) -> None:
        proto = mlp()
        good = feeds_for(proto)[0]
        bad = {"x": np.concatenate([good["x"], good["x"]], axis=-1)}
        items = [(SampleId(0, "good"), good), (SampleId(1, "bad.npz"), bad)]
        with pytest.raises(CalibrationError, match=r"bad\.npz"):
            collect_blockwise(open_model(proto), [Probe("y", "minmax")], items, memory=1, folder=tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestRun:
    def test_outputs_equal_the_sessions(self, tmp_path: Path) -> None:
        proto, data = capturing()
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        answers = run_blockwise(open_model(proto), data, memory=1, folder=tmp_path)
        for (sample, feed), (seen, values) in zip(data, answers, strict=True):
            assert seen == sample
            np.testing.assert_allclose(values["y"], session.run(["y"], dict(feed))[0], rtol=1e-6)
        assert list(tmp_path.iterdir()) == []

    def test_outputs_that_no_node_makes(self) -> None:
        proto = mlp()
        weight = proto.graph.initializer[0]
        ((_, values),) = run_blockwise(open_model(proto), data_of(proto, 1), ["x", weight.name, "y"])
        assert np.array_equal(values["x"], feeds_for(proto)[0]["x"])
        assert np.array_equal(values[weight.name], onnx.numpy_helper.to_array(weight))

    def test_a_consumer_that_stops_early_leaves_nothing(self, tmp_path: Path) -> None:
        answers = run_blockwise(open_model(mlp()), data_of(mlp()), folder=tmp_path)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.network
class TestZoo:
    """Ragged images, transformers, If subgraphs: statistics of the inputs of all layers, as quantizing needs them."""

    @pytest.mark.parametrize(
        ("name", "memory", "samples"),
        [
            ("rec", 64 * MB, 4),
            ("minilm", 128 * MB, 3),
            ("effnet", 64 * MB, 2),
            ("silero", MB, 4),
            ("silero-16k-op15", MB, 4),
            pytest.param("smollm2", 600 * MB, 2, marks=pytest.mark.slow),
        ],
    )
    def test_equals_the_whole_model(self, name: str, memory: int, samples: int) -> None:
        try:
            case = zoo.load(name)
        except zoo.ZooUnavailable as reason:
            pytest.skip(str(reason))
        model = open_model(case.model)
        data = from_iterable([case.calibration[i] for i in range(samples)], model.inputs())
        constants = {t.name for t in model.proto.graph.initializer}
        layers = [n for n in model.proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
        names = dict.fromkeys([*(n.input[0] for n in layers), *(o.name for o in model.proto.graph.output)])
        kinds = ("minmax", "histogram")
        probes = [Probe(n, k) for n in names if n not in constants for k in kinds]
        whole, blocks = collect(model, probes, data), collect_blockwise(model, probes, data, memory=memory)
        for probe in probes:
            x, y = whole[probe], blocks[probe]
            if isinstance(x, MinMaxStats) and isinstance(y, MinMaxStats):
                size = max(abs(x.lo), abs(x.hi))
                assert max(abs(x.lo - y.lo), abs(x.hi - y.hi)) <= 1e-6 * size, probe
                assert x.count == y.count
            elif isinstance(x, HistogramStats) and isinstance(y, HistogramStats):
                # A value within rounding of a bin's edge may change sides.
                assert np.abs(x.counts - y.counts).sum() <= 5e-3 * x.counts.sum(), probe


_LIMITED = """
import resource, sys
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
from calib.blocks.blockwise import collect_blockwise
from calib.model import open_model
from calib.readers import from_iterable
from calib.runner import collect
from calib.types import Probe

rng, path, size = np.random.default_rng(0), sys.argv[1], 1024
if not sys.argv[2:]:
    weights = [numpy_helper.from_array(rng.standard_normal((size, size), np.float32) / 32, f"w{i}") for i in range(40)]
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(40)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [4, size])],
                              [helper.make_tensor_value_info("v40", TensorProto.FLOAT, [4, size])], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    sys.exit()
model = open_model(path)
data = from_iterable([{"v0": rng.standard_normal((4, size)).astype(np.float32)} for _ in range(3)], model.inputs())
probes = [Probe(f"v{i}", "minmax") for i in range(41)]
first = collect_blockwise(model, probes[:2], data, memory=1 << 24)  # everything is imported and started now
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData:")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (96 << 20), used + (96 << 20)))
gather = {"whole": collect, "blocks": collect_blockwise}[sys.argv[2]]
print(len(gather(model, probes, data)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_a_model_larger_than_the_memory_left(tmp_path: Path) -> None:
    """160 MB of weights, 96 MB of data: whole it fails, in blocks (chosen by the memory that is left) it runs."""
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "m.onnx")]
    root = Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=root)
    answers = {
        how: subprocess.run([*command, how], capture_output=True, text=True, cwd=root, check=False)
        for how in ("whole", "blocks")
    }
    assert answers["whole"].returncode != 0
    assert answers["blocks"].returncode == 0, answers["blocks"].stderr[-2000:]
    assert answers["blocks"].stdout.strip() == "41"
