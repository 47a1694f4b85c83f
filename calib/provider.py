"""The one seam to ONNX Runtime: every session of this project is made here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from calib.devices import CPU, Device
from calib.errors import DeviceError, GraphError
from calib.model import open_model
from calib.scope import subgraphs
from calib.types import Array

__all__ = [
    "SIGNED_OPTION",
    "Optimize",
    "SessionOptions",
    "create_session",
    "new_session",
    "one_line",
    "require_device",
    "runtime",
]

_PROOF_SECONDS = 300  # for a matrix product; the first start of a compiler can take a minute


@dataclass(frozen=True)
class SessionOptions:
    """How a session is built.

    ``optimize`` is off | basic | all; ``simulate`` keeps ONNX Runtime from quantizing float weights behind a
    quantized activation by itself (its WeightBiasQuantization optimizer), which a simulation must not do.
    ``lanes``: how many samples a sweep runs side by side, 0 for one per core; each holds its tensors in memory.
    ``frugal`` gives memory back as soon as a value dies, for sessions that run a few times beside others. Without
    ``prepack`` weights stay as they lie: with them in a file of external data, the session needs no memory for them.
    ``write_optimized`` is where ONNX Runtime leaves the graph as it will really run.
    """

    optimize: str = "all"
    simulate: bool = False
    threads: int = 0
    write_optimized: Path | None = None
    frugal: bool = False
    lanes: int = 0
    prepack: bool = True


# From opset 21 on ONNX Runtime 1.31 moves int8 quantizers on x86, makes them uint8 and then refuses its own work.
SIGNED_OPTION = "session.qdqisint8allowed"
_UNSIGNED = "output_dtype INT8 does not match y_zero_point type UINT8"


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
    """The execution provider for ``cpu``, ``npu[:ID]`` or ``cuda[:ID]``, after a matrix product was computed on it.

    Raises DeviceError with the reason and the cure when it is not really there.
    """
    parsed = _in_this_build(device)
    if parsed.kind != "cpu":
        _prove(parsed)
    return parsed.provider


def create_session(
    model: bytes | Path,
    weights: Mapping[str, Array] | None = None,
    *,
    device: str = "cpu",
    options: SessionOptions = SessionOptions(),
) -> Any:
    """A session over a skeleton, its large initializers shared with ``weights``, not copied.

    On the CPU an ``onnxruntime.InferenceSession``; on another device a ``ChildSession`` with the same ``run``, in a
    process of its own, whose placement and first results are checked. Raises DeviceError when the device is not there
    or does not compute what it should, GraphError when ONNX Runtime refuses the model.
    """
    parsed = _in_this_build(device)
    if parsed.kind != "cpu":
        return _child_session(model, weights or {}, parsed, options)
    ort = runtime()
    if weights and isinstance(model, bytes):
        weights = _only_read(model, weights)
    try:
        try:
            return new_session(ort, model, weights or {}, options, [CPU])
        except Exception as error:
            if _UNSIGNED not in str(error):
                raise
            return new_session(ort, model, weights or {}, options, [CPU], signed=True)
    except Exception as error:  # ONNX Runtime raises many classes; their text is what the user needs
        raise GraphError(f"ONNX Runtime {ort.__version__} cannot load the model: {one_line(error)}") from None


def new_session(
    ort: ModuleType,
    model: bytes | Path,
    weights: Mapping[str, Array],
    options: SessionOptions,
    providers: Sequence[Any],
    *,
    record: bool = False,
    profile: bool = False,
    signed: bool = False,
) -> Any:
    """An InferenceSession as ``options`` say, without falling back to other providers; raises what ONNX Runtime raises.

    ``signed``: int8 activations stay int8 (`SIGNED_OPTION`). ``record`` and ``profile`` are two ways to learn later
    which provider took which node (calib.devices.placement).
    """
    settings = ort.SessionOptions()
    # Fatal only: errors are raised, and need not stand on stderr as well. In a child process they tell the reason.
    settings.log_severity_level = 3 if record or profile else 4
    settings.intra_op_num_threads = options.threads
    levels = ort.GraphOptimizationLevel
    settings.graph_optimization_level = {
        Optimize.OFF: levels.ORT_DISABLE_ALL,
        Optimize.BASIC: levels.ORT_ENABLE_BASIC,
        Optimize.ALL: levels.ORT_ENABLE_ALL,
    }[options.optimize]
    add = settings.add_session_config_entry
    if signed:
        add(SIGNED_OPTION, "1")
    if not options.prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if options.frugal:
        settings.enable_cpu_mem_arena = False
        settings.enable_mem_pattern = False
    if options.write_optimized is not None:
        settings.optimized_model_filepath = str(options.write_optimized)
        # Weights go beside the structure, which is all that anyone reads back.
        add("session.optimized_model_external_initializers_file_name", f"{options.write_optimized.name}.data")
        add("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if record:
        add("session.record_ep_graph_assignment_info", "1")
    settings.enable_profiling = profile
    shared = _share(settings, weights, ort) if weights else []
    source = str(model) if isinstance(model, Path) else model
    session = ort.InferenceSession(
        source,
        settings,
        providers=list(providers),
        disabled_optimizers=["WeightBiasQuantization"] if options.simulate else [],
        enable_fallback=0,
    )
    session.signed = signed
    session.shared_weights = shared  # it reads them where they lie, so they must live as long as it does
    return session


def _in_this_build(device: str) -> Device:
    """The parsed device; DeviceError when this build of ONNX Runtime has no provider for it."""
    parsed = Device.parse(device)
    available = runtime().get_available_providers()
    if parsed.provider not in available:
        cure = "reinstall onnxruntime" if parsed.kind == "cpu" else parsed.accelerator.install
        raise DeviceError(
            f"device '{device}' is not available: this onnxruntime has {', '.join(available)}; {cure}"
        )
    return parsed


@functools.lru_cache
def _prove(device: Device) -> None:
    """A list of providers says what was compiled in; only a result says what works."""
    model = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["" : 13]> '
        "proof (float[4,4] x, float[4,4] w) => (float[4,4] y) { y = MatMul (x, w) }"
    )
    x = np.arange(-8, 8, dtype=np.float32).reshape(4, 4) / 8
    session = _child_session(
        model.SerializeToString(), {}, device, SessionOptions(threads=1), seconds=_PROOF_SECONDS
    )
    with session:
        session.run(None, {"x": x, "w": x})  # compared with the CPU's by the session itself


def _child_session(
    model: bytes | Path,
    weights: Mapping[str, Array],
    device: Device,
    options: SessionOptions,
    seconds: float | None = None,
) -> Any:
    from calib.devices.child import ChildSession

    if options.write_optimized is not None:
        raise ValueError("write_optimized: the optimized graph of an accelerator cannot be written")
    if isinstance(model, Path):
        opened = open_model(model)
        skeleton, weights = bytes(opened.proto.SerializeToString()), {**opened.weights, **weights}
    else:
        skeleton = model
    return ChildSession(skeleton, _only_read(skeleton, weights), device, options, seconds=seconds)


def _only_read(model: bytes, weights: Mapping[str, Array]) -> Mapping[str, Array]:
    """Weights without those that nothing reads: ONNX Runtime drops them from the model, and then misses them."""
    read = _names_read(onnx.ModelProto.FromString(model).graph)
    return {name: values for name, values in weights.items() if name in read}


def _names_read(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes, those of subgraphs included, or graph outputs read."""
    names = {o.name for o in graph.output}
    for node in graph.node:
        names.update(node.input)
        for sub in subgraphs(node):
            names |= _names_read(sub)
    return names


def _share(settings: Any, weights: Mapping[str, Array], ort: ModuleType) -> list[Any]:
    names: Sequence[str] = list(weights)
    arrays = [np.require(weights[n], requirements=["C", "A"]) for n in names]
    values = [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays]
    settings.add_external_initializers(names, values)
    return [*arrays, *values]


def one_line(error: Exception) -> str:
    """The text of an error on one line of at most 400 characters."""
    return " ".join(str(error).split())[:400]
