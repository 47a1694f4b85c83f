"""What is reduced inside the graph gives the same as looking at the whole tensor, NaN and Inf included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from calib.model import open_model
from calib.progress import Progress
from calib.provider import SessionOptions, create_session
from calib.readers import from_iterable
from calib.runner import collect, tap
from calib.stats import COLLECTORS, HistogramStats, MeanStats, MinMaxStats
from calib.stats.histogram import grid_step, sampled
from calib.sweep.bounds import NAN_PASSES, Facts, Limits, Padded
from calib.sweep.budget import split, state_bytes
from calib.sweep.lanes import in_lanes, lanes_for, values_of
from calib.sweep.reduce import Plan, make_plan
from calib.types import Array, Dataset, Feed, Probe, Sample, Stats

C = 32
SIZE = 64  # 32 x 64 x 64: large enough to be pooled
POOLED = ("r1", "k2", "r3")
Floats = NDArray[np.float32]


def network(swallow: bool = False) -> onnx.ModelProto:
    """Conv, Relu, Pad, depthwise Conv, Clip, Conv, Relu, Conv; ``swallow``: with a MaxPool at its end."""
    end = "y = MaxPool <kernel_shape = [1, 1], strides = [4, 4]> (r3)" if swallow else "y = Conv (r3, w4, b4)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 3, {SIZE}, {SIZE}] x) => (float[n, m, h, w] y) {{
            c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            r1 = Relu (c1)
            p1 = Pad <mode = "constant"> (r1, pads)
            c2 = Conv <group = {C}> (p1, w2, b2)
            k2 = Clip (c2, zero, six)
            c3 = Conv (k2, w3, b3)
            r3 = Relu (c3)
            {end}
        }}"""
    )
    rng = np.random.default_rng(5)
    shapes = {"w1": (C, 3, 3, 3), "w2": (C, 1, 3, 3), "w3": (C, C, 1, 1), "w4": (8, C, 1, 1)}
    values: dict[str, Array] = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    values |= {f"b{n[1]}": np.zeros(s[0], np.float32) for n, s in shapes.items()}
    values |= {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "zero": np.float32(0), "six": np.float32(6)}
    used = {i for n in proto.graph.node for i in n.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), n) for n, v in values.items() if n in used
    )
    return proto


def feeds(count: int = 5, scale: float = 1.0) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [{"x": (rng.standard_normal((1, 3, SIZE, SIZE)) * scale).astype(np.float32)} for _ in range(count)]


def data_of(proto: onnx.ModelProto, samples: list[Feed]) -> Dataset:
    return from_iterable(samples, open_model(proto).inputs())


def probes(names: tuple[str, ...] = ("x", "r1", "p1", "k2", "r3")) -> list[Probe]:
    found = [Probe(n, "minmax") for n in names]
    found += [Probe(n, "histogram", None, (("most", 4096.0),)) for n in names]
    return found + [Probe(n, "mean", 1) for n in names]


def directly(proto: onnx.ModelProto, wanted: list[Probe], samples: list[Feed]) -> dict[Probe, Stats]:
    """The same statistics of whole tensors, taken one after the other."""
    model = open_model(proto)
    names = list(dict.fromkeys(p.tensor for p in wanted if p.tensor != "x"))
    session = create_session(tap(model, names).SerializeToString(), model.weights)
    stats = {p: COLLECTORS[p.kind](p) for p in wanted}
    for sample, feed in data_of(proto, samples):
        values = dict(zip(names, session.run(names, dict(feed)), strict=True)) | {"x": feed["x"]}
        for probe, stat in stats.items():
            stat.update(values[probe.tensor], sample)
    return stats


def plan_of(proto: onnx.ModelProto, wanted: list[Probe]) -> Plan:
    model = open_model(proto)
    return make_plan(model.proto, Facts(model), {p: COLLECTORS[p.kind](p) for p in wanted})


