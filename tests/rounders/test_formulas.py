"""Every rounder against its formula, written out again as plain loops over small matrices."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from onnxslim_ptq.core.dtypes import INT4, INT8
from onnxslim_ptq.core.qmath import dequantize, quantize
from onnxslim_ptq.core.rounding import Task
from onnxslim_ptq.core.spec import PerChannel
from onnxslim_ptq.rounders import AdaRound, Admm, Clip, Gptq, Rtn, SQuant, Ssz
from tests.rounders.tasks import FORMS, Form, error_of, make

CHANNEL = FORMS[0]
NARROW = Form(INT4, PerChannel(0), True)


def test_rtn_is_quantize_linear() -> None:
    task = make(CHANNEL)
    np.testing.assert_array_equal(Rtn().round(task).codes, quantize(task.weight, task.start))


class TestGptq:
    def _naive(self, task: Task, damping: float, order: list[int]) -> np.ndarray:
        """Column by column with the whole inverse Hessian recomputed for the columns left, as the paper derives it."""
        assert task.gram is not None
        hessian = task.gram + damping * np.mean(np.diag(task.gram)) * np.eye(len(task.gram))
        weight = task.weight.astype(np.float64).copy()
        codes = np.zeros(weight.shape)
        left = list(order)
        while left:
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            j = left[0]
            for r in range(len(weight)):
                s = task.start.scale[r]
                codes[r, j] = min(max(np.rint(weight[r, j] / s), task.limits[0]), task.limits[1])
                error = (weight[r, j] - codes[r, j] * s) / inverse[0, 0]
                for place, k in enumerate(left):
                    weight[r, k] -= error * inverse[0, place]
            left = left[1:]
        return codes

    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("block", [1, 5, 128])
    def test_equals_the_greedy_solution(self, act_order: bool, block: int) -> None:
        task = make(NARROW)
        assert task.gram is not None
        order = np.argsort(-np.diag(task.gram), kind="stable") if act_order else np.arange(24)
        found = Gptq(block=block, damping=0.02, act_order=act_order).round(task)
        np.testing.assert_array_equal(found.codes, self._naive(task, 0.02, order.tolist()))

    def test_group_scales_come_from_the_columns_as_they_are_then(self) -> None:
        """The first group sees the weight itself; a later one sees it after the corrections of those before."""
        task = make(FORMS[2])
        moving, fixed = Gptq().round(task), Gptq(static_groups=True).round(task)
        np.testing.assert_array_equal(fixed.params.scale, task.start.scale)
        np.testing.assert_array_equal(moving.params.scale[:, 0], task.start.scale[:, 0])
        assert (moving.params.scale[:, 1:] != task.start.scale[:, 1:]).mean() > 0.9

    def test_without_correlation_it_is_rtn(self) -> None:
        task = replace(make(CHANNEL), gram=np.eye(24))
        np.testing.assert_array_equal(Gptq().round(task).codes, Rtn().round(task).codes)


class TestAdaRound:
    def test_near_the_best_of_all_choices(self) -> None:
        """All 2^8 ways to round a row up or down, tried out."""
        ratios = []
        for seed in range(12):
            task = make(NARROW, outputs=3, inputs=8, seed=seed)
            assert task.gram is not None
            found = AdaRound(damping=0).round(task)
            for r in range(3):
                steps = task.weight[r].astype(np.float64) / task.start.scale[r]
                best = np.inf
                for up in product((0, 1), repeat=8):
                    e = task.weight[r] - np.clip(np.floor(steps) + up, -8, 7) * task.start.scale[r]
                    best = min(best, float(e @ task.gram @ e))
                e = task.weight[r] - found.codes[r] * task.start.scale[r]
                ratios.append(float(e @ task.gram @ e) / best)
        assert min(ratios) >= 1 - 1e-9
        assert np.median(ratios) < 1.05

    def test_no_single_step_betters_it(self) -> None:
        task = make(NARROW)
        found = AdaRound(damping=0, sweeps=100).round(task)
        least = error_of(task, found)
        steps = task.weight.astype(np.float64) / task.start.scale[:, None]
        for r, j in product(range(4), range(24)):
            for code in (np.floor(steps[r, j]), np.ceil(steps[r, j])):
                codes = found.codes.copy()
                codes[r, j] = np.clip(code, *task.limits)
                assert error_of(task, replace(found, codes=codes)) >= least * (1 - 1e-9)

    @pytest.mark.parametrize("reach", [0, 2])
    def test_codes_stay_near(self, reach: int) -> None:
        task = make(CHANNEL)
        found = AdaRound(reach=reach).round(task)
        steps = task.weight.astype(np.float64) / task.start.scale[:, None]
        assert (found.codes >= np.floor(steps) - reach).all()
        assert (found.codes <= np.ceil(steps) + reach).all()


class TestSquant:
    @pytest.mark.parametrize("window", [1, 3, 4])
    def test_sums_of_errors_vanish(self, window: int) -> None:
        task = replace(make(CHANNEL, outputs=40), window=window, limits=(-128, 127))
        error = task.weight.astype(np.float64) / task.start.scale[:, None] - SQuant().round(task).codes
        assert np.abs(error).max() < 1 + 1e-6
        assert np.abs(error.sum(axis=1)).max() <= 0.5 + 1e-6
        assert np.abs(error.reshape(40, -1, window).sum(axis=2)).max() < 1 + 1e-6

    def test_by_hand(self) -> None:
        """Errors 0.4, 0.3, 0.45 (sum 1.15): the largest is flipped, and the sum becomes 0.15."""
        weight = np.asarray([[1.4, 2.3, 3.45, 127]], np.float32)
        task = make(CHANNEL, outputs=1, inputs=4)
        task = replace(task, weight=weight, window=4, start=replace(task.start, scale=np.ones(1)))
        assert SQuant().round(task).codes.tolist() == [[1, 2, 4, 127]]

    def test_per_group(self) -> None:
        task = make(FORMS[3], outputs=30)
        found = SQuant().round(task)
        scale, zero = (v.repeat(8, axis=1) for v in (task.start.scale, task.start.zero_point))
        error = task.weight / scale + zero - found.codes
        sums = np.abs(error.reshape(30, 3, 8).sum(axis=2))
        assert (sums <= 0.5 + 1e-6).mean() > 0.9, "only a code at the end of the type cannot be flipped"


class TestSsz:
    def test_least_squares(self) -> None:
        task = make(NARROW)
        found = Ssz().round(task)
        for r, row in enumerate(task.weight.astype(np.float64)):
            best_s = scale = float(task.start.scale[r])
            best = np.inf
            for _ in range(21):
                q = np.clip(np.rint(row / scale), -8, 7)
                error = float(((row - q * scale) ** 2).sum())
                if error < best:
                    best, best_s = error, scale
                scale = float(np.float32((row @ q) / (q @ q)))
            assert found.params.scale[r] == pytest.approx(best_s, rel=1e-6)

    def test_asymmetric_betters_the_extremes(self) -> None:
        task = replace(make(FORMS[3]), gram=None)
        change = [task.weight - dequantize(r.codes, r.params) for r in (Rtn().round(task), Ssz().round(task))]
        assert (change[1] ** 2).sum() < 0.97 * (change[0] ** 2).sum()


class TestClip:
    def test_picks_the_best_ratio(self) -> None:
        for form in (NARROW, FORMS[2]):
            task = make(form)
            assert task.gram is not None
            found = Clip(lowest=0.5, steps=10).round(task)
            size = 8 if form is FORMS[2] else 24
            for r, g in product(range(12), range(24 // size)):
                part = slice(g * size, (g + 1) * size)
                w, gram = task.weight[r, part].astype(np.float64), task.gram[part, part]
                full = float(task.start.scale.reshape(12, -1)[r, g])
                errors = {}
                for ratio in [1 - i / 20 for i in range(10)]:
                    s = float(np.float32(full * ratio))
                    e = w - np.clip(np.rint(w / s), -8, 7) * s
                    errors[s] = float(e @ gram @ e)
                chosen = float(found.params.scale.reshape(12, -1)[r, g])
                assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-9)


class TestAdmm:
    def test_one_round_by_the_formula(self) -> None:
        task = make(NARROW)
        assert task.gram is not None
        start = Ssz().round(task)
        found = Admm(steps=1, rho=0.5, damping=0.0).round(task)
        gram = task.gram / np.mean(np.diag(task.gram))
        scale = start.params.scale[:, None]
        z = start.codes * scale
        x = (task.weight @ gram + 0.5 * z) @ np.linalg.inv(gram + 0.5 * np.eye(24))
        codes = np.clip(np.rint(x / scale), -8, 7)
        for r in range(12):
            errors = []
            for row in (start.codes[r], codes[r]):
                e = task.weight[r] - row * scale[r]
                errors.append(float(e @ gram @ e))
            np.testing.assert_array_equal(
                found.codes[r], codes[r] if errors[1] < errors[0] else start.codes[r]
            )


def test_one_gram_matrix_per_row() -> None:
    """Depthwise convolutions: the rows of a task with Gram matrices of their own equal tasks of one row."""
    whole = make(Form(INT8, PerChannel(0), True), outputs=5, inputs=9)
    grams = np.stack([make(CHANNEL, inputs=9, seed=s).gram for s in range(5)])  # type: ignore[misc]
    for rounder in (Gptq(), AdaRound(), Admm(), Clip(), Gptq(act_order=False, block=4)):
        found = rounder.round(replace(whole, gram=grams))
        for r in range(5):
            start = replace(whole.start, scale=whole.start.scale[[r]], zero_point=whole.start.zero_point[[r]])
            alone = rounder.round(Task(whole.weight[[r]], start, whole.limits, grams[r]))
            if not isinstance(rounder, AdaRound):  # its order of columns is common to all rows
                np.testing.assert_array_equal(found.codes[r], alone.codes[0])
            assert found.params.scale[r] == pytest.approx(alone.params.scale[0])
