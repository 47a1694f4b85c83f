"""What a sample must look like to fit the model's inputs, and which casts are made for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from calib.readers import open_data
from calib.types import Array, Dataset, InputInfo
from tests.calib.test_readers_files import IDS, X, fails, ones, save


class TestMatch:
    """What `check_feed` accepts and says; the same rules serve data from Python."""

    def sample(self, tmp_path: Path, arrays: Mapping[str, Array], *inputs: InputInfo) -> Dataset:
        return open_data([save(tmp_path / "s.npz", **arrays)], inputs)

    def test_missing(self, tmp_path: Path) -> None:
        fails(
            self.sample(tmp_path, {"x": ones(1)}, X, IDS),
            "s.npz: input 'ids' is missing",
            "has 'x'",
            "'x', 'ids'",
        )

    def test_unknown(self, tmp_path: Path) -> None:
        arrays = {"x": ones(1), "extra": ones(1)}
        fails(self.sample(tmp_path, arrays, X), "s.npz: array 'extra' is not an input", "inputs are 'x'")

    def test_misnamed(self, tmp_path: Path) -> None:
        arrays = {"x": ones(1), "input_ids": ones(1)}
        fails(self.sample(tmp_path, arrays, X, IDS), "'input_ids'", "input 'ids' is missing", "'x', 'ids'")

    def test_rank(self, tmp_path: Path) -> None:
        fails(
            self.sample(tmp_path, {"x": ones(1)[0]}, X),
            "input 'x' has shape [3], rank 1",
            "[batch, 3]",
            "x[None]",
        )
        fails(self.sample(tmp_path, {"x": ones(1)[None]}, X), "rank 3", "reshape it")

    def test_fixed_dimension(self, tmp_path: Path) -> None:
        fails(
            self.sample(tmp_path, {"x": np.zeros((1, 4), np.float32)}, X),
            "axis 1 is 4 instead of 3",
            "resize",
        )

    def test_undeclared_shape(self, tmp_path: Path) -> None:
        assert len(list(self.sample(tmp_path, {"x": ones(1)}, InputInfo("x", X.dtype, None)))) == 1

    @pytest.mark.parametrize(
        ("found", "wanted"),
        [("i4", "i8"), ("u1", "i8"), ("u1", "i4"), ("u1", "u2"), ("f8", "f4"), ("f2", "f4"), ("f4", "f8")],
    )
    def test_cast_that_loses_nothing(self, tmp_path: Path, found: str, wanted: str) -> None:
        info = InputInfo("x", np.dtype(wanted), None)
        ((_, feed),) = self.sample(tmp_path, {"x": np.arange(4).astype(found)}, info)
        assert feed["x"].dtype == np.dtype(wanted)
        np.testing.assert_array_equal(feed["x"], np.arange(4))

    @pytest.mark.parametrize(
        ("found", "wanted", "cure"),
        [
            ("u1", "f4", "(x / 255).astype('float32')"),
            ("i8", "f4", "preprocessing"),
            ("u1", ml_dtypes.bfloat16, "preprocessing"),
            ("i8", "i4", "x.astype('int32')"),
            ("i8", "u8", "x.astype('uint64')"),
            ("f4", "f2", "x.astype('float16')"),
            ("f4", ml_dtypes.bfloat16, "x.astype('bfloat16')"),
            ("f4", "i8", "x.astype('int64')"),
            ("?", "i8", "x.astype('int64')"),
            ("?", "f4", "x.astype('float32')"),
            ("u1", "?", "x.astype('bool')"),
            ("c8", "f4", "x.astype('float32')"),
            ("M8[s]", "i8", "x.astype('int64')"),
            ("V4", "f4", "x.astype('float32')"),
            ("f4", object, "strings"),
        ],
    )
    def test_cast_that_is_refused(self, tmp_path: Path, found: str, wanted: object, cure: str) -> None:
        info = InputInfo("x", np.dtype(wanted), None)  # type: ignore[call-overload]
        data = self.sample(tmp_path, {"x": np.zeros(4, found)}, info)
        fails(
            data,
            "s.npz: input 'x' has dtype",
            f"wants {info.dtype}" if info.dtype != object else "wants",
            cure,
        )

    def test_float64_that_overflows(self, tmp_path: Path) -> None:
        fails(self.sample(tmp_path, {"x": np.array([[1e300, 0, 0]])}, X), "beyond float32's range")
        kept = self.sample(tmp_path, {"x": np.array([[np.inf, np.nan, 0]])}, X)
        assert len(list(kept)) == 1  # what to do about Inf and NaN is the caller's policy
