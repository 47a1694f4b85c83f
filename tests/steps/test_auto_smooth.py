"""The scales that automatic smoothing chooses from, against their formulas in numpy."""

from __future__ import annotations

import numpy as np

from onnxslim_ptq.graph.smooth_groups import find_groups
from onnxslim_ptq.steps.group_strengths import LOCAL, NONE, strength_probes, strengths_of
from tests.steps.layers import place_all, workspace_of
from tests.steps.smoothing_models import Matrix, feeds, int8, known, norm_model, powers


def centred_error(rows: Matrix, weight: Matrix, scale: Matrix) -> float:
    """RMS of the output error without its mean, which the corrected biases take out; 8 bits on both sides."""
    x = rows / scale
    step = (max(x.max(), 0.0) - min(x.min(), 0.0)) / 255
    off = np.rint(x / step) * step @ int8(weight * scale[:, None]) - rows @ weight
    return float(np.sqrt(((off - off.mean(0)) ** 2).mean()))


def test_strengths() -> None:
    """Normalized scales of SmoothQuant for every alpha; "local" is the one with the smallest error of the layers."""
    rows, weight = known()
    workspace = workspace_of(norm_model(), feeds())
    placement = place_all(workspace)
    (group,) = find_groups(workspace.graph)
    stats = workspace.collect(strength_probes(workspace.graph, [group], placement))
    found = strengths_of(workspace.graph, group, (0.5, 0.8), stats, placement)

    def scale(alpha: float) -> Matrix:
        made = powers(np.abs(rows).max(0), np.abs(weight).max(1), alpha, 1 - alpha)
        return np.asarray(made / np.exp(np.log(made).mean()))

    assert found.scales[NONE] is None
    for label, alpha in (("0.5", 0.5), ("0.8", 0.8)):
        np.testing.assert_allclose(np.asarray(found.scales[label]), scale(alpha), rtol=1e-5)
    local = found.scales[LOCAL]
    assert local is not None
    grid = [i / 20 for i in range(6, 21)]
    mine = min(grid, key=lambda a: float(np.abs(np.log(scale(a) / local)).max()))
    np.testing.assert_allclose(local, scale(mine), rtol=1e-5)
    errors = {a: centred_error(rows, weight, scale(a)) for a in grid}
    assert errors[mine] <= min(errors.values()) * 1.05
    assert found.gain_db > 3, "channel 3 is 40 times as large as the others"
