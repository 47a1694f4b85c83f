"""Outlier Suppression+ against its formula in numpy."""

from __future__ import annotations

import numpy as np

from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import feeds, known, norm_model, output_error, powers, smoothed


def test_outlier_suppression_plus() -> None:
    workspace = workspace_of(norm_model(), feeds())
    rows, weight = known()
    (found,) = smoothed(workspace, "outlier_suppression_plus")
    middle = (rows.max(0) + rows.min(0)) / 2
    np.testing.assert_allclose(np.asarray(found.shift), middle, atol=1e-6)
    reach, size = np.abs(rows - middle).max(0), np.abs(weight).max(1)
    scales = [powers(reach, size, i / 20, 1 - i / 20) for i in range(21)]
    errors = [output_error(rows, weight, s, middle) for s in scales]
    mine = min(range(21), key=lambda i: np.abs(np.log(scales[i] / found.scale)).max())
    np.testing.assert_allclose(found.scale, scales[mine], rtol=1e-5)
    assert errors[mine] <= min(errors) * 1.02
