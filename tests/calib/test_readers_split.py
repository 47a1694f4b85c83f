"""Held-out samples, the first n samples, and the identity of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import CalibrationError
from calib.readers import fingerprint, from_iterable, split_held_out, synthetic, take
from calib.types import Dataset, InputInfo, Sample, SampleId

X = InputInfo("x", np.dtype(np.float32), (1,))


@dataclass(frozen=True)
class Plain:
    """A data set that can only be iterated."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        for index in range(self.count):
            yield SampleId(index), {"x": np.array([index], np.float32)}


def indices(data: Dataset) -> list[int]:
    return [ident.index for ident, _ in data]


def sources(count: int) -> list[Dataset]:
    return [Plain(count), from_iterable(Plain(count), [X]), synthetic([X], count=count)]


@pytest.mark.parametrize("count", [1, 7])
def test_too_few_to_hold_out(count: int) -> None:
    data = Plain(count)
    assert split_held_out(data) == (data, data, "calibration")


@pytest.mark.parametrize(
    ("count", "held"),
    [(8, [7]), (15, [7]), (16, [7, 15]), (64, list(range(7, 64, 8))), (128, list(range(7, 128, 8)))],
)
def test_every_8th(count: int, held: list[int]) -> None:
    for data in sources(count):
        calibration, evaluation, measured_on = split_held_out(data)
        assert measured_on == "held-out"
        assert indices(evaluation) == held
        assert indices(calibration) == [index for index in range(count) if index not in held]


@given(st.integers(8, 3000))
def test_split_is_a_partition(count: int) -> None:
    calibration, evaluation, _ = split_held_out(Plain(count))
    held = indices(evaluation)
    assert sorted(indices(calibration) + held) == list(range(count))
    assert len(held) == len(evaluation) == max(1, min(16, count // 8))
    assert len(calibration) == count - len(held)
    assert held == sorted(set(held))
    if count > 128:
        assert set(np.diff([-1, *held])) <= {count // 16, count // 16 + 1}
        assert held[-1] == count - 1


def test_a_sample_that_alone_has_its_tag_calibrates() -> None:
    """16 samples of 5 and of 16 steps: with every step on its own nothing is held out."""

    def tagged(steps: int) -> list[Sample]:
        return [(SampleId(i, tags={"t": i % steps}), {"x": np.zeros(1, np.float32)}) for i in range(16)]

    few, many = (from_iterable(tagged(steps), [X]) for steps in (5, 16))
    calibration, evaluation, measured_on = split_held_out(few, "t")
    assert (indices(evaluation), measured_on) == ([7, 15], "held-out")
    assert {ident.tags["t"] for ident, _ in calibration} == {0, 1, 2, 3, 4}
    assert split_held_out(many, "t") == (many, many, "calibration")


def test_take() -> None:
    for data in sources(20):
        assert indices(take(data, 3)) == [0, 1, 2]
        assert len(take(data, 3)) == 3
        assert take(data, 20) is data
        assert take(data, 99) is data
        with pytest.raises(CalibrationError, match="--samples 0"):
            take(data, 0)


def test_parts_of_parts_keep_their_ids() -> None:
    for data in sources(40):
        calibration, evaluation, _ = split_held_out(data)
        assert indices(take(evaluation, 2)) == [7, 15]
        again, held, _ = split_held_out(calibration)
        assert indices(held) == [8, 17, 26, 35]
        assert len(again) == 31
        assert indices(again) == indices(again)


class TestFingerprint:
    def test_definition(self) -> None:
        text = b"sample [] 1\n'x' float32 [1] 4\n" + np.float32(0).tobytes()
        assert fingerprint(Plain(1)) == hashlib.sha256(text).hexdigest()

    def test_order_of_inputs_does_not_count(self) -> None:
        a, b = np.zeros(2, np.float32), np.ones(3, np.int64)
        inputs = [InputInfo("a", a.dtype, None), InputInfo("b", b.dtype, None)]
        one = fingerprint(from_iterable([{"a": a, "b": b}], inputs))
        assert one == fingerprint(from_iterable([{"b": b, "a": a}], inputs[::-1]))

    @pytest.mark.parametrize(
        "other",
        [
            [{"x": np.zeros((2, 2), np.float32)}, {"x": np.ones(4, np.float32)}],  # shape
            [{"x": np.ones(4, np.float32)}, {"x": np.zeros(4, np.float32)}],  # order
            [{"x": np.zeros(4, np.float32)}],  # count
            [{"x": np.concatenate([np.zeros(4, np.float32), np.ones(4, np.float32)])}],  # grouping
            [{"x": -np.zeros(4, np.float32)}, {"x": np.ones(4, np.float32)}],  # bits
            [
                (SampleId(0, tags={"timestep_idx": 1}), {"x": np.zeros(4, np.float32)}),
                {"x": np.ones(4, np.float32)},
            ],
        ],
    )
    def test_everything_else_counts(self, other: list[object]) -> None:
        info = InputInfo("x", np.dtype(np.float32), None)
        base = from_iterable([{"x": np.zeros(4, np.float32)}, {"x": np.ones(4, np.float32)}], [info])
        assert fingerprint(base) != fingerprint(from_iterable(other, [info]))

    def test_dtype_counts(self) -> None:
        prints = {
            fingerprint(from_iterable([{"x": np.zeros(4, dtype)}], [InputInfo("x", np.dtype(dtype), None)]))
            for dtype in ("f4", "i4", "u4")
        }
        assert len(prints) == 3

    def test_strings_and_empty(self) -> None:
        info = InputInfo("x", np.dtype(object), None)
        one, two, none = (
            fingerprint(from_iterable([{"x": np.array(texts, object)}], [info]))
            for texts in (["ab", "c"], ["a", "bc"], [])
        )
        assert len({one, two, none}) == 3
