"""The data section of a recipe: what it means, where its paths lie, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calib.readers.preprocess import PRESETS
from onnxslim_ptq import Recipe
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.recipes.data import DataConfig, without_folders

STEPS = [{"type": "quantize"}]


def load(**data: Any) -> DataConfig:
    return Recipe.load({"steps": STEPS, "data": data}).data


class TestPreprocess:
    def test_a_preset_by_name(self) -> None:
        preprocess = load(preprocess="imagenet").preprocess
        assert preprocess is not None
        assert preprocess.build() == PRESETS["imagenet"]

    def test_what_differs_from_the_preset(self) -> None:
        preprocess = load(preprocess={"preset": "imagenet", "size": 256, "fit": "crop"}).preprocess
        assert preprocess is not None
        made = preprocess.build()
        assert (made.size, made.fit, made.mean) == ((256, 256), "crop", PRESETS["imagenet"].mean)
        assert preprocess.given == {"size", "fit"}

    @pytest.mark.parametrize(("written", "value"), [("1/255", 1 / 255), (0.5, 0.5), (2, 2.0)])
    def test_a_fraction_may_be_written_as_one(self, written: Any, value: float) -> None:
        preprocess = load(preprocess={"scale": written, "mean": 127, "std": [1, 2, 3]}).preprocess
        assert preprocess is not None
        made = preprocess.build()
        assert (made.scale, made.mean, made.std) == (value, (127.0,), (1.0, 2.0, 3.0))


class TestPaths:
    def test_they_count_from_the_recipe_file(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"
        file.write_text(
            "data: {text: tok.json, sets: [{path: a}, {path: /b, text: {tokenizer: ../c.json}}]}\n"
            "steps: [{type: quantize}]\n"
        )
        for recipe in (Recipe.load(file), Recipe.load(file).with_patterns(exclude=["x"])):
            data = recipe.data
            assert data.text is not None
            assert data.text.tokenizer == str(tmp_path / "tok.json")
            assert [one.path for one in data.sets] == [str(tmp_path / "a"), "/b"]
            assert data.sets[1].text is not None
            assert data.sets[1].text.tokenizer == str(tmp_path / "../c.json")
            assert Recipe.load(recipe.dump()) == recipe

    def test_from_python_they_count_from_the_working_folder(self) -> None:
        assert load(sets=[{"path": "a/b"}]).sets[0].path == "a/b"

    def test_a_description_holds_no_folders(self, tmp_path: Path) -> None:
        recipe = Recipe.load(
            {"steps": STEPS, "data": {"text": f"{tmp_path}/t.json", "sets": [{"path": "x/y"}]}}
        )
        shown = without_folders(recipe.dump())
        assert shown["data"] == {"text": {"tokenizer": "t.json"}, "sets": [{"path": "y"}]}
        assert str(tmp_path) not in str(shown)


def test_without_a_data_section() -> None:
    recipe = Recipe.load({"steps": STEPS})
    assert recipe.data == DataConfig()
    assert "data" not in recipe.dump()


def test_keys_are_replaced_one_by_one() -> None:
    recipe = Recipe.load({"steps": STEPS, "data": {"preprocess": "coco", "constants": {"sr": 1}}})
    data = recipe.with_data(preprocess="imagenet").data
    assert data.preprocess is not None
    assert data.preprocess.preset == "imagenet"
    assert data.constants == {"sr": 1}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"preproces": "coco"}, "data.preproces: unknown key (did you mean 'preprocess'?); accepted: sets, "),
        (
            {"preprocess": "imagnet"},
            "data.preprocess.preset: 'imagnet' is unknown (did you mean 'imagenet'?)",
        ),
        ({"preprocess": {"means": 1}}, "data.preprocess.means: unknown key (did you mean 'mean'?)"),
        ({"preprocess": {"fit": "cut"}}, "data.preprocess.fit: got 'cut'; use stretch, crop, pad"),
        ({"preprocess": {"std": 0}}, "data.preprocess.std: must be above 0"),
        ({"preprocess": {"scale": "1/0"}}, "data.preprocess.scale: "),
        ({"preprocess": {"size": [1, 2, 3]}}, "data.preprocess.size"),
        (
            {"preprocess": {"resize": "bicubic", "antialias": False}},
            "data.preprocess.antialias: false goes with",
        ),
        ({"preprocess": 3}, "data.preprocess: expected a mapping with keys preset, "),
        ({"text": {}}, "data.text.tokenizer: is missing"),
        ({"text": ""}, "data.text.tokenizer: expected a path"),
        ({"text": {"tokenizer": "t", "max_length": 0}}, "data.text.max_length: "),
        ({"sets": [{"samples": 3}]}, "data.sets[0].path: is missing"),
        ({"sets": [{"path": "a", "samples": 0}]}, "data.sets[0].samples: "),
        ({"sets": {"path": "a"}}, "data.sets: expected a list"),
        ({"constants": {"sr": "x"}}, "data.constants.sr: expected a number or lists of numbers, got 'x'"),
        ({"reset_every": 3}, "data.reset_every: means something beside feedback only"),
        ({"initial": {"h": [1]}}, "data.initial: means something beside feedback only"),
        ({"shuffle": 1, "feedback": {"a": "b"}}, "data.shuffle: steps of a sequence are read in order"),
        ({"shuffle": -1}, "data.shuffle: "),
        ({"feedback": {"a": 1}}, "data.feedback"),
    ],
)
def test_mistakes(data: Any, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.load({"steps": STEPS, "data": data})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
