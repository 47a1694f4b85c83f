"""Gram matrices of convolution windows, of groups, and of a bounded number of rows."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.stats import GramStats
from calib.stats.patch import Patch
from calib.types import Probe, SampleId

PATCHES = [
    Patch((3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    Patch((3, 2), (2, 1), (1, 2), (0, 1), (2, 0)),
    Patch((1, 1), (2, 2), (1, 1), (0, 0), (0, 0)),
    Patch((4,), (3,), (1,), (2,), (1,)),
    Patch((2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 0, 1), (0, 1, 0)),
]


def images(patch: Patch, channels: int = 4, seed: int = 0) -> np.ndarray:
    shape = (2, channels, *(6, 5, 4)[: len(patch.kernel)])
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) + 1


def windows(x: np.ndarray, patch: Patch) -> np.ndarray:
    """Every window, cut out one element at a time from the padded image."""
    axes = len(patch.kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(patch.begin, patch.end, strict=True)])
    rows = []
    for image in padded:
        for place in product(*map(range, patch.places(x.shape[2:]))):
            row = []
            for channel in image:
                for offset in product(*map(range, patch.kernel)):
                    at = tuple(
                        place[a] * patch.strides[a] + offset[a] * patch.dilations[a] for a in range(axes)
                    )
                    row.append(channel[at])
            rows.append(row)
    return np.asarray(rows, np.float64)


def filled(patch: Patch, *arrays: np.ndarray, **options: float) -> GramStats:
    stats = GramStats(Probe("x", "gram", None, (*options.items(), *patch.options())))
    for i, x in enumerate(arrays):
        stats.update(x, SampleId(i))
    return stats


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_every_window(patch: Patch) -> None:
    x = images(patch)
    rows = windows(x, patch)
    stats = filled(patch, x)
    assert stats.rows == len(rows)
    np.testing.assert_allclose(stats.gram, rows.T @ rows, rtol=2e-5, atol=1e-4)
    centred = rows - rows.mean(axis=0)
    np.testing.assert_allclose(stats.centred, centred.T @ centred, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("patch", PATCHES[:2], ids=str)
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_the_diagonal_blocks(patch: Patch, groups: int) -> None:
    x = images(patch)
    whole, parts = filled(patch, x).gram, filled(patch, x, groups=groups).gram
    size = len(whole) // groups
    for i, part in enumerate(parts):
        np.testing.assert_allclose(part, whole[i * size :, i * size :][:size, :size], rtol=1e-4, atol=1e-4)


def test_a_bounded_number_of_rows_is_a_sample_of_all() -> None:
    patch = PATCHES[0]
    x = images(patch)
    stats = filled(patch, x, most=7)
    assert stats.rows == 7
    every = [np.outer(row, row) for row in windows(x, patch)]
    traces = [np.trace(m) for m in every]
    assert 7 * min(traces) <= np.trace(stats.gram) <= 7 * max(traces)
    again = filled(patch, x, most=7)
    np.testing.assert_array_equal(stats.gram, again.gram)
    lines = GramStats(Probe("x", "gram", -1, (("most", 5.0),)))
    lines.update(x[:, :, 0], SampleId(3))
    assert (lines.rows, lines.gram.shape) == (5, (5, 5))


def test_merging_in_any_order_and_states() -> None:
    patch = PATCHES[1]
    arrays = [images(patch, seed=s) for s in range(4)]
    whole = filled(patch, *arrays, most=9)
    options = (("most", 9.0), *patch.options())
    parts = []
    for i in (2, 0, 3, 1):
        part = GramStats(Probe("x", "gram", None, options))
        part.update(arrays[i], SampleId(i))
        parts.append(GramStats.from_state(part.state()))
    for part in parts[1:]:
        parts[0].merge(part)
    for key, value in whole.state().items():
        np.testing.assert_array_equal(value, parts[0].state()[key], err_msg=key)


def test_bad_windows_outside_the_image_do_not_spread_nan() -> None:
    patch = PATCHES[0]
    x = images(patch)
    x[0, 0, 0, 0] = np.nan
    stats = filled(patch, x)
    assert np.isfinite(stats.gram).all()
    assert stats.rows == 2 * 6 * 5 - 4


def test_errors() -> None:
    patch = PATCHES[0]
    stats = filled(patch, images(patch))
    with pytest.raises(CalibrationError, match="axis 1 had 4 channels"):
        stats.update(images(patch, channels=5), SampleId(1, "b"))
    with pytest.raises(CalibrationError, match="a window of 2 axes does not fit"):
        stats.update(np.ones((2, 4, 5), np.float32), SampleId(1))
    with pytest.raises(CalibrationError, match="cannot be cut into 5 parts"):
        filled(patch, images(patch), groups=5)
    with pytest.raises(CalibrationError, match="different windows"):
        stats.merge(filled(PATCHES[1], images(PATCHES[1])))
