"""squant_ptq's OnnxCalibrator: one model, one configuration, run once, exported as often as wanted."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from calib.errors import DeviceError, GraphError
from calib.model import open_model
from calib.provider import require_device
from calib.types import Feed, InputInfo
from onnxslim_ptq.export.files import OutputPaths
from onnxslim_ptq.frontends.ascend import AscendJob, feeds_of, layers_of, random_feed, require_input_shape
from onnxslim_ptq.frontends.checks import require_type
from onnxslim_ptq.frontends.paths import readable, writable
from onnxslim_ptq.frontends.squant_ptq.config import QuantConfig
from onnxslim_ptq.frontends.squant_ptq.npu_compiler import Compiler, find_compiler
from onnxslim_ptq.frontends.squant_ptq.structures import passes_without
from onnxslim_ptq.pipeline import Planned

__all__ = ["OnnxCalibrator"]

_LOG = logging.getLogger("onnxslim_ptq")


class OnnxCalibrator:
    """Quantizes ``input_model`` (a path) by ``cfg``; ``calib_data``: a list of samples, each a list of arrays.

    Without samples one is drawn, uniform in [0, 1). Data-free mode looks at the first sample only.

    Raises:
        TypeError: ``cfg`` is no QuantConfig, or the path is no string.
        ValueError: the path, a sample or ``input_shape`` does not fit the model.
        GraphError: the file is no valid model.
        DeviceError: ``use_onnx=False`` where there is no Ascend NPU.
    """

    def __init__(self, input_model: str, cfg: QuantConfig, calib_data: list[Any] | None = None) -> None:
        if not isinstance(cfg, QuantConfig):
            raise TypeError(f"cfg must be QuantConfig, not {type(cfg).__name__}.")
        self._cfg = cfg
        self._source = open_model(readable(input_model, ".onnx"))
        self._device = _device(cfg)
        inputs = self._source.inputs()
        require_input_shape(inputs, cfg.input_shape)
        self._compiler = _compiler(cfg, inputs)
        given = calib_data if calib_data is not None else []
        feeds = feeds_of(given, inputs)
        self._synthetic = not feeds
        self._feeds: list[Feed] = feeds or [random_feed(inputs, cfg.input_shape)]
        self._planned: Planned | None = None
        self._job: AscendJob | None = None

    def run(self) -> None:
        """Find ranges and codes, roll back the ``amp_num`` worst layers; ValueError, GraphError, CalibrationError."""
        cfg = self._cfg
        passes = _passes(cfg)
        ops = cfg.quant_param_ops or ()
        layers = layers_of(self._source, passes, ops)
        names = [layer.node for layer in layers]
        for name in sorted(set(cfg.disable_names or ()) - set(names)):
            _LOG.warning("disable_names: '%s' is no layer that can be quantized; the name is ignored", name)
        ends = [*names[: int(cfg.disable_first_layer)], *(names[-1:] if cfg.disable_last_layer else [])]
        disabled = [name for name in names if name in ends or name in (cfg.disable_names or ())]
        if len(disabled) == len(names):
            raise GraphError(
                f"{self._source.name}: no layer is left to quantize: disable_first_layer, disable_last_layer and "
                f"disable_names exclude all {len(names)}; switch one off"
            )
        feeds = self._feeds if cfg.label_free else self._feeds[:1]
        job = AscendJob(
            self._source,
            cfg.recipe(disabled, {layer.op for layer in layers}, passes),
            feeds,
            self._synthetic,
            device=self._device,
        )
        planned = job.plan()
        for name in job.roll_back(planned, cfg.amp_num, "mse"):
            _LOG.info("%s: rolled back to float", name)
        self._planned, self._job = planned, job

    def export_quant_onnx(
        self, save_path: str | os.PathLike[str], fuse_add: bool = True, use_external: bool = False
    ) -> OutputPaths:
        """Verify and write the model for Ascend, and its weights JSON beside it; with graph_optimize_level 1 or 2 the
        compiled model too (.om), where CANN's compiler is.

        Raises:
            TypeError: before `run`, or an argument of the wrong type.
            ValueError: the path does not fit.
            VerificationError: the model does not answer like the plan; nothing is written.
            DeviceError: the compiler that graph_optimize_level asks for is there and fails; nothing is written.
        """
        require_type("fuse_add", fuse_add, bool)
        require_type("use_external", use_external, bool)
        if self._planned is None or self._job is None:
            raise TypeError("export_quant_onnx needs a quantized model: call run() first.")
        path = writable(save_path, ".onnx")
        compiled = None if self._compiler is None else self._compiler.compile
        return self._job.write(self._planned, path, fuse_add, use_external, compiled)


def _device(cfg: QuantConfig) -> str:
    """Where the samples run; DeviceError with the cure when that is not there."""
    if cfg.use_onnx:
        return "cpu"
    device = f"npu:{cfg.device_id}"
    try:
        require_device(device)
    except DeviceError as error:
        raise DeviceError(
            f"use_onnx=False calibrates on an Ascend NPU: {error}; or leave use_onnx at True"
        ) from None
    return device


def _passes(cfg: QuantConfig) -> list[str]:
    if not cfg.is_optimize_graph:
        return []
    return passes_without(cfg.shut_down_structures or (), more=cfg.graph_optimize_level > 0)


def _compiler(cfg: QuantConfig, inputs: Sequence[InputInfo]) -> Compiler | None:
    """The tool that graph_optimize_level asks for; a warning says what is done in its place where it is not there."""
    if not (cfg.graph_optimize_level and cfg.is_optimize_graph):
        return None
    shapes = cfg.atc_input_shape
    if shapes is None and cfg.input_shape:
        pairs = zip(inputs, cfg.input_shape, strict=True)
        shapes = ";".join(f"{info.name}:{','.join(map(str, sizes))}" for info, sizes in pairs)
    found = find_compiler(cfg.om_method, shapes)
    missing = found if isinstance(found, str) else ""
    _LOG.warning(
        "graph_optimize_level=%d: all exact simplifications are applied; latencies are not measured (%s)",
        cfg.graph_optimize_level,
        missing or f"{cfg.om_method} compiles what is exported",
    )
    return None if isinstance(found, str) else found
