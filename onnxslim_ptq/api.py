"""The Python API: ``quantize`` and its ``Result``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.errors import GraphError
from calib.model import Model, to_array
from calib.progress import Listener
from calib.provider import SessionOptions, create_session, runtime
from calib.saved.progress import Resume
from calib.saved.store import Statistics
from calib.types import Array, SampleId
from onnxslim_ptq import __version__
from onnxslim_ptq.analysis.metrics import first_top1, leaves
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.core.targets import TARGETS, BiasForm
from onnxslim_ptq.errors import VerificationError
from onnxslim_ptq.export.cache import io_changes
from onnxslim_ptq.export.check import check_file, source_files
from onnxslim_ptq.export.description import Calibration, Context, describe, write_description
from onnxslim_ptq.export.exchange import Exchange
from onnxslim_ptq.export.files import AtomicFiles, OutputPaths, output_paths, write_model
from onnxslim_ptq.export.renderers import RENDERERS
from onnxslim_ptq.export.tensors import layer_tensors
from onnxslim_ptq.export.weight_files import WeightFiles, Write, files_of
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.names import module_names
from onnxslim_ptq.job import Job, gathering, open_job
from onnxslim_ptq.pipeline import Outcome, run
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.recipes.data import without_folders
from onnxslim_ptq.samples import Samples

__all__ = ["Result", "quantize", "quantize_as"]

_FIRST = SampleId(0, "the first evaluation sample")
_AT_ONCE = 1 << 20  # elements of an output compared at a time


@dataclass
class Result:
    """A verified quantized model: its graph, the plan it follows, what was measured and what stayed float."""

    quantized: Model
    graph: Graph
    source: Model
    recipe: Recipe
    plan: QuantPlan
    metrics: dict[str, Any]
    notes: list[str]
    context: Context
    _first: tuple[Mapping[str, Array], list[Array]] = field(repr=False)
    blockwise: bool = False
    _rescaled: Model | None = field(default=None, repr=False)

    @property
    def skipped(self) -> dict[str, str]:
        """Every layer that stayed float, with its reason."""
        return self.plan.skipped

    @property
    def exact(self) -> Model:
        """The float model to compare layers with: smoothed as the quantized one is."""
        return self._rescaled or self.source

    @property
    def model(self) -> onnx.ModelProto:
        """The quantized model with its weights inside; GraphError above 2 GB (use ``save``)."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.quantized.proto)
        if sum(w.nbytes for w in self.quantized.weights.values()) > 2**31 - 2**20:
            raise GraphError(
                "the quantized model is above 2 GB, more than one protobuf holds; use save(path)"
            )
        for tensor in proto.graph.initializer:
            if tensor.name in self.quantized.weights:
                array = onnx.numpy_helper.from_array(
                    np.ascontiguousarray(to_array(tensor, self.quantized.weights))
                )
                array.name = tensor.name
                tensor.CopyFrom(array)
        return proto

    def save(
        self, out: str | Path, *, external_data: bool = False, weights: WeightFiles | None = None
    ) -> OutputPaths:
        """Write the model and its weights JSON (README: "What it writes"), atomically, after a last check.

        ``weights``: also the tensors and their description as msModelSlim writes them (docs/session.md). The written
        file is read again, checked, loaded and run; VerificationError leaves nothing at ``out``.
        """
        stem = self.source.path.stem if self.source.path else "model"
        protected = source_files(self.source.path) if self.source.path else []
        more = self._weight_files(weights) if weights is not None else {}
        paths = output_paths(Path(out), stem, self.recipe.quant_type, tuple(more))
        with AtomicFiles(paths, protected) as files:
            target = files.temporary.model
            write_model(self.quantized, target, external=external_data or self.blockwise)
            proof = RENDERERS[TARGETS[self.context.target].exporter].proof(target, files.folder)
            self.notes += check_file(proof, source=self.source.path or self.source.proto)
            self._run_written(proof)
            described = describe(self.plan, self.graph, self.quantized.proto, self.context)
            write_description(described, files.temporary)
            for path in files.temporary.others:
                more[path.name](path)
            return files.commit()

    def _weight_files(self, how: WeightFiles) -> dict[str, Write]:
        modules = module_names(self.graph, find_linears(self.graph)[0], self.recipe.names)
        return files_of(layer_tensors(self.graph, self.plan, modules, self.recipe.quant_type), how)

    def _run_written(self, path: Path) -> None:
        feed, expected = self._first
        try:
            foreign = TARGETS[self.context.target].bias is BiasForm.FLOAT  # as in the verification
            small = self.blockwise  # then the weights lie in a file of their own, and are mapped
            options = SessionOptions(simulate=foreign, frugal=small, prepack=not small)
            session = create_session(path, options=options)
        except GraphError as error:
            raise VerificationError(f"the written model does not load: {error}") from None
        names = [o.name for o in self.source.proto.graph.output]
        seen = Exchange.of(self.quantized).run(session, names, feed, _FIRST)
        for name, y, z in zip(names, expected, seen, strict=True):
            if not _same(leaves(y), leaves(z)):
                raise VerificationError(
                    f"the written model answers '{name}' differently from the one that was verified; "
                    "check the disk and try again"
                )


