"""GPTQ: column by column, each rounding error is made up for by the columns not rounded yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from calib.ranges.grid import require_between
from calib.types import Range
from onnxslim_ptq.core.qmath import params_from_range
from onnxslim_ptq.core.rounding import Floats, Rounded, Rounder, Task
from onnxslim_ptq.core.spec import PerChannel, PerGroup
from onnxslim_ptq.rounders.clip import RATIOS, clipped
from onnxslim_ptq.rounders.descent import inverse_factor, order_of, ordered, successive
from onnxslim_ptq.rounders.numbers import damped, require_whole, spread

__all__ = ["Gptq"]


@dataclass(frozen=True)
class Gptq(Rounder):
    """min tr((W - Ŵ) G (W - Ŵ)ᵀ), greedily: see `successive`; G + damping * mean(diag G) I in place of G.

    ``act_order``: columns in order of falling diag(G). Scales: those of the extremes, or with ``clip`` those of the
    rounder ``clip``. Without ``static_groups`` (and without ``act_order`` and ``clip``) a group's scale comes from
    its columns as they are when the first of them is reached. ValueError unless 1 <= block <= 65536 and
    0 <= damping <= 1. Time: in² · out.
    Source: E. Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
    ICLR 2023; static groups and order: MindSpore Golden Stick's GPTQQuantConfig.
    """

    block: int = 128
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    clip: bool = False

    name: ClassVar[str] = "gptq"
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_whole("block", self.block, 1, 65536)
        require_between("damping", self.damping, 0, 1)

    def round(self, task: Task) -> Rounded:
        size = task.weight.shape[1]
        gram = damped(task, self.damping)
        order = order_of(gram) if self.act_order else np.arange(size)
        factor = inverse_factor(ordered(gram, order))
        start = clipped(task, RATIOS) if self.clip else task.start
        grain, block = start.spec.grain, self.block
        groups = None
        if isinstance(grain, PerGroup) and not (self.act_order or self.static_groups or self.clip):
            groups = _Groups(task, grain.size)
            block = (
                max(block // grain.size, 1) * grain.size
            )  # a group's columns must be up to date at its start
        scale, zero = (np.ascontiguousarray(v.T[order]) for v in spread(start, task.weight.shape))
        columns = np.ascontiguousarray(task.weight.T[order], np.float64)
        low, high = (np.full((size, 1), float(v)) for v in task.limits)

        def numbers(j: int, now: Floats) -> tuple[Floats, Floats]:
            return (scale[j], zero[j]) if groups is None else groups.of(j, now)

        found = np.empty(columns.shape)
        found[order] = successive(columns, factor, numbers, low, high, block)
        if groups is not None:
            start = replace(start, scale=groups.scale, zero_point=groups.zero.astype(np.int64))
        return Rounded(np.ascontiguousarray(found.T).astype(start.spec.dtype.dtype), start)


class _Groups:
    """Scales found on the way: of each group when its first column is reached."""

    def __init__(self, task: Task, size: int) -> None:
        self.size = size
        self.spec = replace(task.start.spec, grain=PerChannel(0))
        low, high = task.limits
        every = self.spec.full_range and (low, high) == (self.spec.dtype.lowest, self.spec.dtype.highest)
        self.codes = (high - low) // 2 if self.spec.symmetric and not every else None
        self.scale, self.zero = task.start.scale.copy(), task.start.zero_point.astype(np.float64)

    def of(self, j: int, columns: Floats) -> tuple[Floats, Floats]:
        group = j // self.size
        if j % self.size == 0:
            part = columns[j : j + self.size]
            params = params_from_range(Range(part.min(axis=0), part.max(axis=0)), self.spec, codes=self.codes)
            self.scale[:, group], self.zero[:, group] = params.scale, params.zero_point
        return self.scale[:, group], self.zero[:, group]
