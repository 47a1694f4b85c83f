"""Statistics files: nothing is lost on disk, a damaged or foreign file is one clear line, parts merge to the whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from calib.errors import CalibrationError
from calib.model import open_model
from calib.provider import SessionOptions
from calib.readers import from_iterable, split_held_out, subset
from calib.runner import collect
from calib.saved.container import Header, read_container, require_place, write_container
from calib.saved.identity import ModelRef, Shard, conditions
from calib.saved.kept import Kept, keep
from calib.saved.store import FORMAT, VERSION, Statistics, revived
from calib.stats import COLLECTORS
from calib.types import Array, Dataset, InputInfo, Probe, SampleId, Stats

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
INPUT = InputInfo("x", np.dtype(np.float32), (None, 4))
KINDS = sorted(COLLECTORS)


def data_of(count: int, seed: int = 0) -> Dataset:
    draw = np.random.default_rng(seed)
    return from_iterable(
        [{"x": draw.standard_normal((3, 4)).astype(np.float32)} for _ in range(count)], [INPUT]
    )


def gathered(data: Dataset, probes: list[Probe]) -> dict[Probe, Stats]:
    stats = {probe: COLLECTORS[probe.kind](probe) for probe in probes}
    for sample, feed in data:
        for stat in stats.values():
            stat.update(feed["x"], sample)
    return stats


PROBES = [Probe("x", kind) for kind in KINDS]


def statistics(data: Dataset, probes: list[Probe] | None = None, graph: str = "g") -> Statistics:
    options = SessionOptions()
    found = Statistics(
        ModelRef(file="m.onnx", sha256="a" * 64), (Shard.of(data),), conditions("cpu", options)
    )
    found.add(graph, gathered(data, PROBES if probes is None else probes))
    return found


def assert_same(a: Stats, b: Stats) -> None:
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert value.tobytes() == right[name].tobytes(), name


class TestRoundTrip:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("count", [0, 5])
    def test_every_statistic(self, kind: str, count: int, tmp_path: Path) -> None:
        probe = Probe("x", kind, -1)
        stat = COLLECTORS[kind](probe)
        x = np.random.default_rng(1).standard_normal((count, 3, 4)).astype(np.float32)
        for index in range(count):
            stat.update(x[index], SampleId(index, f"s{index}"))
        found = statistics(data_of(1), [])
        found.add("g", {probe: stat})
        found.save(tmp_path / "s")
        again = Statistics.load(tmp_path / "s").find("g", [probe])[probe]
        assert_same(again, stat)

    def test_what_a_nan_left_behind(self, tmp_path: Path) -> None:
        x = np.array([[1.0, np.nan, np.inf, 2.0]], np.float32)
        data = from_iterable([{"x": x}], [INPUT])
        statistics(data, [Probe("x", "histogram")]).save(tmp_path / "s")
        stat = Statistics.load(tmp_path / "s").find("g", [Probe("x", "histogram")])[Probe("x", "histogram")]
        assert_same(stat, gathered(data, [Probe("x", "histogram")])[Probe("x", "histogram")])

    def test_header(self, tmp_path: Path) -> None:
        found = statistics(data_of(5))
        found.made_with = {"recipe": {"steps": [1, "ü"]}}
        found.save(tmp_path / "s")
        again = Statistics.load(tmp_path / "s")
        assert (again.model, again.data, again.conditions) == (found.model, found.data, found.conditions)
        assert again.made_with == found.made_with
        assert again.samples == 5

    def test_the_same_statistics_are_the_same_bytes(self, tmp_path: Path) -> None:
        for name in "ab":
            statistics(data_of(5)).save(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_counters_that_are_zero_take_no_room(self, tmp_path: Path) -> None:
        statistics(data_of(5), [Probe("x", "histogram")]).save(tmp_path / "s")
        assert (tmp_path / "s").stat().st_size < 20_000

    def test_a_probe_that_is_not_there(self) -> None:
        found = statistics(data_of(2), [Probe("x", "minmax")])
        with pytest.raises(
            CalibrationError, match="hold no 'minmax' of tensor 'y'; run calibrate with the recipe"
        ):
            found.find("g", [Probe("y", "minmax")])
        with pytest.raises(CalibrationError, match="hold nothing of the float graph that this recipe makes"):
            found.find("other", [Probe("x", "minmax")])


class TestKept:
    def test_round_trip(self, tmp_path: Path) -> None:
        data = data_of(40)
        calibration, held_out, _ = split_held_out(data)
        found = statistics(calibration, [])
        found.kept = keep(calibration, held_out)
        found.save(tmp_path / "s")
        kept = Statistics.load(tmp_path / "s").kept
        assert len(kept.judged) == 16
        assert [s.index for s, _ in kept.held_out] == [s.index for s, _ in held_out]
        for (sample, feed), (again, same) in zip(found.kept.judged, kept.judged, strict=True):
            assert (sample, sample.name) == (again, again.name)
            np.testing.assert_array_equal(feed["x"], same["x"])

    def test_too_large(self) -> None:
        data = data_of(8)
        kept = keep(*split_held_out(data)[:2], limit=100)
        assert len(kept.judged) == 0
        assert "more than the 100 bytes allowed" in kept.reason

    def test_strings_are_not_kept(self) -> None:
        info = InputInfo("x", np.dtype(object), (None,))
        data = from_iterable([{"x": np.array(["a"])}] * 8, [info])
        assert "input 'x' is of type object, which is not kept" in keep(*split_held_out(data)[:2]).reason


class TestMismatch:
    def test_another_model(self) -> None:
        model = open_model(DIGITS / "digits.onnx")
        with pytest.raises(CalibrationError, match=r"of another model: 'm\.onnx' .* not .*digits\.onnx"):
            statistics(data_of(2)).require(model)

    def test_other_data(self) -> None:
        with pytest.raises(CalibrationError, match=r"of other data: 2 samples with sha256 .* not the 3 with"):
            statistics(data_of(2)).require_data(Shard.of(data_of(3)))

    def test_data_beside_merged_parts(self) -> None:
        merged = statistics(data_of(2)).merged(statistics(data_of(2, seed=1)))
        with pytest.raises(CalibrationError, match="are merged from 2 parts"):
            merged.require_data(Shard.of(data_of(2)))

    def merge_error(self, change: Callable[[Statistics], Statistics]) -> str:
        with pytest.raises(CalibrationError) as caught:
            statistics(data_of(2)).merged(change(statistics(data_of(2, seed=1))))
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    def test_merging_different_models(self) -> None:
        other = ModelRef(file="n.onnx", sha256="b" * 64)
        assert "different models ('m.onnx' aaaaaaaaaaaa…, 'n.onnx' bbbbbbbbbbbb…)" in self.merge_error(
            lambda s: replace(s, model=other)
        )

    @pytest.mark.parametrize(
        ("name", "value"), [("device", "npu:1"), ("threads", 3), ("optimize", "off"), ("onnxruntime", "1.0")]
    )
    def test_merging_different_conditions(self, name: str, value: object) -> None:
        def change(found: Statistics) -> Statistics:
            return replace(found, conditions=found.conditions.model_copy(update={name: value}))

        assert f"different {name} (" in self.merge_error(change)

    def test_merging_different_probes(self) -> None:
        fewer = self.merge_error(lambda s: replace(s, sweeps={"g": dict(list(s.sweeps["g"].items())[1:])}))
        assert f"hold '{KINDS[0]}' of tensor 'x'" in fewer
        assert "same recipe" in self.merge_error(lambda s: replace(s, sweeps={"h": s.sweeps["g"]}))

    def test_merging_the_same_samples(self) -> None:
        assert "hold the same samples" in self.merge_error(lambda s: statistics(data_of(2)))


class TestMerge:
    # `rows` draws by sample number, so the parts draw differently from the whole.
    @pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("rows",)])
    def test_parts_are_the_whole(self, kind: str) -> None:
        whole, probe = data_of(9), Probe("x", kind, -1)
        feeds = [feed for _, feed in whole]
        first, second = (from_iterable(part, [INPUT]) for part in (feeds[:4], feeds[4:]))
        merged = statistics(first, [probe]).merged(statistics(second, [probe]))
        assert merged.samples == 9
        assert_same(merged.find("g", [probe])[probe], statistics(whole, [probe]).find("g", [probe])[probe])

    def test_sample_numbers_go_on(self) -> None:
        bad = np.array([[np.nan, 1, 1, 1]], np.float32)
        good = np.ones((1, 4), np.float32)
        first, second = (from_iterable([{"x": good}, {"x": x}], [INPUT]) for x in (good * 2, bad))
        probe = Probe("x", "series")
        merged = statistics(first, [probe]).merged(statistics(second, [probe])).find("g", [probe])[probe]
        assert merged.state()["index"].tolist() == [0, 1, 2, 3]
        assert int(merged.state()["extent.bad_index"]) == 3

    def test_gaps_of_held_out_samples_stay(self) -> None:
        calibration, _, _ = split_held_out(data_of(16))
        other, _, _ = split_held_out(data_of(16, seed=1))
        probe = Probe("x", "series")
        merged = statistics(calibration, [probe]).merged(statistics(other, [probe]))
        index = merged.find("g", [probe])[probe].state()["index"]
        assert len(set(index.tolist())) == 28

    def test_kept_samples_stay_few(self) -> None:
        parts = []
        for seed in range(2):
            split = split_held_out(data_of(40, seed))
            found = statistics(split[0], [])
            found.kept = keep(*split[:2])
            parts.append(found)
        merged = parts[0].merged(parts[1])
        assert (len(merged.kept.judged), len(merged.kept.held_out)) == (16, 10)
        indices = [s.index for s, _ in merged.kept.judged]
        assert indices == sorted(set(indices))
        assert indices[-1] > 40

    def test_a_reason_stays(self) -> None:
        a, b = statistics(data_of(2)), statistics(data_of(2, seed=1))
        a.kept = Kept(reason="too large")
        assert a.merged(b).kept.reason == "too large"


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        statistics(data_of(5)).save(tmp_path / "s")
        return tmp_path / "s"

    def refused(self, path: Path) -> str:
        with pytest.raises(CalibrationError) as caught:
            Statistics.load(path)
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        assert str(path) in text
        return text

    def test_missing_and_folder(self, tmp_path: Path) -> None:
        assert "does not exist" in self.refused(tmp_path / "none")
        assert "is a folder" in self.refused(tmp_path)

    @pytest.mark.parametrize("share", [0.0, 1e-4, 0.05, 0.5, 0.999])
    def test_truncated(self, path: Path, share: float) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert "damaged" in self.refused(path)

    def test_every_changed_byte_is_seen(self, path: Path) -> None:
        content = path.read_bytes()
        for at in np.linspace(0, len(content) - 1, 60).astype(int):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
            self.refused(path)

    def test_a_header_that_claims_too_much(self, path: Path) -> None:
        path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])
        assert "does not start with a header" in self.refused(path)

    def test_any_other_safetensors_file(self, path: Path) -> None:
        save_file({"a": np.ones(3)}, path)
        assert f"is no {FORMAT} file" in self.refused(path)
        save_file(
            {"a": np.ones(3)}, path, metadata={"calib": json.dumps({"format": FORMAT, "version": "99"})}
        )
        assert "has version '99' of its format" in self.refused(path)

    def test_an_onnx_file(self) -> None:
        self.refused(DIGITS / "digits.onnx")

    def test_an_unknown_statistic(self, tmp_path: Path) -> None:
        found = statistics(data_of(1), [])
        found.sweeps["g"] = {Probe("x", "entropy_of_mind"): {"a": np.ones(1)}}
        found.save(tmp_path / "s")
        with pytest.raises(CalibrationError, match="statistic 'entropy_of_mind' of tensor 'x' is unknown"):
            Statistics.load(tmp_path / "s")

    def test_an_unknown_key(self, tmp_path: Path) -> None:
        class Extra(Header):
            surprise: int = 1

        write_container(tmp_path / "s", FORMAT, VERSION, Extra(), {})
        self.refused(tmp_path / "s")

    def test_states_that_cannot_be(self) -> None:
        probe = Probe("x", "histogram")
        state = gathered(data_of(2), [probe])[probe].state()
        wrong: list[dict[str, Array]] = [
            {k: v for k, v in state.items() if k != "counts"},
            {**state, "counts": np.zeros((2, 2))},
            {**state, "more": np.zeros(3)},
            {**state, "lo": np.zeros(3)},
        ]
        for broken in wrong:
            with pytest.raises(CalibrationError, match="statistic 'histogram' of tensor 'x'"):
                revived(probe, broken)


class TestContainer:
    def test_sparse_arrays_of_any_shape(self, tmp_path: Path) -> None:
        arrays: dict[str, Array] = {
            "flat": np.zeros(5000, np.int64),
            "stacked": np.zeros((3, 70, 100), np.int64),
            "dense": np.arange(5000),
            "scalar": np.array(7, np.int64),
            "empty": np.zeros((0, 3), np.uint8),
            "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        }
        arrays["flat"][[3, 4999]] = -5, 2**40
        arrays["stacked"][2, 69, 99] = 1
        write_container(tmp_path / "c", "f", 1, Header(), arrays)
        found = read_container(tmp_path / "c", "f", 1, Header)[1]
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape

    def test_sparse_claims_are_checked(self, tmp_path: Path) -> None:
        for shape in ([1 << 40], [10], ["a"], 3):
            write_container(tmp_path / "c", "f", 1, Header(), {"a": np.eye(1, 5000, 4999, dtype=np.int64)[0]})
            _resealed(tmp_path / "c", json.dumps({"a": shape}))
            with pytest.raises(CalibrationError, match="damaged"):
                read_container(tmp_path / "c", "f", 1, Header)

    def test_all_or_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "c"
        write_container(path, "f", 1, Header(), {"a": np.ones(3)})
        before = path.read_bytes()

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("calib.saved.container.save_file", full)
        with pytest.raises(CalibrationError, match=r"cannot be written \(No space left on device\)"):
            write_container(path, "f", 1, Header(), {"a": np.zeros(3)})
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_refused_places(self, tmp_path: Path) -> None:
        (tmp_path / "in").write_bytes(b"x")
        with pytest.raises(CalibrationError, match="is a folder"):
            require_place(tmp_path)
        with pytest.raises(CalibrationError, match="is an input"):
            require_place(tmp_path / "in", [tmp_path / "in"])
        with pytest.raises(CalibrationError, match="cannot be written"):
            require_place(tmp_path / "in" / "below")
        require_place(tmp_path / "new" / "file")


def _resealed(path: Path, sparse: str) -> None:
    """The file with another list of sparse arrays and a hash that fits it: what a hostile writer would make."""
    from safetensors import safe_open

    from calib.saved.container import _digest

    with safe_open(path, framework="numpy") as opened:
        metadata = json.loads(opened.metadata()["calib"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    metadata |= {"sparse": sparse, "content": _digest(metadata["header"], sparse, arrays)}
    save_file(arrays, path, metadata={"calib": json.dumps(metadata)})


def test_on_a_real_model(tmp_path: Path) -> None:
    """Half the samples, saved, loaded and merged with the other half: the statistics of all."""
    from calib.readers import open_data

    model = open_model(DIGITS / "digits.onnx")
    data = open_data([DIGITS / "calib"], model.inputs())
    names = [node.output[0] for node in model.proto.graph.node if node.op_type in ("Conv", "Relu", "Gemm")]
    probes = [Probe(name, kind) for name in names for kind in ("histogram", "minmax")]
    found = []
    for part in (range(32), range(32, 64)):
        chosen = subset(data, part)
        one = Statistics(ModelRef.of(model), (Shard.of(chosen),), conditions("cpu", SessionOptions()))
        one.add(model.sha256, collect(model, probes, chosen))
        one.save(tmp_path / f"{part.start}")
        found.append(Statistics.load(tmp_path / f"{part.start}"))
    merged, whole = found[0].merged(found[1]).find(model.sha256, probes), collect(model, probes, data)
    for probe in probes:
        assert_same(merged[probe], whole[probe])
