"""Flexible smoothing (m6) against its formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim_ptq.steps.flex_smooth import search
from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import feeds, known, norm_model, output_error, powers, smoothed


@pytest.mark.parametrize("given", [{}, {"alpha": 0.4}, {"beta": 0.3}, {"alpha": 0.6, "beta": 0.2}])
def test_flex_smooth(given: dict[str, float]) -> None:
    workspace = workspace_of(norm_model(), feeds())
    rows, weight = known()
    act, size = np.abs(rows).max(0), np.abs(weight).max(1)
    (found,) = smoothed(workspace, "flex_smooth", **given)

    def error(alpha: float, beta: float) -> float:
        return output_error(rows, weight, powers(act, size, alpha, beta))

    grid = [i / 20 for i in range(21)]
    pairs = [(a, b) for a in grid for b in grid]
    near = min(pairs, key=lambda p: np.abs(np.log(powers(act, size, *p) / found.scale)).max())
    np.testing.assert_allclose(found.scale, powers(act, size, *near), rtol=1e-6)
    assert given.get("alpha", near[0]) == near[0]
    assert given.get("beta", near[1]) == near[1]
    if not given:
        best = min(error(a, 1 - a) for a in grid)
        assert error(*near) <= best * 1.02, "the second phase starts from the best of the first"


def test_ties_go_to_the_last() -> None:
    assert search(lambda a, b: 1.0) == (1.0, 1.0)
    assert search(lambda a, b: (a - 0.3) ** 2 + (b - 0.2) ** 2) == (0.55, 0.2)
    assert search(lambda a, b: abs(b - 0.2), alpha=0.4) == (0.4, 0.2)
    assert search(lambda a, b: abs(a - 0.2), beta=0.9) == (0.2, 0.9)
