"""Exact simplifications of the float graph, run to a fixpoint before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection

from onnxslim_ptq.graph.forms import APPROXIMATE, EXACT
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.optimize.affine import fold_affine
from onnxslim_ptq.graph.optimize.batchnorm import fold_batchnorm
from onnxslim_ptq.graph.optimize.constants import fold_constants
from onnxslim_ptq.graph.optimize.gemm import normalize_gemm
from onnxslim_ptq.graph.optimize.hard_sigmoid import form_hard_sigmoid
from onnxslim_ptq.graph.optimize.pad import fold_pad

__all__ = ["ALL", "PASSES", "optimize"]

PASSES: dict[str, Callable[[Graph], int]] = {
    "constants": fold_constants,
    "batchnorm": fold_batchnorm,
    "affine": fold_affine,
    "gemm": normalize_gemm,
    "hard_sigmoid": form_hard_sigmoid,
    "pad": fold_pad,
}


# What can be named; nothing but `PASSES` runs unasked.
ALL = {**PASSES, **EXACT, **APPROXIMATE}


def optimize(graph: Graph, names: Collection[str] | None = None) -> dict[str, int]:
    """Apply passes until none changes anything: those of `PASSES`, or those that are named, of `graph.forms` too.

    Returns how often each one acted.
    """
    passes = {name: run for name, run in ALL.items() if name in (PASSES if names is None else names)}
    counts = dict.fromkeys(passes, 0)
    while True:
        changed = {name: run(graph) for name, run in passes.items()}
        if not any(changed.values()):
            return counts
        for name, count in changed.items():
            counts[name] += count
