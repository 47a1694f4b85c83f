"""``quant_model``: a session on an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.errors import CalibrationError
from calib.model import open_model
from calib.types import Array
from onnxslim_ptq.api import Result, quantize
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.frontends.session.config import SaveProcessorConfig, SessionConfig
from onnxslim_ptq.frontends.session.translate import recipe_of, require_complete, weight_files

__all__ = ["quant_model"]


def quant_model(
    model: str | Path | onnx.ModelProto,
    session_cfg: SessionConfig,
    *,
    target: str = "cpu",
    names: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    eval_data: Any = None,
    disable_last_linear: bool = True,
    quantize_conv: bool = False,
    min_sqnr: float = 6.0,
) -> Result:
    """Quantize ``model`` as the session says, verify it, and write what its ``save`` processor asks for.

    As in msModelSlim, convolutions and the last linear layer stay float unless told otherwise. ``names`` gives nodes
    module names; ``shapes`` are those of inputs with dynamic dimensions when there is no data; ``min_sqnr`` is that of
    `onnxslim_ptq.quantize`. Raises RecipeError naming the field, and what `onnxslim_ptq.quantize` raises.
    """
    if not isinstance(session_cfg, SessionConfig):
        raise RecipeError(f"session_cfg: expected a SessionConfig, got {type(session_cfg).__name__}")
    require_complete(session_cfg, bool(session_cfg.calib_data))
    save = session_cfg.processor_cfg_map.get("save")
    files = weight_files(save) if isinstance(save, SaveProcessorConfig) else None
    source = open_model(model)
    recipe = recipe_of(
        session_cfg,
        source,
        target=target,
        names=names,
        disable_last_linear=disable_last_linear,
        quantize_conv=quantize_conv,
    )
    inputs = [info.name for info in source.inputs()]
    data = None
    if session_cfg.calib_data:
        data = [_feed(index, sample, inputs) for index, sample in enumerate(session_cfg.calib_data)]
    result = quantize(
        model,
        recipe,
        data,
        device=session_cfg.device,
        eval_data=eval_data,
        shapes=None if data else shapes,
        min_sqnr=min_sqnr,
    )
    if isinstance(save, SaveProcessorConfig):
        result.save(save.output_path, weights=files)
    return result


def _feed(index: int, sample: object, inputs: Sequence[str]) -> dict[str, Array]:
    """One sample of ``calib_data`` by input name: a mapping, values in the order of the model's inputs, or
    ``{"timestep_idx": step, "args": values}``."""
    if isinstance(sample, Mapping) and "args" in sample and "args" not in inputs:
        rest = {str(name): _array(value) for name, value in sample.items() if name != "args"}
        return {**_feed(index, sample["args"], inputs), **rest}
    if isinstance(sample, Mapping):
        return {str(name): _array(value) for name, value in sample.items()}
    values = sample if isinstance(sample, list | tuple) else [sample]
    if len(values) > len(inputs):
        raise CalibrationError(
            f"calib_data[{index}]: has {len(values)} values, the model has inputs {', '.join(inputs)}"
        )
    return dict(zip(inputs, map(_array, values), strict=False))


def _array(value: Any) -> Array:
    """A numpy array of an array or a torch tensor, which this package does not import."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    return np.asarray(value)
