"""On a real Ascend NPU: `pytest -m npu` on a host with the CANN toolkit and `pip install 'onnxslim_ptq[cann]'`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.errors import DeviceError
from calib.model import open_model
from calib.provider import Optimize, SessionOptions, create_session, require_device
from calib.readers import from_iterable
from calib.runner import collect
from calib.types import Probe
from onnxslim_ptq.cli import main
from tests.models import cnn, feeds_for, mlp, outputs_of, parse

pytestmark = pytest.mark.npu
DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"


@pytest.fixture(scope="module", autouse=True)
def npu() -> None:
    try:
        require_device("npu")
    except DeviceError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("proto", [cnn(), mlp()], ids=["cnn", "mlp"])
def test_results_are_those_of_the_cpu(proto: onnx.ModelProto) -> None:
    feeds = [f for size in (8, 16) for f in feeds_for(proto, 3, {"H": size, "W": size})]
    with create_session(proto.SerializeToString(), device="npu") as session:
        for feed, exact in zip(feeds, outputs_of(proto, feeds), strict=True):
            np.testing.assert_allclose(session.run(None, feed)[0], exact[0], rtol=1e-2, atol=1e-4)


def test_float32_is_not_computed_in_float16() -> None:
    """In float16 the sum of 1 and 1e-4 is 1, and so the difference would be 0."""
    proto = parse("g (float[4,8] x, float[4,8] z) => (float[4,8] y) { s = Add (x, z) y = Sub (s, x) }", {})
    x, z = np.ones((4, 8), np.float32), np.full((4, 8), 1e-4, np.float32)
    with create_session(
        proto.SerializeToString(), device="npu", options=SessionOptions(optimize=Optimize.OFF)
    ) as session:
        np.testing.assert_allclose(session.run(None, {"x": x, "z": z})[0], z, rtol=1e-2)


def test_changed_weights_change_the_result() -> None:
    """A compiled model of the same graph with other weights must not be found again."""
    x = np.ones((2, 4), np.float32)
    for factor in (1, 2):
        weight = np.full((4, 4), factor, np.float32)
        proto = parse("g (float[2,4] x) => (float[2,4] y) { y = MatMul (x, w) }", {"w": weight})
        with create_session(proto.SerializeToString(), device="npu") as session:
            np.testing.assert_allclose(session.run(None, {"x": x})[0], 4 * factor, rtol=1e-3)


def test_statistics_are_close_to_those_of_the_cpu() -> None:
    model = open_model(cnn())
    data = from_iterable(feeds_for(cnn(), 4), model.inputs())
    probes = [Probe(name, "minmax") for name in ("c1", "r1", "c2", "a", "y")]
    on_cpu, on_npu = (collect(model, probes, data, device=device) for device in ("cpu", "npu"))
    for probe in probes:
        for name, value in on_cpu[probe].state().items():
            np.testing.assert_allclose(on_npu[probe].state()[name], value, rtol=1e-2, atol=1e-4)


def test_the_main_job(tmp_path: Path) -> None:
    arguments = [str(DIGITS / "digits.onnx"), str(tmp_path / "out.onnx"), "--calib", str(DIGITS / "calib")]
    assert main([*arguments, "--device", "npu"]) == 0
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


def test_a_number_that_does_not_exist() -> None:
    with pytest.raises(DeviceError, match="NPU 9999 does not exist"):
        require_device("npu:9999")
