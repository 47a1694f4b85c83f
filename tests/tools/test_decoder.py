"""The decoder benchmark: its arithmetic, and SmolLM2 through an int8 cache in chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxslim_ptq import quantize
from tools import zoo
from tools.bench import decoder
from tools.bench.decoder import Decoder, against, chunks


def test_chunks_add_up() -> None:
    sizes = [size for seed in range(100) for size in chunks(256, np.random.default_rng(seed))]
    assert sum(sizes) == 100 * 256
    assert min(sizes) == 1
    assert max(sizes) == 64


def test_paired_errors() -> None:
    """Noise that both share does not count."""
    rng = np.random.default_rng(0)
    exact = rng.normal(3, 1, 32 * 256)
    ratio, error = against(exact + 0.001, exact)
    assert ratio == pytest.approx(np.exp(0.001) - 1)
    assert error == pytest.approx(0, abs=1e-9)
    ratio, error = against(exact + np.repeat(rng.normal(0, 0.01, 32), 256), exact)
    assert error == pytest.approx(0.01 / 32**0.5, rel=0.5)


@pytest.mark.slow
@pytest.mark.network
class TestSmolLM2:
    @pytest.mark.parametrize("per", ["channel", "token"])
    def test_int8_cache(self, per: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """512 tokens in chunks: at most 0.5 % worse than float, with two standard errors of room; a quarter of the
        bytes."""
        try:
            case = zoo.load("smollm2")
        except zoo.ZooUnavailable as reason:
            pytest.skip(str(reason))
        monkeypatch.setattr(decoder, "_WINDOWS", 2)
        with np.load(case.model.parent / "tokens.npz") as arrays:
            tokens = arrays["evaluation"]
        recipe = {"steps": [{"type": "kv_cache", "per": per}]}
        samples = [case.calibration[i] for i in range(0, 64, 16)]
        path = quantize(case.model, recipe, samples, eval_data=samples[:1]).save(tmp_path / "q.onnx").model
        plain, small = Decoder(case.model), Decoder(path)
        exact, seen = (decoder.losses_of(model, tokens) for model in (plain, small))
        ratio, error = against(seen, exact)
        assert ratio < 0.005 + 2 * error
        assert small.bytes_per_token < 0.26 * plain.bytes_per_token
