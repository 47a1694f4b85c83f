"""``analyze SCOPE MODEL``: which layers cost most when they are quantized, and the lines that leave them float."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxslim_ptq.commands.console import Bars, columns, db, emit_json, program, say, warn
from onnxslim_ptq.commands.options import (
    Calib,
    Device,
    Json,
    Preprocess,
    Recipe,
    ReduceRange,
    Samples,
    Seed,
    Stacked,
    Target,
    Threads,
    Tokenizer,
)
from onnxslim_ptq.commands.preflight import require_samples

if TYPE_CHECKING:
    from onnxslim_ptq.sensitivity import Analysis

__all__ = ["analyze"]

Scope = Annotated[
    str, typer.Argument(metavar="linear|attn|layer", show_default=False, help="What is ranked.")
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="The float ONNX model.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="M",
        show_default="the scope's first",
        help="linear: sqnr, std, quantile, kurtosis; attn: mse; layer: mse_model_wise, mse_layer_wise.",
    ),
]
Top = Annotated[int, typer.Option("--topk", metavar="N", min=1, help="How many are shown and listed.")]
Patterns = Annotated[
    list[str] | None,
    typer.Option("--pattern", metavar="PATTERN", show_default=False, help="Rank only these. Repeatable."),
]


def analyze(
    scope: Scope,
    model: Model,
    calib: Calib = None,
    metrics: Metrics = None,
    topk: Top = 15,
    pattern: Patterns = None,
    recipe: Recipe = "w8a8",
    target: Target = None,
    device: Device = "cpu",
    samples: Samples = None,
    stacked: Stacked = False,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    reduce_range: ReduceRange = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Rank layers by what they cost when quantized, worst first, with the lines that leave the worst float."""
    from onnxslim_ptq.commands.samples import with_data
    from onnxslim_ptq.sensitivity import analyze as run

    require_samples(stacked, calib)
    with Bars(json) as bars:
        found = run(
            model,
            scope,
            metrics,
            calib or None,
            recipe=with_data(recipe, preprocess, tokenizer),
            target=target,
            device=device,
            samples=samples,
            stacked=stacked,
            patterns=pattern or (),
            reduce_range=reduce_range,
            threads=threads,
            seed=seed,
            listener=bars,
        )
    if json:
        emit_json({**found.as_json(topk), "model": str(model), "exit_code": 0})
    else:
        _show(found, topk)


def _show(found: Analysis, topk: int) -> None:
    shown = found.ranking[:topk]
    alone = " (SQNR of the outputs with only this layer quantized)" if found.metric == "sqnr" else ""
    count = f"{len(shown)} of {len(found.ranking)}" if len(shown) < len(found.ranking) else str(len(shown))
    say(f"{count} by {found.metric}, most sensitive first{alone}, on {found.samples} samples")
    rows: list[tuple[object, ...]] = [("", "LAYER", "OP", "SQNR" if found.metric == "sqnr" else "SCORE")]
    for place, ranked in enumerate(shown, 1):
        more = f" + {len(ranked.nodes) - 1}" if len(ranked.nodes) > 1 else ""
        value = db(ranked.sqnr_db) if ranked.sqnr_db is not None else f"{ranked.score:.4g}"
        rows.append((place, f"{ranked.name}{more}", ranked.op, value))
    for line in columns(rows, right=frozenset({0, 3})):
        say(line)
    for text in found.notes:
        if "simplified" not in text:
            warn(text)
    say("for a quantize step of the recipe (keep as many from the top as you need):")
    say(found.snippet(topk).rstrip())
    say(
        f"next: {program()} quantize MODEL OUT --calib SAMPLES --exclude PATTERN  (or tune, which finds how many)"
    )