def assert_same(found: dict[Probe, Stats], exact: dict[Probe, Stats]) -> None:
    assert found.keys() == exact.keys()
    for probe, stat in found.items():
        other = exact[probe]
        if isinstance(stat, MinMaxStats):
            assert isinstance(other, MinMaxStats)
            for key, value in stat.state().items():
                np.testing.assert_array_equal(value, other.state()[key], f"{probe} {key}")
        elif isinstance(stat, HistogramStats):
            assert isinstance(other, HistogramStats)
            for key, value in stat.extent.state().items():
                np.testing.assert_array_equal(value, other.extent.state()[key], f"{probe} {key}")
            if probe.tensor != "p1":  # a padded one counts its zeros in proportion
                np.testing.assert_array_equal(stat.counts, other.counts, str(probe))
        else:
            assert isinstance(stat, MeanStats)
            assert isinstance(other, MeanStats)
            assert stat.count == other.count
            if stat.count:
                np.testing.assert_allclose(stat.mean, other.mean, rtol=1e-5, atol=1e-6)


def test_large_limited_values_are_pooled_and_a_padded_one_is_its_source() -> None:
    plan = plan_of(network(), probes())
    assert tuple(plan.pooled) == POOLED
    assert plan.fed == ["x"]
    assert plan.whole == []
    assert "p1" not in plan.wanted
    assert [n.op_type for n in plan.nodes(17)].count("MaxPool") == 3


class ReadOnce:
    """Samples that cannot be asked for again."""

    def __init__(self, data: Dataset) -> None:
        self.samples, self.count = iter(list(data)), len(data)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return self.samples


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_pooled_statistics_equal_those_of_whole_tensors(scale: float, once: bool) -> None:
    """With tiny inputs Clip never reaches 6: the sweep has to look again, at once where it cannot later."""
    proto, samples = network(), feeds(scale=scale)
    data = ReadOnce(data_of(proto, samples)) if once else data_of(proto, samples)
    found = collect(open_model(proto), probes(), data, once=once)
    exact = directly(proto, probes(), samples)
    top = found[Probe("k2", "minmax")]
    assert isinstance(top, MinMaxStats)
    assert (top.hi == 6.0) == (scale == 1.0)
    assert_same(found, exact)


@pytest.mark.parametrize("wanted", [probes(POOLED), [Probe(n, "minmax") for n in (*POOLED, "y")]])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_is_counted_and_named_with_its_sample(bad: float, wanted: list[Probe]) -> None:
    proto, samples = network(), feeds()
    samples[3]["x"][0, 1, 17, 5] = bad
    found = collect(open_model(proto), wanted, data_of(proto, samples))
    assert_same(found, directly(proto, wanted, samples))
    watched = found[Probe("r1", "minmax")]
    assert isinstance(watched, MinMaxStats)
    assert watched.nan + watched.inf > 0
    assert watched.first_bad is not None
    assert watched.first_bad[0] == 3


def test_a_nan_that_could_be_lost_on_its_way_is_watched_where_it_arises() -> None:
    """Only a value that shows the NaN of another one makes a reduction of that other one's mean superfluous."""
    wanted = [Probe(n, "minmax") for n in POOLED]
    assert [plan_of(network(), [*wanted, Probe("y", "minmax")]).pooled[n].mean for n in POOLED] == [False] * 3
    assert [plan_of(network(True), wanted).pooled[n].mean for n in POOLED] == [True] * 3


