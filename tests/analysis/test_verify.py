"""A result is believed only after it loaded, ran and answered like the float model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.model import open_model
from calib.progress import Progress
from calib.readers import from_iterable
from calib.types import Dataset
from onnxslim_ptq.analysis import verify as module
from onnxslim_ptq.analysis.verify import compare_outputs, verify
from onnxslim_ptq.errors import VerificationError
from tests.graph.models import parse
from tests.models import feeds_for, mlp, outputs_of, quantized, session_of, sqnr_of, weights_of


def data_of(proto: onnx.ModelProto, count: int = 6) -> Dataset:
    return from_iterable(feeds_for(proto, count), open_model(proto).inputs())


def test_measures_what_a_stranger_measures() -> None:
    proto, result = mlp(), quantized(mlp())
    seen: list[Progress] = []
    found = verify(open_model(proto), result.quantized, data_of(proto), listener=seen.append)
    feeds = feeds_for(proto, 6)
    assert found.sqnr == pytest.approx(
        sqnr_of(outputs_of(proto, feeds), outputs_of(result.model, feeds)), abs=0.3
    )
    assert found.samples == 6
    assert [(p.done, p.total) for p in seen] == [(i, 6) for i in range(1, 7)]


def test_a_lost_output() -> None:
    proto = mlp()
    other = mlp()
    other.graph.output[0].name = "a3"
    with pytest.raises(VerificationError, match="lost its output 'y'"):
        verify(open_model(proto), open_model(other), data_of(proto))


def test_a_model_that_does_not_load() -> None:
    broken = mlp()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(VerificationError, match=r"does not load: .*NoSuchOperator"):
        verify(open_model(mlp()), open_model(broken), data_of(mlp()))


def test_a_model_that_does_not_run() -> None:
    broken = parse("g (float[N,16] x) => (float[N,4] y) { y = Reshape (x, s) }", {"s": np.asarray([7, 4])})
    with pytest.raises(VerificationError, match="fails to run: sample 0"):
        verify(open_model(mlp()), open_model(broken), data_of(mlp()))


def test_nan_where_the_float_model_has_none() -> None:
    broken = mlp()
    values = numpy_helper.to_array(broken.graph.initializer[0]).copy()
    values[0, 0] = np.nan
    broken.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, broken.graph.initializer[0].name))
    with pytest.raises(
        VerificationError, match=r"sample 0: output 'y' has NaN or Inf where the float model has none.*more\)"
    ):
        verify(open_model(mlp()), open_model(broken), data_of(mlp()))


def test_another_shape() -> None:
    other = parse("g (float[N,16] x) => (float[N,3] y) { y = MatMul (x, w) }", weights_of(1, w=(16, 3)))
    with pytest.raises(VerificationError, match=r"output 'y' has shape \[3, 3\], float \[3, 4\]"):
        verify(open_model(mlp()), open_model(other), data_of(mlp()))


def test_duplicate_node_names_in_the_source() -> None:
    source = mlp()
    for node in source.graph.node:
        node.name = "same"
    assert verify(open_model(source), open_model(mlp()), data_of(mlp())).sqnr == float("inf")
    assert {n.name for n in source.graph.node} == {"same"}


def test_a_disagreement_of_optimizations_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model with and without optimizations: 30 dB against 20 dB is something to tell."""
    real, seen = module._loaded, []
    proto = mlp()

    def loaded(model: object, options: object, spool: object) -> object:
        seen.append(options)
        noisy = mlp()
        values = numpy_helper.to_array(noisy.graph.initializer[0])
        level = 0.01 if len(seen) == 1 else 0.1
        noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32) * level
        noisy.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(values + noise, noisy.graph.initializer[0].name)
        )
        return real(open_model(noisy), options, None)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_loaded", loaded)
    (warning,) = verify(open_model(proto), open_model(proto), data_of(proto)).warnings
    assert "dB with ONNX Runtime's optimizations" in warning
    assert [o.optimize for o in seen] == ["all", "off"]  # type: ignore[attr-defined]


def test_compare_outputs() -> None:
    proto, result = mlp(), quantized(mlp())
    (error,) = compare_outputs(session_of(proto), session_of(result.model), ["y"], data_of(proto))
    feeds = feeds_for(proto, 6)
    assert error.sqnr == pytest.approx(sqnr_of(outputs_of(proto, feeds), outputs_of(result.model, feeds)))
