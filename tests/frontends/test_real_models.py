"""msModelSlim's interfaces on real models; skipped without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from onnxslim_ptq.frontends import post_training_quant, squant_ptq
from tools import zoo

pytestmark = pytest.mark.network


def model_and_samples(name: str, count: int, folder: Path) -> tuple[str, list[list[Any]]]:
    try:
        case = zoo.load(name)
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))
    shutil.copy(case.model, folder / "m.onnx")
    return str(folder / "m.onnx"), [list(feed.values()) for feed in list(case.calibration)[:count]]


def sqnr(path: Path) -> float:
    return float(json.loads(path.with_suffix(".json").read_text())["metrics"]["sqnr_db"])


def test_text_detection(tmp_path: Path) -> None:
    model, samples = model_and_samples("det", 4, tmp_path)
    config = squant_ptq.QuantConfig(quant_mode=1, act_method=1, amp_num=3)
    calibrator = squant_ptq.OnnxCalibrator(model, config, samples)
    calibrator.run()
    assert sqnr(calibrator.export_quant_onnx(str(tmp_path / "q.onnx")).model) > 15
    written = post_training_quant.run_quantize(
        model, str(tmp_path / "p.onnx"), post_training_quant.QuantConfig(calib_data=samples)
    )
    assert sqnr(written.model) > 15
