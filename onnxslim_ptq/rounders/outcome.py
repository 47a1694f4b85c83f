"""Runs a rounder on a weight matrix and keeps whatever rtn did better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxslim_ptq.core.rounding import Rounded, Rounder, Task
from onnxslim_ptq.core.spec import PerTensor, QParams
from onnxslim_ptq.rounders.numbers import values_of
from onnxslim_ptq.rounders.rtn import Rtn

__all__ = ["Outcome", "never_worse"]

_ELEMENTS = 1 << 22  # of a weight that is worked on at a time


@dataclass(frozen=True)
class Outcome:
    """The codes, and the squared output errors tr(E G Eᵀ) of rtn and of them beside tr(W G Wᵀ); ``kept``: rows that
    stayed with rtn because the rounder was worse there."""

    rounded: Rounded
    before: float
    after: float
    signal: float
    kept: int


def never_worse(rounder: Rounder, task: Task) -> Outcome:
    """The rounder's codes where their error is smaller than rtn's, row by row (as a whole where all share a changed
    scale); without a Gram matrix the error is that of the weight itself.

    Rows do not depend on each other unless they share a scale, so a tall matrix is worked on in pieces.
    """
    if isinstance(task.start.spec.grain, PerTensor):
        return _better(rounder, task)
    rows = max(1, _ELEMENTS // max(task.weight.shape[1], 1))
    pieces = [_better(rounder, _rows(task, slice(i, i + rows))) for i in range(0, len(task.weight), rows)]
    if len(pieces) == 1:
        return pieces[0]
    params = replace(
        task.start,
        scale=np.concatenate([p.rounded.params.scale for p in pieces]),
        zero_point=np.concatenate([p.rounded.params.zero_point for p in pieces]),
    )
    rounded = Rounded(np.concatenate([p.rounded.codes for p in pieces]), params)
    return Outcome(
        rounded,
        sum(p.before for p in pieces),
        sum(p.after for p in pieces),
        sum(p.signal for p in pieces),
        sum(p.kept for p in pieces),
    )


def _rows(task: Task, part: slice) -> Task:
    start = replace(task.start, scale=task.start.scale[part], zero_point=task.start.zero_point[part])
    gram = task.gram[part] if task.gram is not None and task.gram.ndim == 3 else task.gram
    return replace(task, weight=task.weight[part], start=start, gram=gram)


def _better(rounder: Rounder, task: Task) -> Outcome:
    weight = task.weight.astype(np.float64)
    plain = Rtn().round(task)
    signal = float(rounder.errors(task, weight).sum())
    before = rounder.errors(task, weight - values_of(plain))
    if isinstance(rounder, Rtn):
        return Outcome(plain, float(before.sum()), float(before.sum()), signal, 0)
    found = rounder.round(task)
    after = rounder.errors(task, weight - values_of(found))
    worse = ~(after <= before)
    if task.start.spec.grain == PerTensor() and not np.array_equal(found.params.scale, task.start.scale):
        worse[:] = not after.sum() <= before.sum()
        if worse.any():
            return Outcome(plain, float(before.sum()), float(before.sum()), signal, len(worse))
    codes = np.where(worse[:, None], plain.codes, found.codes)
    params = _mixed(found.params, task.start, worse)
    after = np.where(worse, before, after)
    return Outcome(Rounded(codes, params), float(before.sum()), float(after.sum()), signal, int(worse.sum()))


def _mixed(found: QParams, start: QParams, worse: Any) -> QParams:
    if not worse.any() or not found.scale.ndim:
        return found
    rows = worse.reshape(-1, *[1] * (found.scale.ndim - 1))
    return replace(
        found,
        scale=np.where(rows, start.scale, found.scale),
        zero_point=np.where(rows, start.zero_point, found.zero_point),
    )
