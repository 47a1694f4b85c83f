"""What CANN is asked for, what its errors mean, and the checks a session on a device has to pass."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calib.devices.cann import explain, options, shortened
from calib.devices.placement import (
    Placement,
    compare,
    placement_from_profile,
    placement_from_session,
    require_placed,
)
from calib.errors import DeviceError

CANN = "CANNExecutionProvider"


class TestOptions:
    @pytest.mark.parametrize(
        ("version", "splits"), [((1, 22), False), ((1, 23), False), ((1, 24), True), ((2, 0), True)]
    )
    def test_only_what_the_version_knows(self, version: tuple[int, int], splits: bool) -> None:
        for form in options(2, version):
            assert ("enable_cann_subgraph" in form) is splits
            assert form["device_id"] == "2"
            assert form["dump_om_model"] == "0"

    def test_the_precision_of_the_model_in_both_spellings(self) -> None:
        first, second = options(0, (1, 24))
        assert first["precision_mode"] == "must_keep_origin_dtype"
        assert second["precision_mode_v2"] == "origin"
        assert {*first} ^ {*second} == {"precision_mode", "precision_mode_v2"}


# What ONNX Runtime (onnxruntime-cann 1.22.1 and 1.24.4) raises or logs.
FAILED = (
    "/root/onnxruntime/onnxruntime/python/onnxruntime_pybind_state.cc:1189 "
    "std::shared_ptr<onnxruntime::IExecutionProviderFactory> onnxruntime::python::"
    "CreateExecutionProviderFactoryInstance(const onnxruntime::SessionOptions&, const std::string&) "
    "create CANN ExecutionProvider fail"
)
IDENTITY = (
    "/root/x/cann_execution_provider_info.cc:41 static onnxruntime::CANNExecutionProviderInfo "
    "onnxruntime::CANNExecutionProviderInfo::FromProviderOptions(const onnxruntime::ProviderOptions&) "
    '[ONNXRuntimeError] : 1 : FAIL : provider_options_utils.h:187 Parse Failed to parse provider option "device_id": '
    "cann_execution_provider_info.cc:51 operator() Invalid device ID: 3, must be between 0 (inclusive) and {} "
    "(exclusive)."
)
PARSING = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running g_0 node. Name:'CANN_g_0_0' Status "
    "Message: CANN Graph error executing ge::aclgrphParseONNXFromMem(string_model.data(), parser_params, graph)"
)


class TestExplanations:
    @pytest.mark.parametrize(
        ("text", "log", "start", "cure"),
        [
            (
                FAILED,
                "with error: libascendcl.so: cannot open shared object file: No such file",
                "the CANN toolkit is not found (libascendcl.so is missing)",
                "set_env.sh",
            ),
            (FAILED, "", "CANN cannot be started (create CANN ExecutionProvider fail)", "npu-smi info"),
            (
                IDENTITY.format(2),
                "",
                "NPU 3 does not exist: this host has 2, numbered from 0",
                "npu-smi info",
            ),
            (IDENTITY.format(0), "", "this host has no NPU that CANN can see", "the driver"),
            ("silent", IDENTITY.format(1), "NPU 3 does not exist: this host has 1", "npu-smi info"),
            (PARSING, "", "CANN's graph compiler refuses the model (Non-zero", "--device cpu"),
            (
                FAILED,
                "undefined symbol: aclNew\n",
                "the CANN toolkit lacks aclNew",
                "install CANN 8.2 or later",
            ),
            ("EE9999 whatever", "", "EE9999 whatever;", "--device cpu"),
        ],
    )
    def test_reason_and_cure(self, text: str, log: str, start: str, cure: str) -> None:
        explained = explain(text, log)
        assert explained.startswith(start)
        assert cure in explained
        assert "\n" not in explained

    def test_short(self) -> None:
        assert shortened(f"{FAILED}\n\n") == "create CANN ExecutionProvider fail"
        assert len(shortened("x" * 10_000)) == 300
        assert shortened(" ") == "no message"


def session_with(*parts: tuple[str, list[str]]) -> Any:
    assigned = [
        SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops])
        for name, ops in parts
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: assigned)


class TestPlacement:
    def test_from_the_session(self) -> None:
        session = session_with((CANN, ["Conv", "Relu"]), ("CPUExecutionProvider", ["Gelu", "Gelu", "Einsum"]))
        placement = placement_from_session(session, CANN)
        assert placement == Placement(2, {"Gelu": 2, "Einsum": 1})
        require_placed(placement, "npu:0")
        assert placement.note("npu:0") == "device 'npu:0': 3 nodes run on the CPU instead (2 Gelu, 1 Einsum)"

    def test_from_a_profile(self, tmp_path: Path) -> None:
        def event(name: str, provider: str, op: str) -> dict[str, Any]:
            return {
                "cat": "Node",
                "name": f"{name}_kernel_time",
                "args": {"provider": provider, "op_name": op},
            }

        events = [
            {"cat": "Session", "name": "model_run"},
            {"cat": "Node", "name": "a_fence_before", "args": {"op_name": "Conv"}},
            event("a", CANN, "CANNExecutionProvider_g_0"),
            event("b", "CPUExecutionProvider", "Gelu"),
        ]
        (tmp_path / "p.json").write_text(json.dumps(events))
        assert placement_from_profile(tmp_path / "p.json", CANN) == Placement(1, {"Gelu": 1})

    def test_nothing_there(self) -> None:
        with pytest.raises(
            DeviceError, match=r"takes none of the model's operators \(Einsum, Gelu\); use --device cpu"
        ):
            require_placed(Placement(0, {"Gelu": 2, "Einsum": 1}), "npu:0")

    def test_all_there(self) -> None:
        assert Placement(3, {}).note("npu:0") is None


RNG = np.random.default_rng(0)
Y = RNG.standard_normal((4, 100)).astype(np.float32)


class TestComparison:
    """‖device − cpu‖₂ ≤ share · ‖cpu‖₂ + 1e-5 √n"""

    @pytest.mark.parametrize(
        ("found", "exact"),
        [
            (Y, Y),
            (Y * 1.009, Y),
            (Y + np.float32(5e-6), Y * 0),
            (Y.astype(np.float16) * np.float16(1.04), Y.astype(np.float16)),
            (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)),
            (np.float32(1.001), np.float32(1)),
            (np.where(Y > 1, np.inf, Y), np.where(Y > 1, np.inf, Y)),
            (np.arange(200) + (np.arange(200) == 7), np.arange(200)),
        ],
    )
    def test_close_enough(self, found: Any, exact: Any) -> None:
        if np.ndim(exact) and not np.any(exact) and exact.size:
            found = found * np.float32(0) + np.float32(5e-6)
        compare(["y"], [found], [exact], "npu:0")

    @pytest.mark.parametrize(
        ("found", "exact", "text"),
        [
            (Y * 1.011, Y, "output 'y' differs by 0.011 of its norm"),
            (Y.astype(np.float16) * np.float16(1.06), Y.astype(np.float16), "differs by 0.0596"),
            (Y * 0 + 1, Y * 0, "differs by 20 from 0"),
            (Y.T, Y, r"is float32 \[100, 4\] instead of float32 \[4, 100\]"),
            (Y.astype(np.float64), Y, "is float64"),
            (np.where(Y > 1, np.nan, Y), Y, "has NaN or Inf in other places"),
            (np.arange(200) + 3 * (np.arange(200) < 4), np.arange(200), "agrees in 98.0% of its elements"),
        ],
    )
    def test_something_else(self, found: Any, exact: Any, text: str) -> None:
        with pytest.raises(
            DeviceError, match=f"device 'npu:0' computes something else than the CPU: .*{text}.*--device cpu"
        ):
            compare(["z", "y"], [exact, found], [exact, exact], "npu:0")
