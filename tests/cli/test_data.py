"""Calibration data of every kind through the command line, on the digit network and small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxslim_ptq.cli import main
from tests.models import parse, weights_of

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
MODEL = str(DIGITS / "digits.onnx")
Captured = pytest.CaptureFixture[str]
STEPS = "steps: [{type: quantize, act: {range: {type: minmax}}}]\n"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The digits 0..9 of the evaluation set and more, as gray images of 0..255."""
    pil = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    with np.load(DIGITS / "eval.npz") as held_out:
        for index, image in enumerate(held_out["image"][:16]):
            pil.fromarray(np.rint(image.reshape(8, 8) * 255).astype(np.uint8)).save(
                folder / f"{index:02}.png"
            )
    return folder


def recipe(folder: Path, data: str) -> str:
    path = folder / "r.yaml"
    path.write_text(f"data: {data}\n{STEPS}")
    return str(path)


def run(capsys: Captured, *args: str) -> tuple[int, dict[str, Any]]:
    code = main([*args, "--json"])
    return code, json.loads(capsys.readouterr().out)


def recurrent(folder: Path) -> str:
    """y = x W + h, hn = tanh(y): a state that feeds itself, and a scalar input nobody wants to save."""
    body = """g (float[N,4] x, float[N,4] h, int64 rate) => (float[N,4] y, float[N,4] hn) {
        [mm] m = MatMul (x, w)
        c = Cast <to = 1> (rate)
        one = Div (c, c)
        s = Mul (h, one)
        y = Add (m, s)
        hn = Tanh (y)
    }"""
    path = folder / "state.onnx"
    onnx.save(parse(body, weights_of(3, w=(4, 4)), 17, 8), path)
    return str(path)


class TestImages:
    def test_quantize_and_compare(self, images: Path, tmp_path: Path, capsys: Captured) -> None:
        out, preprocessed = str(tmp_path / "m.onnx"), recipe(tmp_path, "{preprocess: {scale: 1/255}}")
        code, document = run(capsys, MODEL, out, "--calib", str(images), "--recipe", preprocessed)
        assert code == 0
        assert document["notes"][0].startswith(
            "16 images from images: stretched to 8x8 (bilinear), GRAY, NCHW, (x * "
        )
        described = json.loads((tmp_path / "m.json").read_text())["calibration"]
        assert described["prepared"] == document["notes"][:1]
        code, compared = run(capsys, "compare", MODEL, out, "--calib", str(images), "--recipe", preprocessed)
        assert code == 0
        assert compared["sqnr_db"] == pytest.approx(document["metrics"]["sqnr_db"])
        main(["inspect", out])
        assert "16 images from images: " in capsys.readouterr().out

    def test_as_good_as_arrays(self, images: Path, tmp_path: Path, capsys: Captured) -> None:
        """The same pixels as .npy and as images give the same model."""
        arrays = tmp_path / "arrays"
        arrays.mkdir()
        pil = pytest.importorskip("PIL.Image")
        for path in images.iterdir():
            pixels = np.asarray(pil.open(path), np.float32) * np.float32(1 / 255)
            np.save(arrays / f"{path.stem}.npy", pixels[None, None])
        preprocessed = recipe(tmp_path, "{preprocess: {scale: 1/255}}")
        made = []
        for name, folder in (("a", images), ("b", arrays)):
            assert (
                main(
                    [MODEL, str(tmp_path / f"{name}.onnx"), "--calib", str(folder), "--recipe", preprocessed]
                )
                == 0
            )
            made.append((tmp_path / f"{name}.onnx").read_bytes())
        assert made[0] == made[1]

    def test_the_next_line_repeats_the_preprocessing(
        self, images: Path, tmp_path: Path, capsys: Captured
    ) -> None:
        args = [
            MODEL,
            str(tmp_path / "m.onnx"),
            "--calib",
            str(images),
            "--preprocess",
            "none",
            "--min-sqnr",
            "0",
        ]
        assert main(args) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert "--preprocess none  (error" in line

    def test_without_preprocessing(self, images: Path, tmp_path: Path, capsys: Captured) -> None:
        code, document = run(capsys, MODEL, str(tmp_path / "m.onnx"), "--calib", str(images))
        assert code == 2
        assert "an image needs the preprocessing of the model's training" in document["error"]
        code, document = run(
            capsys, MODEL, str(tmp_path / "m.onnx"), "--calib", str(images), "--preprocess", "x"
        )
        assert code == 2
        assert "data.preprocess.preset: 'x' is unknown" in document["error"]

    def test_an_option_that_serves_nothing_says_so(self, tmp_path: Path, capsys: Captured) -> None:
        args = [
            MODEL,
            str(tmp_path / "m.onnx"),
            "--calib",
            str(DIGITS / "calib"),
            "--preprocess",
            "coco",
            "--dry-run",
        ]
        code, document = run(capsys, *args)
        assert code == 0
        assert "data.preprocess was not used: the files hold arrays" in document["notes"]

    def test_dry_run_tells_it_too(self, images: Path, tmp_path: Path, capsys: Captured) -> None:
        code, document = run(
            capsys,
            MODEL,
            str(tmp_path / "m.onnx"),
            "--calib",
            str(images),
            "--preprocess",
            "coco",
            "--dry-run",
        )
        assert code == 0
        assert "size 8x8 as the model wants, not 320x320" in document["notes"][0]


