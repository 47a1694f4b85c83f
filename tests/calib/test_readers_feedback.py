"""States fed back, constants, tags, and several sets as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.readers import from_iterable, open_data, split_held_out
from calib.readers.access import read_at
from calib.readers.compose import FileSet, Recurrence, Wiring, open_sets
from calib.readers.feedback import Feedback, Run, resolve_feedback
from calib.readers.files import HowToRead
from calib.readers.fill import constant_feed, initial_state
from calib.readers.mix import mix
from calib.types import Array, Dataset, Feed, InputInfo, Sample, SampleId

X = InputInfo("x", np.dtype(np.float32), ("n", 2))
H = InputInfo("h", np.dtype(np.float32), ("n", 2))
MASK = InputInfo("attention_mask", np.dtype(np.int64), ("n", "total"))
PLACE = InputInfo("position_ids", np.dtype(np.int64), ("n", "seq"))
PAST = InputInfo("past.0", np.dtype(np.float32), ("n", "past"))


class Adder:
    """A model of one step: hn = h + x. Counts how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> Run:
        def run(feed: Feed, sample: SampleId) -> Mapping[str, Array]:
            self.runs += 1
            return {"hn": feed["h"] + feed["x"]}  # type: ignore[operator]

        return run


def steps(count: int) -> Dataset:
    return from_iterable([{"x": np.full((1, 2), i + 1, np.float32)} for i in range(count)], [X])


def states(data: Iterable[Sample]) -> list[float]:
    return [float(feed["h"][0, 0]) for _, feed in data]  # type: ignore[arg-type]


def fed_back(count: int, model: Adder, **more: Any) -> Feedback:
    return Feedback(steps(count), [X, H], {"hn": "h"}, {"h": np.zeros((1, 2), np.float32)}, model, **more)


class TestFeedback:
    def test_each_step_starts_from_the_one_before(self) -> None:
        assert states(fed_back(5, Adder())) == [0, 1, 3, 6, 10]  # sums of 1, 2, 3, …

    def test_a_new_sequence_starts_afresh(self) -> None:
        assert states(fed_back(7, Adder(), reset_every=3)) == [0, 1, 3, 0, 4, 9, 0]

    def test_the_model_runs_once_per_state(self) -> None:
        model = Adder()
        data = fed_back(6, model)
        first = states(data)
        assert model.runs == 5  # nobody needs what follows the last
        assert states(data) == first
        assert states(read_at(data, [2, 4])) == [first[2], first[4]]
        assert model.runs == 5

    @pytest.mark.parametrize("positions", [[0], [4], [1, 2], [0, 5, 6], [3, 6]])
    @pytest.mark.parametrize("kept", [0, 16, 1 << 20])
    @pytest.mark.parametrize("reset", [None, 1, 2, 4])
    def test_in_part(self, positions: list[int], kept: int, reset: int | None) -> None:
        """Any part is what the whole pass gives there, whatever is kept of earlier passes."""
        whole = states(fed_back(7, Adder(), reset_every=reset))
        data = fed_back(7, Adder(), reset_every=reset, kept_bytes=kept)
        for _ in range(2):
            assert states(read_at(data, positions)) == [whole[p] for p in positions]
            assert states(data) == whole

    def test_skips_sequences_nobody_asked_for(self) -> None:
        model = Adder()
        assert states(read_at(fed_back(9, model, reset_every=3), [7])) == [7]
        assert model.runs == 1

    def test_held_out_steps_keep_their_states(self) -> None:
        whole = states(fed_back(16, Adder()))
        kept, held, _ = split_held_out(fed_back(16, Adder()))
        assert states(held) == [whole[7], whole[15]]
        assert states(kept) == whole[:7] + whole[8:15]

    def tokens(self, masks: list[list[int]], places: list[list[int]]) -> Feedback:
        """Two tokens a step; the past grows with the mask."""
        feeds = [
            {
                "input_ids": np.zeros((1, 2), np.int64),
                "attention_mask": np.array([mask]),
                "position_ids": np.array([place]),
            }
            for mask, place in zip(masks, places, strict=True)
        ]
        inputs = [InputInfo("input_ids", np.dtype(np.int64), ("n", "seq")), MASK, PLACE]

        def start() -> Run:
            return lambda feed, _: {"present.0": np.zeros((1, feed["attention_mask"].shape[1]), np.float32)}

        empty = {"past.0": initial_state(PAST)}
        return Feedback(from_iterable(feeds, inputs), [*inputs, PAST], {"present.0": "past.0"}, empty, start)

    def test_tokens_are_counted_on(self) -> None:
        """A step that knows its own tokens only gets the masks of all before it, and positions behind them."""
        data = self.tokens([[1, 1], [1, 0], [1, 1]], [[0, 1], [0, 0], [0, 1]])
        masks = [feed["attention_mask"][0].tolist() for _, feed in data]
        assert masks == [[1, 1], [1, 1, 1, 0], [1, 1, 1, 0, 1, 1]]
        assert [feed["position_ids"].tolist() for _, feed in data] == [[[0, 1]], [[2, 2]], [[3, 4]]]
        assert [feed["past.0"].shape[1] for _, feed in data] == [0, 2, 4]

    def test_what_counts_the_past_stays(self) -> None:
        masks, places = [[1, 1], [1, 1, 1, 0]], [[0, 1], [2, 3]]
        data = self.tokens(masks, places)
        assert [feed["attention_mask"][0].tolist() for _, feed in data] == masks
        assert [feed["position_ids"][0].tolist() for _, feed in data] == places

    def test_a_state_of_another_shape(self) -> None:
        data = Feedback(
            steps(2), [X, H], {"hn": "h"}, {"h": np.zeros((1, 2), np.float32)},
            lambda: lambda feed, _: {"hn": np.zeros((1, 3), np.float32)},
        )  # fmt: skip
        with pytest.raises(CalibrationError, match=r"sample 1: input 'h' has shape \[1, 3\]"):
            list(data)


