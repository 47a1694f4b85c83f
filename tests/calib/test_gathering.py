"""Workers, blocks and interruptions do not show in the statistics."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.blocks.blockwise import Blockwise
from calib.errors import CalibrationError
from calib.gathering import WORKER_THREADS, Gathering, gather
from calib.model import Model, open_model
from calib.progress import Progress
from calib.provider import SessionOptions
from calib.readers import from_iterable, open_data, split_held_out, subset, synthetic
from calib.runner import collect
from calib.saved.progress import Resume
from calib.types import Dataset, Probe, Sample, Stats
from calib.workers import cluster
from calib.workers.luggage import is_portable, write_for_workers
from calib.workers.parallel import Processes, shards
from calib.workers.part import Slice

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "tools" / "digits"
ONE_THREAD = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(DIGITS / "digits.onnx")


@pytest.fixture(scope="module")
def data(model: Model) -> Dataset:
    return open_data([DIGITS / "calib"], model.inputs())


@pytest.fixture(scope="module")
def probes(model: Model) -> list[Probe]:
    names = [node.output[0] for node in model.proto.graph.node if node.op_type in ("Conv", "Gemm")]
    return [
        Probe(name, kind) for name in ("image", *names) for kind in ("histogram", "minmax", "series", "mean")
    ]


@pytest.fixture(scope="module")
def plain(model: Model, probes: list[Probe], data: Dataset) -> dict[Probe, Stats]:
    return collect(model, probes, data, options=ONE_THREAD)


def assert_same(found: dict[Probe, Stats], plain: dict[Probe, Stats]) -> None:
    assert found.keys() == plain.keys()
    for probe, stat in plain.items():
        left, right = found[probe].state(), stat.state()
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.tobytes() == right[name].tobytes(), (probe, name)


class InMemory:
    """Samples that only this process has; counts how often one was asked for."""

    def __init__(self, data: Dataset) -> None:
        self.samples = list(data)
        self.read_count = 0
        self.unpicklable = lambda: None

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.samples:
            self.read_count += 1
            yield sample


class Broken(Exception):
    pass


class BreaksAt(InMemory):
    """Raises instead of giving the n-th sample, once."""

    def __init__(self, data: Dataset, at: int) -> None:
        super().__init__(data)
        self.at: int | None = at

    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(super().__iter__()):
            if number == self.at:
                self.at = None
                raise Broken
            yield sample


class TestWorkers:
    @pytest.mark.parametrize("workers", [1, 3])
    def test_of_files(
        self, workers: int, model: Model, probes: list[Probe], data: Dataset, plain: dict[Probe, Stats]
    ) -> None:
        assert is_portable(data)
        events: list[Progress] = []
        found = gather(model, probes, data, how=Gathering(workers), listener=events.append)
        assert_same(found, plain)
        assert events[-1] == Progress("calibrating", len(data), len(data))
        assert [e.done for e in events] == sorted(e.done for e in events)

    def test_of_samples_in_this_process(
        self, model: Model, probes: list[Probe], data: Dataset, plain: dict[Probe, Stats]
    ) -> None:
        fed = InMemory(data)
        assert not is_portable(fed)
        assert_same(gather(model, probes, fed, how=Gathering(2)), plain)
        assert fed.read_count == len(data)

    @pytest.mark.parametrize("resume", [False, True])
    def test_of_samples_in_this_process_in_several_sweeps(
        self, resume: bool, model: Model, data: Dataset, tmp_path: Path
    ) -> None:
        """Every sweep gets the samples, and progress tells of all sweeps."""
        large = (("rows", 1e9),)  # counts as more than one sweep may hold
        several = [Probe("image", "rows", options=large), Probe("logits", "rows", options=large)]
        several.append(Probe("logits", "minmax"))
        events: list[Progress] = []
        how = Gathering(2, resume=Resume(tmp_path, data="known", every=60) if resume else None)
        found = gather(model, several, InMemory(data), how=how, listener=events.append)
        assert_same(found, collect(model, several, data, options=ONE_THREAD))
        assert events[-1] == Progress("calibrating", 3 * len(data), 3 * len(data))
        assert events[-1].rate is not None

    def test_more_workers_than_samples(self, model: Model, probes: list[Probe], data: Dataset) -> None:
        two = subset(data, [3, 5])
        expected = collect(model, probes, two, options=ONE_THREAD)
        assert_same(gather(model, probes, InMemory(two), how=Gathering(3)), expected)

    def test_threads_do_not_depend_on_the_number_of_workers(self) -> None:
        for workers in (1, 2, 7):
            assert Gathering(workers).options(SessionOptions()).threads == WORKER_THREADS
            assert Gathering(workers).options(SessionOptions(threads=3)).threads == 3
        assert Gathering().options(SessionOptions()).threads == 0

    def test_a_bad_sample_is_named(self, model: Model, tmp_path: Path) -> None:
        for number in range(4):
            shape = (1, 1, 8, 8) if number != 2 else (1, 2, 8, 8)
            np.savez(tmp_path / f"{number}.npz", image=np.zeros(shape, np.float32))
        bad = open_data([tmp_path], model.inputs())
        with pytest.raises(CalibrationError, match=r"2\.npz: input 'image' has shape \[1, 2, 8, 8\]"):
            gather(model, [Probe("logits", "minmax")], bad, how=Gathering(2))

    def test_an_error_of_the_data_ends_all(self, model: Model, data: Dataset) -> None:
        with pytest.raises(Broken):
            gather(model, [Probe("logits", "minmax")], BreaksAt(data, 20), how=Gathering(2))

    def test_a_dead_worker(self, model: Model, data: Dataset) -> None:
        with Processes(1, model, data, "cpu", ONE_THREAD, None) as workers:
            import os

            future = workers._pool.submit(os._exit, 1)
            assert future.exception() is not None
            with pytest.raises(CalibrationError, match="a worker process died"):
                workers.round([Probe("logits", "minmax")], range(4), float("inf"))

    def test_nothing_stays_behind(
        self, model: Model, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("calib.blocks.spool._on_disk", lambda: tmp_path)
        gather(model, [Probe("logits", "minmax")], subset(data, range(4)), how=Gathering(2))
        assert list(tmp_path.iterdir()) == []

    def test_the_written_model_is_the_model(self, model: Model, tmp_path: Path) -> None:
        again = open_model(write_for_workers(model, tmp_path))
        assert again.sha256 == model.sha256
        assert again.weights.keys() == model.weights.keys()

    def test_portable(self, model: Model) -> None:
        assert is_portable(synthetic(model.inputs()))
        assert is_portable(split_held_out(open_data([DIGITS / "calib"], model.inputs()))[0])
        assert not is_portable(from_iterable(lambda: iter(()), model.inputs()))
        large: Any = (np.zeros(1 << 20, np.float32),)
        assert not is_portable(large)

    def test_shards(self) -> None:
        assert shards([1, 2, 5, 7, 8], 2) == [[1, 2, 5], [7, 8]]
        assert shards([1], 4) == [[1]]
        assert shards([], 4) == [[]]


class TestProgress:
    def test_of_several_sweeps_in_one_process(self, model: Model, data: Dataset) -> None:
        large = (("rows", 1e9),)
        several = [Probe(name, "rows", options=large) for name in ("image", "logits")]
        events: list[Progress] = []
        gather(model, several, data, listener=events.append)
        assert [e.done for e in events] == list(range(1, 2 * len(data) + 1))
        assert {e.total for e in events} == {2 * len(data)}

    def test_of_blocks(self, model: Model, data: Dataset) -> None:
        events: list[Progress] = []
        how = Gathering(blockwise=Blockwise(1 << 20))
        gather(model, [Probe("logits", "minmax")], data, how=how, listener=events.append)
        assert events[-1].done == events[-1].total >= len(data)
        assert events[-1].rate is not None

    def test_the_rate_is_that_of_what_was_run_now(self, model: Model, data: Dataset, tmp_path: Path) -> None:
        some = subset(data, range(12))
        events: list[Progress] = []
        how = Gathering(resume=Resume(tmp_path, data="known", every=0))  # a round for each sample
        gather(model, [Probe("logits", "minmax")], some, how=how, listener=events.append)
        assert [(e.done, e.before) for e in events] == [(n + 1, n) for n in range(12)]
        assert all(e.rate == pytest.approx(1 / e.seconds) for e in events)


class TestSlice:
    def test_a_later_pass_gives_the_same(self, data: Dataset) -> None:
        part = Slice(data, range(10, 20), seconds=0)
        first = [sample.index for sample, _ in part]
        assert first == [10]
        assert [sample.index for sample, _ in part] == first
        assert len(part) == 1

    def test_a_pass_that_was_given_up_decides_nothing(self, data: Dataset) -> None:
        part = Slice(data, range(10, 20))
        next(iter(part))
        assert part.done is None
        assert len(list(part)) == 10


class TestResume:
    def resume(self, folder: Path, every: float = 0.0) -> Gathering:
        return Gathering(resume=Resume(folder, every=every))

    @pytest.mark.parametrize("workers", [None, 2])
    def test_goes_on_where_it_stopped(
        self,
        workers: int | None,
        model: Model,
        probes: list[Probe],
        data: Dataset,
        plain: dict[Probe, Stats],
        tmp_path: Path,
    ) -> None:
        some = subset(data, range(12))
        expected = collect(model, probes, some, options=ONE_THREAD)
        broken = BreaksAt(some, 7)
        known = Resume(tmp_path / "r", data="known", every=0)
        how = Gathering(workers, resume=known)
        with pytest.raises(Broken):
            gather(model, probes, broken, options=ONE_THREAD, how=how)
        kept = list((tmp_path / "r").iterdir())
        assert len(kept) == 1
        before = broken.read_count
        events: list[Progress] = []
        found = gather(model, probes, broken, options=ONE_THREAD, how=how, listener=events.append)
        assert_same(found, expected)
        assert events[0].done > 1, "samples that were finished are not run again"
        assert events[-1].done == 12
        assert broken.read_count - before < 12 * 12
        known.clear()
        assert not (tmp_path / "r").exists()

    def test_a_finished_sweep_is_not_run_again(
        self, model: Model, probes: list[Probe], data: Dataset, plain: dict[Probe, Stats], tmp_path: Path
    ) -> None:
        how = self.resume(tmp_path, every=60)
        assert_same(gather(model, probes, data, options=ONE_THREAD, how=how), plain)
        events: list[Progress] = []
        assert_same(gather(model, probes, data, options=ONE_THREAD, how=how, listener=events.append), plain)
        assert events == []

    def test_other_data_is_an_error(self, model: Model, data: Dataset, tmp_path: Path) -> None:
        probes = [Probe("logits", "minmax")]
        gather(model, probes, subset(data, range(3)), how=self.resume(tmp_path))
        with pytest.raises(CalibrationError, match="progress of another run, which differs in data; give"):
            gather(model, probes, subset(data, range(4)), how=self.resume(tmp_path))

    def test_other_options_are_an_error(self, model: Model, data: Dataset, tmp_path: Path) -> None:
        probes, three = [Probe("logits", "minmax")], subset(data, range(3))
        gather(model, probes, three, options=ONE_THREAD, how=self.resume(tmp_path))
        with pytest.raises(CalibrationError, match=r"differs in threads \(1, now 2\)"):
            gather(model, probes, three, options=SessionOptions(threads=2), how=self.resume(tmp_path))

    def test_another_model_is_an_error(self, model: Model, data: Dataset, tmp_path: Path) -> None:
        probes, three = [Probe("logits", "minmax")], subset(data, range(3))
        gather(model, probes, three, how=Gathering(resume=Resume(tmp_path, model="a")))
        with pytest.raises(CalibrationError, match="differs in model"):
            gather(model, probes, three, how=Gathering(resume=Resume(tmp_path, model="b")))

    def test_a_second_sweep_of_the_same_run(self, model: Model, data: Dataset, tmp_path: Path) -> None:
        three = subset(data, range(3))
        for kind in ("minmax", "series"):
            gather(model, [Probe("logits", kind)], three, how=self.resume(tmp_path))
        assert len(list(tmp_path.iterdir())) == 2

    def test_damaged_progress(self, model: Model, data: Dataset, tmp_path: Path) -> None:
        probes, three = [Probe("logits", "minmax")], subset(data, range(3))
        gather(model, probes, three, how=self.resume(tmp_path))
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CalibrationError, match="is damaged"):
            gather(model, probes, three, how=self.resume(tmp_path))

    def test_foreign_files_in_the_folder_stay(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("x")
        Resume(tmp_path).clear()
        assert (tmp_path / "mine.txt").exists()


class TestBlockwise:
    def test_equals_the_whole(self, model: Model, probes: list[Probe], data: Dataset, tmp_path: Path) -> None:
        some = subset(data, range(8))
        how = Gathering(blockwise=Blockwise(1 << 20), resume=Resume(tmp_path, every=0))
        found = gather(model, probes, some, options=ONE_THREAD, how=how)
        for probe, stat in collect(model, probes, some, options=ONE_THREAD).items():
            for name in ("lo", "hi"):
                if probe.kind in ("minmax", "histogram"):
                    np.testing.assert_allclose(found[probe].state()[name], stat.state()[name], rtol=1e-6)

    def test_not_with_workers(self, model: Model, data: Dataset) -> None:
        with pytest.raises(CalibrationError, match="block-wise calibration runs in one process"):
            gather(model, [Probe("logits", "minmax")], data, how=Gathering(2, blockwise=Blockwise()))


def test_no_samples(model: Model) -> None:
    for how in (Gathering(), Gathering(2), Gathering(resume=Resume(Path("never")))):
        with pytest.raises(CalibrationError, match="holds no samples"):
            gather(model, [Probe("logits", "minmax")], InMemory([]), how=how)  # type: ignore[arg-type]


class TestRay:
    def test_missing(self, model: Model, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(CalibrationError, match=r"pip install 'onnxslim_ptq\[ray\]'"):
            gather(model, [Probe("logits", "minmax")], data, how=Gathering(2, cluster.LOCAL))

    @pytest.mark.slow
    def test_two_actors(
        self, model: Model, probes: list[Probe], data: Dataset, plain: dict[Probe, Stats], tmp_path: Path
    ) -> None:
        """In a process of its own: Ray leaves threads and handlers behind."""
        pytest.importorskip("ray")
        done = subprocess.run(
            [sys.executable, "-c", RAY_SCRIPT, str(DIGITS)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["same", "told", "needs-files", "bad-sample", "no-cluster"], done.stdout


RAY_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from calib.errors import CalibrationError
from calib.gathering import Gathering, gather
from calib.model import open_model
from calib.provider import SessionOptions
from calib.readers import from_iterable, open_data
from calib.runner import collect
from calib.types import Probe

digits = Path(sys.argv[1])
model = open_model(digits / "digits.onnx")
data = open_data([digits / "calib"], model.inputs())
probes = [Probe("logits", k) for k in ("histogram", "minmax", "series")]
plain = collect(model, probes, data, options=SessionOptions(threads=1))
events = []
found = gather(model, probes, data, how=Gathering(2, "local"), listener=events.append)
same = all(a.tobytes() == found[p].state()[n].tobytes() for p, s in plain.items() for n, a in s.state().items())
print("same" if same else "different")
print("told" if events and events[-1].done <= events[-1].total == len(data) and events[-1].rate else events)
try:
    gather(model, probes, from_iterable(lambda: iter(data), model.inputs()), how=Gathering(2, "local"))
except CalibrationError as error:
    print("needs-files" if "read the samples themselves" in str(error) else error)

class Bad:
    def __len__(self): return 2
    def __iter__(self): raise CalibrationError("this sample is bad")
try:
    gather(model, probes, Bad(), how=Gathering(2, "local"))
except CalibrationError as error:
    print("bad-sample" if str(error) == "this sample is bad" else error)
try:
    gather(model, probes, data, how=Gathering(2, "127.0.0.1:1"))
except CalibrationError as error:
    print("no-cluster" if "--ray 127.0.0.1:1: no connection" in str(error) else error)
"""
