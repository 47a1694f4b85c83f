"""A session on a real transformer: the files' integers are the graph's, for every layer; dynamic and int8 attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from onnxslim_ptq import Result, quantize
from onnxslim_ptq.core.deq_scale import unpack
from onnxslim_ptq.frontends.session import (
    FA3ProcessorConfig,
    M4ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8DynamicQuantConfig,
    W8A8ProcessorConfig,
    W8A8QuantConfig,
    quant_model,
)
from tools import zoo

pytestmark = [pytest.mark.network, pytest.mark.slow]


def minilm() -> Any:
    try:
        return zoo.load("minilm")
    except zoo.ZooUnavailable as reason:
        pytest.skip(str(reason))


def run_session(case: Any, **processors: Any) -> Result:
    data = [case.calibration[i] for i in range(0, 64, 8)]
    config = SessionConfig(processor_cfg_map=processors, calib_data=data)
    return quant_model(case.model, config, eval_data=[case.evaluation[i] for i in range(0, 50, 6)])


@pytest.mark.parametrize("smoothing", [{}, {"m4": M4ProcessorConfig()}], ids=["plain", "m4"])
def test_every_layer_of_the_files_computes_what_the_graph_does(
    smoothing: dict[str, Any], tmp_path: Path
) -> None:
    """Integers: sum q_x q_w + quant_bias = sum (q_x - z) q_w + round(b / deq), exactly. Real: within 1e-5 max|y|."""
    case = minilm()
    static = W8A8ProcessorConfig(cfg=W8A8QuantConfig(), disable_names=[])
    run_session(case, w8a8=static, **smoothing, save=SaveProcessorConfig(output_path=str(tmp_path)))
    tensors = load_file(tmp_path / "quant_model_weight_w8a8.safetensors")
    proto = onnx.load(tmp_path / "model_w8a8.onnx")
    made = {o: n for n in proto.graph.node for o in n.output}
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    added = {i: n for n in proto.graph.node if n.op_type == "Add" for i in n.input}
    layers = [n for n in proto.graph.node if n.op_type == "MatMul" and n.input[1] in made
              and made[n.input[1]].input[0] in stored]  # fmt: skip
    assert len(layers) == 35  # of 36, the last stays float
    spots = {n.name: (made[n.input[0]].input[0], added[n.output[0]].output[0]) for n in layers}
    wanted = list(dict.fromkeys(name for pair in spots.values() for name in pair))
    present = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in present)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seen = dict(zip(wanted, session.run(wanted, dict(case.evaluation[0])), strict=True))
    for node in layers:
        module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
        codes = seen[spots[node.name][0]].astype(np.int64)
        zero = int(stored[made[node.input[0]].input[2]])
        weight = tensors[f"{module}.weight"].astype(np.int64)
        np.testing.assert_array_equal(stored[made[node.input[1]].input[0]].T, tensors[f"{module}.weight"])
        deq, bias = unpack(tensors[f"{module}.deq_scale"]).astype(np.float64), tensors[f"{module}.bias"]
        sums = (codes - 128) @ weight.T + tensors[f"{module}.quant_bias"]
        own = (codes - zero) @ weight.T + np.rint(bias / deq).astype(np.int64)
        assert np.abs(sums - own).max() <= 1  # ties
        assert (sums != own).mean() < 0.01
        real, exact = sums * deq, seen[spots[node.name][1]]
        assert np.abs(real - exact).max() <= 1e-5 * np.abs(exact).max()


def test_smoothed_channels_suit_one_scale_per_token() -> None:
    case = minilm()
    data = [case.calibration[i] for i in range(0, 64, 8)]
    measured = [case.evaluation[i] for i in range(0, 50, 6)]
    result = quantize(case.model, "w8a8-dynamic-smooth", data, eval_data=measured)
    assert result.metrics["sqnr_db"] > 27.5


def test_a_rounder_brings_the_embeddings_to_29_db() -> None:
    """Measured on texts that do not calibrate; weights rounded to nearest stop at 28."""
    case = minilm()
    data = [case.calibration[i] for i in range(0, 64, 4)]
    result = quantize(case.model, "w8a8-dynamic-best", data, eval_data=list(case.evaluation))
    assert result.metrics["sqnr_db"] > 29


def test_int8_attention_costs_less_than_a_decibel() -> None:
    case = minilm()
    dynamic = W8A8DynamicProcessorConfig(cfg=W8A8DynamicQuantConfig(), disable_names=[])
    alone = run_session(case, w8a8_dynamic=dynamic).metrics["sqnr_db"]
    both = run_session(case, w8a8_dynamic=dynamic, fa3=FA3ProcessorConfig()).metrics["sqnr_db"]
    assert alone > 25.5
    assert both > alone - 1
