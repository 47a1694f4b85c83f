"""What recipes may say about smoothing steps."""

from __future__ import annotations

from typing import Any

import pytest

from onnxslim_ptq import Recipe, quantize
from onnxslim_ptq.errors import RecipeError
from tests.steps.smoothing_models import QUANTIZE
from tools.bench.outliers import llama_block, llama_feeds


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"type": "smoothquant", "alpha": 1.5}, ".alpha: expected a number from 0 to 1, got 1.5"),
        ({"type": "smoothquant", "alpha": "0.5"}, ".alpha: expected a number from 0 to 1, got '0.5'"),
        ({"type": "smoothquant", "alpha": True}, ".alpha: expected a number from 0 to 1, got true"),
        ({"type": "smoothquant", "beta": 0.5}, ".beta: unknown key; accepted: type, include, exclude, "),
        ({"type": "smoothquant", "alhpa": 0.5}, ".alhpa: unknown key (did you mean 'alpha'?)"),
        ({"type": "smoothquant", "groups": ["norm"]}, ".groups[0]: got 'norm'; use norm-linear, linear-linear, "),
        ({"type": "smoothquant", "groups": []}, ".groups: give at least one, got []"),
        ({"type": "smoothquant", "groups": "ov"}, ".groups: expected a list, got 'ov'; write ['ov']"),
        ({"type": "smoothquant", "include": ["re:("]}, ".include[0]: pattern 're:(' is not a regular expression"),
        ({"type": "iter_smooth", "scale_min": 0}, ".scale_min: expected a number above 0, got 0"),
        ({"type": "iter_smooth", "symmetric": 3}, ".symmetric: "),
        ({"type": "awq", "grid": 0}, ".grid: "),
        ({"type": "awq", "loss": "model"}, ".loss: got 'model'; use layer, block"),
        ({"type": "awq", "duo": True}, ".duo: goes with loss: block only"),
        ({"type": "outlier_suppression_lite", "loss": 1}, ".loss: "),
        ({"type": "flex_smooth", "beta": -0.1}, ".beta: expected a number from 0 to 1, got -0.1"),
        ({"type": "outlier_suppression_plus", "alpha": 2}, ".alpha: expected a number from 0 to 1, got 2"),
        ({"type": "outlier_suppression_lite", "alpha": 2}, ".alpha: unknown key"),
        ({"type": "equalize", "rounds": 0}, ".rounds: "),
        ({"type": "kv_smooth", "smooth_factor": 0}, ".smooth_factor: expected a number above 0, got 0"),
        ({"type": "kv_smooth", "groups": ["ov"]}, ".groups: unknown key; accepted: type, include, exclude, "),
        ({"type": "auto_smooth", "alphas": [0.5, 7]}, ".alphas[1]: expected a number from 0 to 1, got 7"),
        ({"type": "auto_smooth", "alphas": []}, ".alphas: give at least one"),
        ({"type": "smooth"}, ".type: got 'smooth'; use quantize, auto_smooth, awq, "),
    ],
)  # fmt: skip
def test_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load({"steps": [given, QUANTIZE]})
    assert f"recipe: steps[0]{text}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_smoothing_comes_first_and_something_is_quantized() -> None:
    with pytest.raises(RecipeError, match=r"steps\[1\].type: smoothquant changes the float model, so it"):
        Recipe.load({"steps": [QUANTIZE, {"type": "smoothquant"}]})
    with pytest.raises(RecipeError, match="steps: nothing is quantized; end with a step of type quantize"):
        Recipe.load({"steps": [{"type": "smoothquant"}]})


def test_a_pattern_that_matches_nothing() -> None:
    recipe = {"steps": [{"type": "smoothquant", "exclude": ["*qq*"]}, QUANTIZE]}
    with pytest.raises(RecipeError, match=r"steps\[0\].exclude: pattern '\*qq\*' matches no layer"):
        quantize(llama_block(), recipe, llama_feeds(3))


def test_dump_and_patterns_from_outside() -> None:
    recipe = Recipe.load("w8a8-m4").with_patterns(exclude=["*head*"])
    assert Recipe.load(recipe.dump()) == recipe
    assert [step.exclude for step in recipe.steps] == [(), ("*head*",)]