class TestPatterns:
    def test_what_the_star_matches_is_carried_over(self) -> None:
        outputs = ["logits", "present.0.key", "present.0.value", "present.11.key"]
        inputs = ["ids", *(f"past_key_values.{end[8:]}" for end in outputs[1:])]
        found = resolve_feedback({"present.*": "past_key_values.*"}, inputs, outputs)
        assert found == {o: f"past_key_values.{o[8:]}" for o in outputs[1:]}
        assert resolve_feedback({"stateN": "state"}, ["state"], ["y", "stateN"]) == {"stateN": "state"}
        two = resolve_feedback({"o.*.k.*": "i.*.*"}, ["i.1.2"], ["o.1.k.2"])
        assert two == {"o.1.k.2": "i.1.2"}

    @pytest.mark.parametrize(
        ("patterns", "words"),
        [
            ({"nothing": "a"}, "matches no output; the outputs are 'y', 'z'"),
            ({"y": "b"}, "output 'y' would feed 'b', which is no input"),
            ({"*": "a"}, "same number of"),
            ({"y": "a", "z": "a"}, "input 'a' is fed by two outputs"),
        ],
    )
    def test_mistakes(self, patterns: dict[str, str], words: str) -> None:
        with pytest.raises(CalibrationError, match=words):
            resolve_feedback(patterns, ["a"], ["y", "z"])


