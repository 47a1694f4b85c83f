"""``analyze``: which layers, attentions or blocks cost most when they are quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.errors import GraphError
from calib.progress import Listener, Meter
from calib.provider import SessionOptions, create_session
from calib.runner import run_session, tap
from calib.stats.spread import SPREADS, SpreadStats
from calib.types import Probe, Sample
from onnxslim_ptq.analysis.entries import Entry, entries_of, find_blocks
from onnxslim_ptq.analysis.metrics import OutputError
from onnxslim_ptq.analysis.ranking import Analysis, Ranked, judging_samples, rank, rank_by_sqnr
from onnxslim_ptq.analysis.switchboard import Switchboard
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.core.match import Layer, Pattern, nearest
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.export.switches import add_twins
from onnxslim_ptq.graph.attention import Attention, find_attention
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import LINEAR_OPS, Linear, find_linears
from onnxslim_ptq.job import Job, open_job
from onnxslim_ptq.pipeline import Planned, float_graph, make_plan
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.resolution import named_layers

__all__ = ["METRICS", "NO_DATA", "Analysis", "Ranked", "analyze", "analyze_as"]

NO_DATA = "no data was given: the ranking is that of random inputs"
METRICS: dict[str, tuple[str, ...]] = {
    "linear": ("sqnr", *SPREADS),
    "attn": ("mse",),
    "layer": ("mse_model_wise", "mse_layer_wise"),
}


def analyze(
    model: str | Path | onnx.ModelProto,
    scope: str = "linear",
    metric: str | None = None,
    calib_data: Any = None,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w8a8",
    target: str | None = None,
    device: str = "cpu",
    samples: int | None = None,
    stacked: bool = False,
    patterns: Sequence[str] = (),
    reduce_range: str = "auto",
    threads: int = 0,
    seed: int = 0,
    listener: Listener | None = None,
) -> Analysis:
    """Rank what ``scope`` names (`METRICS`) by ``metric`` (default: the scope's first), worst first.

    ``sqnr``: noise-to-signal ratio of the model's outputs when only these layers are quantized, as ``recipe`` says, on
    4 to 16 calibration samples (families of outputs count as one, an output behind a saturating function is judged
    before it). ``std``, ``quantile``, ``kurtosis``: of the layers' inputs, `calib.stats.SpreadStats`.
    ``mse``: mean squared error of an attention's output with the layers that make its queries, keys and values
    quantized. ``mse_model_wise``: mean squared error of the outputs with one block quantized; ``mse_layer_wise``: its
    layers' mean squared error on float inputs. ``patterns`` choose layers. Raises what `quantize` raises, RecipeError
    for an unknown metric.
    """
    return analyze_as(model, Asked.of(locals()), scope, metric, patterns)


def analyze_as(
    model: str | Path | onnx.ModelProto,
    asked: Asked,
    scope: str = "linear",
    metric: str | None = None,
    patterns: Sequence[str] = (),
) -> Analysis:
    """`analyze`, with the arguments that it shares with `quantize` in one piece; raises the same."""
    known = METRICS.get(scope)
    if known is None:
        raise RecipeError(f"scope '{scope}' is unknown; use one of {', '.join(METRICS)}")
    metric = metric or known[0]
    if metric not in known:
        raise RecipeError(f"metric '{metric}' is unknown for scope '{scope}'; use one of {', '.join(known)}")
    job, data = open_job(model, replace(asked, hold_out=False))
    wanted = [Pattern.parse(text) for text in patterns]
    if odd := next((pattern.text for pattern in wanted if pattern.group is not None), None):
        raise RecipeError(f"--pattern '{odd}': groups choose in recipes; name the layers here")
    found = _by_spread(job, metric, wanted) if metric in SPREADS else _by_error(job, scope, metric, wanted)
    found.notes[:0] = data.notes
    if data.synthetic:
        found.notes.append(NO_DATA)
    return found


def _by_spread(job: Job, metric: str, patterns: Sequence[Pattern]) -> Analysis:
    notes: list[str] = []
    graph = float_graph(job, notes)
    layers = _chosen(find_linears(graph)[0], named_layers(job.source, job.recipe, graph), patterns)
    workspace = job.workspace(graph)
    probes = {layer.node: _spread_probe(layer) for layer in layers}
    stats = workspace.collect(probes.values())
    ranking = []
    for entry in entries_of(layers):
        stat = stats[probes[entry.name]]
        assert isinstance(stat, SpreadStats)
        score = stat.of(metric)
        if score is None:
            notes.append(f"{entry.name}: no finite, changing input was seen; not ranked")
        else:
            ranking.append(Ranked(entry.name, entry.nodes, entry.layers[0].op, score))
    ranking.sort(key=lambda ranked: -ranked.score)
    return Analysis("linear", metric, ranking, len(job.calibration), notes)


def _spread_probe(layer: Linear) -> Probe:
    return Probe(layer.activation_name, "spread", 1 if layer.op in ("Conv", "ConvTranspose") else -1)


def _chosen(
    layers: Sequence[Linear], named: Mapping[str, Layer], patterns: Sequence[Pattern]
) -> list[Linear]:
    """The layers that a pattern matches, all without patterns; RecipeError for a pattern that matches none."""
    for pattern in patterns:
        if not any(pattern.matches(named[layer.node]) for layer in layers):
            raise RecipeError(
                f"--pattern '{pattern.text}' matches no layer; {nearest(pattern, list(named.values()))}"
            )
    chosen = [la for la in layers if not patterns or any(p.matches(named[la.node]) for p in patterns)]
    if not chosen:
        raise GraphError("the model has no layer that can be quantized, so there is nothing to rank")
    return chosen


def _by_error(job: Job, scope: str, metric: str, patterns: Sequence[Pattern]) -> Analysis:
    planned = make_plan(job)
    every = [layer for layer, _ in planned.placement.layers.values()]
    layers = _chosen(every, planned.names, patterns)
    if scope == "linear":
        entries = entries_of(layers)
        samples = judging_samples(planned.workspace, len(entries))
        board = Switchboard(planned.workspace, planned.placement, planned.plan, samples)
        ranking = rank_by_sqnr(board, entries, job.listener)
    elif scope == "attn":
        return _by_attention(planned, layers, job.listener)
    else:
        blocks = [Entry(tuple(block)) for block in find_blocks(planned.workspace.model(), layers)]
        samples = judging_samples(planned.workspace, len(blocks))
        score = _model_wise if metric == "mse_model_wise" else _layer_wise
        ranking = score(planned, blocks, samples, job.listener)
    return Analysis(scope, metric, ranking, len(samples), planned.notes)


def _by_attention(planned: Planned, layers: Sequence[Linear], listener: Listener | None) -> Analysis:
    graph = planned.workspace.graph
    found, reasons = find_attention(graph)
    known = [layer.node for layer in layers]
    heads = {one.name: (one.output, nodes) for one in found if (nodes := _feeding(graph, one, known))}
    if not heads:
        why = next(iter(reasons.values()), "no Softmax between two products, and no attention operator")
        raise GraphError(f"no attention whose layers are quantized was found ({why}); use scope linear")
    samples = judging_samples(planned.workspace, len(heads))
    outputs = [output for output, _ in heads.values()]
    board = Switchboard(planned.workspace, planned.placement, planned.plan, samples, outputs)

    def one(name: str) -> Ranked:
        output, nodes = heads[name]
        error = board.values(nodes, [output])[output]
        return Ranked(name, nodes, "attention", error.noise / max(error.count, 1))

    return Analysis("attn", "mse", rank(list(heads), one, listener), len(samples), planned.notes)


def _feeding(graph: Graph, attention: Attention, layers: Sequence[str]) -> tuple[str, ...]:
    """Of ``layers`` those that make the attention's queries, keys and values: the next ones before it."""
    todo = [graph.tensor(entry.tensor) for entry in attention.entries.values()]
    seen: set[str] = set()
    met: set[str] = set()
    while todo:
        node = graph.producer(todo.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op in LINEAR_OPS and any(graph.is_constant(t) for t in node.inputs):
            met.add(node.name)
        elif node.op not in ("Shape", "Size"):  # how large the residual stream is does not make a query
            todo += [t for t in node.inputs if t.name and not graph.is_constant(t)]
    return tuple(name for name in layers if name in met)


def _model_wise(
    planned: Planned, blocks: Sequence[Entry], samples: Sequence[Sample], listener: Listener | None
) -> list[Ranked]:
    board = Switchboard(planned.workspace, planned.placement, planned.plan, samples)

    def one(block: Entry) -> Ranked:
        errors = [e for e in board.outputs(block.nodes) if e.is_float and e.count]
        return _block(block, float(np.mean([e.noise / e.count for e in errors])) if errors else 0.0)

    return rank(blocks, one, listener)


def _layer_wise(
    planned: Planned, blocks: Sequence[Entry], samples: Sequence[Sample], listener: Listener | None
) -> list[Ranked]:
    model, twins = add_twins(planned.workspace.model(), planned.plan)
    layers = [layer for block in blocks for layer in block.layers]
    names = list(dict.fromkeys(n for la in layers for n in (la.output_name, twins[la.node])))
    options = SessionOptions(threads=planned.workspace.threads, simulate=True)
    session = create_session(tap(model, names).SerializeToString(), model.weights, options=options)
    errors = {layer.node: OutputError(layer.output_name) for layer in layers}
    meter = Meter("ranking", len(samples), listener)
    for done, (sample, feed) in enumerate(samples, 1):
        values = dict(zip(names, run_session(session, names, feed, sample), strict=True))
        for layer in layers:
            errors[layer.node].add(values[layer.output_name], values[twins[layer.node]], str(sample))
        meter.at(done)
    means = {node: e.noise / max(e.count, 1) for node, e in errors.items()}
    ranking = [_block(block, float(np.mean([means[n] for n in block.nodes]))) for block in blocks]
    return sorted(ranking, key=lambda ranked: -ranked.score)


def _block(block: Entry, score: float) -> Ranked:
    ops = ", ".join(dict.fromkeys(layer.op for layer in block.layers))
    return Ranked(block.name, block.nodes, f"{len(block.layers)} {ops}", score)
