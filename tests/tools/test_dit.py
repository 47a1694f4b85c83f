"""The shipped diffusion transformer, and every processor of a session on it, over a short denoising loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from calib.model import open_model
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.export.files import write_model
from onnxslim_ptq.export.rebuild import rebuild
from onnxslim_ptq.frontends.session import SaveProcessorConfig, SessionConfig, quant_model
from tools.bench import session
from tools.dit import sampling

STEPS, SEEDS = 10, range(4)
SEPARATION = 5


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return session.denoising_samples(range(100, 104), STEPS)


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return sampling.sample(session.runner(sampling.MODEL), SEEDS, STEPS)


def test_the_model_makes_images_of_digits(exact: np.ndarray) -> None:
    """Corners of the digits' images are paper, and something is drawn."""
    assert sampling.MODEL.stat().st_size < 1_000_000
    assert exact.shape == (4, 1, 8, 8)
    assert np.abs(exact[:, 0, :, 0] + 1).mean() < 0.2
    assert (exact.max(axis=(1, 2, 3)) > 0.5).all()


def test_the_loop_ends_at_the_image() -> None:
    """With a model that knows the answer every number of steps ends at it."""
    target = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)

    def run(index: int, feed: sampling.Feed) -> np.ndarray:
        angle = sampling.angle(feed["time"].astype(np.float64))[:, None, None, None]
        error = (feed["image"] - np.cos(angle) * target) / np.sin(angle)
        return np.asarray(np.cos(angle) * error - np.sin(angle) * target, np.float32)

    for steps in (1, 7, sampling.STEPS):
        np.testing.assert_allclose(
            sampling.sample(run, range(2), steps), np.tile(target, (2, 1, 1, 1)), atol=1e-3
        )


@pytest.mark.parametrize(
    ("form", "least"),
    [
        ("w8a8", 15), ("w8a8_dynamic", 20), ("w8a8_timestep", 15), ("m3 + w8a8", 15), ("m4 + w8a8", 15),
        ("m6 + w8a8", 15), ("w8a8_dynamic + fa3", 20),
    ],
)  # fmt: skip
def test_processors(
    form: str, least: float, samples: list[dict[str, Any]], exact: np.ndarray, tmp_path: Path
) -> None:
    given = {**session.processors(form), "save": SaveProcessorConfig(output_path=str(tmp_path))}
    if form == "w8a8_timestep":
        given[form].timestep_sep = SEPARATION
    config = SessionConfig(processor_cfg_map=given, calib_data=samples)
    measured = [{name: np.asarray(value) for name, value in sample.items()} for sample in samples[::4]]
    result = quant_model(sampling.MODEL, config, eval_data=measured)
    kind = next(name for name in given if name.startswith("w8a8"))
    kinds = json.loads((tmp_path / f"quant_model_description_{kind}.json").read_text())
    assert kinds["model_quant_type"] == kind.upper()
    assert kinds["blocks.0.attn.to_q.weight"] == kind.upper()
    assert kinds["proj_out.weight"] == "FLOAT"
    assert ("blocks.0.attn.fa_q.scale" in kinds) == ("fa3" in given)
    assert bool(result.context.smoothing) == any(name in given for name in ("m3", "m4", "m6"))
    tensors = load_file(tmp_path / f"quant_model_weight_{kind}.safetensors")
    if kind == "w8a8_timestep":
        assert tensors["blocks.1.fc1.input_scale"].shape == (STEPS, 1)
    seen = sampling.sample(session.runner(tmp_path / f"dit_{kind}.onnx"), SEEDS, STEPS)
    description = tmp_path / f"quant_model_description_{kind}.json"
    write_model(rebuild(open_model(sampling.MODEL), description, TARGETS["cpu"]), tmp_path / "again.onnx")
    again = sampling.sample(session.runner(tmp_path / "again.onnx"), SEEDS, STEPS)
    np.testing.assert_array_equal(seen, again)
    assert sampling.decibels(exact, seen).mean() > least