class TestFill:
    @pytest.mark.parametrize(
        ("shape", "first"),
        [
            ((2, None, 128), (2, 1, 128)),  # an LSTM's state
            ((2, "batch", 128), (2, 1, 128)),
            (("batch", 3, "past", 64), (1, 3, 0, 64)),
            (("b", 3, "past_sequence_length", 64), (1, 3, 0, 64)),
            ((None, 3, None, 64), (1, 3, 0, 64)),
        ],
    )
    def test_the_first_state(self, shape: Any, first: tuple[int, ...]) -> None:
        made = initial_state(InputInfo("s", np.dtype(np.float16), shape))
        assert (made.shape, made.dtype) == (first, np.float16)
        assert not made.any()

    def test_the_first_state_can_be_given(self) -> None:
        info = InputInfo("s", np.dtype(np.float32), (2, None))
        assert initial_state(info, [2, 5]).shape == (2, 5)
        for shape in ([3, 5], [2]):
            with pytest.raises(CalibrationError, match=r"data.initial.s: .* does not fit"):
                initial_state(info, shape)
        with pytest.raises(CalibrationError, match="declares no shape"):
            initial_state(InputInfo("s", np.dtype(np.float32), None))
        with pytest.raises(CalibrationError, match="more than"):
            initial_state(info, [2, 1 << 40])

    def test_constants(self) -> None:
        rate = InputInfo("sr", np.dtype(np.int64), ())
        flags = InputInfo("flags", np.dtype(np.bool_), ("n", 2))
        scale = InputInfo("scale", np.dtype(np.float32), (1, 2))
        made = constant_feed({"sr": 16000, "flags": True, "scale": [[1, 2.5]]}, [rate, flags, scale])
        assert made["sr"].shape == ()
        assert made["flags"].tolist() == [[True, True]]
        assert made["scale"].dtype == np.float32

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"rate": 1}, "data.constants.rate: no such input; the inputs are 'sr', 'v'"),
            ({"sr": 1.5}, "not values of int64"),
            ({"sr": [1]}, r"has shape \[1\], the input wants \[\]"),
            ({"sr": "16000"}, "not values of int64"),
            ({"v": [[1], [1, 2]]}, "not values of float32"),
            ({"v": [float("nan"), 1]}, "not values of float32"),
            ({"sr": float("nan")}, "not values of int64"),
            ({"v": [1, 2, 3]}, r"has shape \[3\], the input wants \[2\]"),
        ],
    )
    def test_bad_constants(self, values: dict[str, Any], words: str) -> None:
        inputs = [InputInfo("sr", np.dtype(np.int64), ()), InputInfo("v", np.dtype(np.float32), (2,))]
        with pytest.raises(CalibrationError, match=words):
            constant_feed(values, inputs)


class TestTags:
    def test_from_files(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((1, 2), np.float32), timestep_idx=np.array(3))
        np.savez(tmp_path / "b.npz", any_name=np.zeros((1, 2), np.float32), timestep_idx=np.array([4]))
        data = open_data([tmp_path], [X])
        assert [ident.tags for ident, _ in data] == [{"timestep_idx": 3}, {"timestep_idx": 4}]
        assert all(list(feed) == ["x"] for _, feed in data)

    def test_from_stacks_and_python(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((3, 2), np.float32), timestep_idx=np.arange(3))
        assert [i.tags["timestep_idx"] for i, _ in open_data([tmp_path], [X], stacked=True)] == [0, 1, 2]
        feed = {"x": np.zeros((1, 2), np.float32), "timestep_idx": np.array(9)}
        ((ident, _),) = from_iterable([(SampleId(0, "s", {"other": 1}), feed)], [X])
        assert ident.tags == {"other": 1, "timestep_idx": 9}

    def test_an_input_of_that_name_is_fed_as_well(self, tmp_path: Path) -> None:
        info = InputInfo("timestep_idx", np.dtype(np.int64), ())
        np.savez(tmp_path / "a.npz", timestep_idx=np.array(3))
        ((ident, feed),) = open_data([tmp_path], [info])
        assert ident.tags == {"timestep_idx": 3}
        assert feed["timestep_idx"] == 3

    def test_no_integer(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((1, 2), np.float32), timestep_idx=np.array(0.5))
        with pytest.raises(
            CalibrationError, match=r"a.npz: 'timestep_idx' is float64 \[\], a tag is one integer"
        ):
            list(open_data([tmp_path], [X]))


def values(start: int, count: int) -> Dataset:
    feeds = [{"x": np.full((1, 2), start + i, np.float32)} for i in range(count)]
    return from_iterable(feeds, [X])


