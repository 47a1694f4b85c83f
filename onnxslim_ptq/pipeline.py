"""The main job: recipe in, verified quantized model out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from calib.blocks.memory import release_memory
from calib.blocks.spool import Spool
from calib.errors import CalibrationError, GraphError
from calib.model import Model
from calib.stats import HistogramStats, MinMaxStats
from calib.types import Probe, Stats
from onnxslim_ptq.analysis.verify import Verification, verify
from onnxslim_ptq.core.choice import LayerChoice
from onnxslim_ptq.core.match import Layer
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.core.targets import BiasForm
from onnxslim_ptq.errors import VerificationError
from onnxslim_ptq.export.fusion import guard_float_layers
from onnxslim_ptq.export.renderers import RENDERERS
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear, find_linears
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.precision import already_quantized
from onnxslim_ptq.job import Job
from onnxslim_ptq.resolution import choice_of, named_layers, resolve, unquantizable
from onnxslim_ptq.steps import attention, kv_cache, quantize
from onnxslim_ptq.steps.fusing import dry_placement, leave_float, unfused_layers
from onnxslim_ptq.steps.placement import Placement, place
from onnxslim_ptq.steps.run_smoothing import run_smoothing, smoothing_notes
from onnxslim_ptq.steps.smoothing import Smoothed, SmoothingConfig
from onnxslim_ptq.workspace import Workspace

__all__ = ["Outcome", "Planned", "choices", "float_graph", "make_plan", "run"]


@dataclass
class Outcome:
    """The verified result: the rendered model, the float graph it came from, the plan and the measurements.

    ``rescaled``: the float model after smoothing, whose values mean what the quantized model's of that name mean; None
    where nothing was smoothed."""

    quantized: Model
    graph: Graph
    plan: QuantPlan
    verification: Verification
    notes: list[str] = field(default_factory=list)
    smoothing: list[Smoothed] = field(default_factory=list)
    rescaled: Model | None = None


@dataclass
class Planned:
    """The plan before anything is rendered; ``needs_layers``: an empty plan is an error; not when every
    layer lies in a subgraph, or the recipe is about the KV cache alone."""

    workspace: Workspace
    placement: Placement
    plan: QuantPlan
    skipped: dict[str, str]
    notes: list[str]
    needs_layers: bool
    smoothed: list[Smoothed]
    rescaled: Model | None
    names: Mapping[str, Layer]


@contextmanager
def _with_spool(job: Job) -> Iterator[Job]:
    """The job as it is, or with a place on the disk for its tensors when it runs block after block."""
    if job.gathering.blockwise is None or job.spool is not None:
        yield job
    else:
        with Spool(job.gathering.blockwise.folder) as spool:
            yield replace(job, spool=spool)


def make_plan(job: Job) -> Planned:
    """Everything that needs statistics; raises GraphError, RecipeError, CalibrationError or DeviceError."""
    with _with_spool(job) as spooled:
        return _make_plan(spooled)


def _make_plan(job: Job) -> Planned:
    notes: list[str] = []
    graph = float_graph(job, notes)
    named = named_layers(job.source, job.recipe, graph)
    layers, skipped = choices(job, graph, named)
    workspace = job.workspace(graph)
    placement = dry_placement(workspace, layers)
    # A model that keeps everything in subgraphs is passed on in float, and says so: pipelines of many models go on.
    caches = kv_cache.chosen(graph, job.recipe.caches, job.target)
    attention.chosen(graph, job.recipe.attentions, job.target)  # refuses before the long work
    inside = not layers and any(graph.has_subgraph(n) for n in graph.nodes)
    needs_layers = not inside and job.recipe.layers
    if inside and job.recipe.layers:
        notes.append(
            "every layer lies inside a subgraph (If, Loop, Scan): the written model computes in float"
        )
    elif needs_layers:
        _require_layers(job, placement.layers, {**skipped, **placement.skipped})
    smoothing = _smoothing(job, notes)
    layers, placement, smoothed = run_smoothing(workspace, smoothing, named, layers, placement)
    notes += smoothing_notes(smoothing, smoothed)
    entering = attention.chosen(graph, job.recipe.attentions, job.target)
    others = [*kv_cache.probes(caches), *attention.probes(entering)]
    workspace.collect([*quantize.probes(workspace, placement), *others])  # in one sweep
    placement, stats = _statistics(job, workspace, placement, layers, notes)
    if needs_layers:
        _require_layers(job, placement.layers, {**skipped, **placement.skipped})
    beside = workspace.collect(others)  # before biases are corrected, which changes the graph
    # Not block-wise: layers are not compared there, for want of memory.
    rescaled = workspace.model() if smoothed and job.spool is None else None
    plan = quantize.apply(workspace, placement, stats)
    plan.io = kv_cache.apply(caches, beside)
    attention.apply(entering, beside, plan)
    workspace.memo.clear()  # histograms are no longer needed
    return Planned(workspace, placement, plan, skipped, notes, needs_layers, smoothed, rescaled, named)


def _smoothing(job: Job, notes: list[str]) -> list[SmoothingConfig]:
    steps = [step for step in job.recipe.steps if isinstance(step, SmoothingConfig)]
    if job.spool is None or all(step.type != "auto_smooth" for step in steps):
        return steps
    notes.append(
        "auto_smooth was left out: it runs the whole model, which is larger than the memory (block-wise); "
        "name the smoothing in the recipe, as w8a8-smoothquant does"
    )
    return [step for step in steps if step.type != "auto_smooth"]


def run(job: Job) -> Outcome:
    """Quantize and verify; raises what `make_plan` raises, and VerificationError."""
    with _with_spool(job) as spooled:
        return _run(spooled)


def _run(job: Job) -> Outcome:
    planned = make_plan(job)
    workspace, placement, plan = planned.workspace, planned.placement, planned.plan
    graph, skipped, notes = workspace.graph, planned.skipped, planned.notes
    quantized = _rendered(job, workspace, placement, plan)
    plan.skipped = {**skipped, **placement.skipped, **plan.skipped}
    if planned.needs_layers:
        _require_layers(job, plan.weights, plan.skipped)
    notes += graph.notes + plan.notes
    release_memory()
    renderer = RENDERERS[job.target.exporter]
    verification = verify(
        job.source,
        renderer.runnable(quantized),
        job.evaluation,
        threads=job.threads,
        foreign=job.target.bias is BiasForm.FLOAT,
        listener=job.listener,
        spool=job.spool,
        twin=renderer.twin(workspace.model(), plan, job.target),
    )
    _require(job, verification)
    notes += verification.warnings
    return Outcome(quantized, graph, plan, verification, notes, planned.smoothed, planned.rescaled)


def _require_layers(job: Job, layers: Collection[object], skipped: Mapping[str, str]) -> None:
    if not layers:
        why = next(iter(skipped.items()), None)
        hint = f" (first: '{why[0]}': {why[1]})" if why else ""
        raise GraphError(f"{job.source.name}: no layer can be quantized{hint}; nothing was written")


def float_graph(job: Job, notes: list[str]) -> Graph:
    """The graph that is quantized: opset raised, simplified; GraphError for a model that is quantized already."""
    integer = already_quantized(job.source)
    if integer and not job.allow_quantized:
        raise GraphError(
            f"{job.source.name} is already quantized (node '{integer[0]}' and {len(integer) - 1} more); "
            "give the float model, or --allow-quantized to quantize only its float part"
        )
    before = Graph(job.source).opset
    model = raise_opset(job.source, PER_CHANNEL_OPSET)
    graph = Graph(model, job.spool.keep if job.spool is not None else None)
    if graph.opset != before:
        notes.append(f"opset raised from {before} to {graph.opset}: per-channel weight scales need it")
    folded = {name: n for name, n in optimize(graph, job.recipe.passes).items() if n}
    if folded:
        notes.append("float graph simplified: " + ", ".join(f"{n} {name}" for name, n in folded.items()))
    return graph


def choices(
    job: Job, graph: Graph, named: Mapping[str, Layer]
) -> tuple[dict[str, tuple[Linear, LayerChoice]], dict[str, str]]:
    """What the recipe says of each layer it quantizes, and why the others stay float; ``named``: `named_layers`."""
    linears, reasons = find_linears(graph)
    resolution = resolve(job.recipe, list(named.values()), unquantizable(job.source, graph, reasons))
    chosen = {
        lin.node: (lin, choice_of(resolution.configs[lin.node], job.target))
        for lin in linears
        if lin.node in resolution.configs
    }
    return chosen, {**reasons, **resolution.skipped}


def _statistics(
    job: Job,
    workspace: Workspace,
    placement: Placement,
    layers: Mapping[str, tuple[Linear, LayerChoice]],
    notes: list[str],
) -> tuple[Placement, dict[Probe, Stats]]:
    stats = workspace.collect(quantize.probes(workspace, placement))
    bad = {p.tensor: e for p, s in stats.items() if (e := _extent(s)) is not None and e.nan + e.inf}
    if not bad or job.nan == "ignore":
        notes += [f"tensor '{t}': {_health(e)}; ignored" for t, e in bad.items()]
        return placement, stats
    tensor, extent = next(iter(bad.items()))
    if job.nan == "error":
        raise CalibrationError(
            f"tensor '{tensor}': {_health(extent)}; fix the sample, or use --nan ignore or exclude-layer"
        )
    floats = dict(placement.skipped)
    for placed in placement.tensors.values():
        if placed.tensor in bad:
            floats |= {lin.node: f"its output '{placed.tensor}' has NaN or Inf" for lin in placed.producers}
            floats |= {lin.node: f"its input '{placed.tensor}' has NaN or Inf" for lin in placed.readers}
    again = place(workspace.graph, layers, workspace.target, placement.output_q, floats)
    return again, {**stats, **workspace.collect(quantize.probes(workspace, again))}


def _extent(stat: Stats) -> MinMaxStats | None:
    return (
        stat if isinstance(stat, MinMaxStats) else stat.extent if isinstance(stat, HistogramStats) else None
    )


def _health(extent: MinMaxStats) -> str:
    where = extent.first_bad[1] or f"sample {extent.first_bad[0]}" if extent.first_bad else "a sample"
    return f"{extent.nan} NaN and {extent.inf} Inf values, first in {where}"


def _rendered(job: Job, workspace: Workspace, placement: Placement, plan: QuantPlan) -> Model:
    """Render; a weight that ONNX Runtime would still dequantize at every run leaves the plan, with that reason."""
    while job.target.optimizes_here:
        slow = unfused_layers(workspace, plan)
        if not slow:
            break
        for name in [use.node for use in plan.weights if use.node in slow]:  # in graph order
            leave_float(plan, placement, workspace.graph, name)
    rendered = RENDERERS[job.target.exporter].render(workspace.model(), plan, job.target)
    return guard_float_layers(rendered) if job.target.optimizes_here else rendered


def _require(job: Job, verification: Verification) -> None:
    sqnr = verification.sqnr
    if sqnr is not None and job.min_sqnr > 0 and sqnr < job.min_sqnr:
        worst = min((e for e in verification.outputs if e.sqnr is not None), key=lambda e: e.sqnr or 0.0)
        raise VerificationError(
            f"output '{worst.name}' reaches {sqnr:.1f} dB SQNR, below --min-sqnr {job.min_sqnr:g}; "
            "calibrate with representative samples, exclude sensitive layers, or lower --min-sqnr"
        )
