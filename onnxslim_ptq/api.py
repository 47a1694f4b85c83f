"""The Python API: ``quantize`` and its ``Result``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.errors import GraphError
from calib.model import Model, open_model, to_array
from calib.provider import SessionOptions, create_session, require_device, runtime
from calib.readers import fingerprint, from_iterable, open_data, split_held_out, synthetic, take
from calib.runner import Listener, run_session
from calib.types import Array, Dataset, SampleId
from onnxslim_ptq import __version__
from onnxslim_ptq.analysis.metrics import leaves
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.core.targets import TARGETS, BiasForm
from onnxslim_ptq.cpu import saturates
from onnxslim_ptq.errors import RecipeError, VerificationError
from onnxslim_ptq.export.check import check_file, source_files
from onnxslim_ptq.export.description import Calibration, Context, describe, write_description
from onnxslim_ptq.export.files import AtomicFiles, OutputPaths, output_paths, write_model
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.pipeline import Job, Outcome, run
from onnxslim_ptq.recipe import Recipe

__all__ = ["Result", "quantize"]

QUANT_TYPE = "W8A8"
_FIRST = SampleId(0, "the first evaluation sample")
_NAN_POLICIES = ("error", "ignore", "exclude-layer")


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

    @property
    def skipped(self) -> dict[str, str]:
        """Every layer that stayed float, with its reason."""
        return self.plan.skipped

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

    def save(self, out: str | Path, *, external_data: bool = False) -> OutputPaths:
        """Write the model and its weights JSON (README: "What it writes"), atomically, after a last check.

        The written file is read again, checked, loaded and run; VerificationError leaves nothing at ``out``.
        """
        stem = self.source.path.stem if self.source.path else "model"
        protected = source_files(self.source.path) if self.source.path else []
        with AtomicFiles(output_paths(Path(out), stem, QUANT_TYPE), protected) as files:
            target = files.temporary.model
            write_model(self.quantized, target, external=external_data)
            self.notes += check_file(target, source=self.source.path or self.source.proto)
            self._run_written(target)
            described = describe(self.plan, self.graph, self.quantized.proto, self.context)
            write_description(described, files.temporary)
            return files.commit()

    def _run_written(self, path: Path) -> None:
        feed, expected = self._first
        try:
            foreign = TARGETS[self.context.target].bias is BiasForm.FLOAT  # as in the verification
            session = create_session(path, options=SessionOptions(simulate=foreign))
        except GraphError as error:
            raise VerificationError(f"the written model does not load: {error}") from None
        names = [o.name for o in self.source.proto.graph.output]
        for name, y, z in zip(names, expected, run_session(session, names, feed, _FIRST), strict=True):
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
    return np.allclose(y, z, rtol=1e-3, atol=1e-5, equal_nan=True)


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
    listener: Listener | None = None,
) -> Result:
    """Quantize a float ONNX model (path or proto, which stays as it is) and verify the result in memory.

    ``calib_data`` and ``eval_data``: paths (see docs/calibration-data.md), or any re-iterable of
    {input: ndarray}; without calibration data ranges come from synthetic samples, which suits weights only.
    ``target`` overrides the recipe's. Raises RecipeError, GraphError, CalibrationError, DeviceError and
    VerificationError (output SQNR below ``min_sqnr`` dB, NaN, a missing output).
    """
    loaded = Recipe.load(recipe).with_patterns(include=include, exclude=exclude)
    row = TARGETS.get(target or loaded.target)
    if row is None:
        raise RecipeError(f"target '{target}' is unknown; use one of {', '.join(TARGETS)}")
    if row.exporter is None:
        raise RecipeError(
            f"target '{row.name}' is not available yet; "
            f"available: {', '.join(n for n, t in TARGETS.items() if t.exporter)}"
        )
    if nan not in _NAN_POLICIES:
        raise RecipeError(f"nan: '{nan}' is unknown; use one of {', '.join(_NAN_POLICIES)}")
    require_device(device)
    reduced = {"auto": row.optimizes_here and saturates(), "on": True, "off": False}.get(reduce_range)
    if reduced is None:
        raise RecipeError(f"reduce_range: '{reduce_range}' is unknown; use auto, on or off")
    source = open_model(model)
    data = _Data(source, calib_data, eval_data, samples, stacked, shapes, ranges, seed)
    job = Job(
        source,
        loaded,
        row,
        data.calibration,
        data.evaluation,
        device,
        threads,
        nan,
        reduced,
        allow_quantized,
        min_sqnr,
        listener,
    )
    outcome = run(job)
    return _result(job, outcome, data, seed)


class _Data:
    """Calibration and evaluation samples, and where the measurement was made."""

    def __init__(
        self,
        source: Model,
        calib: Any,
        evaluation: Any,
        samples: int | None,
        stacked: bool,
        shapes: Mapping[str, tuple[int, ...]] | None,
        ranges: Mapping[str, tuple[float, float]] | None,
        seed: int,
    ) -> None:
        inputs = source.inputs()
        if calib is None:
            everything: Dataset = synthetic(
                inputs, count=samples or 8, shapes=shapes, ranges=ranges, seed=seed
            )
        else:
            everything = _dataset(calib, inputs, stacked)
            if samples is not None:
                everything = take(everything, samples)
        if evaluation is not None:
            self.calibration, self.evaluation = everything, _dataset(evaluation, inputs, stacked)
            self.measured_on = "eval"
        elif calib is None:
            self.calibration, self.evaluation, self.measured_on = everything, everything, "synthetic"
        else:
            self.calibration, self.evaluation, self.measured_on = split_held_out(everything)

    @property
    def samples(self) -> int:
        return len(self.calibration)


def _dataset(data: Any, inputs: Sequence[Any], stacked: bool) -> Dataset:
    if isinstance(data, (str, Path)):
        return open_data([Path(data)], inputs, stacked=stacked)
    if isinstance(data, (list, tuple)) and data and all(isinstance(d, (str, Path)) for d in data):
        return open_data([Path(d) for d in data], inputs, stacked=stacked)
    feeds: Iterable[Any] | Callable[[], Iterable[Any]] = data
    return from_iterable(feeds, inputs)


def _result(job: Job, outcome: Outcome, data: _Data, seed: int) -> Result:
    verified = outcome.verification
    metrics: dict[str, Any] = {
        "sqnr_db": verified.sqnr,
        "cosine": min((e.cosine for e in verified.outputs if e.cosine is not None), default=None),
        "per_output": {e.name: e.as_json() for e in verified.outputs},
        "measured_on": data.measured_on,
        "samples": verified.samples,
    }
    tools = {"onnxslim_ptq": __version__, "onnxruntime": runtime().__version__, "onnx": _version("onnx")}
    context = Context(
        source=job.source.path.name if job.source.path else "model.onnx",
        source_sha256=job.source.sha256,
        quant_type=QUANT_TYPE,
        target=job.target.name,
        tool=tools,
        recipe=job.recipe.dump(),
        calibration=Calibration(data.samples, job.device, fingerprint(job.calibration)),
        seed=seed,
        metrics=metrics,
    )
    return Result(
        outcome.quantized,
        outcome.graph,
        job.source,
        job.recipe,
        outcome.plan,
        metrics,
        outcome.notes,
        context,
        verified.first,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
