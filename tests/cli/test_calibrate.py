"""`calibrate`, `merge-stats` and `quantize --stats`: what is written, said and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib import Statistics
from onnxslim_ptq.cli import main

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
MODEL, CALIB = str(DIGITS / "digits.onnx"), str(DIGITS / "calib")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("stats") / "made" / "digits.stats")
    assert main(["calibrate", MODEL, path, "--calib", CALIB, "-q"]) == 0
    return path


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Statistics of each half of the samples."""
    folder, paths = tmp_path_factory.mktemp("halves"), []
    files = sorted(Path(CALIB).glob("*.npz"))
    for name, part in (("a", files[:32]), ("b", files[32:])):
        (folder / name).mkdir()
        for file in part:
            shutil.copy(file, folder / name)
        paths.append(str(folder / f"{name}.stats"))
        assert main(["calibrate", MODEL, paths[-1], "--calib", str(folder / name), "-q"]) == 0
    return paths


def run_json(capsys: Captured, *args: str) -> dict[str, Any]:
    assert main([*args, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_says_what_it_wrote_and_what_comes_next(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "d.stats"
    assert main(["calibrate", MODEL, str(out), "--calib", CALIB]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert "from 56 samples" in text
    assert "kept: 16 of these samples and 8 held-out ones" in text
    assert f"next: onnxslim-ptq quantize {MODEL} OUT --stats {out}" in text
    assert [p.name for p in tmp_path.iterdir()] == ["d.stats"]
    assert oct(out.stat().st_mode & 0o777) in ("0o640", "0o600")


def test_json(stats: str, tmp_path: Path, capsys: Captured) -> None:
    found = run_json(capsys, "calibrate", MODEL, str(tmp_path / "s"), "--calib", CALIB, "--workers", "1")
    assert found["samples"] == 56
    assert found["conditions"]["threads"] == 1
    assert found["conditions"]["device"] == "cpu"
    assert found["made_with"]["target"] == "cpu"
    assert {s["kind"] for s in found["statistics"]} >= {"histogram", "mean"}


def test_quantize_needs_no_data(stats: str, tmp_path: Path, capsys: Captured) -> None:
    with_data, without = tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"
    assert main([MODEL, str(with_data), "--calib", CALIB, "-q"]) == 0
    assert main([MODEL, str(without), "--stats", stats]) == 0
    text, errors = capsys.readouterr()
    assert errors == "", "ranges do not come from synthetic samples"
    assert "on 8 held-out samples" in text
    for name in ("m.onnx", "m.json"):
        assert (with_data.parent / name).read_bytes() == (without.parent / name).read_bytes()


def test_the_worst_layers_are_measured_on_kept_samples(
    stats: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxslim_ptq.commands.quantize._DOUBTFUL_DB", 99.0)
    assert main([MODEL, str(tmp_path / "m.onnx"), "--stats", stats, "-q"]) == 0
    assert "Worst layers on their own: '" in capsys.readouterr().err


def test_dry_run(stats: str, tmp_path: Path, capsys: Captured) -> None:
    assert main([MODEL, str(tmp_path / "m.onnx"), "--stats", stats, "--dry-run"]) == 0
    assert "from 56 samples; result measured on 8 (held-out)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_no_samples_kept(tmp_path: Path, capsys: Captured) -> None:
    path = str(tmp_path / "s")
    assert main(["calibrate", MODEL, path, "--calib", CALIB, "--keep-samples", "0"]) == 0
    assert "kept: 0 of these samples" in capsys.readouterr().out
    assert main([MODEL, str(tmp_path / "m.onnx"), "--stats", path]) == 2
    assert "keep no samples" in capsys.readouterr().err
    assert main([MODEL, str(tmp_path / "m.onnx"), "--stats", path, "--calib", CALIB, "-q"]) == 0


def test_samples_too_large_to_keep_are_a_warning(tmp_path: Path, capsys: Captured) -> None:
    assert main(["calibrate", MODEL, str(tmp_path / "s"), "--calib", CALIB, "--keep-samples", "0.001"]) == 0
    assert "quantize --stats will need --calib as well" in capsys.readouterr().err


def test_merge(halves: list[str], tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "all.stats"
    assert main(["merge-stats", *halves, "-o", str(out)]) == 0
    assert "from 56 samples in 2 parts" in capsys.readouterr().out
    assert main([MODEL, str(tmp_path / "m.onnx"), "--stats", str(out), "-q"]) == 0
    document = json.loads((tmp_path / "m.json").read_text())
    assert document["calibration"]["samples"] == 56
    assert document["metrics"]["measured_on"] == "held-out"


def test_workers_and_resume(tmp_path: Path) -> None:
    more = ["--workers", "2", "--resume", str(tmp_path / "progress")]
    assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "-q", *more]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.onnx"]


def test_blockwise(tmp_path: Path) -> None:
    """In blocks as in one piece."""
    recipe, paths = ["--recipe", "w8a8-minmax"], [str(tmp_path / name) for name in ("b", "w")]
    assert main(["calibrate", MODEL, paths[0], "--calib", CALIB, *recipe, "--blockwise", "-q"]) == 0
    assert main(["calibrate", MODEL, paths[1], "--calib", CALIB, *recipe, "-q"]) == 0
    blocks, whole = (Statistics.load(Path(path)).sweeps for path in paths)
    (states,) = blocks.values()
    (expected,) = whole.values()
    assert states.keys() == expected.keys()
    for probe, state in states.items():
        for end in {"lo", "hi"} & state.keys():
            np.testing.assert_allclose(state[end], expected[probe][end], rtol=1e-6)


def test_nothing_to_gather_is_a_warning(tmp_path: Path, capsys: Captured) -> None:
    out = str(tmp_path / "none")
    assert main(["calibrate", MODEL, out, "--calib", CALIB, "--recipe", "w8a16", "--target", "generic"]) == 0
    assert "holds no statistics, because no layer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "quantize", "analyze", "tune"])
def test_a_misspelt_device_is_a_wrong_argument(command: str, tmp_path: Path, capsys: Captured) -> None:
    """2, where a device that is not there is 4."""
    before = {"analyze": ["linear", MODEL], "tune": [MODEL, str(tmp_path / "o"), "--goal", "sqnr>=1"]}
    args = before.get(command, [MODEL, str(tmp_path / "o")])
    for device, code in (("tpu", 2), ("npu:x", 2), ("npu", 4)):
        assert main([command, *args, "--calib", CALIB, "--device", device]) == code
    assert "--device: device 'npu:x' is unknown" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(stats: str, halves: list[str], tmp_path: Path, capsys: Captured) -> None:
    out = str(tmp_path / "m.onnx")
    cases = {
        "give them with --calib": ["calibrate", MODEL, out],
        "is an input; give another name": ["calibrate", MODEL, MODEL, "--calib", CALIB],
        "is a folder; give the name of a file": ["calibrate", MODEL, str(tmp_path), "--calib", CALIB],
        "needs two or more files": ["merge-stats", stats, "-o", out],
        "is an input": ["merge-stats", *halves, "-o", halves[0]],
        "hold the same samples": ["merge-stats", stats, stats, "-o", out],
        "'nowhere' does not exist": [MODEL, out, "--stats", "nowhere"],
        "is damaged or no statistics file": [MODEL, out, "--stats", MODEL],
        "leave them out with --stats": [MODEL, out, "--stats", stats, "--range", "image:0,1"],
        "--samples limits --calib": [MODEL, out, "--stats", stats, "--samples", "4"],
        "--workers gathers statistics": [MODEL, out, "--stats", stats, "--workers", "2"],
        "run calibrate with the recipe": [MODEL, out, "--stats", stats, "--recipe", "w8a8-output-mse"],
        "are of other data": [MODEL, out, "--stats", halves[0], "--calib", CALIB],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert len(error.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
