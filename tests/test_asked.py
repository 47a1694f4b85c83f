"""`Asked` is one declaration of what the functions share: their signatures say the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest

from onnxslim_ptq import analyze, calibrate, quantize
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.tuning import tune

OWN: dict[Callable[..., Any], set[str]] = {
    quantize: {"model"},
    calibrate: {"model", "keep_bytes"},
    analyze: {"model", "scope", "metric", "patterns"},
    tune: {"model", "goal", "evaluator", "max_time", "history"},
}
SHARED = {field.name: field for field in fields(Asked)}


@pytest.mark.parametrize("function", OWN)
def test_parameters_are_fields(function: Callable[..., Any]) -> None:
    """The same name, type and default, so that handing on ``locals()`` loses and changes nothing."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in OWN[function]:
            assert (parameter.annotation, parameter.default) == (SHARED[name].type, SHARED[name].default)


def test_quantize_has_every_option() -> None:
    assert SHARED.keys() - inspect.signature(quantize).parameters.keys() == {"hold_out"}
    assert all(field.default is not MISSING for field in SHARED.values())


def test_of_takes_what_it_knows() -> None:
    asked = Asked.of({"model": "m.onnx", "samples": 3, "seed": 1}, seed=2)
    assert asked == Asked(samples=3, seed=2)
