"""Quantizing block after block gives the same model as quantizing the whole, on request or by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import calib.blocks.blockwise
from calib.blocks.spool import Spool
from onnxslim_ptq import Result, quantize
from onnxslim_ptq.errors import CalibrationError
from tests.models import feeds_for, mlp

ROOT = Path(__file__).parents[2]
DIGITS, SAMPLES = ROOT / "tools" / "digits" / "digits.onnx", ROOT / "tools" / "digits" / "calib"
AUTO = {"steps": [{"type": "quantize"}]}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if memory were just large enough for the model to need many blocks."""
    monkeypatch.setattr(calib.blocks.blockwise, "available_memory", lambda: 1 << 19)


def numbers(result: Result) -> dict[str, Any]:
    return {
        **{key: (p.scale, p.zero_point) for key, p in result.plan.params.items()},
        **{f"codes {key}": (c.params.scale, c.codes) for key, c in result.plan.weight_codes.items()},
        **{f"bias {key}": (b.scale, b.codes) for key, b in result.plan.bias_codes.items()},
    }


@pytest.mark.usefixtures("small_blocks")
class TestSameResult:
    @pytest.mark.parametrize("recipe", ["w8a8-minmax", "w8a8-percentile", AUTO], ids=str)
    def test_numbers_codes_and_methods(self, recipe: Any) -> None:
        """`auto` is judged by outputs that come from blocks, too."""
        whole = quantize(DIGITS, recipe, SAMPLES, threads=1, blockwise=False)
        blocks = quantize(DIGITS, recipe, SAMPLES, threads=1, blockwise=True)
        assert {k: m for k, (_, m) in whole.plan.ranges.items()} == {
            k: m for k, (_, m) in blocks.plan.ranges.items()
        }
        first, second = numbers(whole), numbers(blocks)
        assert first.keys() == second.keys()
        for key, (scale, integers) in first.items():
            np.testing.assert_allclose(scale, second[key][0], rtol=1e-6, err_msg=key)
            assert np.abs(integers.astype(np.int64) - second[key][1]).max() <= 1, key
        assert blocks.metrics["sqnr_db"] == pytest.approx(whole.metrics["sqnr_db"], abs=0.1)

    def test_what_is_written_runs(self, tmp_path: Path) -> None:
        result = quantize(DIGITS, "w8a8-minmax", SAMPLES, blockwise=True)
        paths = result.save(tmp_path / "q.onnx")
        assert paths.data is not None, "weights lie beside the model, so that nothing has to hold them"
        session = ort.InferenceSession(paths.model, providers=["CPUExecutionProvider"])
        first = session.get_inputs()[0]
        shape = [d if isinstance(d, int) else 1 for d in first.shape]
        assert np.isfinite(session.run(None, {first.name: np.zeros(shape, np.float32)})[0]).all()
        onnx.checker.check_model(paths.model, full_check=True)

    def test_smoothing_that_runs_the_whole_model_is_left_out_and_said(self) -> None:
        notes = quantize(DIGITS, "w8a8", SAMPLES, blockwise=True).notes
        assert any("auto_smooth was left out" in note for note in notes)


class TestSpool:
    def test_nothing_is_left(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("calib.blocks.spool._on_disk", lambda: tmp_path)
        quantize(DIGITS, "w8a8-minmax", SAMPLES, blockwise=True)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=repr)
    def test_nothing_is_left_after_an_interruption(
        self, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("calib.blocks.spool._on_disk", lambda: tmp_path)
        written = Spool.put

        def fail(self: Spool, key: object, values: Any) -> None:
            if isinstance(error, OSError):
                raise self._refused(error)
            written(self, key, values)
            raise error

        monkeypatch.setattr(Spool, "put", fail)
        with pytest.raises((KeyboardInterrupt, CalibrationError)):
            quantize(DIGITS, "w8a8-minmax", SAMPLES, blockwise=True)
        assert list(tmp_path.iterdir()) == []


class TestChosen:
    @pytest.mark.parametrize("short", [True, False])
    def test_by_the_memory_there_is(self, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        available = DIGITS.stat().st_size * (3 if short else 100)
        monkeypatch.setattr(calib.blocks.blockwise, "available_memory", lambda: available)
        assert quantize(DIGITS, "w8a8-minmax", SAMPLES).blockwise is short

    def test_not_where_memory_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calib.blocks.blockwise, "available_memory", lambda: None)
        assert not quantize(mlp(), "w8a8-minmax", feeds_for(mlp()), min_sqnr=0).blockwise

    def test_workers_exclude_it(self) -> None:
        with pytest.raises(CalibrationError, match="block-wise calibration runs in one process"):
            quantize(DIGITS, "w8a8-minmax", SAMPLES, blockwise=True, workers=2)
