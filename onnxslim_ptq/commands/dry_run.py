"""``quantize --dry-run``: everything up to where values would be quantized, without running a sample or writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxslim_ptq.asked import Asked
from onnxslim_ptq.commands.console import emit_json, say, size
from onnxslim_ptq.commands.summary import cache_line, cpu_line, float_lines
from onnxslim_ptq.export.check import source_files
from onnxslim_ptq.export.files import AtomicFiles, output_paths
from onnxslim_ptq.job import Job, open_job
from onnxslim_ptq.pipeline import choices, float_graph
from onnxslim_ptq.resolution import named_layers
from onnxslim_ptq.steps import kv_cache
from onnxslim_ptq.steps.fusing import dry_placement
from onnxslim_ptq.steps.placement import Placement

__all__ = ["show_plan"]


@dataclass(frozen=True)
class _Plan:
    job: Job
    placement: Placement
    skipped: Mapping[str, str]
    notes: list[str]
    measured_on: str
    samples: int
    pasts: list[str]


def show_plan(model: Path, out: Path, asked: Asked, *, external: bool, as_json: bool, verbose: bool) -> None:
    """Print which layers would be quantized, which stay float and why, and the files that would be written."""
    plan = _plan(model, asked)
    paths = output_paths(out, model.stem, plan.job.recipe.quant_type)
    with AtomicFiles(paths, source_files(model)):
        pass  # OUT can be written and is no input
    large = external or plan.job.source.nbytes > 2**31
    files = [p for p in (paths.model, paths.data if large else None, paths.json) if p is not None]
    if as_json:
        emit_json(
            {
                "dry_run": True,
                "target": plan.job.target.name,
                "device": plan.job.device,
                "files": [str(p) for p in files],
                "layers": {"quantized": list(plan.placement.layers), "float": plan.skipped},
                "kv_cache": plan.pasts,
                "calibration_samples": plan.samples,
                "evaluation_samples": len(plan.job.evaluation),
                "measured_on": plan.measured_on,
                "reduce_range": plan.job.reduce_range,
                "notes": plan.notes,
                "exit_code": 0,
            }
        )
        return
    _say(plan, files, verbose)


def _plan(model: Path, asked: Asked) -> _Plan:
    job, data = open_job(model, asked)
    notes = data.notes
    graph = float_graph(job, notes)
    layers, skipped = choices(job, graph, named_layers(job.source, job.recipe, graph))
    workspace = job.workspace(graph)
    placement = dry_placement(workspace, layers)
    pasts = [pair.past for pair, _ in kv_cache.chosen(graph, job.recipe.caches, job.target)]
    floats = {**skipped, **placement.skipped}
    return _Plan(job, placement, floats, notes + graph.notes, data.measured_on, data.samples, pasts)


def _say(plan: _Plan, files: list[Path], verbose: bool) -> None:
    layers = [layer for layer, _ in plan.placement.layers.values()]
    kinds = ", ".join(f"{n} {op}" for op, n in Counter(layer.op for layer in layers).most_common())
    say("dry run: nothing was calibrated or written")
    say(f"model: {plan.job.source.name}, {size(plan.job.source.nbytes)}; target {plan.job.target.name}")
    say(
        f"layers: {len(layers)} would be quantized{f' ({kinds})' if kinds else ''}, {len(plan.skipped)} float"
    )
    if verbose:
        for layer in layers:
            say(f"  {layer.node}: {layer.op}, weight {layer.weight_name}")
    for line in [*float_lines(plan.skipped, verbose), *cache_line(plan.pasts, plan.job.recipe)]:
        say(line)
    say(
        f"ranges: of {len(plan.placement.tensors)} tensors, from {plan.samples} samples"
        + (" of synthetic data" if plan.measured_on == "synthetic" else "")
        + f"; result measured on {len(plan.job.evaluation)} ({plan.measured_on})"
    )
    say(cpu_line(plan.job.reduce_range))
    for text in plan.notes:
        say(f"note: {text}")
    say(f"would write: {', '.join(map(str, files))}")
    if not layers and not plan.pasts:
        say("nothing can be quantized: quantize would end with exit code 2")
