"""Samples from files: folders, single files, stacks, and what they must match."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.readers import ReadLimits, fingerprint, open_data, take
from calib.types import Array, Dataset, InputInfo

X = InputInfo("x", np.dtype(np.float32), ("batch", 3))
IDS = InputInfo("ids", np.dtype(np.int64), ("batch", None))


def save(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)
    return path


def ones(value: float, rows: int = 1) -> Array:
    return np.full((rows, 3), value, np.float32)


def first_values(data: Dataset) -> list[float]:
    return [float(next(iter(feed.values())).flat[0]) for _, feed in data]


def names(data: Dataset) -> list[str]:
    return [str(ident) for ident, _ in data]


def fails(data: Dataset, *parts: str) -> None:
    with pytest.raises(CalibrationError) as error:
        list(data)
    says(error, *parts)


def says(error: pytest.ExceptionInfo[CalibrationError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


class TestFolder:
    def test_one_sample_per_file_sorted_by_name(self, tmp_path: Path) -> None:
        for name in ("b", "a", "c"):
            save(tmp_path / f"{name}.npz", x=ones(ord(name)))
        np.save(tmp_path / "d.npy", ones(ord("d")))
        (tmp_path / ".DS_Store").write_bytes(b"hidden")
        data = open_data([tmp_path], [X])
        assert len(data) == 4
        assert names(data) == ["a.npz", "b.npz", "c.npz", "d.npy"]
        assert [ident.index for ident, _ in data] == [0, 1, 2, 3]
        assert first_values(data) == [ord(name) for name in "abcd"]
        assert first_values(data) == first_values(data)

    @pytest.mark.parametrize("other", ["labels.txt", "x.NPX", "npz", "x.pkl"])
    def test_other_file(self, tmp_path: Path, other: str) -> None:
        save(tmp_path / "a.npz", x=ones(1))
        (tmp_path / other).write_bytes(b"")
        with pytest.raises(CalibrationError) as error:
            open_data([tmp_path], [X])
        says(error, str(tmp_path / other), "not a sample file")

    def test_folder_in_folder(self, tmp_path: Path) -> None:
        (tmp_path / "sub.npz").mkdir()
        with pytest.raises(CalibrationError, match=r"sub\.npz: is a folder in a folder"):
            open_data([tmp_path], [X])

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="no samples"):
            open_data([tmp_path], [X])
        with pytest.raises(CalibrationError, match="no samples"):
            open_data([], [X])

    def test_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"gone: no such file or folder"):
            open_data([tmp_path / "gone"], [X])

    def test_too_many(self, tmp_path: Path) -> None:
        for index in range(4):
            np.save(tmp_path / f"{index}.npy", ones(index))
        with pytest.raises(CalibrationError, match="more than the 3 samples allowed"):
            open_data([tmp_path], [X], limits=ReadLimits(max_samples=3))

    def test_limit(self, tmp_path: Path) -> None:
        for index in range(4):
            np.save(tmp_path / f"{index}.npy", ones(index))
        assert first_values(open_data([tmp_path], [X], limit=2)) == [0, 1]
        assert len(open_data([tmp_path], [X], limit=9)) == 4
        with pytest.raises(CalibrationError, match="--samples 0"):
            open_data([tmp_path], [X], limit=0)


class TestSingleFiles:
    def test_npz(self, tmp_path: Path) -> None:
        path = save(tmp_path / "s.npz", ids=np.zeros((1, 5), np.int64), x=ones(2))
        ((ident, feed),) = open_data([path], [X, IDS])
        assert (ident.index, ident.name) == (0, "s.npz")
        assert list(feed) == ["x", "ids"]

    def test_compressed(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "s.npz", x=ones(2, 1000))
        ((_, feed),) = open_data([tmp_path / "s.npz"], [X])
        np.testing.assert_array_equal(feed["x"], ones(2, 1000))

    def test_single_array_serves_a_one_input_model(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "s.npz", ones(2))
        np.save(tmp_path / "s.npy", ones(3))
        data = open_data([tmp_path / "s.npz", tmp_path / "s.npy"], [X])
        assert [list(feed) for _, feed in data] == [["x"], ["x"]]
        assert [ident.index for ident, _ in data] == [0, 1]

    def test_npy_for_a_model_of_two_inputs(self, tmp_path: Path) -> None:
        np.save(tmp_path / "s.npy", ones(3))
        fails(
            open_data([tmp_path / "s.npy"], [X, IDS]), "s.npy: an .npy holds one array", "'x', 'ids'", ".npz"
        )

    @pytest.mark.parametrize("dtype", ["<f4", ">f4"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_layouts(self, tmp_path: Path, dtype: str, order: str) -> None:
        values = np.arange(12, dtype=np.float32).reshape(4, 3)
        stored = np.asarray(values, dtype, order=order)  # type: ignore[call-overload]
        np.save(tmp_path / "s.npy", stored)
        np.savez(tmp_path / "s.npz", x=stored)
        for _, feed in open_data([tmp_path / "s.npy", tmp_path / "s.npz"], [X]):
            np.testing.assert_array_equal(feed["x"], values)
            assert feed["x"].flags.c_contiguous
            assert feed["x"].dtype == np.float32
            assert feed["x"].dtype.isnative

    def test_scalar_and_empty_inputs(self, tmp_path: Path) -> None:
        inputs = [
            InputInfo("flag", np.dtype(np.bool_), ()),
            InputInfo("past", np.dtype(np.float32), (1, "n")),
        ]
        path = save(tmp_path / "s.npz", flag=np.array(True), past=np.zeros((1, 0), np.float32))
        ((_, feed),) = open_data([path], inputs)
        assert feed["flag"].shape == ()
        assert feed["past"].shape == (1, 0)

    def test_bfloat16_is_stored_as_raw_bytes(self, tmp_path: Path) -> None:
        info = InputInfo("x", np.dtype(ml_dtypes.bfloat16), (None,))
        np.save(tmp_path / "s.npy", np.arange(4).astype(ml_dtypes.bfloat16))
        ((_, feed),) = open_data([tmp_path / "s.npy"], [info])
        np.testing.assert_array_equal(feed["x"].astype(np.float32), np.arange(4.0))

    def test_strings(self, tmp_path: Path) -> None:
        np.save(tmp_path / "s.npy", np.array(["a", "bc"]))
        ((_, feed),) = open_data([tmp_path / "s.npy"], [InputInfo("s", np.dtype(object), (None,))])
        assert list(feed["s"]) == ["a", "bc"]


class TestStacked:
    @pytest.fixture(params=["npy", "npz", "compressed"])
    def stack(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        values = np.arange(30, dtype=np.float32).reshape(10, 3)
        if request.param == "npy":
            np.save(tmp_path / "s.npy", values)
            return tmp_path / "s.npy"
        (np.savez if request.param == "npz" else np.savez_compressed)(tmp_path / "s.npz", x=values)
        return tmp_path / "s.npz"

    def test_rows(self, stack: Path) -> None:
        data = open_data([stack], [X], stacked=True)
        assert len(data) == 10
        assert {feed["x"].shape for _, feed in data} == {(1, 3)}
        assert first_values(data) == [3.0 * row for row in range(10)]
        assert names(data)[3] == f"{stack.name}[3]"

    def test_several_concatenate(self, stack: Path) -> None:
        data = open_data([stack, stack], [X], stacked=True)
        assert len(data) == 20
        assert [ident.index for ident, _ in data] == list(range(20))
        assert names(data)[13] == f"{stack.name}[3]"
        assert len(open_data([stack, stack], [X], stacked=True, limit=13)) == 13
        assert first_values(open_data([stack, stack], [X], stacked=True, limit=12))[-1] == 3.0

    def test_positions_are_reached_without_decoding_others(self, stack: Path) -> None:
        data = open_data([stack, stack], [X], stacked=True)
        assert first_values(take(data, 2)) == [0.0, 3.0]
        chosen = list(data.read([1, 9, 10, 17]))  # type: ignore[attr-defined]
        assert [float(feed["x"][0, 0]) for _, feed in chosen] == [3.0, 27.0, 0.0, 21.0]

    def test_fixed_batch_of_one(self, stack: Path) -> None:
        assert len(list(open_data([stack], [InputInfo("x", X.dtype, (1, 3))], stacked=True))) == 10

    def test_forgotten_flag(self, stack: Path) -> None:
        fails(
            open_data([stack], [InputInfo("x", X.dtype, (1, 3))]),
            f"{stack.name}: input 'x' has shape [10, 3]",
            "wants [1, 3]",
            "axis 0 is 10 instead of 1",
            "--stacked",
        )

    def test_lengths_must_agree(self, tmp_path: Path) -> None:
        path = save(tmp_path / "s.npz", x=ones(1, 4), ids=np.zeros((5, 2), np.int64))
        with pytest.raises(CalibrationError) as error:
            open_data([path], [X, IDS], stacked=True)
        says(error, "s.npz", "'x' 4", "'ids' 5")

    def test_scalar(self, tmp_path: Path) -> None:
        path = save(tmp_path / "s.npz", x=np.float32(1))
        with pytest.raises(CalibrationError, match="'x' is a scalar"):
            open_data([path], [X], stacked=True)

    def test_no_rows(self, tmp_path: Path) -> None:
        np.save(tmp_path / "s.npy", np.zeros((0, 3), np.float32))
        with pytest.raises(CalibrationError, match="no samples"):
            open_data([tmp_path / "s.npy"], [X], stacked=True)

    def test_fortran_order(self, tmp_path: Path) -> None:
        values = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
        np.save(tmp_path / "s.npy", values)
        rows = [feed["x"] for _, feed in open_data([tmp_path / "s.npy"], [X], stacked=True)]
        np.testing.assert_array_equal(np.concatenate(rows), values)
        with pytest.raises(CalibrationError, match=r"'x' is in Fortran order.*ascontiguousarray"):
            open_data([save(tmp_path / "s.npz", x=values)], [X], stacked=True)

    def test_size_limit_is_per_row(self, stack: Path) -> None:
        assert len(list(open_data([stack], [X], stacked=True, limits=ReadLimits(max_sample_bytes=12)))) == 10
        with pytest.raises(CalibrationError, match="12 bytes, more than the 11 bytes"):
            open_data([stack], [X], stacked=True, limits=ReadLimits(max_sample_bytes=11))

    def test_count_limit_is_after_samples(self, stack: Path) -> None:
        limits = ReadLimits(max_samples=5)
        assert len(open_data([stack], [X], stacked=True, limit=5, limits=limits)) == 5
        with pytest.raises(CalibrationError, match="more than the 5 samples allowed"):
            open_data([stack], [X], stacked=True, limits=limits)

    def test_error_names_the_row(self, tmp_path: Path) -> None:
        path = save(tmp_path / "s.npz", x=ones(1, 2).astype(np.uint8))
        fails(open_data([path], [X], stacked=True), "s.npz[0]: input 'x' has dtype uint8")

    def test_file_shortened_meanwhile(self, tmp_path: Path) -> None:
        np.save(tmp_path / "s.npy", ones(1, 5))
        data = open_data([tmp_path / "s.npy"], [X], stacked=True)
        np.save(tmp_path / "s.npy", ones(1, 4))
        fails(data, "s.npy: now holds 4 samples")

    @pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
    def test_one_sample_in_memory(self, tmp_path: Path, writer: object) -> None:
        writer(tmp_path / "s.npz", x=np.zeros((64, 1 << 18), np.float32))  # type: ignore[operator]
        data = open_data([tmp_path / "s.npz"], [InputInfo("x", X.dtype, ("n", 1 << 18))], stacked=True)
        tracemalloc.start()
        for _ in data:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 << 20  # a row is 1 MiB, the stack 64


def test_fingerprint_is_the_same_for_every_way_to_store(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "stack.npy", values)
    (tmp_path / "folder").mkdir()
    for row in range(4):
        np.save(tmp_path / "folder" / f"{row}.npy", values[row : row + 1])
    one = fingerprint(open_data([tmp_path / "stack.npy"], [X], stacked=True))
    assert one == fingerprint(open_data([tmp_path / "folder"], [X]))
    assert one != fingerprint(open_data([tmp_path / "folder"], [X], limit=3))
