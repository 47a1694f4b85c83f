"""SmoothQuant against its formula in numpy over the raw activations."""

from __future__ import annotations

import numpy as np
import pytest

from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import feeds, known, norm_model, powers, smoothed


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant(alpha: float) -> None:
    workspace = workspace_of(norm_model(), feeds())
    rows, weight = known()
    (found,) = smoothed(workspace, "smoothquant", alpha=alpha)
    expected = powers(np.abs(rows).max(0), np.abs(weight).max(1), alpha, 1 - alpha)
    np.testing.assert_allclose(found.scale, expected, rtol=1e-6)
    assert found.scale[5] == 1, "a dead channel stays as it is"
    assert (found.step, found.kind, found.nodes) == ("smoothquant", "norm-linear", ("a", "b"))
