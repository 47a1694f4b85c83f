"""msModelSlim's ``post_training_quant``: QuantConfig, run_quantize and the two image preprocessors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.errors import GraphError
from calib.model import Model, open_model
from calib.types import Feed
from onnxslim_ptq.export.files import OutputPaths
from onnxslim_ptq.frontends.ascend import (
    AscendJob,
    exactly,
    feeds_of,
    layers_of,
    random_feed,
    require_input_shape,
)
from onnxslim_ptq.frontends.checks import (
    require_choice,
    require_int,
    require_names,
    require_shapes,
    require_type,
)
from onnxslim_ptq.frontends.images import coco, imagenet
from onnxslim_ptq.frontends.paths import readable, writable
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.recipe import Recipe

__all__ = ["QuantConfig", "preprocess_func_coco", "preprocess_func_imagenet", "run_quantize"]

_LOG = logging.getLogger("onnxslim_ptq")
_OPS = frozenset({"Conv", "Gemm", "MatMul"})
_METHODS = (
    {"type": "minmax"},
    {"type": "percentile", "percentile": 99.999},
    {"type": "entropy"},
)
_FLAGS = (
    "is_signed_quant",
    "is_per_channel",
    "is_optimize_graph",
    "is_quant_depthwise_conv",
    "is_dynamic_shape",
)

preprocess_func_imagenet = imagenet
preprocess_func_coco = coco


@dataclass
class QuantConfig:
    """Arguments, order and defaults of msModelSlim 26.1.0.

    ``calib_method`` 0, 1, 2: min-max, percentile (99.999), entropy. ``is_signed_quant``: Ascend's codes are int8
    either way; False changes nothing in the written file.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    quant_mode: int = 1
    is_signed_quant: bool = True
    is_per_channel: bool = True
    calib_data: Sequence[Any] | None = None
    calib_method: int = 0
    quantize_nodes: Sequence[str] | None = None
    exclude_nodes: Sequence[str] | None = None
    amp_num: int = 0
    is_optimize_graph: bool = True
    is_quant_depthwise_conv: bool = True
    input_shape: Sequence[Sequence[int]] | None = None
    is_dynamic_shape: bool = False

    def __post_init__(self) -> None:
        require_choice("quant_mode", self.quant_mode, (0, 1))
        require_choice("calib_method", self.calib_method, (0, 1, 2))
        require_int("amp_num", self.amp_num, 0)
        for name in _FLAGS:
            require_type(name, getattr(self, name), bool)
        if not self.is_signed_quant:
            _LOG.warning("is_signed_quant=False: AscendQuant makes int8 codes, so they stay signed")
        self.calib_data = [] if self.calib_data is None else self.calib_data
        require_type("calib_data", self.calib_data, list)
        for name in ("quantize_nodes", "exclude_nodes"):
            value = getattr(self, name)
            setattr(self, name, [] if value is None else value)
            require_names(name, getattr(self, name))
        self.input_shape = [] if self.input_shape is None else self.input_shape
        require_shapes(self.input_shape, self.is_dynamic_shape)

    def recipe(self, disabled: Sequence[str], ops: Iterable[str], passes: list[str] | None) -> Recipe:
        """Label-free: nearest codes, ranges by ``calib_method``. Data-free: SQuant and the sigma rule."""
        free = self.quant_mode == 0
        step = {
            "type": "quantize",
            "include": [f"op:{op}" for op in sorted(ops)],
            "exclude": exactly(disabled),
            "rounder": {"type": "squant" if free else "rtn"},
            "weight": {"per": "channel" if self.is_per_channel else "tensor"},
            "act": {"range": {"type": "msmodelslim"} if free else _METHODS[self.calib_method]},
            "bias_correction": False,
        }
        return Recipe.load({"version": 1, "target": "ascend", "passes": passes, "steps": [step]})


def run_quantize(
    input_model_path: str | os.PathLike[str],
    output_model_path: str | os.PathLike[str],
    quant_config: QuantConfig,
) -> OutputPaths:
    """Quantize the model at one path for Ascend and write it, verified, to the other, with its weights JSON beside it.

    No other file is made, whatever happens. A sample that does not fit the model is left out with a warning; without
    one that does, a random sample serves. Layers: Conv, Gemm and MatMul with a constant weight; those in
    ``quantize_nodes`` if it names any, less those in ``exclude_nodes``.

    Raises:
        TypeError, ValueError: an argument, a path or a name does not fit.
        GraphError: the file is no model, or no layer is left to quantize.
        VerificationError: the result does not answer like the plan.
    """
    if not isinstance(quant_config, QuantConfig):
        raise TypeError(f"quant_config must be QuantConfig, not {type(quant_config).__name__}.")
    source = open_model(readable(input_model_path, ".onnx"))
    out = writable(output_model_path, ".onnx")
    require_input_shape(source.inputs(), quant_config.input_shape)
    passes: list[str] | None = None if quant_config.is_optimize_graph else []
    feeds = _valid(quant_config.calib_data or [], source)
    synthetic = not feeds
    feeds = feeds or [random_feed(source.inputs(), quant_config.input_shape)]
    if quant_config.quant_mode == 0:
        feeds = feeds[:1]
    layers = layers_of(source, passes, _OPS)
    disabled = _disabled(quant_config, source, layers)
    if len(disabled) == len(layers):
        raise GraphError(
            f"{source.name}: no layer can be quantized: quantize_nodes, exclude_nodes and is_quant_depthwise_conv "
            f"exclude all {len(layers)}; name fewer"
        )
    recipe = quant_config.recipe(disabled, {layer.op for layer in layers}, passes)
    job = AscendJob(source, recipe, feeds, synthetic, per_channel=_OPS)
    planned = job.plan()
    job.roll_back(planned, quant_config.amp_num, "l2")
    return job.write(planned, out)


def _valid(samples: Sequence[Any], source: Model) -> list[Feed]:
    """The samples that fit; here a sample of a one-input model may be the bare array."""
    feeds: list[Feed] = []
    for index, sample in enumerate(samples):
        given = [sample] if isinstance(sample, np.ndarray) else sample
        try:
            feeds += feeds_of([given], source.inputs())
        except ValueError as error:
            text = str(error).replace("calib_data[0]", f"calib_data[{index}]", 1)
            _LOG.warning("%s It is left out.", text)
    if samples and not feeds:
        _LOG.warning("no sample of calib_data fits the model; a random one serves")
    return feeds


def _disabled(config: QuantConfig, source: Model, layers: Sequence[Linear]) -> list[str]:
    names = [layer.node for layer in layers]
    wanted, unwanted = set(config.quantize_nodes or ()), set(config.exclude_nodes or ())
    for name in sorted((wanted | unwanted) - set(names)):
        _LOG.warning("'%s' is no layer that can be quantized; the name is ignored", name)
    if wanted and not wanted & set(names):
        raise ValueError(
            "quantize_nodes names no layer that can be quantized; leave it empty for all of them."
        )
    graph = Graph(source)
    kinds = {node.name: node for node in graph.nodes}
    disabled = []
    for name in names:
        depthwise = name in kinds and int(kinds[name].attrs.get("group", 1)) > 1
        if (
            (wanted and name not in wanted)
            or name in unwanted
            or (depthwise and not config.is_quant_depthwise_conv)
        ):
            disabled.append(name)
    return disabled
