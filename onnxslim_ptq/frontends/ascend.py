"""What both ONNX interfaces of msModelSlim share: samples as lists, planning for Ascend, roll-back, writing."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import GraphError
from calib.model import Model
from calib.readers.limits import DEFAULT_LIMITS
from calib.types import Array, Dataset, Feed, InputInfo, Sample, SampleId
from onnxslim_ptq import __version__
from onnxslim_ptq.analysis.layer_output import LayerOutput, layer_outputs, ranked
from onnxslim_ptq.analysis.verify import Verification, verify
from onnxslim_ptq.core.spec import Use
from onnxslim_ptq.core.targets import TARGETS, Target
from onnxslim_ptq.export.ascend import render_ascend
from onnxslim_ptq.export.check import check_file, source_files
from onnxslim_ptq.export.description import Calibration, Context, describe, write_description
from onnxslim_ptq.export.files import AtomicFiles, OutputPaths, output_paths, write_model
from onnxslim_ptq.export.lowering import lower_ascend
from onnxslim_ptq.export.renderers import RENDERERS
from onnxslim_ptq.graph.convert import in_order
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import PASSES, optimize
from onnxslim_ptq.graph.precision import already_quantized
from onnxslim_ptq.job import Job
from onnxslim_ptq.pipeline import Planned, make_plan
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.steps.fusing import leave_float

__all__ = ["AscendJob", "Feeds", "exactly", "feeds_of", "layers_of", "random_feed", "require_input_shape"]

_LOG = logging.getLogger("onnxslim_ptq")
_SEED = 0
_DOUBTFUL_DB = 12.0


class Feeds(Dataset):
    """Samples in memory, in their order."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = list(feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def __iter__(self) -> Any:
        return iter([(SampleId(i), feed) for i, feed in enumerate(self._feeds)])


def feeds_of(calib_data: Sequence[Any], inputs: Sequence[InputInfo]) -> list[Feed]:
    """One list of arrays per sample, in the order of the model's inputs; ValueError naming the sample and input."""
    if not isinstance(calib_data, list | tuple):
        raise ValueError(
            f"calib_data must be a list of samples, each a list of arrays, not {type(calib_data).__name__}."
        )
    return [_feed(f"calib_data[{i}]", sample, inputs) for i, sample in enumerate(calib_data)]


def _feed(where: str, sample: Any, inputs: Sequence[InputInfo]) -> Feed:
    if not isinstance(sample, list | tuple):
        raise ValueError(f"{where} must be a list with one array per input, not {type(sample).__name__}.")
    if len(sample) != len(inputs):
        names = ", ".join(i.name for i in inputs)
        raise ValueError(f"{where} has {len(sample)} arrays, the model has {len(inputs)} inputs: {names}.")
    feed: dict[str, Array] = {}
    for info, value in zip(inputs, sample, strict=True):
        array = np.asarray(value)
        if array.dtype != info.dtype:
            raise ValueError(f"{where}: input '{info.name}' is {info.dtype}, the array is {array.dtype}.")
        wanted = [d if isinstance(d, int) else None for d in info.shape or array.shape]
        if len(wanted) != array.ndim or any(
            w not in (None, d) for w, d in zip(wanted, array.shape, strict=True)
        ):
            raise ValueError(
                f"{where}: input '{info.name}' has shape {list(info.shape or ())}, not {list(array.shape)}."
            )
        feed[info.name] = array
    return feed


def require_input_shape(inputs: Sequence[InputInfo], shapes: Sequence[Sequence[int]] | None) -> None:
    """ValueError when ``shapes`` are given and are not one per input, of its rank and fixed sizes."""
    if shapes and len(shapes) != len(inputs):
        raise ValueError(
            f"Invalid input shape: {len(shapes)} shapes are given, the model has {len(inputs)} inputs."
        )
    for info, sizes in zip(inputs, shapes or (), strict=False):
        declared = list(info.shape if info.shape is not None else sizes)
        known = [(d, s) for d, s in zip(declared, sizes, strict=False) if isinstance(d, int)]
        if len(sizes) != len(declared) or any(d != s for d, s in known):
            raise ValueError(
                f"Invalid input shape: {list(sizes)} for input '{info.name}', which has {declared}."
            )


def random_feed(inputs: Sequence[InputInfo], shapes: Sequence[Sequence[int]] | None) -> Feed:
    """One sample, uniform in [0, 1) (integers: 0); a dynamic first dimension is 1, others need ``shapes``.

    ValueError when a shape is missing, CalibrationError when the sample is too large.
    """
    rng = np.random.default_rng(_SEED)
    feed: dict[str, Array] = {}
    for index, info in enumerate(inputs):
        declared = list(info.shape or ())
        if shapes:
            sizes = list(shapes[index])
        else:
            sizes = [d if isinstance(d, int) else 1 for d in declared]
            if info.shape is None or any(not isinstance(d, int) for d in declared[1:]):
                told = "no declared shape" if info.shape is None else declared
                raise ValueError(f"Invalid input shape: input '{info.name}' has {told}; give input_shape.")
        DEFAULT_LIMITS.check_bytes(math.prod(sizes) * 8, f"input '{info.name}'", "give a smaller input_shape")
        feed[info.name] = rng.random(sizes).astype(info.dtype)
    return feed


def exactly(names: Iterable[str]) -> list[str]:
    """Patterns that match these names and nothing else."""
    return [f"re:{re.escape(name)}" for name in names]


