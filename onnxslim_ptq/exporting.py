"""``export``: a quantized model rendered again for another target, from the integers in its file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import GraphError
from calib.model import Model, open_model
from calib.provider import SessionOptions, create_session, runtime
from calib.readers import synthetic
from onnxslim_ptq import __version__
from onnxslim_ptq.analysis.metrics import OutputError, worst_sqnr
from onnxslim_ptq.analysis.verify import compare_outputs
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import WeightCodes
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import RecipeError, VerificationError
from onnxslim_ptq.export.check import check_file, source_files
from onnxslim_ptq.export.description import Calibration, Context, describe, write_description
from onnxslim_ptq.export.exchange import Exchange
from onnxslim_ptq.export.files import AtomicFiles, OutputPaths, output_paths, write_model
from onnxslim_ptq.export.lowering import is_ascend, lower_ascend
from onnxslim_ptq.export.reading import read_quantized
from onnxslim_ptq.export.renderers import RENDERERS
from onnxslim_ptq.export.retarget import retarget
from onnxslim_ptq.export.triton import free_entry, staged_triton, triton_config
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize

__all__ = ["Exported", "export"]

_SAMPLES = 4
_MOST_JSON = 64 << 20
_ROUNDS = 20
_QUANT_TYPE = re.compile(r"\w{1,32}", re.ASCII)  # it becomes part of a file name
_FURTHER_DB, _LEAST_DB = 3.0, 6.0  # on real models ONNX Runtime's own answers differ by up to 3 dB
_LIKE_DB = 15.0  # int8 codes are some 40 dB from the weight they were made of


@dataclass
class Exported:
    """What was written, how close it is to the model it was made from (dB, worst output), and what changed."""

    paths: OutputPaths
    agreement_db: float | None
    notes: list[str] = field(default_factory=list)
    triton: Path | None = None


def export(
    quant: str | Path,
    out: str | Path,
    target: str,
    *,
    float_model: str | Path | None = None,
    triton: str | Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    min_agreement: float = 20.0,
    seed: int = 0,
) -> Exported:
    """Render ``quant`` (QDQ or Ascend) for ``target`` and write it with its weights JSON, atomically.

    Without ``float_model`` only what is exact on the integers; with it, weights the target wants with one scale are
    rounded anew from it. Both models run on synthetic samples: VerificationError when an output agrees to less than
    ``min_agreement`` dB, unless ``float_model`` shows that it is about as close to that as ``quant``. ``shapes``: of
    inputs with dynamic dimensions. Raises GraphError, RecipeError and CalibrationError.
    """
    row = TARGETS.get(target)
    if row is None:
        raise RecipeError(f"target '{target}' is unknown; use one of {', '.join(TARGETS)}")
    if triton is not None and RENDERERS[row.exporter].lower is not None:
        raise RecipeError(f"Triton's ONNX Runtime backend cannot run target '{target}'; leave --triton out")
    source = open_model(quant)
    assert source.path is not None
    origin = _Origin.beside(source.path)
    paths = output_paths(Path(out), source.path.stem, origin.quant_type)
    if triton is not None:  # refused now, not after OUT was written
        free_entry(Path(triton), paths.model.stem)
    reading = read_quantized(source)
    exact = None if float_model is None else open_model(float_model)
    floats = None if exact is None else _FloatWeights(exact)
    notes = retarget(reading, row, None if floats is None else floats.weight)
    renderer = RENDERERS[row.exporter]
    rendered = renderer.render(reading.graph.to_model(), reading.plan, row)
    if triton is not None:
        triton_config(rendered, paths.model.stem)
    before = lower_ascend(source) if is_ascend(source) else source
    after = renderer.runnable(rendered)
    errors = _compared(before, after, shapes, seed)
    agreement, excuse = worst_sqnr(errors), None
    if exact is not None and agreement is not None and agreement < min_agreement:
        excuse = _as_close(exact, before, after, shapes, seed)
    if excuse is None:
        _require_agreement(errors, source.name, target, min_agreement)
    else:
        notes.append(excuse)
    context = _context(source, origin, rendered, target, agreement)
    inputs = [*source_files(source.path), *([] if float_model is None else source_files(Path(float_model)))]
    with ExitStack() as stack:
        publish = None
        if triton is not None:
            publish = stack.enter_context(staged_triton(rendered, Path(triton), paths.model.stem))
        files = stack.enter_context(AtomicFiles(paths, inputs))
        write_model(rendered, files.temporary.model)
        check_file(renderer.proof(files.temporary.model, files.folder), source=source.proto)
        write_description(describe(reading.plan, reading.graph, rendered.proto, context), files.temporary)
        made = Exported(files.commit(), agreement, notes)
        made.triton = None if publish is None else publish()
    return made


def _compared(
    before: Model, after: Model, shapes: Mapping[str, tuple[int, ...]] | None, seed: int
) -> list[OutputError]:
    """Both on the same normal samples."""
    names = [o.name for o in before.proto.graph.output]
    options = SessionOptions(simulate=True)
    exact, seen = (
        create_session(m.proto.SerializeToString(), m.weights, options=options) for m in (before, after)
    )
    data = synthetic(before.inputs(), count=_SAMPLES, shapes=shapes, seed=seed)
    return compare_outputs(exact, seen, names, data)


def _as_close(
    exact: Model, before: Model, after: Model, shapes: Mapping[str, tuple[int, ...]] | None, seed: int
) -> str | None:
    """What tells that ``after`` is about as close to the float model as ``before`` is; None when it is not.

    Outputs that were quantized saturate on samples beyond their ranges; without that a result is another, not worse.
    """
    old, new = (_compared(exact, model, shapes, seed) for model in (before, after))
    pairs = [(a.sqnr, b.sqnr) for a, b in zip(old, new, strict=True)]
    further = any(a is not None and (b is None or b < a - _FURTHER_DB) for a, b in pairs)
    known, worst = worst_sqnr(old), worst_sqnr(new)
    if known is None or worst is None or worst < _LEAST_DB or further or any(e.faults for e in new):
        return None
    return f"it is {worst:.1f} dB from the float model on these samples, the source {known:.1f} dB"


def _require_agreement(errors: list[OutputError], name: str, target: str, bound: float) -> None:
    """VerificationError where an output is NaN, of another shape, or less than ``bound`` dB like that of ``name``."""
    fault = next((fault for error in errors for fault in error.faults), None)
    if fault is not None:
        raise VerificationError(f"{fault}; quantize the float model with --target {target} instead")
    worst, output = min(((e.sqnr, e.name) for e in errors if e.sqnr is not None), default=(bound, ""))
    if worst < bound:
        raise VerificationError(
            f"output '{output}' agrees with {name} to {worst:.1f} dB only, below {bound:g}; "
            f"quantize the float model with --target {target} instead"
        )


def _context(
    source: Model, origin: _Origin, rendered: Model, target: str, agreement: float | None
) -> Context:
    return Context(
        source=Path(source.name).name,
        source_sha256=source.sha256,
        quant_type=origin.quant_type,
        target=target,
        tool={"onnxslim_ptq": __version__, "onnxruntime": runtime().__version__},
        recipe=origin.recipe,
        calibration=Calibration(0, "cpu", None, ["the integers are those of the source file"]),
        seed=origin.seed,
        metrics={"agreement_db": agreement, "measured_on": "synthetic"},
        io_changes=Exchange.of(rendered).io_changes(),
    )


@dataclass(frozen=True)
class _Origin:
    """What the weights JSON beside a model tells of its making; a field that holds something else is not believed."""

    quant_type: str = "W8A8"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def beside(cls, model: Path) -> _Origin:
        path = model.with_suffix(".json")
        try:
            if path.stat().st_size > _MOST_JSON:
                return cls()
            document = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return cls()
        if not isinstance(document, dict) or document.get("format") != "onnxslim_ptq.weights":
            return cls()
        kind, recipe, seed = (document.get(key) for key in ("model_quant_type", "recipe", "seed"))
        return cls(
            kind if isinstance(kind, str) and _QUANT_TYPE.fullmatch(kind) else cls.quant_type,
            recipe if isinstance(recipe, dict) else {},
            seed if isinstance(seed, int) and not isinstance(seed, bool) else cls.seed,
        )


class _FloatWeights:
    """The weights of the float model, simplified as quantize does, with the scales that smoothing put into them."""

    def __init__(self, model: Model) -> None:
        self._name = model.name
        self._graph = Graph(raise_opset(model, PER_CHANNEL_OPSET))
        optimize(self._graph)
        self._layers = {layer.node: layer for layer in find_linears(self._graph)[0]}

    def weight(self, node: str, transposed: bool, codes: WeightCodes) -> NDArray[np.float32]:
        """The float weight behind ``codes``, of a Gemm that is ``transposed`` (transB) or not.

        GraphError when this is not the model they were made from.
        """
        layer = self._layers.get(node)
        values = None if layer is None else self._graph.value(self._graph.node(node).inputs[layer.weight])
        seen = dequantize(codes.codes, codes.params).astype(np.float64)
        if values is None or layer is None:
            raise self._other(node)
        weight = values.astype(np.float64)
        if layer.op == "Gemm" and bool(self._graph.node(node).attrs.get("transB", 0)) != transposed:
            weight = weight.T  # stored without transB for Ascend
        if weight.shape != seen.shape:
            raise self._other(node)
        weight = _smoothed(weight, seen)
        error = float(((weight - seen) ** 2).sum())
        if error > float((seen**2).sum()) * 10 ** (-_LIKE_DB / 10):
            raise GraphError(
                f"--float: layer '{node}' of {self._name} does not hold the weight that was quantized; give the model "
                "that quantize got"
            )
        return weight.astype(np.float32)

    def _other(self, node: str) -> GraphError:
        return GraphError(
            f"--float: {self._name} has no layer '{node}' of that shape; give the model that was quantized"
        )


def _smoothed(weight: NDArray[np.float64], seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """``weight`` itself where it is as close to ``seen`` as rounding leaves it, else with a factor per row and column.

    Smoothing multiplies a weight's input channels, and divides its output channels for a layer behind it. Both factors
    by alternating least squares, over the last two axes.
    """
    found = weight.copy()
    for _ in range(_ROUNDS):
        for axis in (-1, -2):
            power = (found**2).sum(axis=axis, keepdims=True)
            fitted = (found * seen).sum(axis=axis, keepdims=True)
            found *= np.divide(fitted, power, out=np.ones_like(power), where=power > 0)
    plain = ((weight - seen) ** 2).sum() <= 2 * ((found - seen) ** 2).sum()
    return weight if plain else found
