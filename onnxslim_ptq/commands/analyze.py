"""``analyze SCOPE MODEL``: which layers cost most when they are quantized, and the lines that leave them float."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from onnxslim_ptq.commands import options as opt
from onnxslim_ptq.commands.console import Bars, columns, db, emit_json, program, say, warn
from onnxslim_ptq.commands.given import asked_by
from onnxslim_ptq.commands.preflight import require_samples
from onnxslim_ptq.commands.session import with_session

if TYPE_CHECKING:
    from onnxslim_ptq.sensitivity import Analysis

__all__ = ["analyze"]

Scope = Annotated[
    str, typer.Argument(metavar="linear|attn|layer", show_default=False, help="What is ranked.")
]
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
    model: opt.Model,
    calib: opt.Calib = None,
    metrics: Metrics = None,
    topk: Top = 15,
    pattern: Patterns = None,
    recipe: opt.Recipe = "w8a8",
    target: opt.Target = None,
    device: opt.Device = "cpu",
    samples: opt.Samples = None,
    stacked: opt.Stacked = False,
    preprocess: opt.Preprocess = None,
    tokenizer: opt.Tokenizer = None,
    reduce_range: opt.ReduceRange = "auto",
    threads: opt.Threads = 0,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Rank layers by what they cost when quantized, worst first, with the lines that leave the worst float."""
    given = with_session(dict(locals()))
    from onnxslim_ptq.sensitivity import analyze_as

    require_samples(stacked, calib)
    asked = asked_by(given)
    with Bars(json) as bars:
        found = analyze_as(model, replace(asked, listener=bars), scope, metrics, pattern or ())
    if json:
        emit_json({**found.as_json(topk), "model": str(model), "exit_code": 0})
    else:
        _show(found, topk)


def _show(found: Analysis, topk: int) -> None:
    from onnxslim_ptq.sensitivity import NO_DATA

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
        if text == NO_DATA:
            warn(text)
        elif "simplified" not in text:
            say(f"note: {text}")
    say("for a quantize step of the recipe (keep as many from the top as you need):")
    say(found.snippet(topk).rstrip())
    say(
        f"next: {program()} quantize MODEL OUT --calib SAMPLES --exclude PATTERN  (or tune, which finds how many)"
    )
