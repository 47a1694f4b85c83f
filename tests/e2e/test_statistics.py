"""Saved statistics, workers and interruptions give the same files as one plain run, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.saved.kept import KEPT_BYTES
from calib.saved.store import Statistics
from onnxslim_ptq import calibrate, quantize
from tools import zoo
from tools.bench.outliers import llama_block, llama_feeds

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "tools" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"
# One method that looks at the extremes only, one that looks at a histogram.
FIXED = {
    "steps": [
        {"type": "quantize", "act": {"range": {"type": "minmax"}}},
        {"type": "quantize", "include": ["op:Gemm"], "act": {"range": {"type": "percentile"}}},
    ]
}


def files(folder: Path, recipe: Any = "w8a8", model: Any = MODEL, **options: Any) -> tuple[bytes, bytes]:
    """The model and its JSON."""
    paths = quantize(model, recipe, **options).save(folder / "m.onnx")
    return paths.model.read_bytes(), paths.json.read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return files(tmp_path_factory.mktemp("plain"), calib_data=CALIB)


class TestSaved:
    def test_no_data_needed(self, plain: tuple[bytes, bytes], tmp_path: Path) -> None:
        """`auto` ranges are judged on the kept samples, and the result is measured on the held-out ones."""
        calibrate(MODEL, calib_data=CALIB).save(tmp_path / "s")
        assert files(tmp_path, stats=tmp_path / "s") == plain

    def test_with_the_data_when_no_samples_were_kept(
        self, plain: tuple[bytes, bytes], tmp_path: Path
    ) -> None:
        calibrate(MODEL, calib_data=CALIB, keep_bytes=0).save(tmp_path / "s")
        assert files(tmp_path, stats=tmp_path / "s", calib_data=CALIB) == plain
        with pytest.raises(CalibrationError, match=r"keep no samples, .* give the samples .* with --calib"):
            quantize(MODEL, stats=tmp_path / "s")
        with pytest.raises(CalibrationError, match="are of other data: 56 samples"):
            quantize(MODEL, stats=tmp_path / "s", calib_data=CALIB, samples=32)

    def test_ranges_that_are_not_judged_need_only_samples_to_measure_on(self, tmp_path: Path) -> None:
        statistics = calibrate(MODEL, FIXED, CALIB, keep_bytes=0, hold_out=False)
        assert statistics.samples == 64
        with np.load(DIGITS / "eval.npz") as held_out:
            images = list(held_out["image"][:32, None])
        same = files(tmp_path, FIXED, stats=statistics, eval_data=images)
        assert same == files(tmp_path, FIXED, calib_data=CALIB, eval_data=images)

    def test_few_samples(self, tmp_path: Path) -> None:
        """Below eight nothing is held out, and the calibration samples measure."""
        statistics = calibrate(MODEL, calib_data=CALIB, samples=5)
        assert files(tmp_path, stats=statistics) == files(tmp_path, calib_data=CALIB, samples=5)

    @pytest.mark.parametrize(
        ("step", "sweeps"),
        [
            ({"type": "smoothquant"}, 2),
            ({"type": "awq"}, 2),
            ({"type": "quantize", "rounder": {"type": "gptq"}}, 1),
        ],
    )
    def test_statistics_are_known_by_the_graph_they_are_of(
        self, step: dict[str, Any], sweeps: int, tmp_path: Path
    ) -> None:
        """Before and after a step that edits the graph; and whatever statistics a rounder takes."""
        recipe = {"steps": [step, {"type": "quantize"}]}
        model, feeds = llama_block(), llama_feeds(9)
        calibrate(model, recipe, feeds).save(tmp_path / "s")
        statistics = Statistics.load(tmp_path / "s")
        assert len(statistics.sweeps) == sweeps
        expected = files(tmp_path, recipe, model, calib_data=feeds, min_sqnr=0)
        assert files(tmp_path, recipe, model, stats=statistics, min_sqnr=0) == expected

    def test_merged_parts(self, tmp_path: Path) -> None:
        """Ranges of two halves, merged, are those of all samples."""
        paths = sorted(CALIB.glob("*.npz"))
        halves = [calibrate(MODEL, FIXED, part, hold_out=False) for part in (paths[:32], paths[32:])]
        for number, half in enumerate(halves):
            half.save(tmp_path / str(number))
        merged = Statistics.load(tmp_path / "0").merged(Statistics.load(tmp_path / "1"))
        result = quantize(MODEL, FIXED, stats=merged)
        with np.load(DIGITS / "eval.npz") as held_out:
            whole = quantize(MODEL, FIXED, calib_data=paths, eval_data=list(held_out["image"][:8, None]))
        assert result.plan.ranges == whole.plan.ranges
        assert result.context.calibration.samples == 64

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"recipe": FIXED | {"target": "tensorrt"}}, "hold no '.*' of tensor '.*'; run calibrate with"),
            ({"allow_quantized": True, "workers": 2}, "--workers gathers statistics, and --stats has them"),
            ({"resume": "r"}, "--resume gathers statistics"),
        ],
    )
    def test_what_does_not_fit(self, options: dict[str, Any], message: str) -> None:
        recipe = {"steps": [{"type": "quantize", "include": ["op:Gemm"], "act": {"range": {"type": "ema"}}}]}
        statistics = calibrate(MODEL, recipe, CALIB, samples=8)
        with pytest.raises(CalibrationError, match=message):
            quantize(MODEL, **{"recipe": recipe, "stats": statistics, **options})

    def test_another_model(self, tmp_path: Path) -> None:
        import onnx

        other = onnx.load(MODEL)
        other.graph.node[0].name = "renamed"
        with pytest.raises(CalibrationError, match=r"are of another model: 'digits\.onnx'"):
            quantize(other, stats=calibrate(MODEL, FIXED, CALIB, samples=8))

    def test_random_samples_are_no_statistics(self) -> None:
        with pytest.raises(CalibrationError, match="calibrate needs samples"):
            calibrate(MODEL, FIXED)

    def test_samples_that_are_too_large_are_not_kept(self) -> None:
        assert calibrate(MODEL, FIXED, CALIB, samples=9, keep_bytes=1000).kept.reason
        assert not calibrate(MODEL, FIXED, CALIB, samples=9, keep_bytes=KEPT_BYTES).kept.reason


class TestWorkers:
    def test_any_number_gives_the_same_files(self, tmp_path: Path) -> None:
        found = {n: files(tmp_path, FIXED, calib_data=CALIB, workers=n) for n in (1, 2, 4)}
        assert found[1] == found[2] == found[4]

    @pytest.mark.slow
    @pytest.mark.network
    @pytest.mark.parametrize("method", ["minmax", "histogram"])
    def test_text_recognizer(self, method: str, tmp_path: Path) -> None:
        """Ragged samples of a real model, 1, 2 and 4 workers, and without workers on one thread."""
        case = _case("rec")
        folder = tmp_path / "samples"
        folder.mkdir()
        for number, feed in enumerate(case.calibration[:24]):
            np.savez(folder / f"{number:03}.npz", **feed)
        recipe = {"steps": [{"type": "quantize", "act": {"range": {"type": method}}}]}
        options: dict[str, Any] = {"model": case.model, "calib_data": folder, "min_sqnr": 0}
        found = [files(tmp_path, recipe, **options, workers=n) for n in (1, 2, 4)]
        assert found[0] == found[1] == found[2]
        assert calibrate(case.model, recipe, folder, workers=2).conditions.threads == 1


class TestResume:
    def test_kill_9_and_again(self, plain: tuple[bytes, bytes], tmp_path: Path) -> None:
        out, progress = tmp_path / "out", tmp_path / "progress"
        command = [sys.executable, "-c", KILLED, str(MODEL), str(out / "m.onnx"), str(progress)]
        killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "KILL": "1"}, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        assert len(list(progress.glob("*.sweep"))) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["progress"]
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert int(again.stdout) >= 20, "finished samples are not run again"
        assert ((out / "m.onnx").read_bytes(), (out / "m.json").read_bytes()) == plain
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert sorted(p.name for p in out.iterdir()) == ["m.json", "m.onnx"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from calib.saved.progress import Resume
from onnxslim_ptq import quantize

model, out, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
files = sorted((Path(model).parent / "calib").glob("*.npz"))
blocks, events = 0, []

def feeds():
    global blocks
    blocks += bool(list(folder.glob("*.sweep")))  # every block reads the samples anew
    for file in files:
        if blocks == 20 and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        yield dict(np.load(file))

result = quantize(model, calib_data=feeds, resume=Resume(folder, every=0), listener=events.append)
result.save(out)
print(next(e.done for e in events if e.what == "calibrating"))
"""


def _case(name: str) -> Any:
    try:
        return zoo.load(name)
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))
