"""Chooses the codes of weights with the recipe's rounders, a bounded number of Gram matrices at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calib.stats import GramStats
from calib.stats.gram import gram_bytes
from calib.sweep.lanes import in_lanes
from calib.types import Probe
from onnxslim_ptq.core.choice import LayerChoice
from onnxslim_ptq.core.rounding import Floats, Rounder, Task
from onnxslim_ptq.core.spec import PerTensor, QParams, QuantPlan, WeightCodes
from onnxslim_ptq.graph.linears import Linear
from onnxslim_ptq.graph.matrix import Matrices, matrices_of
from onnxslim_ptq.rounders import Outcome, Rtn, never_worse
from onnxslim_ptq.steps.weights import correctable, float_weight, start_numbers
from onnxslim_ptq.workspace import Workspace

__all__ = ["round_weights", "shrunk"]

_BUDGET = 512 * 2**20  # bytes of statistics gathered in one sweep
_LANES = 2  # weights rounded at once; each takes several times its own size while it is
_SHRINK = 0.3
_ROW_GRAMS = 1 << 22  # elements of the Gram matrices that rows of a task may have of their own


@dataclass(frozen=True)
class _Job:
    """One weight, the layers that read it, and how it reads as matrices."""

    key: str
    readers: tuple[Linear, ...]
    choice: LayerChoice
    rounder: Rounder
    matrices: Matrices

    @property
    def probes(self) -> list[Probe]:
        if not self.rounder.needs_gram:
            return []
        probe = self.matrices.probe
        return list(dict.fromkeys(replace(probe, tensor=layer.activation_name) for layer in self.readers))

    def gram_bytes(self) -> int:
        taps = self.matrices.window if self.readers[0].op == "ConvTranspose" else 1
        return gram_bytes(self.matrices.inputs // taps, self.matrices.groups)


def round_weights(
    workspace: Workspace, plan: QuantPlan, layers: Mapping[str, tuple[Linear, LayerChoice]]
) -> None:
    """Add the codes of every weight whose choice names a rounder other than rtn, and a note of what that gained.

    Statistics of the float graph are gathered for as many weights at once as fit the budget, and freed again. Where
    the bias takes out the mean error anyway (see `correct_biases`), the Gram matrix is that of x - E[x].
    """
    jobs, refused = _jobs(workspace, plan, layers)
    gains: dict[str, list[Outcome]] = defaultdict(list)
    for chunk in _chunks(jobs):
        probes = list(dict.fromkeys(probe for job in chunk for probe in job.probes))
        stats = workspace.collect(probes) if probes else {}
        ready = []
        for job in chunk:
            seen = [s for p in job.probes if isinstance(s := stats[p], GramStats) and s.rows]
            if job.rounder.needs_gram and not seen:
                refused["its input had no finite value"].append(job.readers[0].node)
            else:
                ready.append((job, seen))
        # Side by side: much of a rounder is numpy calls too small for a BLAS with threads of its own.
        for (job, _), (outcomes, codes) in zip(
            ready, in_lanes(ready, lambda pair: _round(workspace, plan, *pair), _LANES), strict=True
        ):
            plan.weight_codes[job.key] = codes
            gains[job.rounder.name].append(_total(outcomes))
        workspace.forget(probes)
    plan.notes += [_summary(name, found) for name, found in gains.items()]
    plan.notes += [
        f"{len(nodes)} weights were rounded to nearest: {why} ({', '.join(nodes[:3])})"
        for why, nodes in refused.items()
    ]


def _jobs(
    workspace: Workspace, plan: QuantPlan, layers: Mapping[str, tuple[Linear, LayerChoice]]
) -> tuple[list[_Job], dict[str, list[str]]]:
    """What is to be rounded; and, by reason, the nodes whose weight has to be rounded to nearest."""
    readers: dict[str, list[str]] = defaultdict(list)
    for use, slot in plan.weights.items():
        readers[slot.params].append(use.node)
    jobs, refused = [], defaultdict(list)
    specs = {slot.params: slot.spec for slot in plan.weights.values()}
    for key, nodes in readers.items():
        layer, choice = layers[nodes[0]]
        if choice.rounder is None or isinstance(choice.rounder, Rtn):
            continue
        found = matrices_of(workspace.graph, layer)
        if isinstance(found, str):
            refused[found].append(layer.node)
            continue
        if workspace.synthetic and choice.rounder.needs_gram:
            refused["there is no calibration data"].append(layer.node)
            continue
        job = _Job(key, tuple(layers[n][0] for n in nodes), choice, choice.rounder, found)
        if found.groups > 1 and isinstance(specs[key].grain, PerTensor):
            refused["one scale for all groups of a Conv"].append(layer.node)
        elif job.rounder.needs_gram and job.gram_bytes() > _BUDGET:
            size = f"{job.gram_bytes() / 2**20:.0f} MB, above {_BUDGET / 2**20:.0f}"
            refused[f"the Gram matrix of its inputs takes {size}"].append(layer.node)
        else:
            jobs.append(job)
    return jobs, refused


def _chunks(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """The jobs in graph order, cut where the statistics of a sweep would exceed the budget."""
    chunk: list[_Job] = []
    known: set[Probe] = set()
    used = 0
    for job in jobs:
        new = [p for p in job.probes if p not in known]
        if chunk and used + len(new) * job.gram_bytes() > _BUDGET:
            yield chunk
            chunk, known, used, new = [], set(), 0, job.probes
        chunk.append(job)
        known.update(new)
        used += len(new) * job.gram_bytes()
    if chunk:
        yield chunk


def _round(
    workspace: Workspace, plan: QuantPlan, job: _Job, seen: Sequence[GramStats]
) -> tuple[list[Outcome], WeightCodes]:
    graph, layer = workspace.graph, job.readers[0]
    spec = next(slot.spec for slot in plan.weights.values() if slot.params == job.key)
    weight = float_weight(graph, layer)
    start, limits = start_numbers(weight, spec, workspace.reduce_range)
    centred = job.choice.bias_correction and all(correctable(graph, reader) for reader in job.readers)
    grams: Floats | None = None
    if seen:
        grams = job.matrices.gram(sum((s.centred if centred else s.gram for s in seen), np.zeros(())))
        grams = shrunk(grams, sum(s.rows for s in seen))
    tasks = _tasks(job.matrices, weight, start, limits, grams)
    outcomes = [never_worse(job.rounder, task) for task in tasks]
    codes = job.matrices.join(np.concatenate([o.rounded.codes for o in outcomes]))
    params = job.matrices.joined([o.rounded.params for o in outcomes], start)
    total = _total(outcomes)
    error = (_share(total, False), _share(total, True))
    return outcomes, WeightCodes(codes, params, job.rounder.name, layer.weight_name, error=error)


def shrunk(grams: Floats, rows: int) -> Floats:
    """G + 0.3 (in / rows) mean(diag G) I, for each G of ``grams`` [groups, in, in].

    A Gram matrix of few rows shows correlations that other inputs will not have; making use of them is worse than
    rounding to nearest (measured on normal inputs with power-law spectra, rows from 0.1 to 30 times in: at worst 0.5 dB
    worse instead of 2.7 dB, and at least as good where the matrix is well known).
    """
    size = grams.shape[-1]
    level = np.diagonal(grams, axis1=-2, axis2=-1).mean(axis=-1)
    return np.asarray(grams + (_SHRINK * size / rows * level)[:, None, None] * np.eye(size))


def _tasks(
    matrices: Matrices,
    weight: NDArray[np.float32],
    start: QParams,
    limits: tuple[int, int],
    grams: Floats | None,
) -> list[Task]:
    """One task per group; small groups (depthwise) become one task whose rows have Gram matrices of their own."""
    parts, window = matrices.split(weight), matrices.window
    groups, rows, size = parts.shape
    if groups > 1 and groups * rows * size * size <= _ROW_GRAMS:
        (numbers,) = replace(matrices, groups=1).numbers(start)
        own = None if grams is None else grams.repeat(rows, axis=0)
        return [Task(parts.reshape(-1, size), numbers, limits, own, window)]
    each = zip(parts, matrices.numbers(start), strict=True)
    return [
        Task(part, numbers, limits, None if grams is None else grams[i], window)
        for i, (part, numbers) in enumerate(each)
    ]


def _total(outcomes: Sequence[Outcome]) -> Outcome:
    def summed(values: Iterable[float]) -> float:
        return float(np.sum(list(values)))

    return replace(
        outcomes[0],
        before=summed(o.before for o in outcomes),
        after=summed(o.after for o in outcomes),
        signal=summed(o.signal for o in outcomes),
        kept=sum(o.kept for o in outcomes),
    )


def _share(outcome: Outcome, after: bool) -> float:
    """The relative squared output error: of rtn, or of the codes that were chosen."""
    error = outcome.after if after else outcome.before
    return error / outcome.signal if outcome.signal > 0 else 0.0


def _summary(name: str, found: Sequence[Outcome]) -> str:
    """One line: the output errors of the weights alone, geometric means over the layers."""
    known = [(o.before / o.signal, o.after / o.signal) for o in found if o.after > 0]
    if not known:
        return f"rounder {name}: {len(found)} weights, exact with rounding to nearest"
    before, after = (10 * np.log10(np.asarray(side)).mean() for side in zip(*known, strict=True))
    return (
        f"rounder {name}: {len(found)} weights, error of the layer outputs {before:.1f} dB rounded to nearest, "
        f"{after:.1f} dB now"
    )