class TestSets:
    def test_the_recipe_names_the_files(self, tmp_path: Path, capsys: Captured) -> None:
        """Relative to the recipe; without --calib, and with a share of each."""
        rng = np.random.default_rng(0)
        for name, scale in (("a", 1), ("b", 2)):
            np.save(tmp_path / f"{name}.npy", rng.random((20, 1, 8, 8), np.float32) * scale)
        made = recipe(
            tmp_path,
            "{stacked: true, shuffle: 1, sets: [{path: a.npy, samples: 8}, {path: b.npy, samples: 4}]}",
        )
        args = [MODEL, str(tmp_path / "m.onnx"), "--recipe", made, "--min-sqnr", "0"]
        code, document = run(capsys, *args)
        assert code == 0
        assert document["metrics"]["measured_on"] == "held-out"
        first = (tmp_path / "m.onnx").read_bytes()
        assert json.loads((tmp_path / "m.json").read_text())["calibration"]["samples"] == 11
        assert main(args) == 0
        assert (tmp_path / "m.onnx").read_bytes() == first
        captured = capsys.readouterr()
        assert "synthetic" not in captured.err
        assert f"compare {MODEL} {tmp_path / 'm.onnx'} --recipe {made}" in captured.out
        code, _ = run(capsys, "compare", MODEL, str(tmp_path / "m.onnx"), "--recipe", made)
        assert code == 0

    def test_options_of_synthetic_samples(self, tmp_path: Path, capsys: Captured) -> None:
        np.save(tmp_path / "a.npy", np.zeros((1, 1, 8, 8), np.float32))
        made = recipe(tmp_path, "{sets: [{path: a.npy}]}")
        code, document = run(
            capsys, MODEL, str(tmp_path / "m.onnx"), "--recipe", made, "--range", "image:0,1", "--dry-run"
        )
        assert code == 2
        assert "--shape and --range describe synthetic samples" in document["error"]


class TestFeedback:
    def test_states_and_constants(self, tmp_path: Path, capsys: Captured) -> None:
        frames = np.random.default_rng(0).standard_normal((24, 1, 4)).astype(np.float32)
        for index, frame in enumerate(frames):
            np.savez(tmp_path / f"{index:02}.npz", x=frame)
        (tmp_path / "frames").mkdir()
        for path in tmp_path.glob("*.npz"):
            path.rename(tmp_path / "frames" / path.name)
        made = recipe(tmp_path, "{constants: {rate: 8}, feedback: {hn: h}, reset_every: 12}")
        args = [recurrent(tmp_path), str(tmp_path / "m.onnx"), "--recipe", made]
        code, document = run(capsys, *args, "--calib", str(tmp_path / "frames"), "--target", "generic")
        assert code == 0
        note = "states of the float model fed back: 'hn' -> 'h'; afresh every 12 samples"
        assert document["notes"][0] == note
        code, document = run(capsys, *args)  # synthetic steps are fed back as well
        assert code == 0
        assert document["metrics"]["measured_on"] == "synthetic"

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ("{constants: {rate: 8}, feedback: {hm: h}}", "matches no output; the outputs are 'y', 'hn'"),
            ("{constants: {rate: 8}, feedback: {hn: k}}", "would feed 'k', which is no input"),
            ("{constants: {rte: 8}, feedback: {hn: h}}", "data.constants.rte: no such input"),
            ("{feedback: {hn: h}}", "00.npz: input 'rate' is missing"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, capsys: Captured, data: str, words: str) -> None:
        np.savez(tmp_path / "00.npz", x=np.zeros((1, 4), np.float32))
        model, out = recurrent(tmp_path), str(tmp_path / "m.onnx")
        code, document = run(
            capsys, model, out, "--calib", str(tmp_path / "00.npz"), "--recipe", recipe(tmp_path, data)
        )
        assert code == 2
        assert words in document["error"]