def firsts(data: Iterable[Sample]) -> list[int]:
    return [int(feed["x"][0, 0]) for _, feed in data]  # type: ignore[call-overload]


class TestMix:
    def test_one_after_another(self) -> None:
        data = mix([(values(0, 3), 2), (values(10, 3), None), (values(20, 2), 9)])
        assert firsts(data) == [0, 1, 10, 11, 12, 20, 21]
        assert [ident.index for ident, _ in data] == list(range(7))
        assert firsts(read_at(data, [1, 2, 6])) == [1, 10, 21]

    def test_shuffled(self) -> None:
        sets = [(values(0, 50), 10), (values(100, 20), None)]
        data = mix(sets, shuffle=7)
        found = firsts(data)
        assert firsts(data) == found == firsts(mix(sets, shuffle=7))
        assert found != firsts(mix(sets, shuffle=8))
        assert len(set(found)) == 30
        assert sum(value < 100 for value in found) == 10
        assert sorted(found)[:10] != list(range(10)), "chosen from all of the set"
        assert [ident.index for ident, _ in data] == list(range(30))
        assert firsts(read_at(data, [3, 9])) == [found[3], found[9]]


class Endless:
    """A data set without `read`, as a user may write one."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Sample]:
        for i in range(5):
            yield SampleId(i), {"x": np.full((1, 2), i, np.float32)}


def test_data_sets_that_cannot_skip() -> None:
    assert firsts(mix([(Endless(), 3), (Endless(), None)], shuffle=1)) == firsts(
        mix([(values(0, 5), 3), (values(0, 5), None)], shuffle=1)
    )


class TestSets:
    wiring = Wiring([X, H, InputInfo("sr", np.dtype(np.int64), ())], ["y", "hn"], lambda _: Adder())

    def save(self, folder: Path, name: str, *starts: int) -> Path:
        path = folder / name
        np.save(path, np.array([[s, s] for s in starts], np.float32))
        return path

    def test_each_set_is_a_sequence(self, tmp_path: Path) -> None:
        how = HowToRead(stacked=True)
        sets = [
            FileSet(self.save(tmp_path, "a.npy", 1, 2, 3), how, None, {"sr": 8}),
            FileSet(self.save(tmp_path, "b.npy", 10, 20, 30), how, 2, {"sr": 16}),
        ]
        data = open_sets(sets, self.wiring, Recurrence({"hn": "h"}))
        assert states(data) == [0, 1, 3, 0, 10]
        assert [int(feed["sr"]) for _, feed in data] == [8, 8, 8, 16, 16]  # type: ignore[call-overload]
        assert list(next(iter(data))[1]) == ["x", "h", "sr"]

    def test_how_many_were_taken_is_said(self, tmp_path: Path) -> None:
        how, path, said = HowToRead(stacked=True), self.save(tmp_path, "a.npy", 1, 2, 3), list[str]()
        sets = [FileSet(path, how, count, {"sr": 8, "h": 0}) for count in (2, 3, 5)]
        assert len(open_sets(sets, self.wiring, Recurrence(), shuffle=4, said=said)) == 8
        assert said == [
            f"2 of the 3 samples of {path}, chosen at random by seed 4",
            f"{path}: 3 samples, although data.sets asks for 5",
        ]

    def test_contradictions(self, tmp_path: Path) -> None:
        one = FileSet(self.save(tmp_path, "a.npy", 1), HowToRead(stacked=True), None, {"sr": 8})
        back = Recurrence({"hn": "h"})
        for sets, recurrence, shuffle, words in (
            ([one], back, 0, "data.shuffle: steps of a sequence are read in order"),
            ([one], Recurrence({"hn": "h"}, initial={"x": [1, 2]}), None, "data.initial.x: is not fed by"),
            (
                [FileSet(one.path, one.how, None, {"sr": 1, "h": 0})],
                back,
                None,
                "data.constants.h: data.feedback",
            ),
        ):
            with pytest.raises(CalibrationError, match=words):
                open_sets(sets, self.wiring, recurrence, shuffle=shuffle)