def _same(ys: Sequence[Array], zs: Sequence[Array]) -> bool:
    return len(ys) == len(zs) and all(map(_close, ys, zs))


def _close(y: Array, z: Array) -> bool:
    if y.shape != z.shape or y.dtype.kind not in "fc":
        return np.array_equal(y, z)
    ys, zs = y.reshape(-1), z.reshape(-1)
    parts = [slice(at, at + _AT_ONCE) for at in range(0, y.size, _AT_ONCE)]
    return all(np.allclose(ys[p], zs[p], rtol=1e-3, atol=1e-5, equal_nan=True) for p in parts)


def quantize(
    model: str | Path | onnx.ModelProto,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w8a8",
    calib_data: Any = None,
    *,
    target: str | None = None,
    device: str = "cpu",
    eval_data: Any = None,
    samples: int | None = None,
    stacked: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    nan: str = "error",
    reduce_range: str = "auto",
    min_sqnr: float = 6.0,
    allow_quantized: bool = False,
    threads: int = 0,
    seed: int = 0,
    stats: str | Path | Statistics | None = None,
    workers: int | None = None,
    ray: str | None = None,
    resume: str | Path | Resume | None = None,
    blockwise: bool = False,
    listener: Listener | None = None,
) -> Result:
    """Quantize a float ONNX model (path or proto, which stays as it is) and verify the result in memory.

    ``calib_data`` and ``eval_data``: paths (see docs/calibration-data.md), or any re-iterable of
    {input: ndarray}; without calibration data ranges come from synthetic samples, which suits weights only.
    ``target`` overrides the recipe's. ``stats`` are statistics that `calibrate` gathered, then no data is needed;
    ``workers`` processes (or Ray actors, ``ray`` being an address or ``local``) share the samples; ``resume`` is a
    folder that keeps progress until the work is done; ``blockwise`` runs the model block after block, as is done anyway
    where memory is short (docs/calibration-data.md). Raises RecipeError, GraphError, CalibrationError, DeviceError
    and VerificationError (output SQNR below ``min_sqnr`` dB, NaN, a missing output).
    """
    return quantize_as(model, Asked.of(locals()))


def quantize_as(model: str | Path | onnx.ModelProto, asked: Asked) -> Result:
    """`quantize`, with its arguments in one piece; raises the same."""
    job, data = open_job(model, asked)
    job = replace(job, gathering=gathering(job.source, data, asked))
    outcome = run(job)
    if job.gathering.resume is not None:
        job.gathering.resume.clear()
    return _result(job, outcome, data, asked.seed)


def _result(job: Job, outcome: Outcome, data: Samples, seed: int) -> Result:
    verified = outcome.verification
    metrics: dict[str, Any] = {
        "sqnr_db": verified.sqnr,
        "cosine": min((e.cosine for e in verified.outputs if e.cosine is not None), default=None),
        "top1_agree": first_top1(verified.outputs),
        "per_output": {e.name: e.as_json() for e in verified.outputs},
        "measured_on": data.measured_on,
        "samples": verified.samples,
    }
    tools = {"onnxslim_ptq": __version__, "onnxruntime": runtime().__version__, "onnx": _version("onnx")}
    context = Context(
        source=job.source.path.name if job.source.path else "model.onnx",
        source_sha256=job.source.sha256,
        quant_type=job.recipe.quant_type,
        target=job.target.name,
        tool=tools,
        recipe=without_folders(job.recipe.dump()),
        calibration=Calibration(data.samples, job.device, data.sha256, data.notes),
        seed=seed,
        metrics=metrics,
        smoothing=[found.as_json() for found in outcome.smoothing],
        io_changes=io_changes(outcome.plan.io),
    )
    return Result(
        outcome.quantized,
        outcome.graph,
        job.source,
        job.recipe,
        outcome.plan,
        metrics,
        data.notes + outcome.notes,
        context,
        verified.first,
        job.gathering.blockwise is not None,
        outcome.rescaled,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
