"""The one seam to ONNX Runtime: every session of this project is made here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from calib.errors import DeviceError, GraphError
from calib.types import Array

__all__ = ["Optimize", "SessionOptions", "create_session", "require_device", "runtime"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "npu": "CANNExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class SessionOptions:
    """How a session is built.

    ``optimize`` is off | basic | all; ``simulate`` keeps ONNX Runtime from quantizing float weights behind a
    quantized activation by itself (its WeightBiasQuantization optimizer), which a simulation must not do.
    ``frugal`` gives memory back as soon as a value dies, for sessions that run a few times beside others.
    ``write_optimized`` is where ONNX Runtime leaves the graph as it will really run.
    """

    optimize: str = "all"
    simulate: bool = False
    threads: int = 0
    write_optimized: Path | None = None
    frugal: bool = False


class Optimize:
    """Names of the graph optimization levels of ONNX Runtime that this project uses."""

    OFF, BASIC, ALL = "off", "basic", "all"


def runtime() -> ModuleType:
    """The onnxruntime module; raises DeviceError when it is missing or broken, with the cure."""
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "import failed"
        raise DeviceError(
            f"onnxruntime cannot be imported ({reason}); install exactly one: "
            "pip install 'onnxslim_ptq[cpu]' or 'onnxslim_ptq[cann]'"
        ) from None
    if not hasattr(module, "InferenceSession"):
        raise DeviceError(
            "onnxruntime is installed but gutted (two of its distributions share one folder); cure: "
            "pip uninstall onnxruntime onnxruntime-cann, then install one of them"
        )
    return module


def require_device(device: str) -> str:
    """The execution provider for ``cpu``, ``npu[:ID]`` or ``cuda``; raises DeviceError when it is not really here."""
    kind = device.split(":", 1)[0]
    if kind not in _PROVIDERS:
        raise DeviceError(f"device '{device}' is unknown; use cpu, npu, npu:ID or cuda")
    provider = _PROVIDERS[kind]
    available = runtime().get_available_providers()
    if provider not in available:
        cure = {
            "npu": "pip install 'onnxslim_ptq[cann]' on a host with the CANN toolkit",
            "cuda": "install an onnxruntime build with CUDA",
        }.get(kind, "reinstall onnxruntime")
        raise DeviceError(
            f"device '{device}' is not available: this onnxruntime has {', '.join(available)}; {cure}"
        )
    if kind != "cpu":
        raise DeviceError(f"device '{device}' is not available yet in this version; use --device cpu")
    return provider


def create_session(
    model: bytes | Path,
    weights: Mapping[str, Array] | None = None,
    *,
    device: str = "cpu",
    options: SessionOptions = SessionOptions(),
) -> Any:
    """An ``onnxruntime.InferenceSession`` over a skeleton, its large initializers shared with ``weights``, not copied.

    Raises DeviceError when the device is not there and GraphError when ONNX Runtime refuses the model.
    """
    provider = require_device(device)
    ort = runtime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # fatal only: errors are raised, and need not stand on stderr as well
    settings.intra_op_num_threads = options.threads
    levels = ort.GraphOptimizationLevel
    settings.graph_optimization_level = {
        Optimize.OFF: levels.ORT_DISABLE_ALL,
        Optimize.BASIC: levels.ORT_ENABLE_BASIC,
        Optimize.ALL: levels.ORT_ENABLE_ALL,
    }[options.optimize]
    if options.frugal:
        settings.enable_cpu_mem_arena = False
        settings.enable_mem_pattern = False
    if options.write_optimized is not None:
        settings.optimized_model_filepath = str(options.write_optimized)
        # Weights go beside the structure, which is all that anyone reads back.
        add = settings.add_session_config_entry
        add("session.optimized_model_external_initializers_file_name", f"{options.write_optimized.name}.data")
        add("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if weights and isinstance(model, bytes):  # ONNX Runtime drops what nothing reads, and then misses it
        read = _names_read(onnx.ModelProto.FromString(model).graph)
        weights = {name: values for name, values in weights.items() if name in read}
    shared = _share(settings, weights, ort) if weights else []
    disabled = ["WeightBiasQuantization"] if options.simulate else []
    try:
        source = str(model) if isinstance(model, Path) else model
        session = ort.InferenceSession(source, settings, providers=[provider], disabled_optimizers=disabled)
    except Exception as error:  # ONNX Runtime raises many classes; their text is what the user needs
        raise GraphError(
            f"ONNX Runtime {ort.__version__} cannot load the model: {_one_line(error)}"
        ) from None
    session.shared_weights = (
        shared  # the session reads them where they lie, so they must live as long as it does
    )
    return session


def _names_read(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes, those of subgraphs included, or graph outputs read."""
    names = {o.name for o in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attr in node.attribute:
            for sub in (*([attr.g] if attr.HasField("g") else []), *attr.graphs):
                names |= _names_read(sub)
    return names


def _share(settings: Any, weights: Mapping[str, Array], ort: ModuleType) -> list[Any]:
    names: Sequence[str] = list(weights)
    arrays = [np.require(weights[n], requirements=["C", "A"]) for n in names]
    values = [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays]
    settings.add_external_initializers(names, values)
    return [*arrays, *values]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
