"""AWQ (m3) against its formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import Matrix, block_loss, feeds, int8, known, norm_model, smoothed


def test_awq() -> None:
    workspace = workspace_of(norm_model(), feeds())
    rows, weight = known()
    (found,) = smoothed(workspace, "awq")
    size = np.abs(rows).mean(0)
    losses, scales = [], []
    for i in range(20):
        scale = np.maximum(size ** (i / 20), 1e-4)
        scale /= np.sqrt(scale.max() * scale.min())
        seen = int8(weight * scale[:, None]) / scale[:, None]
        per_output = ((rows @ seen - rows @ weight) ** 2).mean(0)
        losses.append(per_output[:6].mean() + per_output[6:].mean())
        scales.append(scale)
    np.testing.assert_allclose(found.scale, scales[int(np.argmin(losses))], rtol=1e-5)


@pytest.mark.parametrize("duo", [False, True])
def test_the_loss_of_the_block(duo: bool) -> None:
    """Golden Stick's form: rounded weights, float activations, the error where the block ends."""
    rows, weight = known()
    (found,) = smoothed(workspace_of(norm_model(), feeds()), "awq", loss="block", duo=duo)
    size = np.abs(rows).mean(0)
    share = (np.abs(weight) / (np.abs(weight).max(0) + 1e-6)).mean(1)

    def scale(exponent: float) -> Matrix:
        made = np.maximum(size**exponent, 1e-4)
        if duo:
            made = np.maximum(size**exponent / (share ** (1 - exponent) + 1e-4), 1e-4)
        made = made / np.sqrt(made.max() * made.min())
        return np.where(size > 0, made, 1.0) if duo else made

    scales = [scale(i / 20) for i in range(20)]
    losses = [block_loss(s, quantized_input=False) for s in scales]
    mine = min(range(20), key=lambda i: np.abs(np.log(scales[i] / found.scale)).max())
    np.testing.assert_allclose(found.scale, scales[mine], rtol=1e-5)
    assert losses[mine] <= min(losses) * 1.02
