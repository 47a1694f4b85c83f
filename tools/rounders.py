"""Compares rounders on zoo models: python -m tools.rounders cls rec [--rounder gptq …] [--samples 100].

For each model and rounder: SQNR of the worst output over evaluation samples, of the written model and of the float
model with the rounded weights (and corrected biases) alone, as rows of a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from calib.model import Model, open_model
from calib.provider import create_session
from onnxslim_ptq import quantize
from onnxslim_ptq.analysis.metrics import OutputError
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.rounders import ROUNDERS
from tools import zoo

Outputs = list[list[np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounder", action="append", choices=sorted(ROUNDERS))
    parser.add_argument("--samples", type=int, default=100, help="evaluation samples at most")
    arguments = parser.parse_args()
    print("| model | rounder | layer outputs dB | weights alone dB | all dB |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name in arguments.models:
        case = zoo.load(name)
        feeds = [dict(case.evaluation[i]) for i in range(min(len(case.evaluation), arguments.samples))]
        exact = outputs(open_model(case.model), feeds)
        for rounder in arguments.rounder or ["rtn", "squant", "gptq", "adaround", "admm"]:
            print("| " + " | ".join([name, rounder, *row(case, rounder, feeds, exact)]) + " |", flush=True)


def row(case: Any, rounder: str, feeds: Sequence[dict[str, np.ndarray]], exact: Outputs) -> list[str]:
    recipe = {"steps": [{"type": "quantize", "rounder": {"type": rounder}}]}
    result = quantize(case.model, recipe, list(case.calibration), min_sqnr=0)
    layer = [c.error[1] for c in result.plan.weight_codes.values() if c.error is not None and c.error[1] > 0]
    written = sqnr(exact, outputs(open_model(result.model), feeds))
    weights = sqnr(exact, outputs(rounded(result.graph, result.plan), feeds))
    found = f"{10 * np.log10(layer).mean():.1f}" if layer else ""
    return [found, f"{weights:.1f}", f"{written:.1f}"]


def rounded(graph: Graph, plan: QuantPlan) -> Model:
    """The float model with every weight as its codes represent it."""
    for use, slot in plan.weights.items():
        codes = plan.weight_codes[slot.params]
        tensor = graph.node(use.node).inputs[use.port]
        old = graph.value(tensor)
        assert old is not None
        graph.set_value(tensor, dequantize(codes.codes, codes.params).astype(old.dtype))
    return graph.to_model()


def outputs(model: Model, feeds: Sequence[dict[str, np.ndarray]]) -> Outputs:
    session = create_session(model.proto.SerializeToString(), model.weights)
    return [session.run(None, feed) for feed in feeds]


def sqnr(exact: Outputs, found: Outputs) -> float:
    errors = [OutputError(str(i)) for i in range(len(exact[0]))]
    for sample, other in zip(exact, found, strict=True):
        for error, y, z in zip(errors, sample, other, strict=True):
            error.add(y, z, "sample")
    return min(e.sqnr for e in errors if e.sqnr is not None)


if __name__ == "__main__":
    main()
