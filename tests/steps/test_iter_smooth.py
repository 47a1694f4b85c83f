"""Iterative smoothing (m4) against its formula in numpy."""

from __future__ import annotations

import numpy as np

from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import feeds, known, norm_model, smoothed


def test_iter_smooth() -> None:
    workspace = workspace_of(norm_model(), feeds())
    rows, weight = known()
    (found,) = smoothed(workspace, "iter_smooth", scale_min=1e-3)
    expected = np.maximum(np.abs(rows).max(0) ** 0.9 / np.abs(weight).max(1) ** 0.1, 1e-3)
    np.testing.assert_allclose(found.scale, expected, rtol=1e-6)
    assert found.shift is None


def test_iter_smooth_with_shift() -> None:
    workspace = workspace_of(norm_model(), feeds())
    rows, weight = known()
    (found,) = smoothed(workspace, "iter_smooth", symmetric=False, alpha=0.7)
    middle = (rows.max(0) + rows.min(0)) / 2
    np.testing.assert_allclose(np.asarray(found.shift), middle, atol=1e-6)
    reach = np.abs(rows - middle).max(0)
    expected = np.maximum(reach**0.7 / np.abs(weight).max(1) ** 0.3, 1e-5)
    np.testing.assert_allclose(found.scale, expected, rtol=1e-5)