def layers_of(source: Model, passes: Collection[str] | None, ops: Collection[str]) -> list[Linear]:
    """The layers of those operators as they will be found, in the order of execution.

    GraphError when there is none, or the model is quantized already.
    """
    if integer := already_quantized(source):
        raise GraphError(f"{source.name} is already quantized (node '{integer[0]}'); give the float model")
    graph = Graph(raise_opset(source, PER_CHANNEL_OPSET))
    # What is folded into weights neither makes nor names a layer.
    optimize(graph, set(PASSES if passes is None else passes) - {"batchnorm", "affine"})
    place = {
        node.name: index for index, node in enumerate(in_order(graph.nodes))
    }  # passes add nodes at the end
    layers, reasons = find_linears(graph)
    found = [layer for layer in layers if layer.op in ops]
    if not found:
        why = "".join(f" (first: '{node}': {reason})" for node, reason in list(reasons.items())[:1])
        raise GraphError(
            f"{source.name}: no layer can be quantized among {', '.join(sorted(ops)) or 'no operators'}{why}"
        )
    return sorted(found, key=lambda layer: place[layer.node])


@dataclass
class AscendJob:
    """A recipe for the target ``ascend`` on samples in memory. ``per_channel``: which operators' weights may be."""

    source: Model
    recipe: Recipe
    feeds: list[Feed]
    synthetic: bool
    per_channel: frozenset[str] = TARGETS["ascend"].per_channel
    device: str = "cpu"

    @property
    def target(self) -> Target:
        return replace(TARGETS["ascend"], per_channel=self.per_channel)

    def plan(self) -> Planned:
        """Statistics, ranges and codes; layers whose input was always zero are left float."""
        data = Feeds(self.feeds)
        job = Job(self.source, self.recipe, self.target, data, data, self.device)
        planned = make_plan(job)
        plan = planned.plan
        for use in list(plan.weights):
            activation = plan.activations[Use(use.node, 0)]
            rng = plan.ranges[activation.params][0]
            if float(rng.lo) == float(rng.hi) == 0.0:
                self._leave(planned, use.node, "its input is always zero")
        return planned

    def roll_back(self, planned: Planned, count: int, score: str) -> list[str]:
        """Leave the ``count`` layers float whose outputs are worst on the first sample, by ``LayerOutput.<score>``."""
        if count == 0:
            return []
        item: Sample = (SampleId(0), self.feeds[0])
        found: Mapping[str, LayerOutput] = layer_outputs(planned.workspace.model(), planned.plan, item)
        worst = ranked(((node, float(getattr(f, score))) for node, f in found.items()), count)
        for node in worst:
            self._leave(
                planned,
                node,
                f"rolled back (amp_num): {score} {getattr(found[node], score):.4g} of its output",
            )
        return worst

    def write(
        self,
        planned: Planned,
        path: Path,
        fuse_add: bool = True,
        external: bool = False,
        compiled: Callable[[Path, Path], None] | None = None,
    ) -> OutputPaths:
        """Render, verify the lowered graph on the first sample, write the model and its weights JSON, atomically.

        ``compiled`` makes of the model file another one, which goes beside it with the suffix .om.
        """
        model, plan = planned.workspace.model(), planned.plan
        if not plan.weights:
            _LOG.warning("every layer was left float: the written model computes in float")
        rendered = render_ascend(model, plan, self.target, fuse_add=fuse_add)
        verified = verify(
            self.source,
            lower_ascend(rendered),
            Feeds(self.feeds[:1]),
            twin=RENDERERS["ascend"].twin(model, plan, self.target),
        )
        sqnr = verified.sqnr
        level = logging.WARNING if sqnr is not None and sqnr < _DOUBTFUL_DB else logging.INFO
        told = "n/a" if sqnr is None else f"{sqnr:.1f}"
        _LOG.log(level, "worst output: %s dB SQNR on the first sample", told)
        plan.skipped = {**planned.skipped, **planned.placement.skipped, **plan.skipped}
        context = self._context(verified)
        beside = () if compiled is None else (f"{path.stem}.om",)
        paths = output_paths(path, path.stem, context.quant_type, beside)
        with AtomicFiles(paths, source_files(self.source.path) if self.source.path else []) as files:
            written = files.temporary.model
            write_model(rendered, written, external=external)
            check_file(
                RENDERERS["ascend"].proof(written, files.folder), source=self.source.path or self.source.proto
            )
            described = describe(plan, planned.workspace.graph, rendered.proto, context)
            write_description(described, files.temporary)
            if compiled is not None:
                compiled(written, files.temporary.others[0])
            return files.commit()

    def _leave(self, planned: Planned, node: str, reason: str) -> None:
        leave_float(planned.plan, planned.placement, planned.workspace.graph, node, reason)

    def _context(self, verified: Verification) -> Context:
        metrics = {
            "sqnr_db": verified.sqnr,
            "per_output": {e.name: e.as_json() for e in verified.outputs},
            "measured_on": "synthetic" if self.synthetic else "calibration",
            "samples": verified.samples,
        }
        return Context(
            source=self.source.path.name if self.source.path else "model.onnx",
            source_sha256=self.source.sha256,
            quant_type=self.recipe.quant_type,
            target="ascend",
            tool={"onnxslim_ptq": __version__},
            recipe=self.recipe.dump(),
            calibration=Calibration(0 if self.synthetic else len(self.feeds), self.device),
            metrics=metrics,
        )
