"""What holds for every rounder: never worse than rtn, codes within limits, the same twice, options checked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxslim_ptq.core.dtypes import INT8
from onnxslim_ptq.core.rounding import Rounded, Rounder, Task
from onnxslim_ptq.core.spec import PerChannel
from onnxslim_ptq.rounders import ROUNDERS, AdaRound, Gptq, Rtn, never_worse
from tests.rounders.tasks import FORMS, Form, error_of, make

ALL = [*(r() for r in ROUNDERS.values()), Gptq(act_order=True), Gptq(clip=True), AdaRound(clip=True, reach=1)]


@pytest.mark.parametrize("rounder", ALL, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_never_worse_and_within_limits(rounder: Rounder, form: Form) -> None:
    for seed in range(3):
        task = make(form, seed=seed)
        outcome = never_worse(rounder, task)
        codes = outcome.rounded.codes
        assert codes.dtype == form.dtype.dtype
        assert codes.min() >= task.limits[0]
        assert codes.max() <= task.limits[1]
        assert (outcome.rounded.params.scale > 0).all()
        assert outcome.rounded.params.scale.shape == task.start.scale.shape
        plain = error_of(task, Rtn().round(task))
        assert outcome.before == pytest.approx(plain, rel=1e-4)
        assert outcome.after == pytest.approx(error_of(task, outcome.rounded), rel=1e-4)
        assert outcome.after <= outcome.before * (1 + 1e-9)


@pytest.mark.parametrize("rounder", ALL, ids=str)
def test_the_same_twice(rounder: Rounder) -> None:
    for form in FORMS:
        first, second = (never_worse(rounder, make(form)) for _ in range(2))
        np.testing.assert_array_equal(first.rounded.codes, second.rounded.codes)
        np.testing.assert_array_equal(first.rounded.params.scale, second.rounded.params.scale)


@pytest.mark.parametrize("rounder", ALL, ids=str)
def test_odd_matrices(rounder: Rounder) -> None:
    """Dead rows, dead inputs, one column, one row, inputs never seen, and fewer samples than inputs."""
    whole = make(FORMS[0])
    weight = whole.weight.copy()
    weight[2] = 0
    gram = whole.gram
    assert gram is not None
    quiet = gram.copy()
    quiet[5] = quiet[:, 5] = 0
    few = make(FORMS[0], rows=3).gram
    scale = whole.start.scale.copy()
    scale[2] = 1
    dead = replace(whole, weight=weight, start=replace(whole.start, scale=scale))
    narrow = make(FORMS[0], inputs=1)
    low = make(FORMS[0], outputs=1)
    for task in (dead, replace(whole, gram=quiet), replace(whole, gram=gram * 0), replace(whole, gram=few)):
        outcome = never_worse(rounder, task)
        assert np.isfinite(outcome.rounded.params.scale).all()
        assert outcome.after <= outcome.before * (1 + 1e-9)
    assert not never_worse(rounder, dead).rounded.codes[2].any()
    for task in (narrow, low):
        assert never_worse(rounder, task).rounded.codes.shape == task.weight.shape


@pytest.mark.parametrize("name", ["gptq", "adaround", "admm"])
def test_correlated_inputs_gain(name: str) -> None:
    gains = []
    for seed in range(5):
        outcome = never_worse(ROUNDERS[name](), make(FORMS[0], outputs=32, inputs=48, seed=seed, rows=1000))
        gains.append(outcome.after / outcome.before)
    assert np.mean(gains) < 0.6


def test_tall_matrices_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxslim_ptq.rounders import outcome

    for form in FORMS:
        task = make(form, outputs=30)
        whole = never_worse(Gptq(), task)
        monkeypatch.setattr(outcome, "_ELEMENTS", 24 * 7)
        pieces = never_worse(Gptq(), task)
        monkeypatch.undo()
        np.testing.assert_array_equal(whole.rounded.codes, pieces.rounded.codes)
        np.testing.assert_array_equal(whole.rounded.params.scale, pieces.rounded.params.scale)
        assert pieces.after == pytest.approx(whole.after)


def test_a_bad_rounder_keeps_rtn() -> None:
    class Broken(Rtn):
        def round(self, task: Task) -> Rounded:
            return Rounded(np.zeros(task.weight.shape, np.int8), task.start)

    task = make(Form(INT8, PerChannel(0), True))
    outcome = never_worse(Broken(), task)
    assert outcome.after == outcome.before
    np.testing.assert_array_equal(outcome.rounded.codes, Rtn().round(task).codes)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("gptq", {"block": 0}, "block: expected a whole number from 1 to 65536, got 0"),
        ("gptq", {"damping": 1.5}, "damping: expected a number from 0 to 1, got 1.5"),
        ("gptq", {"damping": float("nan")}, "damping: expected a number from 0 to 1, got nan"),
        ("adaround", {"sweeps": -1}, "sweeps: expected a whole number from 0 to 1000, got -1"),
        ("adaround", {"reach": 300}, "reach: expected a whole number from 0 to 255, got 300"),
        ("admm", {"rho": 0.0}, "rho: expected a number from 0.0001 to 10000, got 0.0"),
        ("ssz", {"steps": 0}, "steps: expected a whole number from 1 to 1000, got 0"),
        ("clip", {"lowest": 1.0}, "lowest: expected a number from 0.05 to 0.999, got 1.0"),
    ],
)
def test_bad_options(name: str, options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        ROUNDERS[name](**options)
