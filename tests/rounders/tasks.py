"""Weight matrices to be rounded, with correlated inputs, for every grain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxslim_ptq.core.dtypes import INT4, INT8, UINT4, IntType
from onnxslim_ptq.core.qmath import dequantize, grain_range, params_from_range
from onnxslim_ptq.core.rounding import Rounded, Task
from onnxslim_ptq.core.spec import Grain, PerChannel, PerGroup, PerTensor, QuantSpec

__all__ = ["FORMS", "Form", "error_of", "make"]


@dataclass(frozen=True)
class Form:
    dtype: IntType
    grain: Grain
    symmetric: bool

    def __str__(self) -> str:
        kind = type(self.grain).__name__
        return f"{self.dtype}-{kind}-{'symmetric' if self.symmetric else 'asymmetric'}"


FORMS = [
    Form(INT8, PerChannel(0), True),
    Form(INT8, PerTensor(), True),
    Form(INT4, PerGroup(1, 8), True),
    Form(UINT4, PerGroup(1, 8), False),
    Form(INT4, PerChannel(0), True),
]


def make(form: Form, outputs: int = 12, inputs: int = 24, seed: int = 0, rows: int = 200) -> Task:
    """A random weight, and the Gram matrix of inputs that are correlated and have means far from zero."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((outputs, inputs)) * rng.uniform(0.2, 3, (outputs, 1))).astype(np.float32)
    x = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs)) + rng.uniform(
        0, 3, inputs
    )
    spec = QuantSpec(form.dtype, form.grain, form.symmetric)
    start = params_from_range(grain_range(weight, form.grain), spec)
    limits = (-127, 127) if form.dtype is INT8 else (form.dtype.lowest, form.dtype.highest)
    return Task(weight, start, limits, x.T @ x)


def error_of(task: Task, rounded: Rounded) -> float:
    """tr(E G Eᵀ), from the definition."""
    change = task.weight.astype(np.float64) - dequantize(rounded.codes, rounded.params)
    assert task.gram is not None
    return float(np.trace(change @ task.gram @ change.T))