@pytest.mark.parametrize("op", sorted(NAN_PASSES))
def test_every_operator_of_the_table_passes_nan_on(op: str) -> None:
    """The table speaks of the ONNX Runtime at hand: every operator, in and out of the layouts it uses."""
    forms = {
        "Add": "Add (x, v)",
        "BatchNormalization": "BatchNormalization (x, s, s, s, s)",
        "Clip": "Clip (x, low, high)",
        "Concat": "Concat <axis = 1> (x, v)",
        "Conv": "Conv (x, w)",
        "Flatten": "Flatten (x)",
        "Gemm": "Gemm (f, q)",
        "MatMul": "MatMul (x, p)",
        "Mul": "Mul (x, v)",
        "Pad": "Pad (x, pads)",
        "Reshape": "Reshape (x, shape)",
        "Squeeze": "Squeeze (x, none)",
        "Sub": "Sub (v, x)",
        "Unsqueeze": "Unsqueeze (x, none)",
    }
    before = "f = Flatten (x)" if op == "Gemm" else ""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 16, 9, 9] x) => (float y) {{
            {before} y = {forms.get(op, f"{op} (x)")} }}"""
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {
        "v": rng.standard_normal((1, 16, 9, 9)).astype(np.float32),
        "s": np.ones(16, np.float32),
        "low": np.asarray(0, np.float32),
        "high": np.asarray(6, np.float32),
        "w": rng.standard_normal((16, 16, 1, 1)).astype(np.float32),
        "q": np.zeros((16 * 81, 4), np.float32),
        "p": np.zeros((9, 3), np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "shape": np.array([16, 81]),
        "none": np.array([0]),
    }
    used = {i for n in proto.graph.node for i in n.input}
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items() if n in used)
    session = create_session(proto.SerializeToString())
    for place in itertools.product((0, 15), (0, 4, 8), (0, 7, 8)):
        x = rng.standard_normal((1, 16, 9, 9)).astype(np.float32)
        x[0][place] = np.nan
        assert np.isnan(session.run(None, {"x": x})[0]).any(), place


class TestFacts:
    def test_limits(self) -> None:
        facts = Facts(open_model(network()))
        assert facts.limits("r1") == Limits(0.0, None)
        assert facts.limits("k2") == Limits(0.0, 6.0)
        assert facts.limits("c1") is None
        assert facts.limits("x") is None

    def test_padded(self) -> None:
        facts = Facts(open_model(network()))
        assert facts.padded("p1") == Padded("r1", ((0, 0), (0, 0), (1, 1), (1, 1)))
        assert facts.padded("r1") is None

    def test_sizes_that_nodes_compute(self) -> None:
        """Exporters build the pads of a Pad from several small nodes."""
        proto = network()
        half = numpy_helper.from_array(np.array([0, 0, 1, 1]), "half")
        proto.graph.initializer.append(half)
        node = onnx.helper.make_node("Concat", ["half", "half"], ["both"], axis=0)
        proto.graph.node.insert(0, node)
        next(n for n in proto.graph.node if n.op_type == "Pad").input[1] = "both"
        facts = Facts(open_model(proto))
        assert facts.padded("p1") == Padded("r1", ((0, 0), (0, 0), (1, 1), (1, 1)))
        assert facts.shape("p1") == (-1, C, SIZE + 2, SIZE + 2)

    def test_other_pads_are_values_of_their_own(self) -> None:
        for change in ("reflect", "negative"):
            proto = network()
            if change == "reflect":
                next(n for n in proto.graph.node if n.op_type == "Pad").attribute[0].s = b"reflect"
            else:
                pads = next(t for t in proto.graph.initializer if t.name == "pads")
                pads.CopyFrom(numpy_helper.from_array(np.array([0, 0, -1, 1, 0, 0, 1, 1]), "pads"))
            assert Facts(open_model(proto)).padded("p1") is None

    def test_a_stride_that_skips_places_shows_no_nan(self) -> None:
        for stride, kernel, shows in ((1, 1, True), (2, 1, False), (2, 2, True), (2, 3, False)):
            proto = onnx.parser.parse_model(
                f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 3, 8, 8] x) => (float[a, b, c, d] y) {{
                    r = Relu (x)
                    y = Conv <strides = [{stride}, {stride}], kernel_shape = [{kernel}, {kernel}]> (r, w) }}"""
            )
            weight = np.zeros((4, 3, kernel, kernel), np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
            assert Facts(open_model(proto)).shows_nan("r", {"y"}) is shows, (stride, kernel)


class TestGrid:
    def test_about_as_many_as_asked(self) -> None:
        for shape in ((1, 96, 112, 112), (1, 480, 14, 14), (4, 32, 64, 64)):
            x = np.zeros(shape, np.float32)
            assert grid_step(shape, 8192) % 2 == 1
            assert 8192 <= sampled(x, 8192).size / shape[0] <= 3 * 8192

    def test_no_grid_where_it_would_be_coarse(self) -> None:
        assert grid_step((1, 960, 3, 80), 8192) == 1
        assert grid_step((1, 256, 1536), 1024) == 1
        assert grid_step((1, 4, 8, 8), 8192) == 1


class TestLanes:
    def test_in_order_and_bounded(self) -> None:
        made: list[int] = []

        def items() -> Iterator[int]:
            for i in range(9):
                made.append(i)
                yield i

        for done, result in enumerate(in_lanes(items(), lambda i: i * i, 3)):
            assert result == done * done
            assert len(made) <= done + 3

    def test_the_first_failure_is_raised(self) -> None:
        def work(item: int) -> int:
            if item in (2, 3):
                raise ValueError(item)
            return item

        with pytest.raises(ValueError, match="2"):
            list(in_lanes(range(9), work, 4))

    def test_threads_are_shared_out(self) -> None:
        assert lanes_for(SessionOptions(threads=1), "cpu") == (1, SessionOptions(threads=1))
        assert lanes_for(SessionOptions(threads=3), "cpu") == (3, SessionOptions(threads=1))
        assert lanes_for(SessionOptions(threads=16), "cpu") == (4, SessionOptions(threads=4))
        assert lanes_for(SessionOptions(threads=16), "npu:0") == (1, SessionOptions(threads=16))

    def test_any_number_of_lanes_gives_the_same(self) -> None:
        proto, samples = network(), feeds(7)
        one, four = (
            collect(open_model(proto), probes(), data_of(proto, samples), options=SessionOptions(threads=n))
            for n in (1, 4)
        )
        for probe, stat in one.items():
            for key, value in stat.state().items():
                np.testing.assert_array_equal(value, four[probe].state()[key])

    def test_views_outlive_the_run_and_cannot_be_written(self) -> None:
        proto, samples = network(), feeds(2)
        model = open_model(proto)
        session = create_session(tap(model, ["r1"]).SerializeToString(), model.weights)
        first = values_of(session, ["r1"], samples[0])[0]
        values_of(session, ["r1"], samples[1])
        np.testing.assert_array_equal(first, session.run(["r1"], samples[0])[0])
        with pytest.raises(ValueError, match="read-only"):
            first[...] = 0


class TestBudget:
    def test_several_sweeps_give_what_one_gives(self) -> None:
        proto, samples = network(), feeds(3)
        events: list[Progress] = []
        one = collect(open_model(proto), probes(), data_of(proto, samples))
        many = collect(
            open_model(proto), probes(), data_of(proto, samples), memory=1 << 20, listener=events.append
        )
        assert_same(many, one)
        assert events[-1].done == events[-1].total > 3

    def test_estimates(self) -> None:
        facts = Facts(open_model(network()))
        histogram = Probe("r1", "histogram")
        assert state_bytes(histogram, facts) >= sum(
            a.nbytes for a in HistogramStats(histogram).state().values()
        )
        assert state_bytes(Probe("r1", "gram", 1), facts) == 17 * C * (C + 1) // 2
        assert [len(s) for s in split([histogram] * 4, facts, 2 * state_bytes(histogram, facts))] == [2, 2]
        assert [len(s) for s in split([histogram] * 2, facts, 1)] == [1, 1]
        assert split([], facts, 1) == []


def test_a_failing_sample_is_named_from_any_lane() -> None:
    proto = network()
    session = create_session(open_model(proto).proto.SerializeToString(), open_model(proto).weights)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|dimensions"):
        values_of(session, ["y"], {"x": np.zeros((1, 4, SIZE, SIZE), np.float32)})


def test_progress_tells_rate_and_time_left() -> None:
    event = Progress("calibrating", 4, 10, 2.0)
    assert (event.rate, event.eta) == (2.0, 3.0)
    assert (Progress("calibrating", 0, 10).rate, Progress("calibrating", 0, 10).eta) == (None, None)
