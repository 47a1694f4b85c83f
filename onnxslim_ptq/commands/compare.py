"""``compare FLOAT QUANT``: how far a quantized model is from its float model, layer by layer, and how fast."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxslim_ptq.commands import options as opt
from onnxslim_ptq.commands.console import Bars, columns, db, emit_json, say, warn
from onnxslim_ptq.commands.given import asked_by
from onnxslim_ptq.errors import QuantizationError

if TYPE_CHECKING:
    from calib.model import Model
    from onnxslim_ptq.analysis.compare import Comparison
    from onnxslim_ptq.analysis.layers import LayerError
    from onnxslim_ptq.export.fusion import Island

__all__ = ["compare"]

_FEW, _FEW_OF_EACH = 10, 3
Float = Annotated[Path, typer.Argument(metavar="FLOAT", show_default=False, help="The float model.")]
Quant = Annotated[
    Path, typer.Argument(metavar="QUANT", show_default=False, help="The same model, quantized.")
]
Eval = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="PATH",
        show_default=False,
        help="Samples to measure on, instead of some of --calib.",
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        show_default=False,
        help="Whose data section tells how to read samples.",
    ),
]


def compare(
    exact: Float,
    quantized: Quant,
    calib: opt.Calib = None,
    evaluation: Eval = None,
    samples: opt.Samples = None,
    stacked: opt.Stacked = False,
    recipe: Recipe = "w8a8",
    preprocess: opt.Preprocess = None,
    tokenizer: opt.Tokenizer = None,
    threads: opt.Threads = 0,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure QUANT against FLOAT: error of outputs and layers (SQNR, more dB is better), speed.

    Measures on --eval, or on the samples of --calib that quantize holds out.
    """
    given = dict(locals())
    from calib.model import open_model
    from onnxslim_ptq.analysis.compare import compare_models
    from onnxslim_ptq.recipe import Recipe
    from onnxslim_ptq.samples import measured_samples

    asked = asked_by(given)
    loaded = Recipe.load(asked.recipe)
    if not calib and not evaluation and not loaded.data.sets:
        raise QuantizationError("compare needs samples; give the --calib that quantize got, or --eval")
    source, result = open_model(exact), open_model(quantized)
    data, measured_on = measured_samples(source, loaded, asked)
    with Bars(json) as bars:
        rescaled, note = _rescaled(source, result)
        found = compare_models(source, result, data, threads=threads, listener=bars, rescaled=rescaled)
        found.notes += note
    if json:
        emit_json(_as_json(found, exact, quantized, measured_on))
    else:
        _show(found, measured_on, verbose)


def _rescaled(source: Model, quantized: Model) -> tuple[Model | None, list[str]]:
    """The float model smoothed as the weights JSON beside the quantized one says; a note where that cannot be."""
    from onnxslim_ptq.analysis.beside import smoothed_as

    try:
        return smoothed_as(source, quantized.path), []
    except QuantizationError as error:
        return None, [
            f"errors of smoothed layers mislead: the scales in the weights JSON are not used, {error}"
        ]


def _as_json(found: Comparison, exact: Path, quantized: Path, measured_on: str) -> dict[str, Any]:
    return {
        "float": str(exact),
        "quantized": str(quantized),
        "samples": found.samples,
        "measured_on": measured_on,
        "sqnr_db": found.sqnr,
        "per_output": {
            e.name: {**e.as_json(), **({"top1_agree": e.top1} if e.is_float else {})} for e in found.outputs
        },
        "per_layer": [layer.as_json() for layer in found.layers],
        "latency": found.latency.as_json() if found.latency else None,
        "integer_weights": found.integer_weights,
        "unfused_weights": found.unfused,
        "float_islands": [asdict(island) for island in found.islands],
        "notes": found.notes,
        "exit_code": 0,
    }


def _show(found: Comparison, measured_on: str, verbose: bool) -> None:
    from onnxslim_ptq.commands.summary import MEASURED_ON

    say(f"measured on {found.samples} {MEASURED_ON[measured_on]}")
    rows: list[tuple[object, ...]] = [("OUTPUT", "SQNR", "COSINE", "MAX ERROR", "TOP-1", "EQUAL")]
    for error in found.outputs:
        facts = error.as_json()
        equal = facts.get("equal")
        rows.append(
            (
                error.name,
                db(error.sqnr),
                _number(error.cosine, ".5f"),
                _number(error.largest, ".4g") if error.is_float else "n/a",
                _number(error.top1, ".2%") if error.is_float else "n/a",
                f"{equal:.2%}" if isinstance(equal, float) else "n/a",
            )
        )
    for line in columns(rows, right=frozenset({1, 2, 3, 4, 5}), indent=""):
        say(line)
    _show_layers(found.layers, verbose)
    if found.latency:
        speed = found.latency
        say(
            f"speed: float {speed.exact_ms:.3g} ms, int8 {speed.quantized_ms:.3g} ms, {speed.speedup:.2f} x as fast "
            f"(median of {speed.rounds} alternating runs of one sample on this machine's CPU)"
        )
    here = f", of which {len(found.unfused)} get no integer kernel on this CPU" if found.runs_here else ""
    slow = f" (slow): {', '.join(found.unfused[: None if verbose else 3])}" if found.unfused else ""
    say(f"int8 weights: {found.integer_weights}{here}{slow}")
    _show_islands(found.islands, verbose)
    for note in found.notes:
        warn(note)


def _show_islands(islands: list[Island], verbose: bool) -> None:
    """Nodes that compute in float between integer ones, by reason."""
    if not islands:
        return
    say(f"between integer nodes, {len(islands)} compute in float:")
    groups: dict[str, list[str]] = {}
    for island in islands:
        reason = re.sub(r"'.*?'", "…", island.reason)
        groups.setdefault(f"{island.op}: {reason}", []).append(island.node)
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        shown = names if verbose else names[:_FEW_OF_EACH]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        say(f"  {len(names)} {reason}: {', '.join(shown)}{more}")


def _show_layers(layers: list[LayerError], verbose: bool) -> None:
    quantized = [layer for layer in layers if layer.quantized]
    if not quantized:
        return
    shown = layers if verbose else sorted(quantized, key=_local)[:_FEW]
    count = f"{len(shown)} of {len(quantized)}" if len(shown) < len(quantized) else str(len(quantized))
    which = "every layer, in order" if verbose else f"{count} quantized layers, worst first"
    say(f"{which}; local: its own error on exact input, cumulative: with all before it")
    rows: list[tuple[object, ...]] = [("LAYER", "OP", "LOCAL", "CUMULATIVE")]
    rows += [
        (
            layer.node,
            layer.op,
            db(layer.local.sqnr) if layer.local else "float" if not layer.quantized else "n/a",
            db(layer.cumulative.sqnr),
        )
        for layer in shown
    ]
    for line in columns(rows, right=frozenset({2, 3})):
        say(line)


def _local(layer: LayerError) -> float:
    sqnr = layer.local.sqnr if layer.local else None
    return math.inf if sqnr is None else sqnr


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
