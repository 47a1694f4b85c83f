"""Outlier Suppression Lite against its formula in numpy."""

from __future__ import annotations

import numpy as np

from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import block_loss, feeds, known, norm_model, powers, smoothed


def test_outlier_suppression_lite_leaves_the_norm_alone() -> None:
    workspace = workspace_of(norm_model(), feeds())
    rows, weight = known()
    before = len(workspace.graph.nodes)
    found = smoothed(workspace, "outlier_suppression_lite")
    assert [f.kind for f in found] == ["unfused"] * len(found)
    assert len(workspace.graph.nodes) > before
    act, size = np.abs(rows).max(0), np.abs(weight).max(1)
    alphas = [0.3, 0.4, *(i / 20 for i in range(10, 21))]
    if len(found) == 1:
        gaps = [np.abs(np.log(powers(act, size, a, 1 - a) / found[0].scale)).max() for a in alphas]
        assert min(gaps) < 1e-5


def test_the_loss_of_the_block() -> None:
    """Golden Stick's form: weights and input quantized, the error where the block ends."""
    rows, weight = known()
    (found,) = smoothed(workspace_of(norm_model(), feeds()), "outlier_suppression_lite", loss="block")
    act, size = np.abs(rows).max(0), np.abs(weight).max(1)
    alphas = [0.3, 0.4, *(i / 20 for i in range(10, 21))]
    scales = [powers(act, size, a, 1 - a) for a in alphas]
    losses = [block_loss(s, quantized_input=True) for s in scales]
    mine = min(range(len(alphas)), key=lambda i: np.abs(np.log(scales[i] / found.scale)).max())
    np.testing.assert_allclose(found.scale, scales[mine], rtol=1e-5)
    assert losses[mine] <= min(losses) * 1.02
