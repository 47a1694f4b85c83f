"""Rounders on real weights with the inputs they really see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.model import open_model
from calib.readers import from_iterable
from calib.runner import collect
from calib.stats import GramStats
from onnxslim_ptq import quantize
from onnxslim_ptq.core.dtypes import INT4, INT8, UINT4, IntType
from onnxslim_ptq.core.qmath import grain_range, params_from_range
from onnxslim_ptq.core.rounding import Rounder, Task
from onnxslim_ptq.core.spec import Grain, PerChannel, PerGroup, QuantSpec
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.matrix import Matrices, matrices_of
from onnxslim_ptq.rounders import ROUNDERS, AdaRound, Clip, Gptq, SQuant, Ssz, never_worse
from tools import zoo

pytestmark = pytest.mark.network


def case_of(name: str) -> Any:
    try:
        return zoo.load(name)
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))


def test_a_real_network(tmp_path: Path) -> None:
    """46 convolutions, depthwise and pointwise: the layers' errors fall, and the JSON tells by how much."""
    case = case_of("cls")
    recipe = {
        "steps": [{"type": "quantize", "rounder": {"type": "adaround"}, "act": {"range": {"type": "minmax"}}}]
    }
    result = quantize(case.model, recipe, list(case.calibration[:12]), eval_data=list(case.evaluation[:4]))
    errors = [c.error for c in result.plan.weight_codes.values() if c.error is not None]
    assert len(errors) > 40
    gains = [10 * np.log10(before / after) for before, after in errors if after > 0]
    assert min(gains) >= 0
    assert np.mean(gains) > 1.5, "12 samples of the small layers behind a global mean tell little"
    result.save(tmp_path / "m.onnx")
    weights = json.loads((tmp_path / "m.json").read_text())["weights"]
    assert all(w["rounder"] == "adaround" for w in weights.values())
    assert all(w["rounding_error"]["rounder"] <= w["rounding_error"]["rtn"] for w in weights.values())


def layers(name: str, samples: int, pattern: str) -> Iterator[tuple[Matrices, np.ndarray, GramStats]]:
    case = case_of(name)
    model = open_model(case.model)
    graph = Graph(model)
    found = [layer for layer in find_linears(graph)[0] if pattern in layer.node]
    views = {layer.node: matrices_of(graph, layer) for layer in found}
    data = from_iterable(list(case.calibration[:samples]), model.inputs())
    stats = collect(model, list({v.probe for v in views.values() if isinstance(v, Matrices)}), data)
    for layer in found:
        view, weight = views[layer.node], graph.value(graph.node(layer.node).inputs[1])
        assert isinstance(view, Matrices)
        stat = stats[view.probe]
        assert isinstance(stat, GramStats)
        yield view, view.split(np.asarray(weight, np.float32))[0], stat


def test_every_rounder() -> None:
    """Pointwise convolutions of a text line classifier: no layer gets worse, and those that see data gain."""
    gains: dict[str, list[float]] = {name: [] for name in ROUNDERS}
    spec = QuantSpec(INT8, PerChannel(0), True)
    for matrices, weight, stats in layers("cls", 8, ""):
        if matrices.groups > 1 or matrices.window > 1:
            continue
        start = params_from_range(grain_range(weight, spec.grain), spec)
        for name, rounder in ROUNDERS.items():
            outcome = never_worse(rounder(), Task(weight, start, (-127, 127), stats.gram))
            assert outcome.after <= outcome.before
            if outcome.after > 0:
                gains[name].append(10 * np.log10(outcome.before / outcome.after))
    assert len(gains["rtn"]) > 20
    assert max(gains["rtn"]) == 0
    for name in ("gptq", "adaround", "admm"):
        assert np.mean(gains[name]) > 1, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "grain", "symmetric"),
    [
        (INT4, PerGroup(1, 64), True),
        (UINT4, PerGroup(1, 64), False),
        (UINT4, PerGroup(1, 128), False),
        (INT8, PerChannel(0), True),
    ],
    ids=str,
)
def test_one_block_of_a_language_model(dtype: IntType, grain: Grain, symmetric: bool) -> None:
    """The error of the layer outputs, mean over the seven layers of a block, in dB below nearest codes."""
    wanted: dict[Rounder, float] = {
        Ssz(): 0.0,
        SQuant(): 0.0,
        Clip(): 0.0,
        Gptq(act_order=True): 2.0,
        AdaRound(): 2.0,
    }
    gains: dict[Rounder, list[float]] = {rounder: [] for rounder in wanted}
    for _, weight, stats in layers("smollm2", 4, "layers.3/"):
        spec = QuantSpec(dtype, grain, symmetric)
        start = params_from_range(grain_range(weight, grain), spec)
        limits = (-127, 127) if dtype is INT8 else (dtype.lowest, dtype.highest)
        for rounder in wanted:
            outcome = never_worse(rounder, Task(weight, start, limits, stats.gram))
            gains[rounder].append(10 * np.log10(outcome.before / outcome.after))
    for rounder, least in wanted.items():
        assert len(gains[rounder]) == 7
        assert min(gains[rounder]) >= 0
        assert np.mean(gains[rounder]) >= least, rounder
